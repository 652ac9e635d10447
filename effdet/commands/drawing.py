"""The work of demo.py: find images and a checkpoint, detect, draw, and write what was found."""

from __future__ import annotations

import glob
import logging
from pathlib import Path

from PIL import Image

from effdet.checkpoint.io import write_json
from effdet.checkpoint.manager import find_newest_checkpoint
from effdet.config.schema import DemoConfig
from effdet.data.images import read_image
from effdet.predict.load import build_predictor, load_detector
from effdet.predict.predictor import Detections
from effdet.report.draw import draw_detections, make_class_colors

_logger = logging.getLogger("effdet.demo")

DEFAULT_DATA = Path("data/synthetic")
DEFAULT_IMAGES = 12
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}


def detect_and_draw(cfg: DemoConfig) -> None:
    """Detect objects in the images that the config names, draw them, and write them to detections.json."""
    checkpoint = find_checkpoint(cfg)
    paths = find_images(cfg.run.images)
    detector = load_detector(checkpoint, cfg.model, cfg.run.use_ema)
    predictor = build_predictor(
        detector, cfg.model, cfg.run.device, cfg.run.batch_size, cfg.run.tta_flip, cfg.run.tta_scales
    )
    colors = make_class_colors(detector.category_map.class_names) if detector.category_map else None
    output_dir = Path(cfg.run.output)
    output_dir.mkdir(parents=True, exist_ok=True)
    targets = name_drawings(paths, output_dir)
    _logger.info("%s", detector.source)
    results = []
    for start in range(0, len(paths), cfg.run.batch_size):
        batch = paths[start : start + cfg.run.batch_size]
        images = [read_image(path) for path in batch]
        found = predictor.predict(images, cfg.run.score_thr)
        for path, image, objects in zip(batch, images, found, strict=True):
            results.append(write_image(path, image, objects, colors, targets[len(results)]))
    write_json(output_dir / "detections.json", results)
    _logger.info("%d image(s) drawn into %s, numbers in %s", len(results), output_dir, output_dir / "detections.json")


def find_images(names: list[str]) -> list[Path]:
    """Return the image files that the arguments name: files, folders (searched, not deeply) and glob patterns."""
    if not names:
        from effdet.data.synthetic.dataset import make_synthetic_dataset

        folder = make_synthetic_dataset(DEFAULT_DATA) / "val2017"
        return sorted(folder.iterdir())[:DEFAULT_IMAGES]
    found: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in SUFFIXES)
        elif path.is_file():
            inside = [path]
        else:
            inside = [Path(match) for match in sorted(glob.glob(name)) if Path(match).is_file()]
        if not inside:
            raise FileNotFoundError(
                f"no image found for '{name}': give an existing file, a folder with images "
                f"({', '.join(sorted(SUFFIXES))}) or a glob pattern in quotes"
            )
        found += inside
    return list(dict.fromkeys(found))


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
    targets: list[Path] = []
    for path in paths:
        target, number = output_dir / f"{path.stem}.png", 1
        while target in targets:
            number += 1
            target = output_dir / f"{path.stem}_{number}.png"
        if target.resolve() in sources:
            raise ValueError(f"the drawn image would replace {target}: choose another --output")
        targets.append(target)
    return targets


def write_image(path: Path, image: Image.Image, found: Detections, colors: dict | None, target: Path) -> dict:
    """Draw one image's detections, print them, and return them for the json."""
    draw_detections(image, found.boxes_xyxy, found.names, found.scores.tolist(), colors).save(target)
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
