"""A small data set to break, and the doors that broken ones are carried through."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effdet.config.schema import DataConfig
from effdet.data import create_loader
from effdet.data.build import build_dataset

ANN = "annotations/instances_train2017.json"
NOBODY = 65534


def read_ann(root: Path) -> dict[str, Any]:
    return json.loads((root / ANN).read_text())


def write_ann(root: Path, content: Any) -> None:
    """Write the training annotations: bytes and texts as they are, anything else as json."""
    if not isinstance(content, (bytes, str)):
        content = json.dumps(content)
    (root / ANN).write_bytes(content.encode() if isinstance(content, str) else content)


def copy_set(source: Path, root: Path) -> Path:
    return Path(shutil.copytree(source, root, dirs_exist_ok=True))


def open_split(root: Path, split: str = "train", **options: Any) -> Any:
    """Open the training annotations as train.py does, for training or, with the same files, for evaluation."""
    files = {"val_images": str(root / "train2017"), "val_ann": str(root / ANN)} if split == "val" else {}
    return build_dataset(DataConfig(root=str(root), **files, **options.pop("data", {})), split, **options)


def load_all(dataset: Any, training: bool = True, workers: int = 0) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Load a data set once, image by image, and check what every batch must be."""
    loader = create_loader(
        dataset,
        64,
        1,
        is_training=training,
        num_workers=workers,
        device="cpu",
        drop_last=True,
        persistent_workers=True,
        seed=0,
    )
    batches = []
    for images, target in loader:
        assert images.shape == (1, 3, 64, 64) and torch.isfinite(images).all()
        boxes, labels = target["bbox"], target["cls"]
        assert torch.isfinite(boxes).all() and (boxes[labels > 0] >= 0).all() and (boxes[labels > 0] <= 64).all()
        batches.append((images, {key: value.clone() for key, value in target.items()}))
    assert len(batches) == len(dataset)
    return batches


def labels_of(dataset: Any) -> np.ndarray:
    return np.concatenate([dataset.parser.get_ann_info(index)["cls"] for index in range(len(dataset))])


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Within the block, be a user for whom file modes hold; root ignores them."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
