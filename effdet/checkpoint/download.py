"""Fetch published weights into torch.hub's cache: from mirrors, then from their own address.

Lives here: addresses and the cache. What the files hold is read by `io.py`; whose weights they are is said elsewhere.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import sys
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch

from effdet.runtime import progress

from .io import CheckpointError, replacing

_logger = logging.getLogger(__name__)

MIRRORS = "EFFDET_MIRRORS"
"""Environment variable: addresses, parted by spaces; each is asked for NAME (a folder), then for the URL (a proxy)."""

CHECK_HASH = "EFFDET_CHECK_HASH"
"""Environment variable: 0 takes files of the cache as they are."""

# Source: torch.hub's naming, NAME-HASH.EXT, where HASH is the start of the file's SHA-256.
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.")
_PATIENCE_S = 10.0


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_hash(path: Path) -> None:
    """Compare a file with the hash in its name, where it has one.

    Raises:
        CheckpointError: they differ: it was put there by hand, or is an interrupted copy.
    """
    if os.environ.get(CHECK_HASH) != "0" and not _has_its_hash(path, path.name):
        raise CheckpointError(
            f"{path} does not have the SHA-256 its name promises. Delete it and try again; or, if it is meant to be "
            f"another file, give its path instead of pretrained=True, or set the environment variable {CHECK_HASH}=0."
        )


def _has_its_hash(path: Path, name: str) -> bool:
    match = _HASH_IN_NAME.search(name)
    return match is None or sha256(path).startswith(match[1])


def cache_path(url: str) -> Path:
    """Return where torch.hub keeps the file of an address, whether it is there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(unquote(urlsplit(url).path))


def open_url(url: str) -> http.client.HTTPResponse:
    """Ask for a file; a machine without a network is told so within seconds.

    Raises:
        OSError: there is no answer, or the answer is an error.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "effdet"})
    try:
        return urllib.request.urlopen(request, timeout=_PATIENCE_S)
    except (http.client.HTTPException, ValueError) as error:  # ValueError: not an address
        raise OSError(error) from error


def fetch(url: str) -> Path:
    """Return the cached file of an address, downloading it first where it is not there; a terminal sees a bar.

    Args:
        url: an http(s) address; a hash in its file's name is checked.

    Raises:
        CheckpointError: it cannot be downloaded; the text names the place to put it by hand.
    """
    path = cache_path(url)
    if path.is_file():
        check_hash(path)
    elif failures := download(url):
        raise CheckpointError(
            f"Could not download {url} ({'; '.join(failures)}). On a machine without network, download it elsewhere "
            f"and put it at {path}, or give the path of a local file instead (--pretrained FILE); {MIRRORS} in the "
            "environment names mirrors."
        )
    return path


def download(url: str) -> list[str]:
    """Download a file into the cache, from the mirrors or the address itself; return why not, empty when it is there.

    A file is there whole or not at all.
    """
    path, mirrors = cache_path(url), [base.rstrip("/") for base in os.environ.get(MIRRORS, "").split()]
    failures = []
    for address in [*(f"{base}/{what}" for base in mirrors for what in (path.name, url)), url]:
        try:
            with open_url(address) as answer, replacing(path) as temporary:
                _logger.info("downloading %s to %s", address, path)
                _copy(answer, temporary)
                if not _has_its_hash(temporary, path.name):
                    raise OSError("the file does not have the hash that its name promises")
            return []
        except (OSError, http.client.HTTPException) as error:
            failures.append(f"{urlsplit(address).netloc}: {error}")
    return failures


def _copy(answer: http.client.HTTPResponse, path: Path) -> None:
    """Write what is read; a terminal sees a bar.

    Raises:
        OSError: it ends early, or comes to a halt.
    """
    total = int(answer.headers.get("Content-Length") or 0)
    with progress.bar("Downloading", total or None, "B", otherwise=sys.stderr) as move, open(path, "wb") as file:
        while block := answer.read(1 << 16):
            file.write(block)
            move(file.tell())
        if total and file.tell() != total:
            raise OSError(f"{file.tell()} of {total} bytes came")
