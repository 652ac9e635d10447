"""The embedded default data set: images of six kinds of objects in COCO's layout, made from a seed.

Composes images, annotates them and writes the folder; shapes and textures are drawn in shapes.py.
Numpy and Pillow only. Command: `python -m effdet.data.synthetic --out DIR`.

Boxes, areas and masks are of the *visible* part of an object, as COCO's annotators draw them: cut at the image's edge
and by whatever lies in front. Everything painted is annotated; an object that would leave another less than 40 %
visible is not placed. A dense cluster of tiny objects is one annotation with iscrowd = 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from effdet.runtime.console import typed
from effdet.runtime.progress import make_handler, track

from .shapes import KINDS, Patch, make_background, make_colours, make_patch, paint_patch

_log = logging.getLogger(__name__)

# Sparse and not from 1 in steps of 1, so that code which takes a category id for a class index fails here, not later.
CATEGORY_IDS = dict(zip(KINDS, (1, 3, 7, 12, 18, 44), strict=True))
MARKER = "synthetic.json"
_VERSION = 2  # raise it when the same parameters give other images
_SIZES_WH = ((320, 240), (240, 320), (320, 256), (256, 256), (256, 192), (288, 288), (320, 208), (320, 320))
_MIN_VISIBLE = 0.4  # of an object's area, counted over all that lies in front of it and the image's edge
_SHADOW = 0.3


@dataclass(frozen=True)
class Scene:
    """Hold one image and its annotations (COCO dictionaries without id and image_id, in painting order)."""

    pixels: np.ndarray  # uint8 [H, W, 3]
    annotations: list[dict]


class _Canvas:
    """An image being painted, which knows what is on top at every pixel."""

    def __init__(self, height: int, width: int, rng: np.random.Generator):
        self.pixels = make_background(height, width, rng)
        self.owner = np.full((height, width), -1)  # which object is on top, -1 for the background
        self.objects: list[tuple[str, bool, int]] = []  # kind, is a crowd, area in pixels if nothing hid it

    def overlap(self, patch: Patch, x: int, y: int) -> tuple[slice, slice, slice, slice]:
        """Return rows and columns of the image, and of the patch, that meet when the patch's centre is at x, y."""
        n = patch.u.shape[0]
        left, top = x - n // 2, y - n // 2
        height, width = self.owner.shape
        rows = slice(max(top, 0), min(top + n, height))
        columns = slice(max(left, 0), min(left + n, width))
        return rows, columns, slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)

    def fits(self, patch: Patch, x: int, y: int, min_visible: float) -> bool:
        """Tell whether the object and all those it would cover stay visible enough."""
        rows, columns, patch_rows, patch_columns = self.overlap(patch, x, y)
        whole = patch.coverage >= 0.5
        mask = whole[patch_rows, patch_columns]
        if mask.sum() < 0.65 * whole.sum():
            return False
        left = np.bincount(self.owner[self.owner >= 0], minlength=len(self.objects))
        under = self.owner[rows, columns][mask]
        left -= np.bincount(under[under >= 0], minlength=len(self.objects))
        touched = np.unique(under[under >= 0])
        return all(left[i] >= min_visible * self.objects[i][2] for i in touched)

    def paint(self, patch: Patch, x: int, y: int, owner: int, rng: np.random.Generator, shadow: float) -> int:
        """Paint an object as part of object number `owner` and return how many pixels of the image it covers."""
        rows, columns, patch_rows, patch_columns = self.overlap(patch, x, y)
        cover = patch.coverage[patch_rows, patch_columns]
        mask = cover >= 0.5
        under = self.pixels[rows, columns]
        base, accent = make_colours(patch.kind, under[mask].mean(axis=0), rng)
        if shadow:
            self._cast_shadow(patch, x, y, shadow)
        colours = paint_patch(patch, base, accent, rng)[patch_rows, patch_columns]
        under += (colours - under) * cover[..., None]
        self.owner[rows, columns][mask] = owner
        return int(mask.sum())

    def _cast_shadow(self, patch: Patch, x: int, y: int, strength: float) -> None:
        throw = max(1, round(0.07 * patch.radius_px))
        rows, columns, patch_rows, patch_columns = self.overlap(patch, x + throw, y + throw)
        depth = np.clip(0.5 - patch.distance[patch_rows, patch_columns] * patch.radius_px / (2 * throw), 0, 1)
        self.pixels[rows, columns] *= 1 - strength * depth[..., None]


