"""What is named on a command line to predict: files, folders, patterns, addresses, lists; and the images these hold.

Lives here: finding them, their names in results, and reading one. Frames of videos are in `video.py`.
"""

from __future__ import annotations

import glob
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit

from PIL import Image

from effdet.checkpoint.download import open_url
from effdet.data.images import ImageError, image_suffixes, images_in, read_image

Source = Path | str
"""The file of an image or a video, the address of one, or the number of a camera."""

VIDEO_SUFFIXES = frozenset(
    ".3gp .avi .flv .m2ts .m3u8 .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv .y4m".split()
)
CAMERA = re.compile(r"(?:/dev/video)?(\d+)")

DEFAULT_DATA = Path("data/synthetic")
DEFAULT_IMAGES = 12
LARGEST_DOWNLOAD = 256 * 2**20  # bytes
_SLOWEST_DOWNLOAD_S = 120.0
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)
_STREAM = re.compile(r"(?:rtsps?|rtmps?|rtp|srt|tcp|udp)://", re.IGNORECASE)
_FOLDERS = {"images", "labels"}  # of a data set, among the folders of videos' frames


@dataclass(frozen=True)
class Item:
    """One image to predict.

    Args:
        name: what results call it.
        stem: the name, without suffix, of what is written for it; no other item of the run has it.
        read: gives the image, upright, or raises ImageError.
        path: its file; None where it has none.
        frame: its number in a video, from 0.
        time_s: its time in that video, in seconds.
    """

    name: str
    stem: str
    read: Callable[[], Image.Image]
    path: Path | None = None
    frame: int | None = None
    time_s: float | None = None


def image_of(source: Source, stem: str) -> Item:
    """Return the image of a source that is no video; it is not read yet."""
    if isinstance(source, Path):
        return Item(str(source), stem, partial(read_image, source, upright=True), source)
    return Item(shown_name(source), stem, partial(fetch_image, source))


def is_video(source: Source) -> bool:
    """Tell whether a source is a video, a camera or a stream, whose frames come one after another."""
    if isinstance(source, str) and (_STREAM.match(source) or CAMERA.fullmatch(source)):
        return True
    return suffix_of(source) in VIDEO_SUFFIXES


def shown_name(source: Source) -> str:
    """Return a source's name for results and messages, without a user's name and password."""
    return re.sub(r"(?<=://)[^/@]*@", "", source) if isinstance(source, str) else str(source)


# ---- find ------------------------------------------------------------------------------------------------------------


def find_sources(names: Sequence[str], recursive: bool = False, output_dir: Path | None = None) -> list[Source]:
    """Return what the arguments name, each once.

    Args:
        names: files, folders, glob patterns, addresses of images, videos and streams, numbers of cameras; '-' stands
            for a list of them on standard input, one a line. None at all stands for images of the embedded data set.
        recursive: search folders within folders.
        output_dir: left out of that search, as it may hold what an earlier run drew.

    Raises:
        FileNotFoundError: an argument names no image; OSError: the embedded data set cannot be made here.
    """
    if not names:
        return [*_default_images()]
    found: list[Source] = []
    for name in names:
        lines = (line.strip("\r\n") for line in sys.stdin) if name == "-" else [name]
        before = len(found)
        for line in filter(None, lines):
            found += _find(line, recursive, output_dir)
        if len(found) == before:
            raise FileNotFoundError(
                "the list on standard input is empty: write a file, folder, pattern or address a line"
            )
    return list(dict.fromkeys(found))


def _find(name: str, recursive: bool, output_dir: Path | None) -> list[Source]:
    if _ADDRESS.match(name) or _STREAM.match(name):
        return [name]
    path = Path(name)
    if CAMERA.fullmatch(name) and not path.is_dir() and not path.is_file():
        return [name]
    if path.is_dir():
        inside = images_in(path, recursive, output_dir)
    elif path.is_file():
        inside = [path]
    else:
        inside = [Path(match) for match in sorted(glob.glob(name, recursive=recursive)) if Path(match).is_file()]
    if not inside:
        raise FileNotFoundError(
            f"no image found for '{name}': {_images_below(path)}give an existing file, a folder with images "
            f"({', '.join(sorted(image_suffixes()))}), a video, a glob pattern in quotes or an address"
        )
    return [*inside]


