"""Find COCO jsons and their images in a folder, however they are laid out.

A json's part follows from the words of its path, its image folder from where the files it names are. This covers
COCO, Roboflow's, CVAT's and Label Studio's COCO exports, LVIS, and one json beside one folder of images.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from ..coco.read import read_json
from ..coco.report import DatasetError
from .found import FoundData, Part, Tree, nearest_path, part_of

WRITTEN_BY = "effdet"
"""The contributor in the info of a json that this package wrote; such a file is no user's annotation file."""

_HEAD_BYTES = 2**18
_SAMPLE = 40  # file names that the image folder is found by
_MOST_JSONS = 40  # in a folder; with more of them there is one for each image
_LISTS = re.compile(r'"(?:images|annotations)"\s*:\s*\[')
_NAMES = re.compile(r'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')
_URLS = re.compile(r'"coco_url"\s*:\s*("(?:[^"\\]|\\.)*")')
_OTHER_TASKS = ("captions", "keypoints", "panoptic", "stuff", "image_info")


def is_coco_json(path: Path) -> bool:
    """Tell from its beginning whether a file is a COCO json, and not one that this package wrote."""
    head = _read_head(path)
    if not head.lstrip("\ufeff \t\r\n").startswith("{") or f'"contributor": "{WRITTEN_BY}"' in head:
        return False
    return bool(_LISTS.search(head)) or '"categories"' in head and path.stat().st_size > _HEAD_BYTES


def _read_head(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_HEAD_BYTES)
    except OSError:
        return ""
    is_wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
    return raw.decode("utf-16" if is_wide else "utf-8", errors="ignore")


def find_coco(tree: Tree, only: str = "") -> FoundData | None:
    """Recognise a folder with COCO jsons.

    Args:
        tree: of the folder.
        only: relative path of the json that the user named; else all are looked at.

    Returns:
        What was found; None without a COCO json.

    Raises:
        DatasetError: two jsons could be the same part, or a json's images are not in the folder.
    """
    root = tree.root
    paths = [only] if only else [path for path in tree.files(".json", _MOST_JSONS) if is_coco_json(root / path)]
    if not paths:
        return None
    jsons = _by_part(paths, root)
    parts = {part: Part(root / find_images(tree, path, part), root / path) for part, path in jsons.items()}
    kind = _kind_of(list(jsons.values()))
    listed = ", ".join(f"{part}: {path} with {_shown(parts[part].images, root)}" for part, path in jsons.items())
    return FoundData(kind, parts, f"{root}: {kind}, {listed}")


def _by_part(paths: Sequence[str], root: Path) -> dict[str, str]:
    """Return the json of each part."""
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(part_of(path) or "", []).append(path)
    unnamed = found.pop("", [])
    if unnamed and "train" not in found:
        found["train"] = unnamed
    chosen = {}
    for part, candidates in found.items():
        boxes = [path for path in candidates if not any(task in path for task in _OTHER_TASKS)] or candidates
        best = [path for path in boxes if PurePosixPath(path).name.startswith("instances")] or boxes
        best = [path for path in best if "2017" in path] or best
        if len(best) > 1:
            raise DatasetError(
                f"{root} has {len(best)} COCO jsons that could be the {part} part: {', '.join(best[:6])}. Name the "
                f"right one: --{'train' if part == 'train' else 'val'}-ann {root / best[0]}"
            )
        chosen[part] = best[0]
    return {part: chosen[part] for part in ("train", "val", "test") if part in chosen}


def _kind_of(paths: list[str]) -> str:
    names = [PurePosixPath(path).name for path in paths]
    if any(name == "_annotations.coco.json" for name in names):
        return "Roboflow's COCO export"
    if any(name == "instances_default.json" for name in names):
        return "CVAT's COCO export"
    if any(name in ("result.json", "result_coco.json") for name in names):
        return "Label Studio's COCO export"
    return "LVIS" if any("lvis" in name for name in names) else "COCO json"


def _shown(folder: Path, root: Path) -> str:
    return "the images beside it" if folder == root else f"the images in {folder.relative_to(root).as_posix()}/"


def find_images(tree: Tree, ann: str, part: str) -> str:
    """Return the folder, relative to the root, that a json's file names are relative to.

    Names are tried as they stand, then by their last component and their stem, as moved sets and other systems need.

    Args:
        tree: of the data set.
        ann: the json's relative path.
        part: 'train', 'val' or 'test': what decides where several folders have files of these names.

    Raises:
        DatasetError: no image of the folder has such a name.
    """
    names = [name.replace("\\", "/").lstrip("/") for name in sample_names(tree.root / ann)]
    for key in (str, unquote, lambda name: PurePosixPath(unquote(name)).name, lambda name: PurePosixPath(name).stem):
        wanted = [key(name) for name in names]
        table = tree.by_stem if wanted and not PurePosixPath(wanted[0]).suffix else tree.by_name
        hits: Counter[str] = Counter()
        for name in set(wanted):
            for path in table.get(PurePosixPath(name).name, ()):
                whole = path if table is tree.by_name else PurePosixPath(path).with_suffix("").as_posix()
                if whole == name or whole.endswith("/" + name):
                    hits[whole[: -len(name)].rstrip("/")] += 1
        if hits:
            most = max(hits.values())
            best = sorted(folder for folder, count in hits.items() if count == most)
            own = [folder for folder in best if part_of(folder) == part] or best
            return PurePosixPath(
                nearest_path([f"{folder}/x" if folder else "x" for folder in own], ann)
            ).parent.as_posix()
    folders = tree.image_folders()
    if any(Path(name).is_absolute() and Path(name).is_file() for name in sample_names(tree.root / ann)[:1]):
        return "."
    raise DatasetError(
        f"{tree.root / ann} names images ({', '.join(names[:3]) or 'none'}) that are not below {tree.root}, which has "
        f"{f'images in {folders[0] or tree.root}' if folders else 'no images'}: put them there, or name the folder "
        f"with --{'train' if part == 'train' else 'val'}-images DIR"
    )


def sample_names(path: Path) -> list[str]:
    """Return a few of the file names in a COCO json, for LVIS the ends of its addresses."""
    head = _read_head(path)
    names = _texts(_NAMES, head) or _ends(_texts(_URLS, head))
    if not names:
        content = read_json(path)
        rows = content.get("images") if isinstance(content, dict) else None
        rows = [row for row in rows or () if isinstance(row, dict)]
        names = [str(row.get("file_name") or "") for row in rows]
    step = max(1, len(names) // _SAMPLE)
    return [name for name in names[::step] if name]


def _texts(pattern: re.Pattern[str], text: str) -> list[str]:
    return [json.loads(found, strict=False) for found in pattern.findall(text)]


def _ends(urls: list[str]) -> list[str]:
    """Return the names at the end of addresses, with the folder before them where there are several folders."""
    folders = {url.split("/")[-2:-1][0] if "/" in url else "" for url in urls}
    return ["/".join(url.split("/")[-2 if len(folders) > 1 else -1 :]) for url in urls]
