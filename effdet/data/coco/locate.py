"""Find the image files of a json: by the names it gives, else by what mechanical change would make them right.

Only names are compared; what is in the files is read by others.
"""

import itertools
import os
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..images import image_suffixes
from .foreign import is_lfs_pointer
from .report import DatasetError, DatasetReport

# What was done to a name, in the order in which the sentence lists it.
_CHANGES = {
    "url": "names are URLs",
    "backslash": "names have Windows' backslashes",
    "percent": "names are percent-encoded",
    "dropped": "names have folders that are not there",
    "added": "the files are in folders that names lack",
    "spelling": "upper and lower case or accents differ",
    "extension": "the extension is another one",
}
_READ_OFF = frozenset(("url", "backslash", "percent", "spelling"))  # a name shows these by itself, others need not
_MOST_BESIDE = 200  # folders near the image directory that are tried
_TRIED_BESIDE = 20  # names that are tried in each
_UNLIKE = 0.1  # of the missing, or one: so many may have no file at all where one rule is found for the others
_MOST_FILES = 2_000_000  # of an image directory; beyond them nothing is looked for
_SAMPLED = 8  # files that are looked into for Git LFS pointers; all when one of them is
_DRIVE = re.compile(r"[A-Za-z]:")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass
class Search:
    """What a search for missing files came to.

    Attributes:
        paths: name in the json -> path below the image directory, of those that have one place to be.
        doubled: name in the json -> paths of those that have several.
        changes: keys of _CHANGES that the names differ by.
        certain: one rule gives these paths, and no two names the same one.
    """

    paths: dict[str, str] = field(default_factory=dict)
    doubled: dict[str, list[str]] = field(default_factory=dict)
    changes: set[str] = field(default_factory=set)
    certain: bool = False

    def sentence(self, total: int) -> str:
        """Say what was found; empty when it is nothing."""
        texts = []
        if self.paths:
            why = "; ".join(text for key, text in _CHANGES.items() if key in self.changes)
            name, path = next(iter(self.paths.items()))
            texts.append(
                f"{len(self.paths)} of {total} are there, as {path} is for {name}" + (f": {why}" if why else "")
            )
        if self.doubled:
            name, paths = next(iter(self.doubled.items()))
            texts.append(
                f"{len(self.doubled)} of {total} may be one of several files, {name} one of {', '.join(paths[:3])}: "
                "name the folder that is meant"
            )
        return ". ".join(texts)


def escapes(name: str) -> bool:
    """Tell whether a file name leads out of the directory it is meant for."""
    if name.isalnum() or name.replace(".", "0", 1).isalnum():  # the usual kind, 000000000009.jpg
        return False
    return is_absolute(name) or ".." in name.replace("\\", "/").split("/")


def is_absolute(name: str) -> bool:
    """Tell whether a file name starts at a root, of Windows or of others."""
    return name.startswith(("/", "\\")) or (_DRIVE.match(name) is not None and not _SCHEME.match(name))


def is_image_outside(name: str, img_dir: Path | None) -> bool:
    """Tell whether a name that leads out of the image directory is that of an image file on this machine."""
    if os.path.splitext(name)[1].lower() not in image_suffixes() or (img_dir is None and not os.path.isabs(name)):
        return False
    try:
        return os.path.isfile(os.path.join(img_dir or "", name))
    except ValueError:  # no file can have this name
        return False