def _default_images() -> list[Path]:
    from effdet.data.synthetic.dataset import make_synthetic_dataset

    try:
        folder = make_synthetic_dataset(DEFAULT_DATA) / "val2017"
    except OSError as error:
        raise OSError(
            f"the default images cannot be made in {DEFAULT_DATA} ({error}): name images of your own, or start in a "
            "folder that you may write to"
        ) from error
    return sorted(folder.iterdir())[:DEFAULT_IMAGES]


def _images_below(folder: Path) -> str:
    """Return in words how many images are in which folders below one; empty where there are none."""
    counts = Counter(path.parent for path in images_in(folder, True)) if folder.is_dir() else Counter()
    if not counts:
        return ""
    places = ", ".join(f"{count} in {place}" for place, count in counts.most_common(3))
    return f"there are {counts.total()} images further down ({places}), which --recursive takes; else "


# ---- name ------------------------------------------------------------------------------------------------------------


def suffix_of(source: Source) -> str:
    """Return the suffix of a source's file name, in small letters and with its dot; empty where it has none."""
    path = source if isinstance(source, Path) else PurePosixPath(urlsplit(source).path)
    return path.suffix.lower()


def unique_stems(sources: Iterable[Source]) -> list[str]:
    """Return a file name without suffix for each source; those of one name (a.jpg and a.png, b/a.jpg) get numbers."""
    taken: set[str] = set()
    numbers: Counter[str] = Counter()
    stems = []
    for source in sources:
        wanted = source.stem if isinstance(source, Path) else _stem_of_address(source)
        reserved = taken | _FOLDERS if is_video(source) else taken
        numbers[wanted] += 1
        stem = wanted if numbers[wanted] == 1 else f"{wanted}_{numbers[wanted]}"
        while stem in reserved:
            numbers[wanted] += 1
            stem = f"{wanted}_{numbers[wanted]}"
        taken.add(stem)
        stems.append(stem)
    return stems


def _stem_of_address(address: str) -> str:
    if camera := CAMERA.fullmatch(address):
        return f"camera{camera[1]}"
    parts = urlsplit(address)
    name = PurePosixPath(unquote(parts.path)).stem or parts.hostname or ""
    return re.sub(r"[^\w.-]+", "_", name)[-100:].strip(".") or "image"


def refuse_replacing(sources: Iterable[Source], targets: Iterable[Path]) -> None:
    """Raise a ValueError where a file that is to be written is one of the sources, or a folder one that holds some."""
    paths = {source.resolve() for source in sources if isinstance(source, Path)}
    paths |= {path.parent for path in paths}
    for target in targets:
        if target.resolve() in paths:
            raise ValueError(f"what is drawn would replace {target}: choose another --output")


# ---- fetch -----------------------------------------------------------------------------------------------------------


def fetch_image(address: str, largest: int = LARGEST_DOWNLOAD) -> Image.Image:
    """Download an image and read it upright.

    Args:
        address: an http(s) address.
        largest: bytes that are taken at most.

    Raises:
        ImageError: there is no answer, an error, more than that, or no image; the text names the address.
    """
    with tempfile.TemporaryDirectory(prefix="effdet-") as folder:
        path = Path(folder, "image" + suffix_of(address))
        try:
            _download(address, path, largest)
        except HTTPError as error:
            raise ImageError(f"{address}: the server answers {error.code} {error.reason}: check the address") from error
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise ImageError(f"{address}: cannot be downloaded ({reason}): check address and network") from error
        try:
            return read_image(path, upright=True)
        except ImageError as error:
            raise ImageError(str(error).replace(str(path), address)) from error


def _download(address: str, path: Path, largest: int) -> None:
    end = time.monotonic() + _SLOWEST_DOWNLOAD_S
    with open_url(address) as answer, open(path, "wb") as file:
        expected = int(answer.headers.get("Content-Length") or 0)
        if expected > largest:
            raise OSError(f"it has {expected} bytes, more than {largest}")
        while block := answer.read(1 << 16):
            file.write(block)
            if file.tell() > largest:
                raise OSError(f"it has more than {largest} bytes")
            if time.monotonic() > end:
                raise OSError(f"{file.tell()} bytes came in {_SLOWEST_DOWNLOAD_S:.0f} s")
        if file.tell() < expected:
            raise OSError(f"{file.tell()} of {expected} bytes came")
