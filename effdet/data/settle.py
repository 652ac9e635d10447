"""From what the user named to COCO jsons: `settle_data` recognises a folder, converts it, holds out a validation part.

What comes out names an image folder and a json for each part; past this file there is no other format. Where a json has
to be made, it is written into a folder of the run's or of this process's own, never into the user's.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from effdet.checkpoint.io import replacing
from effdet.config.schema import EvalDataConfig
from effdet.runtime import distributed

from .coco.check import MADE_FROM, require_lists
from .coco.read import collector_paused, read_json
from .coco.report import DatasetError
from .formats.coco_folders import WRITTEN_BY, find_images
from .formats.found import FoundData, Part, look_into
from .formats.hold_out import hold_out, id_key, present_classes, take_classes, take_first
from .formats.recognise import recognise

_ConfigT = TypeVar("_ConfigT", bound=EvalDataConfig)
PARTS = ("train", "val")
DEFAULT_SHARE = 0.15
FOLDER = "data"
"""Name of the folder in a run's that holds the jsons made for it."""


class _Source(NamedTuple):
    """A part of the data: where it is, and how to get the content of its COCO json."""

    part: Part
    read: Callable[[], dict[str, Any]]
    convert: bool = False


class _Made(NamedTuple):
    parts: dict[str, Part]  # empty: the config says everything already
    lines: list[str]


def settle_data(
    data: _ConfigT, parts: Sequence[str] = PARTS, folder: Path | None = None, earlier: Sequence[Path] = ()
) -> tuple[_ConfigT, list[str]]:
    """Return the config with an image folder and a COCO json for each part.

    All processes of a run call it together: rank 0 does the work, and again the first process of a machine that does
    not see its files.

    Args:
        data: the data section.
        parts: of 'train' and 'val', those needed.
        folder: for jsons that have to be made; None: one that vanishes with this process.
        earlier: folders of a run that is continued: jsons that were made for it are used again.

    Returns:
        `data` where nothing has to be found or made, as in COCO's layout; else a new config, in which `limit`,
        `classes` and `val_split` have been followed and ask for nothing more. And lines that say what was found.

    Raises:
        ValueError: no data named; DatasetError, a kind of it: the data cannot be used.
        FileNotFoundError: something is absent, or the folder is of no known form.
    """
    if all(_names_all(data, part) for part in {*parts, "val"}) and not (data.limit or data.classes):
        return data, []
    made = distributed.run_on_primary(lambda: _settle(data, parts, folder, earlier))
    if distributed.local_world_size() < distributed.world_size():  # several machines, perhaps with disks of their own
        absent = [part.ann for part in made.parts.values() if part.ann is not None and not part.ann.is_file()]
        if absent and distributed.local_rank() == 0:
            _settle(data, parts, absent[0].parent, ())
        distributed.barrier()
    if not made.parts:
        return data, made.lines
    # Of a training part alone nothing is to be held out again.
    values: dict[str, Any] = {"val_split": None if "val" in made.parts else 0.0, "limit": 0, "classes": []}
    for part, where in made.parts.items():
        values |= {f"{part}_images": str(where.images), f"{part}_ann": str(where.ann)}
    return dataclasses.replace(data, **values), made.lines


def _given(data: EvalDataConfig, part: str, what: str) -> str:
    return getattr(data, f"{part}_{what}", "")  # an evaluation has no training part


def _names_all(data: EvalDataConfig, part: str) -> bool:
    return bool(_given(data, part, "images") and _given(data, part, "ann"))


# ---- what there is ---------------------------------------------------------------------------------------------------


def _find(data: EvalDataConfig, part: str, found: FoundData | None) -> _Source | None:
    """Return a part: given by flags, else found in the root; None where neither has it."""
    images, ann = _given(data, part, "images"), _given(data, part, "ann")
    if images and ann:
        return _Source(Part(Path(images), Path(ann)), lambda: _read(Path(ann)))
    if ann:  # beside --root
        known = found.parts.get(part) if found is not None else None
        folder = known.images if known is not None else _images_of(Path(data.root), Path(ann), part)
        return _Source(Part(folder, Path(ann)), lambda: _read(Path(ann)))
    if found is None:
        return None
    name = part
    if part == "val" and "val" not in found.parts and data.val_split is None:
        name = "test"
    where = found.parts.get(name)
    if where is None:
        return None
    where = dataclasses.replace(where, images=Path(images)) if images else where
    path, convert = where.ann, found.convert
    if path is not None:
        return _Source(where, lambda: _read(path))
    assert convert is not None  # FoundData: a part without a json is converted
    return _Source(where, lambda: convert(name), convert=True)


def _images_of(root: Path, ann: Path, part: str) -> Path:
    return root / find_images(look_into(root), str(ann.resolve()), part)


def _recognise(data: EvalDataConfig) -> FoundData | None:
    """Recognise the root; None where there is none, or where its parts need not be told apart as flags name them."""
    if not data.root:
        return None
    try:
        return recognise(data.root)
    except DatasetError:
        if _given(data, "train", "ann") or _given(data, "val", "ann"):
            return None
        raise


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path)
    require_lists(content, str(path), ("images",))
    return content


# ---- rank 0's work ---------------------------------------------------------------------------------------------------


