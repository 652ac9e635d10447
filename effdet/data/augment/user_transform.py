"""Transforms that users bring along: a callable of theirs, or an Albumentations pipeline.

A callable takes (Pillow image in RGB, target) and returns the same; the target has `bbox` float32 [n, 4] yxyx in
pixels and `cls` int64 [n]: 1..K, and -2 for an ignore region. What it returns is checked, as a box that has slipped
would go unnoticed. Albumentations itself is not imported here.
"""

import importlib
import importlib.util
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..transforms import Compose, ImageToNumpy, Target, clip_boxes


def load_transform(spec: str) -> Callable:
    """Load a user's transform.

    Args:
        spec: FILE.py:NAME or package.module:NAME; the object of that name is a callable (module docstring) or an
            Albumentations pipeline.

    Returns:
        A transform (image, target) -> (image, target) that checks what the user's returns; other processes that
        get a copy load it anew.

    Raises:
        ValueError: no such file, module or name, or an object that is neither of the two.
    """
    source, colon, name = spec.rpartition(":")
    if not colon or not source or not name:
        raise ValueError(f"transform {spec!r} does not say where it is: give FILE.py:NAME or package.module:NAME")
    found = getattr(_load_module(source, spec), name, None)
    if found is None:
        raise ValueError(f"transform {spec!r}: {source} has nothing called {name!r}")
    return UserTransform(found, spec)


def _load_module(source: str, spec: str) -> Any:
    if not source.endswith(".py"):
        try:
            return importlib.import_module(source)
        except ModuleNotFoundError as error:
            raise ValueError(f"transform {spec!r}: {error}. Give a module that can be imported, or a file") from error
    path = Path(source).resolve()
    if not path.is_file():
        raise ValueError(f"transform {spec!r}: there is no file {path}")
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(path.stem, path))
    before = list(sys.path)
    sys.path.insert(0, str(path.parent))  # so that the file can import its neighbours
    try:
        module.__spec__.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


class UserTransform:
    """Run a user's callable or Albumentations pipeline on an image and its target, and check the result.

    Albumentations pipelines have random numbers of their own: they are seeded anew for each image, from the `random`
    module, so that the data set's seed decides over them too.

    Args:
        transform: the callable or the pipeline.
        spec: what the user called it, for messages and for other processes.

    Raises:
        ValueError: not callable, or a pipeline whose boxes are declared in another way than here.
    """

    def __init__(self, transform: Any, spec: str = "") -> None:
        self.transform = transform
        self.spec = spec
        if isinstance(transform, type) or not callable(transform):
            raise ValueError(
                f"transform {self} is {transform!r}; needed is a callable (image, target) -> (image, "
                "target) or an Albumentations pipeline"
            )
        self.is_pipeline = is_pipeline(transform)
        if self.is_pipeline:
            _check_pipeline(transform, str(self))

    def __str__(self) -> str:
        return repr(self.spec or getattr(self.transform, "__name__", type(self.transform).__name__))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.spec:  # what a file holds cannot be found by its module's name in another process
            return load_transform, (self.spec,)
        return UserTransform, (self.transform,)

    def __call__(self, img: Image.Image, target: Target) -> tuple[Image.Image, Target]:
        """Run it on an image and its target; ValueError when what comes back cannot be trained on."""
        result = self._run_pipeline(img, target) if self.is_pipeline else self.transform(img, target)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], dict):
            raise ValueError(f"transform {self} returned {type(result).__name__}; needed is (image, target)")
        img, target = result
        if isinstance(img, np.ndarray) and img.dtype == np.uint8 and img.ndim == 3 and img.shape[2] == 3:
            img = Image.fromarray(img)
        if not isinstance(img, Image.Image) or img.mode != "RGB":
            raise ValueError(
                f"transform {self} returned the image {img!r:.80}; needed is a Pillow image in mode "
                "RGB or a uint8 array [height, width, 3]"
            )
        target = dict(target, img_size=img.size)
        if "bbox" in target:
            target["bbox"], target["cls"] = self._check_boxes(target["bbox"], target.get("cls"), img)
        return img, target

    def _check_boxes(self, boxes: Any, classes: Any, img: Image.Image) -> tuple[np.ndarray, np.ndarray]:
        boxes, classes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4), np.asarray(classes, dtype=np.int64)
        if len(boxes) != len(classes) or not np.isfinite(boxes).all():
            raise ValueError(
                f"transform {self} returned {len(boxes)} boxes and {classes.size} labels; needed is one "
                "label a box, and finite numbers"
            )
        boxes = clip_boxes(boxes, (img.height, img.width))
        keep = (boxes[:, :2] < boxes[:, 2:]).all(1)
        return boxes[keep], classes[keep]

    def _run_pipeline(self, img: Image.Image, target: Target) -> tuple[Any, Target]:
        if hasattr(self.transform, "set_random_seed"):  # older releases draw from `random` and numpy
            self.transform.set_random_seed(random.getrandbits(32))
        boxes = clip_boxes(target["bbox"], (img.height, img.width))[:, [1, 0, 3, 2]]
        result = self.transform(image=np.asarray(img), bboxes=boxes, cls=target["cls"])
        boxes = np.asarray(result["bboxes"], dtype=np.float32).reshape(-1, 4)
        return result["image"], dict(target, bbox=boxes[:, [1, 0, 3, 2]], cls=np.asarray(result["cls"], dtype=np.int64))


def is_pipeline(transform: Any) -> bool:
    """Tell whether something is an Albumentations pipeline (also of AlbumentationsX, which has the same names)."""
    return any(base.__module__.partition(".")[0] == "albumentations" for base in type(transform).__mro__)


def pipeline_transform(pipeline: Any) -> Compose:
    """Make a whole training transform of a pipeline that gives images of one size: uint8 numpy [3, H, W]."""
    return Compose([UserTransform(pipeline), ImageToNumpy()])


def _check_pipeline(pipeline: Any, name: str) -> None:
    params = getattr(getattr(pipeline, "processors", {}).get("bboxes"), "params", None)
    if getattr(params, "format", None) != "pascal_voc" or list(getattr(params, "label_fields", None) or []) != ["cls"]:
        raise ValueError(
            f"the Albumentations pipeline {name} must be a Compose with bbox_params=BboxParams("
            "format='pascal_voc', label_fields=['cls']), so that the boxes move with the image"
        )
