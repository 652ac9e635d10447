"""Draw the first training batch of a run without training: `python -m effdet.show_batch` and train.py's flags."""
from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from . import device as device_layer
from .build import build_dataset, build_train_loader
from .config import get_efficientdet_config
from .config.cli import parse_train_args
from .gallery import draw_training_batch
from .processes import one_line_errors

NUM_PICTURES = 16
FILE_NAME = "first_batch.png"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the first pictures that a run with these settings sees, on the CPU; see `parse_train_args`."""
    cfg = parse_train_args(argv)
    with one_line_errors("show_batch"):
        config = get_efficientdet_config(cfg.model.name)
        if cfg.model.image_size is not None:
            config.image_size = tuple(cfg.model.image_size)
        device = device_layer.pick_device("cpu")
        device_layer.seed_everything(cfg.run.seed)
        dataset = build_dataset(cfg.data, "train", cfg.model.num_classes, None, cfg.data.crowd, cfg.run.seed)
        count = min(NUM_PICTURES, cfg.run.batch_size, len(dataset))
        loader = build_train_loader(dataset, cfg.data, config, count, 0, device, cfg.run.seed, False)
        images, target = next(iter(loader))
        sheet = draw_training_batch(images, target, dataset.parser.category_map.class_names, loader.mean, loader.std)
        path = Path(cfg.run.output) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
        print(f"{count} pictures of {images.shape[-2]}x{images.shape[-1]}: {path}")
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())