def _settle(data: EvalDataConfig, parts: Sequence[str], folder: Path | None, earlier: Sequence[Path]) -> _Made:
    if not data.root and not any(_names_all(data, part) for part in PARTS):
        raise ValueError(
            "no data given: name a folder with --root DIR (COCO, Roboflow, CVAT, Label Studio, YOLO, Pascal VOC, ...), "
            f"or the files with --{parts[0]}-images DIR --{parts[0]}-ann FILE"
        )
    found = None if all(_names_all(data, part) for part in parts) else _recognise(data)
    lines = [found.sentence] if found is not None else []
    sources = {part: _find(data, part, found) for part in PARTS}
    train, val = sources["train"], sources["val"]
    share = DEFAULT_SHARE if data.val_split is None else data.val_split
    if data.val_split and val is not None:
        raise ValueError(
            f"--val-split {data.val_split:g}: the data have a validation part, {val.part.ann or val.part.images}. "
            "Leave the flag out, or name the training part alone: --train-images DIR --train-ann FILE"
        )
    holds = val is None and train is not None and share > 0
    for part in parts:
        if sources[part] is None and not (holds and part == "val"):
            _raise_absent(data, part, found)
    if val is not None and found is not None and "val" not in found.parts and not _given(data, "val", "ann"):
        lines.append(
            "no validation part: the test part serves as one (--val-split X holds training images out instead)"
        )
    make = [p for p in parts if holds or data.limit or data.classes or (s := sources[p]) is not None and s.convert]
    if not make:
        if found is None or found.kind == "COCO":  # the config, or the layout, says where everything is
            return _Made({}, lines)
        return _Made({part: source.part for part in parts if (source := sources[part]) is not None}, lines)
    settings = {"val_split": share if holds else None, "limit": data.limit, "classes": list(data.classes)}
    target = _own_folder() if folder is None else folder
    kept = _find_earlier(make, earlier, settings)
    if kept is not None:
        lines.append(f"parts as they were made for the run before, from {kept}")
        for part in make if kept.resolve() != target.resolve() else ():
            _copy(kept / f"{part}.json", target / f"{part}.json")
    else:
        with collector_paused():
            contents = _contents(sources, make, holds, share, lines)
            for part in make:
                contents[part] = _select(contents[part], data, part, lines)
                origin = sources[part] or train
                _write(target / f"{part}.json", contents[part], origin and origin.part.ann, lines[:1], settings)
        if folder is not None:
            lines.append(f"written for this run: {', '.join(str(target / f'{part}.json') for part in make)}")
    chosen = {}
    for part in parts:
        source = sources[part] or train
        assert source is not None  # _raise_absent
        chosen[part] = Part(source.part.images, target / f"{part}.json") if part in make else source.part
    return _Made(chosen, lines)


def _raise_absent(data: EvalDataConfig, part: str, found: FoundData | None) -> None:
    where = f"{data.root} has " if data.root else "there is "
    if part == "val":
        raise ValueError(
            f"{where}no validation data: name them with --val-images DIR --val-ann FILE, or hold a part of the "
            "training images out with --val-split 0.15"
        )
    has = f" (found: {', '.join(found.parts)})" if found is not None else ""
    raise ValueError(f"{where}no training data{has}: name them with --train-images DIR --train-ann FILE")


def _contents(
    sources: dict[str, _Source | None], make: Sequence[str], holds: bool, share: float, lines: list[str]
) -> dict[str, dict[str, Any]]:
    """Read or convert the parts to make, and hold the validation part out where there is none."""
    train = sources["train"]
    if not holds or train is None:
        return {part: source.read() for part in make if (source := sources[part]) is not None}
    whole = train.read()
    training, validation, groups = hold_out(whole, share)
    count = len(whole["images"])
    together = f", {groups} groups of one source kept together" if groups < count else ""
    lines.append(
        f"no validation part: {len(validation['images'])} of {count} images are held out of the training for one, in "
        f"proportion to the classes{together} (--val-split {share:g})"
    )
    rare = present_classes(training) - present_classes(validation)
    rows = [row for row in whole.get("categories", ()) if isinstance(row, dict)]
    boxless = [str(row.get("name")) for row in rows if id_key(row.get("id")) in rare]
    if boxless:
        lines.append(f"too rare for the validation part: {', '.join(boxless[:12])}{', ...' if boxless[12:] else ''}")
    return {"train": training, "val": validation}


def _select(content: dict[str, Any], data: EvalDataConfig, part: str, lines: list[str]) -> dict[str, Any]:
    """Follow --classes and --limit."""
    before = len(content.get("images") or ())
    if data.classes:
        content = take_classes(content, data.classes, keep_images=part == "val")
    if data.limit:
        content = take_first(content, data.limit)
    if data.classes or data.limit:
        names = ", ".join(str(row.get("name")) for row in content["categories"]) if data.classes else ""
        of = f" with {names} alone" if names else ""
        lines.append(f"{part}: {len(content['images'])} of {before} images{of}")
    return content


# ---- files -----------------------------------------------------------------------------------------------------------


def _own_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="effdet-data-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _find_earlier(make: Sequence[str], earlier: Sequence[Path], settings: dict[str, Any]) -> Path | None:
    """Return the folder of an earlier run's jsons.

    Raises:
        ValueError: they were made with other settings.
    """
    for folder in earlier:
        if all((folder / f"{part}.json").is_file() for part in make):
            info = _read(folder / f"{make[0]}.json").get("info") or {}
            before = info.get("settings", settings)
            changed = [key for key in settings if before.get(key) != settings[key]]
            if changed:
                key = changed[0]
                raise ValueError(
                    f"{folder} was made with --{key.replace('_', '-')} {before.get(key)}, now it is {settings[key]}: "
                    "give the same to go on with that run, or start a new one"
                )
            return folder
    return None


def _write(
    path: Path, content: dict[str, Any], origin: Path | None, description: list[str], settings: dict[str, Any]
) -> None:
    info: dict[str, Any] = {"contributor": WRITTEN_BY, "description": " ".join(description), "settings": settings}
    if origin is not None:
        info[MADE_FROM] = str(origin)
    content = {"info": info, **{key: value for key, value in content.items() if key != "info"}}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)
