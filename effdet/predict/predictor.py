"""Detect objects in images: a network, the preprocessing it was trained with, and names for its classes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from effdet.bench import DetBenchPredict
from effdet.data import ResizePad, resolve_fill_color, resolve_input_config
from effdet.data.coco.categories import CategoryMap
from effdet.data.images import images_in, read_image, to_rgb
from effdet.runtime.device import to_device, use_channels_last

from .detections import Detections

ImageInput = str | PathLike[str] | Image.Image | np.ndarray
Images = ImageInput | Iterable[ImageInput]

RECOMMENDED = "recommended"
USUAL_THRESHOLD = 0.4  # for showing what was found, where nothing is known of the network


class Predictor:
    """Run a network on images of any size; the same images in the same order give the same result, bit for bit."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        category_map: CategoryMap | None = None,
        batch_size: int = 1,
        bench: nn.Module | None = None,
        upright: bool = True,
        score_threshold: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepare a network for prediction.

        Args:
            model: an EfficientDet with weights; moved to the device and put into eval mode.
            device: where to run.
            category_map: names and category ids of the classes; without it a class is called by its number.
            batch_size: images predicted together.
            bench: what runs the network, a DetBenchPredict or a stand-in for one; None makes one.
            upright: turn photographs as their EXIF orientation says, so that boxes are in the coordinates that a viewer
                shows; False takes the pixels as they are stored.
            score_threshold: the recommended ones, as a checkpoint has them (checkpoint/manager.py); None: not known.
        """
        self.score_threshold = score_threshold
        self.device = device
        self.batch_size = batch_size
        self.upright = upright
        self.category_map = category_map
        self._layout = torch.channels_last if use_channels_last(device) else torch.contiguous_format
        bench = DetBenchPredict(model, drop_empty=True) if bench is None else bench
        bench.to(device, memory_format=self._layout)  # type: ignore[call-overload]  # torch's overloads lack the layout
        self.bench = bench.eval()
        config: Any = model.config
        self.num_classes: int = config.num_classes
        inputs = resolve_input_config({"interpolation": "bilinear"}, config)
        self._resize = ResizePad(
            inputs["input_size"][1:], inputs["interpolation"], resolve_fill_color(inputs["fill_color"], inputs["mean"])
        )
        self._mean = torch.tensor([255 * value for value in inputs["mean"]], device=device).view(1, 3, 1, 1)
        self._std = torch.tensor([255 * value for value in inputs["std"]], device=device).view(1, 3, 1, 1)

    def name_of(self, class_idx: int) -> str:
        """Return the name of a class, or 'class N' (from 1) when the weights came without names."""
        return f"class {class_idx + 1}" if self.category_map is None else self.category_map.class_names[class_idx]

    def category_id_of(self, class_idx: int) -> int:
        """Return the category id of a class, or its number from 1 when the weights came without names."""
        return class_idx + 1 if self.category_map is None else int(self.category_map.idx_to_id[class_idx])

    @property
    def class_names(self) -> list[str]:
        """Names of all classes in the network's order."""
        return [self.name_of(index) for index in range(self.num_classes)]

    def threshold_to_show(self, given: float | None) -> tuple[float | str, str]:
        """Return the threshold for showing what was found, and a line about it: given, recommended or usual."""
        if given is not None:
            return given, f"score threshold {given:g}, as given"
        if self.score_threshold is None:
            return USUAL_THRESHOLD, f"score threshold {USUAL_THRESHOLD:g}: the weights recommend none"
        own = [value for value in self.score_threshold["classes"] if value is not None]
        spread = f", {min(own):.3f} to {max(own):.3f} for classes with one of their own" if own else ""
        return RECOMMENDED, f"score threshold {self.score_threshold['all']:.3f}{spread}: best F1 in the evaluation"

    def predict(self, images: Images, score_threshold: float | str = 0.0) -> list[Detections]:
        """Detect objects.

        Args:
            images: one image or several, of any size: a path, a Pillow image, or uint8 pixels [height, width, 3] in RGB
                or [height, width] in gray; a folder stands for the images in it. Any iterable will do, and is read
                batch by batch; a Pillow image gives what its file does.
            score_threshold: detections below are left out; "recommended" takes what gave the best F1 when the
                checkpoint was evaluated, for each class with ten objects or more its own.

        Returns:
            A list with one result for each image, in order.

        Raises:
            ImageError: a file that cannot be read; TypeError, ValueError: something that is no image; ValueError: the
                weights recommend no threshold.
        """
        return list(self.predict_iter(images, score_threshold))

    @torch.no_grad()
    def predict_iter(self, images: Images, score_threshold: float | str = 0.0) -> Iterator[Detections]:
        """Yield what `predict` returns, each batch as soon as it is done; memory stays that of a batch."""
        lowest = self._lowest(score_threshold)
        listed = iter(_each_image(images))
        while batch := list(itertools.islice(listed, self.batch_size)):
            arrays: list[torch.Tensor] = []
            info: dict[str, list[Any]] = {"img_scale": [], "img_size": []}
            sizes: list[tuple[int, int]] = []
            for item in batch:
                image = _to_rgb_image(item, self.upright)
                target: dict[str, Any] = {}
                resized, target = self._resize(image, target)
                arrays.append(torch.from_numpy(np.array(resized)).permute(2, 0, 1))
                info["img_scale"].append(float(target["img_scale"]))
                info["img_size"].append([float(side) for side in image.size])
                sizes.append(image.size)
            batched = to_device(torch.stack(arrays), self.device).float().sub(self._mean).div_(self._std)
            batched = batched.contiguous(memory_format=self._layout)
            img_info = {key: to_device(torch.tensor(value), self.device) for key, value in info.items()}
            found = self.bench(batched, img_info).cpu().numpy()
            for rows, item, size in zip(found, batch, sizes, strict=True):
                rows = rows[rows[:, 4] > 0]
                rows[:, 5] -= 1
                rows = rows[rows[:, 4] >= lowest[rows[:, 5].astype(np.int64)]]
                yield Detections(
                    rows[:, :4],
                    rows[:, 4],
                    [self.name_of(int(idx)) for idx in rows[:, 5]],
                    np.array([self.category_id_of(int(idx)) for idx in rows[:, 5]], dtype=np.int64),
                    size,
                    str(item) if isinstance(item, (str, PathLike)) else None,
                )

    def _lowest(self, score_threshold: float | str) -> np.ndarray:
        """Return the score from which each class counts, float32 [K]."""
        if not isinstance(score_threshold, str):
            return np.full(self.num_classes, score_threshold, dtype=np.float32)
        if score_threshold != RECOMMENDED:
            raise ValueError(f'score_threshold is "{score_threshold}": give a number, or "{RECOMMENDED}"')
        if self.score_threshold is None:
            raise ValueError(
                "the weights recommend no score threshold (checkpoints of train.py do, once evaluated): give a number"
            )
        together = self.score_threshold["all"]
        return np.array([together if own is None else own for own in self.score_threshold["classes"]], np.float32)


def _each_image(images: Any) -> Iterable[ImageInput]:
    """Yield single images: a folder's by name, those of an iterable, or the one given."""
    if isinstance(images, (str, PathLike)):
        return images_in(Path(images)) if Path(images).is_dir() else [images]
    if isinstance(images, Image.Image) or getattr(images, "ndim", None) in (2, 3):
        return [images]
    return itertools.chain.from_iterable(
        _each_image(one) if isinstance(one, (str, PathLike)) else [one] for one in images
    )


def _to_rgb_image(image: ImageInput, upright: bool) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(image, upright)
    if isinstance(image, (str, PathLike)):
        return read_image(image, upright=upright)
    if not isinstance(image, np.ndarray):
        raise TypeError(f"an image is a {type(image).__name__}: give a path, a Pillow image or a numpy array")
    if image.dtype != np.uint8 or image.size == 0 or not (image.ndim == 2 or image.ndim == 3 and image.shape[2] == 3):
        raise ValueError(
            f"an image is an array {image.dtype} {list(image.shape)}: give uint8 [height, width, 3] "
            "in RGB order, or [height, width] in gray"
        )
    return Image.fromarray(image).convert("RGB")
