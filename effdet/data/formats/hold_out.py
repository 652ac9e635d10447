"""Parts of a data set: hold images out for validation, take the first few, take some classes. COCO's form in and out.

Rows go through as they are: what is wrong in them is reported where the json that is made here is read.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from effdet.config.options import nearest

from ..coco.mend import whole
from ..coco.report import DatasetError

Coco = dict[str, Any]

_ROBOFLOW = re.compile(r"(.+)\.rf\.[0-9A-Za-z_-]{6,}")  # copies of one image, augmented: the same before .rf.
_COPIED_SUFFIX = re.compile(r"_(?:jpe?g|png|bmp|webp|tiff?)$", re.IGNORECASE)
_FRAME = re.compile(
    r"(?P<video>.*?(?:\b|_)(?:frame|frm|scene)|.*_(?:mp4|mov|avi|mkv|webm|m4v|mpe?g))[-_ .#]*(?P<number>\d+)",
    re.IGNORECASE,
)
_LONG_VIDEO = 1 / 20  # of the images: a video with more of them is cut into blocks of neighbouring frames
_BLOCK = 1 / 40


def id_key(value: Any) -> str:
    """Return an id so that 1, 1.0, '1' and '1.0' are the same."""
    number = whole(value)
    return str(value if number is None else number)


def _rows(content: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    rows = content.get(key)
    if not isinstance(rows, list):
        raise DatasetError(f'no COCO annotation file: the list "{key}" is missing')
    return [row for row in rows if isinstance(row, dict)]


def _name(image: Mapping[str, Any]) -> str:
    return str(image.get("file_name") or image.get("coco_url") or image.get("id")).replace("\\", "/")


def _classes_of(content: Coco) -> dict[str, set[str]]:
    """Return the categories of each image that has boxes, ids as `id_key`."""
    found: dict[str, set[str]] = {}
    for row in _rows(content, "annotations"):
        image, category = row.get("image_id"), row.get("category_id")
        key = str(image) if type(image) is int else id_key(image)  # most of the time, on a file of COCO's size
        if key not in found:
            found[key] = set()
        found[key].add(str(category) if type(category) is int else id_key(category))
    return found


def present_classes(content: Coco) -> set[str]:
    """Return the categories that have a box, ids as `id_key`."""
    return set().union(*_classes_of(content).values())


def take_images(content: Coco, keys: Iterable[str]) -> Coco:
    """Return the part of a data set with these images (`id_key` of their ids), in the order they had."""
    wanted = set(keys)
    return {
        **content,
        "images": [row for row in _rows(content, "images") if id_key(row.get("id")) in wanted],
        "annotations": [row for row in _rows(content, "annotations") if id_key(row.get("image_id")) in wanted],
    }


# ---- the first few, some classes -------------------------------------------------------------------------------------


def take_first(content: Coco, count: int) -> Coco:
    """Return the first images, those with boxes before those without."""
    boxes = _classes_of(content)
    keys = list(dict.fromkeys(id_key(row.get("id")) for row in _rows(content, "images")))
    return take_images(content, sorted(keys, key=lambda key: key not in boxes)[:count])


def find_classes(wanted: Sequence[str], names: Sequence[str], owner: str = "The data have") -> list[str]:
    """Return the class names that --classes asks for.

    Args:
        wanted: class names; each may be several, with commas between.
        names: those that there are.
        owner: the words before them in messages.

    Raises:
        DatasetError: no class has such a name.
    """
    asked = [name for item in wanted for name in ([item] if item in names else item.split(","))]
    asked = [name.strip() for name in asked if name.strip()]
    for name in asked:
        if name not in names:
            more = "" if len(names) <= 12 else f", ... ({len(names)} in all)"
            raise DatasetError(
                f"--classes: no class is called {name!r}{nearest(name, names) or '.'} {owner}: "
                f"{', '.join(names[:12])}{more}"
            )
    return asked


def take_classes(content: Coco, wanted: Sequence[str], keep_images: bool) -> Coco:
    """Return the data set with some classes alone.

    Args:
        content: of a COCO json.
        wanted: class names; each may be several, with commas between.
        keep_images: keep images whose boxes are all of other classes, without boxes; an evaluation needs them.

    Raises:
        DatasetError: no class has such a name.
    """
    rows = _rows(content, "categories")
    names = [str(row.get("name")) for row in rows]
    asked = find_classes(wanted, names)
    kept = [row for row, name in zip(rows, names, strict=True) if name in asked]
    ids = {id_key(row.get("id")) for row in kept}
    before = set(_classes_of(content))
    chosen = [row for row in _rows(content, "annotations") if id_key(row.get("category_id")) in ids]
    small = {**content, "categories": kept, "annotations": chosen}
    if keep_images:
        return small
    after = set(_classes_of(small))
    images = [key for key in (id_key(row.get("id")) for row in _rows(content, "images"))]
    return take_images(small, [key for key in images if key in after or key not in before])


# ---- a part for validation -------------------------------------------------------------------------------------------


def source_of(file_name: str) -> tuple[str, int | None]:
    """Return what an image was made from, as far as its name shows it, and its number in a video, or None.

    Copies that Roboflow augmented have the same source, frames of a video have its name; other images stand alone.
    """
    path = PurePosixPath(file_name)
    stem, folder = path.stem, str(path.parent)
    copied = _ROBOFLOW.fullmatch(stem)
    if copied:
        stem, folder = _COPIED_SUFFIX.sub("", copied[1]), ""
    frame = _FRAME.fullmatch(stem)
    return (f"{folder}/{frame['video']}", int(frame["number"])) if frame else (f"{folder}/{stem}", None)


def group_images(names: Sequence[str]) -> dict[str, list[int]]:
    """Group images (their indices) that must stay together, by names; long videos in blocks of neighbouring frames."""
    sources: dict[str, list[tuple[int, int]]] = {}
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        source, number = source_of(name)
        if number is None:
            groups.setdefault(source, []).append(index)
        else:
            sources.setdefault(source, []).append((number, index))
    for source, frames in sources.items():
        block = max(1, round(_BLOCK * len(names))) if len(frames) > _LONG_VIDEO * len(names) else len(frames)
        for place, (_, index) in enumerate(sorted(frames)):
            groups.setdefault(f"{source}#{place // block}", []).append(index)
    return groups


def hold_out(content: Coco, share: float) -> tuple[Coco, Coco, int]:
    """Divide a data set into one to train on and one to validate on.

    The same data give the same parts, in whatever order or folder they are. Images of one source stay together; each
    class has its share of images in both parts as nearly as they allow, the rarest first; a very rare one is trained.

    Args:
        content: of a COCO json.
        share: of the images for validation, in 0..1.

    Returns:
        Training part, validation part, and the number of groups of images that stay together.

    Raises:
        DatasetError: fewer than two groups.
    """
    images = list({id_key(row.get("id")): row for row in _rows(content, "images")}.items())
    groups = group_images([_name(row) for _, row in images])
    if len(groups) < 2:
        raise DatasetError(
            f"{len(images)} image(s) of one source: nothing can be held out for validation. Name a validation part "
            "with --val-images DIR --val-ann FILE"
        )
    present = _classes_of(content)
    held: dict[str, Counter[str]] = {}  # by group: the images with each class; under '' those of the group
    total: Counter[str] = Counter()
    for key, members in groups.items():
        held[key] = Counter(c for index in members for c in present.get(images[index][0], ()))
        held[key][""] = len(members)
        total.update(held[key])

    def by_hash(key: str) -> bytes:
        return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()

    rarest = {key: min(classes, key=lambda c: (total[c], c)) for key, classes in held.items()}
    chosen, taken = [], Counter[str]()
    for key in sorted(groups, key=lambda key: (total[rarest[key]], by_hash(key))):
        c = rarest[key]
        if held[key][c] < 2 * (share * total[c] - taken[c]) and len(chosen) < len(groups) - 1:  # nearer to its share
            chosen.append(key)
            taken.update(held[key])
    if not chosen:
        labelled = [key for key in groups if len(held[key]) > 1] or list(groups)
        chosen = [min(labelled, key=by_hash)]
    val = {images[index][0] for key in chosen for index in groups[key]}
    training = {  # what belongs to no image stays, so that its reader reports it
        **content,
        "images": [row for row in _rows(content, "images") if id_key(row.get("id")) not in val],
        "annotations": [row for row in _rows(content, "annotations") if id_key(row.get("image_id")) not in val],
    }
    return training, take_images(content, val), len(groups)