def make_image(seed: int, split: str, index: int) -> Scene:
    """Make one image; the same arguments give the same image, whatever else is made.

    Args:
        seed: of the whole data set, 0 or more.
        split: "train" or "val".
        index: number of the image in its split, from 0. Every 20th image is empty, every 25th has a crowd.
    """
    rng = np.random.default_rng([seed, ("train", "val").index(split), index])
    width, height = _SIZES_WH[rng.integers(len(_SIZES_WH))]
    canvas = _Canvas(height, width, rng)
    wanted = int(rng.choice(np.arange(1, 9), p=(0.05, 0.10, 0.16, 0.19, 0.18, 0.14, 0.10, 0.08)))
    if index % 20 == 7:
        wanted = 0
    if index % 25 == 4:
        _add_crowd(canvas, rng)
        wanted = min(wanted, 3)
    for _ in range(wanted):
        _add_object(canvas, rng)
    pixels = np.round(canvas.pixels * 255).astype(np.uint8)
    annotations = [_annotate(canvas.owner == i, kind, crowd) for i, (kind, crowd, _) in enumerate(canvas.objects)]
    return Scene(pixels, annotations)


def _add_object(canvas: _Canvas, rng: np.random.Generator) -> None:
    kind = KINDS[rng.integers(len(KINDS))]
    height, width = canvas.owner.shape
    small = rng.random() < 0.08
    diameter = np.exp(rng.uniform(np.log(22), np.log(34)) if small else rng.uniform(np.log(38), np.log(160)))
    diameter = min(diameter, 0.7 * min(height, width))
    patch = make_patch(kind, diameter / 2, rng.uniform(0, 2 * np.pi), rng.random())
    min_visible = _MIN_VISIBLE if rng.random() < 0.3 else 0.85  # most objects lie beside each other
    for _ in range(30):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        if canvas.fits(patch, x, y, min_visible):
            area = canvas.paint(patch, x, y, len(canvas.objects), rng, _SHADOW)
            canvas.objects.append((kind, False, area))
            return


def _add_crowd(canvas: _Canvas, rng: np.random.Generator) -> None:
    kind = KINDS[rng.integers(len(KINDS))]
    height, width = canvas.owner.shape
    half_x, half_y = rng.uniform(42, 62), rng.uniform(32, 48)
    middle_x, middle_y = rng.uniform(half_x + 9, width - half_x - 9), rng.uniform(half_y + 9, height - half_y - 9)
    number = len(canvas.objects)
    taken: list[tuple[int, int]] = []
    for _ in range(400):
        turn, away = rng.uniform(0, 2 * np.pi), np.sqrt(rng.random())
        x, y = round(middle_x + half_x * away * np.cos(turn)), round(middle_y + half_y * away * np.sin(turn))
        if all((x - other_x) ** 2 + (y - other_y) ** 2 >= 12**2 for other_x, other_y in taken):
            taken.append((x, y))
            patch = make_patch(kind, rng.uniform(6.5, 8.5), rng.uniform(0, 2 * np.pi), rng.random())
            canvas.paint(patch, x, y, number, rng, _SHADOW)
    canvas.objects.append((kind, True, int((canvas.owner == number).sum())))


def _annotate(mask: np.ndarray, kind: str, crowd: bool) -> dict:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box_xywh = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    return {
        "category_id": CATEGORY_IDS[kind],
        "iscrowd": int(crowd),
        "area": int(mask.sum()),
        "bbox": [int(value) for value in box_xywh],
        "segmentation": {"counts": _run_lengths(mask), "size": list(mask.shape)},
    }


