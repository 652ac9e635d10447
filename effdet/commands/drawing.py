"""The work of demo.py: find images and a checkpoint, detect, draw, and write what was found."""

from __future__ import annotations

import contextlib
import glob
import logging
from collections import Counter
from pathlib import Path

from PIL import Image

from effdet.checkpoint.io import JsonList, ensure_writable, replacing
from effdet.checkpoint.manager import find_newest_checkpoint
from effdet.config.schema import DemoConfig
from effdet.data.corrupt import BadImagesError
from effdet.data.images import ImageError, image_suffixes, images_in, read_image
from effdet.predict.detections import Detections
from effdet.predict.load import build_predictor, load_detector
from effdet.report.draw import draw_detections, make_class_colors
from effdet.runtime import signals

_logger = logging.getLogger("effdet.demo")

DEFAULT_DATA = Path("data/synthetic")
DEFAULT_IMAGES = 12
RESULTS_NAME = "detections.json"
SOME_BAD_STATUS = 3


def detect_and_draw(cfg: DemoConfig) -> int:
    """Detect objects in the images that the config names, draw them, and write them to detections.json as they come.

    Returns:
        The exit status: 0, or 3 where images could not be read and were passed over.

    Raises:
        BadImagesError: more than are allowed cannot be read. StopRequested: a signal came. Both leave what was found
            until then.
    """
    if cfg.run.max_image_pixels is not None:
        Image.MAX_IMAGE_PIXELS = -(-cfg.run.max_image_pixels // 2)  # Pillow refuses from twice this on
    output_dir = Path(cfg.run.output)
    checkpoint = find_checkpoint(cfg)
    ensure_writable(output_dir / RESULTS_NAME, "--output")
    paths = find_images(cfg.run.images, cfg.run.recursive, output_dir)
    targets = name_drawings(paths, output_dir)
    detector = load_detector(checkpoint, cfg.model, cfg.run.use_ema)
    predictor = build_predictor(
        detector,
        cfg.model,
        cfg.run.device,
        cfg.run.batch_size,
        cfg.run.tta_flip,
        cfg.run.tta_scales,
        npu_defaults=cfg.run.npu_defaults,
    )
    colors = make_class_colors(detector.category_map.class_names) if detector.category_map else None
    threshold, line = predictor.threshold_to_show(cfg.run.score_thr)
    _logger.info("%s", detector.source)
    _logger.info("%s", line)
    bad = drawn = 0
    output_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(JsonList(output_dir / RESULTS_NAME)) as results:
        for start in range(0, len(paths), cfg.run.batch_size):
            if signals.requested():
                _logger.info("%d of %d image(s) done, see %s", drawn, len(paths), output_dir)
                raise signals.StopRequested(signals.requested())
            part = slice(start, start + cfg.run.batch_size)
            images = [(path, target, _read(path)) for path, target in zip(paths[part], targets[part], strict=True)]
            batch = [(path, target, image) for path, target, image in images if image is not None]
            bad += len(images) - len(batch)
            if cfg.run.max_bad_images is not None and bad > cfg.run.max_bad_images:
                raise BadImagesError(
                    f"{bad} image(s) cannot be read, {cfg.run.max_bad_images} are allowed (--max-bad-images). {drawn} "
                    f"of {len(paths)} are done, see {output_dir}."
                )
            found = predictor.predict([image for *_, image in batch], threshold)
            results.add(
                [
                    write_image(path, image, objects, colors, target)
                    for (path, target, image), objects in zip(batch, found, strict=True)
                ]
            )
            drawn += len(batch)
    _logger.info("%d image(s) drawn into %s, numbers in %s", drawn, output_dir, output_dir / RESULTS_NAME)
    if bad:
        _logger.warning("%d of %d image(s) could not be read, see above", bad, len(paths))
    return SOME_BAD_STATUS if bad else 0


def _read(path: Path) -> Image.Image | None:
    """Read an image upright; log why it cannot be read and return None."""
    try:
        return read_image(path, upright=True)
    except ImageError as error:
        _logger.warning("passed over: %s", error)
        return None


def find_images(names: list[str], recursive: bool = False, output_dir: Path | None = None) -> list[Path]:
    """Return the image files that the arguments name: files, folders and glob patterns.

    Args:
        names: the arguments; none stands for images of the embedded data set.
        recursive: search folders within folders.
        output_dir: left out of that search, as it may hold what an earlier run drew.

    Raises:
        FileNotFoundError: an argument names no image; OSError: the embedded data set cannot be made here.
    """
    if not names:
        return _default_images()
    found: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = images_in(path, recursive, output_dir)
        elif path.is_file():
            inside = [path]
        else:
            inside = [Path(match) for match in sorted(glob.glob(name, recursive=recursive)) if Path(match).is_file()]
        if not inside:
            raise FileNotFoundError(
                f"no image found for '{name}': {_images_below(path)}give an existing file, a folder with images "
                f"({', '.join(sorted(image_suffixes()))}) or a glob pattern in quotes"
            )
        found += inside
    return list(dict.fromkeys(found))


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


def find_checkpoint(cfg: DemoConfig) -> str:
    """Return the checkpoint asked for, else the newest one of `make train` or train.py."""
    if cfg.run.checkpoint:
        return cfg.run.checkpoint
    newest = find_newest_checkpoint(["runs", "output"])
    if newest is None:
        raise FileNotFoundError(
            "no checkpoint under runs/ or output/: train one with `make train`, or name one with --checkpoint FILE"
        )
    return str(newest)


def name_drawings(paths: list[Path], output_dir: Path) -> list[Path]:
    """Return the file for each image's drawing; images of one name (a.jpg and a.png, two folders) get numbers."""
    sources = {path.resolve() for path in paths}
    targets: dict[Path, None] = {}  # in order
    numbers: Counter[str] = Counter()
    for path in paths:
        numbers[path.stem] += 1
        target = output_dir / (
            f"{path.stem}.png" if numbers[path.stem] == 1 else f"{path.stem}_{numbers[path.stem]}.png"
        )
        while target in targets:
            numbers[path.stem] += 1
            target = output_dir / f"{path.stem}_{numbers[path.stem]}.png"
        if target.resolve() in sources:
            raise ValueError(f"the drawn image would replace {target}: choose another --output")
        targets[target] = None
    return list(targets)


def write_image(path: Path, image: Image.Image, found: Detections, colors: dict | None, target: Path) -> dict:
    """Draw one image's detections, print them, and return them for the json."""
    drawn = draw_detections(image, found.boxes_xyxy, found.names, found.scores.tolist(), colors)
    with replacing(target) as temporary:
        drawn.save(temporary, "PNG")
    _logger.info("%s: %d object(s)", path, len(found))
    objects = []
    for name, category_id, score, box in zip(
        found.names, found.category_ids.tolist(), found.scores.tolist(), found.boxes_xyxy.tolist(), strict=True
    ):
        _logger.info("  %-20s %.3f  x %6.1f .. %6.1f  y %6.1f .. %6.1f", name, score, box[0], box[2], box[1], box[3])
        objects.append(
            {
                "category_id": category_id,
                "name": name,
                "score": score,
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            }
        )
    return {"file": str(path), "width": image.width, "height": image.height, "drawn": str(target), "objects": objects}
