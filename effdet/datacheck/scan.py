"""Decode every image of a split in parallel processes: which are broken, and what is in each, as a hash.

Nothing here knows of boxes. Memory stays at two short hashes for each image, whatever their number.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import UnidentifiedImageError

from effdet.data.coco.foreign import is_lfs_pointer
from effdet.data.coco.report import Cases
from effdet.data.images import ImageError, read_image
from effdet.runtime.progress import IN_LINES, track

_logger = logging.getLogger(__name__)

_HASH_BYTES = 16
_CHUNK = 32  # images sent to a process at a time
_PROGRESS_S = 10.0

BROKEN = {
    "missing": "files that are not there",
    "empty": "empty files",
    "lfs_pointer": "images that are Git LFS pointers, short texts in place of the files",
    "unknown": "files that are no image, or of an unknown format",
    "other_size": "images of another size than the json says",
    "float_pixels": "images with floating point pixels",
    "damaged": "truncated or damaged images",
}


@dataclass
class ImageScan:
    """What a scan found.

    Attributes:
        names: file names in the order scanned.
        file_hashes, pixel_hashes: of each file's bytes, and of its decoded RGB pixels with their size; None if broken.
        broken: kinds are keys of BROKEN; examples have the reason.
        seconds: duration.
    """

    names: list[str] = field(default_factory=list)
    file_hashes: list[bytes | None] = field(default_factory=list)
    pixel_hashes: list[bytes | None] = field(default_factory=list)
    broken: Cases = field(default_factory=Cases)
    seconds: float = 0.0


def read_hashes(job: tuple[str, int | None, int | None]) -> tuple[bytes | None, bytes | None, str, str]:
    """Decode one image.

    Args:
        job: path, and the width and height that the json gives (None: any).

    Returns:
        hash of the file and hash of the pixels, both None when it is broken; the kind of fault and its text, both empty
        when it is fine.
    """
    path, width, height = job
    try:
        image = read_image(path, width, height)
        with open(path, "rb") as file:
            file_hash = hashlib.file_digest(file, _new_hash) if hasattr(hashlib, "file_digest") else None
            file_hash = file_hash or _new_hash(file.read())  # Python 3.10 has no file_digest
    except ImageError as error:
        return None, None, _kind_of(error, path), str(error)
    except OSError as error:
        return None, None, "damaged", f"{path}: {error}"
    pixels = _new_hash(repr(image.size).encode())
    pixels.update(image.tobytes())
    return file_hash.digest(), pixels.digest(), "", ""


def _new_hash(content: bytes = b"") -> Any:
    return hashlib.blake2b(content, digest_size=_HASH_BYTES)


def _kind_of(error: ImageError, path: str) -> str:
    cause = error.__cause__
    if isinstance(cause, FileNotFoundError):
        return "missing"
    if os.path.exists(path) and os.path.getsize(path) == 0:
        return "empty"
    if isinstance(cause, UnidentifiedImageError):
        return "lfs_pointer" if is_lfs_pointer(path) else "unknown"
    if isinstance(cause, ImageError):  # of our own, not the decoder's
        return "float_pixels" if "floating point" in str(cause) else "other_size"
    return "damaged"


def scan_images(folder: Path, infos: Iterable[Mapping[str, Any]], total: int, processes: int) -> ImageScan:
    """Decode and hash images.

    Args:
        folder: of the images.
        infos: {'file_name', 'width', 'height'} of each; a size of 0 is unknown.
        total: their number, for the progress lines.
        processes: worker processes; 0 works in this one.

    Raises:
        RuntimeError: an image ended its worker process, such as by using up the memory.
    """
    scan = ImageScan()
    started = said = time.perf_counter()
    kept, jobs = [], []
    for info in infos:
        kept.append(info["file_name"])
        jobs.append((str(folder / info["file_name"]), info["width"] or None, info["height"] or None))
    results = track(_results(jobs, processes), f"Decoding {folder.name}", total, "img")
    for name, (file_hash, pixel_hash, kind, text) in zip(kept, results, strict=True):
        scan.names.append(name)
        scan.file_hashes.append(file_hash)
        scan.pixel_hashes.append(pixel_hash)
        if kind:
            scan.broken.add(kind, text)
        now = time.perf_counter()
        if now - said > _PROGRESS_S:
            rate = len(scan.names) / (now - started)
            _logger.info(
                "%s: %d of %d images decoded, %.0f a second, about %.0f s left",
                folder,
                len(scan.names),
                total,
                rate,
                (total - len(scan.names)) / rate,
                extra=IN_LINES,
            )
            said = now
    scan.seconds = time.perf_counter() - started
    return scan


def _results(jobs: list[tuple], processes: int) -> Iterator[tuple]:
    processes = min(processes, -(-len(jobs) // _CHUNK))
    if processes < 2:
        yield from map(read_hashes, jobs)
        return
    done = 0
    with ProcessPoolExecutor(processes) as pool:
        try:
            for result in pool.map(read_hashes, jobs, chunksize=_CHUNK):
                done += 1
                yield result
        except BrokenProcessPool as error:
            near = jobs[done // _CHUNK * _CHUNK][0]
            raise RuntimeError(
                f"a process that decodes images was ended, at or soon after {near}: an image may be "
                "too large for the memory; -j 0 decodes in one process and shows which"
            ) from error


def repeats_within(hashes: Iterable[bytes | None]) -> list[tuple[int, int]]:
    """Return the numbers (first, later) of every image whose hash an earlier one has; None is like no other."""
    seen: dict[bytes, int] = {}
    pairs = []
    for k, content in enumerate(hashes):
        if content is not None and content in seen:
            pairs.append((seen[content], k))
        elif content is not None:
            seen[content] = k
    return pairs


def shared_between(first: ImageScan, second: ImageScan) -> list[tuple[str, str, bool]]:
    """Return the images of `second` that are in `first` too: (name in first, name in second, files are equal)."""
    places = {content: k for k, content in reversed(list(enumerate(first.pixel_hashes))) if content is not None}
    pairs = []
    for k, content in enumerate(second.pixel_hashes):
        at = places.get(content) if content is not None else None
        if at is not None:
            pairs.append((first.names[at], second.names[k], first.file_hashes[at] == second.file_hashes[k]))
    return pairs