def _run_lengths(mask: np.ndarray) -> list[int]:
    """Return COCO's uncompressed run lengths: column by column, beginning with the zeros (0 when a one comes first)."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs


def make_synthetic_dataset(out_dir: str | Path, seed: int = 0, num_train: int = 400, num_val: int = 100) -> Path:
    """Make the data set in `out_dir`, or return at once when it is already there, complete, from the same parameters.

    The folder appears whole or not at all, also when several processes make it at the same time.

    Args:
        out_dir: folder to make; its parents are made as needed.
        seed: 0 or more; the same seed gives bit-equal json, and bit-equal images with the same Pillow.
        num_train: images in train2017, 1 or more.
        num_val: images in val2017, 1 or more.

    Returns:
        The folder, with annotations/instances_{train,val}2017.json, train2017/, val2017/ and the marker synthetic.json.

    Raises:
        ValueError: a parameter is out of its range.
        FileExistsError: `out_dir` holds anything else, which is left as it is.
    """
    if seed < 0 or num_train < 1 or num_val < 1:
        raise ValueError(
            f"got seed {seed}, num_train {num_train}, num_val {num_val}; allowed are seed >= 0 and 1 or more images"
        )
    out_dir = Path(out_dir)
    parameters = {"version": _VERSION, "seed": seed, "num_train": num_train, "num_val": num_val}
    if _holds_complete_set(out_dir, parameters):
        _log.info("%s already holds this data set", out_dir)
        return out_dir
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as workshop:
        new = Path(workshop) / "set"
        new.mkdir()
        counts = {}
        for split, count in (("train", num_train), ("val", num_val)):
            counts[split] = _write_split(new, split, count, seed)
        (new / MARKER).write_text(json.dumps({"parameters": parameters, "counts": counts}, indent=1) + "\n")
        try:
            new.replace(out_dir)  # onto an empty folder this is allowed, onto anything else it fails
        except OSError:
            if not _holds_complete_set(out_dir, parameters):  # raises with the reason when it holds something else
                raise
    _log.info("made %d + %d images in %s", num_train, num_val, out_dir)
    return out_dir


def _holds_complete_set(out_dir: Path, parameters: dict) -> bool:
    """Return False when there is nothing yet, True for the same complete set, and refuse everything in between."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return False
    remedy = "nothing was changed; choose another folder or move this one away"
    try:
        found = json.loads((out_dir / MARKER).read_text())["parameters"]
    except (OSError, ValueError, KeyError, TypeError):
        raise FileExistsError(f"{out_dir} exists and is not a synthetic data set (no {MARKER}); {remedy}") from None
    if found != parameters:
        raise FileExistsError(f"{out_dir} holds the synthetic data set {found}, asked was {parameters}; {remedy}")
    for split in ("train", "val"):
        have, want = len(list((out_dir / f"{split}2017").glob("*.jpg"))), parameters[f"num_{split}"]
        if have != want or not (out_dir / "annotations" / f"instances_{split}2017.json").is_file():
            raise FileExistsError(f"{out_dir} is damaged: {have} of {want} {split} images, or no json; {remedy}")
    return True


def _write_split(out_dir: Path, split: str, count: int, seed: int) -> dict:
    folder = out_dir / f"{split}2017"
    folder.mkdir()
    images: list[dict] = []
    annotations: list[dict] = []
    for index in track(range(count), f"Drawing {split} images", count, "img"):
        image = make_image(seed, split, index)
        image_id = (1 if split == "train" else 100_001) + index
        name = f"{image_id:012d}.jpg"
        Image.fromarray(image.pixels).save(folder / name, quality=90)
        height, width = image.pixels.shape[:2]
        images.append({"id": image_id, "file_name": name, "width": width, "height": height, "license": 1})
        for number, annotation in enumerate(image.annotations, start=1):
            annotations.append({"id": 100 * image_id + number, "image_id": image_id, **annotation})
    document = {
        "info": {"description": f"synthetic shapes, {split} split, seed {seed}", "version": str(_VERSION)},
        "licenses": [{"id": 1, "name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}],
        "categories": [{"id": id_, "name": kind, "supercategory": "shape"} for kind, id_ in CATEGORY_IDS.items()],
        "images": images,
        "annotations": annotations,
    }
    target = out_dir / "annotations" / f"instances_{split}2017.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(document, separators=(",", ":")))
    return {
        "images": count,
        "empty": count - len({annotation["image_id"] for annotation in annotations}),
        "annotations": len(annotations),
        "crowds": sum(annotation["iscrowd"] for annotation in annotations),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[make_handler(sys.stderr)])
    parser = argparse.ArgumentParser(
        prog=typed("python -m effdet.data.synthetic"),
        description="Make the embedded data set in COCO's layout.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Examples:\n  python -m effdet.data.synthetic --out data/synthetic\n"
        "  python -m effdet.data.synthetic --out tiny --num-train 12 --num-val 4",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another set of images (default 0)")
    parser.add_argument("--num-train", type=int, default=400, metavar="N", help="images for training (default 400)")
    parser.add_argument("--num-val", type=int, default=100, metavar="N", help="images for validation (default 100)")
    options = parser.parse_args(arguments)
    make_synthetic_dataset(options.out, options.seed, options.num_train, options.num_val)