def find_files(
    infos: Sequence[dict[str, Any]], img_dir: Path, report: DatasetReport
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Look for every image's file, listing each directory once; names that are certain to be another are set right.

    Args:
        infos: of the images; 'file_name' may be changed.
        img_dir: the image directory.
        report: gets what was done.

    Returns:
        Those whose file is not there; and those whose names lead out of the directory, to no file.

    Raises:
        DatasetError: a directory may not be read.
    """
    lost = _absent(infos, img_dir)
    outside = [info for info in lost if escapes(info["file_name"]) and is_image_outside(info["file_name"], img_dir)]
    report.add_all("outside_image", [info["file_name"] for info in outside])
    lost = _without(lost, outside)
    if not lost:
        return [], []
    absolute = [info for info in lost if is_absolute(info["file_name"])]
    relative = _without(lost, absolute)
    found = search_files({info["file_name"] for info in lost}, infos, img_dir)
    renamed = [info for info in relative if found.certain and info["file_name"] in found.paths]
    if renamed:
        report.remarks["renamed_image"] = found.sentence(len(lost))
    for info in renamed:
        report.add("renamed_image", f"{info['file_name']} = {found.paths[info['file_name']]}")
        info["file_name"] = found.paths[info["file_name"]]
    lost = _without(relative, renamed)
    escaping = absolute + [info for info in lost if escapes(info["file_name"])]
    for info in escaping:
        report.add("escaping_file_name", f"{info['file_name']!r} of image {info['id']}")
    if not renamed:
        sentence = found.sentence(len(lost + absolute)) or _look_beside([info["file_name"] for info in lost], img_dir)
        if sentence:
            report.remarks["escaping_file_name" if escaping else "missing_image"] = sentence
    return _without(lost, escaping), escaping


def _look_beside(names: list[str], img_dir: Path) -> str:
    """Say which folder beside the image directory, or above it, has the missing files; empty when none has."""
    above = img_dir.absolute().parent
    tried = names[:_TRIED_BESIDE]
    try:
        with os.scandir(above) as entries:
            folders = [above, *(Path(entry.path) for entry in sorted(entries, key=lambda e: e.name) if entry.is_dir())]
        for folder in folders[:_MOST_BESIDE]:
            if tried and all((folder / name).is_file() for name in tried):
                return f"{folder} has them: give that as the image directory"
    except (OSError, ValueError):  # not to be looked into; no file can have such a name
        pass
    return ""


def _without(infos: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    taken = {id(info) for info in others}
    return [info for info in infos if id(info) not in taken]


def _absent(infos: Iterable[dict[str, Any]], img_dir: Path) -> list[dict[str, Any]]:
    """Return the images that have no file of exactly their name in the image directory."""
    listings: dict[str, set[str]] = {}
    absent = []
    for info in infos:
        name = info["file_name"]
        if escapes(name):
            absent.append(info)
            continue
        folder, base = posixpath.split(posixpath.normpath(name)) if "/" in name else ("", name)
        if folder not in listings:
            listings[folder] = _list_folder(img_dir / folder)
        if base not in listings[folder]:
            absent.append(info)
    return absent


def _list_folder(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except PermissionError as e:
        raise DatasetError(
            f"image directory {folder} may not be read: permission denied. Change its permissions, or run as a user "
            "who may."
        ) from e
    except (OSError, ValueError):  # ValueError: no file can have this name
        return set()


def search_files(names: set[str], infos: Iterable[dict[str, Any]], img_dir: Path) -> Search:
    """Look for files that are not there by name: with slashes, decoded, in other folders, spelled in another way.

    Args:
        names: of the missing.
        infos: all images.
        img_dir: the image directory; all below it is looked through.
    """
    shelves = _Shelves(img_dir)
    search = Search()
    rules = set()
    for name in sorted(names):
        paths, changes = shelves.find(name)
        if len(paths) == 1:
            search.paths[name] = paths[0]
            search.changes |= changes
            rules.add(frozenset(changes - _READ_OFF))
        elif paths:
            search.doubled[name] = paths
    present = {posixpath.normpath(info["file_name"]) for info in infos if info["file_name"] not in names}
    paths_found = set(search.paths.values())
    suffixes = {os.path.splitext(name)[1].lower() for name in search.paths}
    without = len(names) - len(search.paths)
    search.certain = (
        len(rules) == 1
        and without <= max(1, _UNLIKE * len(names))
        and without < len(search.paths)
        and len(paths_found) == len(search.paths)
        and not paths_found & present
        and not {"dropped", "added"} <= search.changes  # folders of one name for those of another
        # Beside images of the same extension that are there, a file of another one may be something else: a mask.
        and not (
            "extension" in search.changes and any(os.path.splitext(name)[1].lower() in suffixes for name in present)
        )
    )
    return search


class _Shelves:
    """All files below a directory by their base names: as written, in any spelling, and images without extension."""

    def __init__(self, root: Path) -> None:
        self.exact: dict[str, list[tuple[str, ...]]] = {}
        self.spelled: dict[str, list[tuple[str, ...]]] = {}
        self.stems: dict[str, list[tuple[str, ...]]] = {}
        count = 0
        for folder, below, files in os.walk(root):
            below[:] = [name for name in below if not name.startswith(".") and name != "__MACOSX"]
            parts = Path(folder).relative_to(root).parts
            for base in files:
                path = (*parts, base)
                stem, suffix = os.path.splitext(_plain(base))
                self.exact.setdefault(base, []).append(path)
                self.spelled.setdefault(stem + suffix, []).append(path)
                if suffix in image_suffixes():
                    self.stems.setdefault(stem, []).append(path)
            count += len(files)
            if count > _MOST_FILES:
                break

    def find(self, name: str) -> tuple[list[str], set[str]]:
        """Return the paths that a name can mean, none, one or several, and the changes that lead to the one."""
        for text, changes in _readings(name):
            parts = tuple(
                part for part in text.split("/") if part not in ("", ".", "..") and not _DRIVE.fullmatch(part)
            )
            if not parts:
                continue
            stem, suffix = os.path.splitext(_plain(parts[-1]))
            for places, key, change in (
                (self.exact, parts[-1], None),
                (self.spelled, stem + suffix, "spelling"),
                (self.stems, stem if suffix in image_suffixes() else stem + suffix, "extension"),
            ):
                paths = places.get(key)
                if paths:
                    return _nearest(parts, paths, changes | ({change} if change else set()))
        return [], set()


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def _readings(name: str) -> Iterator[tuple[str, set[str]]]:
    """Give what a name may mean: a path with slashes, and what was done for it."""
    text, changes = name, set()
    if _SCHEME.match(name):
        parts = urlsplit(name)
        local = re.search(r"(?:^|&)d=([^&]+)", parts.query)  # Label Studio's local files
        text, changes = (local[1] if local else parts.path), {"url"}
    if "\\" in text:
        text, changes = text.replace("\\", "/"), changes | {"backslash"}
    yield text, changes
    if "%" in text and unquote(text) != text:
        yield unquote(text), changes | {"percent"}


def _nearest(parts: tuple[str, ...], paths: list[tuple[str, ...]], changes: set[str]) -> tuple[list[str], set[str]]:
    """Choose the path with the longest end in common; several when they are equally near."""

    def common(path: tuple[str, ...]) -> int:
        pairs = zip(reversed(parts[:-1]), reversed(path[:-1]), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: _plain(pair[0]) == _plain(pair[1]), pairs)) + 1

    best = max(map(common, paths))
    nearest = [path for path in paths if common(path) == best]
    if len(nearest) > 1:
        return ["/".join(path) for path in sorted(nearest)], changes
    (path,) = nearest
    if len(parts) > best and "url" not in changes:  # a host's folders are its own business
        changes = changes | {"dropped"}
    if len(path) > best:
        changes = changes | {"added"}
    return ["/".join(path)], changes | ({"spelling"} if parts[-best:-1] != path[-best:-1] else set())


def find_lfs_pointers(infos: Sequence[dict[str, Any]], img_dir: Path) -> list[dict[str, Any]]:
    """Return the images in whose place Git LFS left a pointer; all are read only when one of a few is such."""
    step = max(1, len(infos) // _SAMPLED)
    if not any(is_lfs_pointer(img_dir / info["file_name"]) for info in infos[::step]):
        return []
    return [info for info in infos if is_lfs_pointer(img_dir / info["file_name"])]
