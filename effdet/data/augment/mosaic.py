"""Training images made of several images of the data set: mosaic and mixup.

The further images are drawn from the whole data set, read, and changed as the first one was (flip and what comes
before it), with the first one's random numbers. All their boxes come along, ignore regions too.

Sources: mosaic after YOLOv4, https://arxiv.org/abs/2004.10934; here each image goes straight from its own size into
its quarter of the network's input, so that every pixel is resampled once. Mixup after Zhang et al., mixup,
https://arxiv.org/abs/1710.09412, and Bag of Freebies for Training Object Detection, https://arxiv.org/abs/1902.04103;
the ratio's distribution is YOLOv5's.
"""

import random
from typing import Any

import numpy as np
from PIL import Image

from effdet.ops.boxes import letterbox_scale, scaled_hw

from ..images import resize_crop
from ..transforms import Compose, RandomResizePadToNumpy, Target, move_boxes

_MIXUP_ALPHA = 32.0  # Beta(32, 32): mostly between 0.4 and 0.6, so that both images can be seen
_SPLIT = (0.3, 0.7)  # where the four quarters of a mosaic meet, as a share of the input's sides


def read_item(dataset: Any, index: int) -> tuple[Image.Image, Target]:
    """Read an item without the transform, also of a subset of a data set."""
    while not hasattr(dataset, "read"):
        dataset, index = dataset.dataset, dataset.indices[index]
    return dataset.read(int(index))


class MosaicMixup:
    """A training transform that sometimes puts four images together, and sometimes blends two.

    Args:
        plain: the transform of one image; its last part is a RandomResizePadToNumpy, which gives size, scale jitter
            and colour of the padding.
        dataset: where further images come from: a `DetectionDatset`, or a subset of one.
        mosaic: probability of a mosaic.
        mixup: probability of blending the result with one further image.

    Raises:
        ValueError: `plain` ends in something else.
    """

    def __init__(self, plain: Compose, dataset: Any, mosaic: float = 0.0, mixup: float = 0.0) -> None:
        *before, self.resize = plain.transforms
        if not isinstance(self.resize, RandomResizePadToNumpy):
            raise ValueError(f"mosaic and mixup need a transform that ends in RandomResizePadToNumpy: {self.resize}")
        self.before = Compose(before)
        self.dataset, self.mosaic, self.mixup = dataset, mosaic, mixup

    @property
    def draws_standard_only(self) -> bool:
        """As `Compose.draws_standard_only`."""
        return self.before.draws_standard_only

    def set_size(self, size_hw: tuple[int, int]) -> None:
        """Choose the output size (height, width) of the images that come next."""
        self.resize.set_size(size_hw)

    def __call__(self, img: Image.Image, target: Target) -> tuple[np.ndarray, Target]:
        """Map an image and its target to the network's input size, alone or together with others."""
        first = self.before(img, target)
        if random.random() < self.mosaic:
            pixels, target = self._put_together([first, *(self._read_another() for _ in range(3))])
        else:
            pixels, target = self.resize(*first)
        if random.random() < self.mixup:
            pixels, target = self._blend(pixels, target, *self.resize(*self._read_another()))
        return pixels, target

    def _read_another(self) -> tuple[Image.Image, Target]:
        return self.before(*read_item(self.dataset, random.randrange(len(self.dataset))))

    def _whole(self, target: Target, parts: list[Target]) -> Target:
        """Return a target with the boxes of all parts, whose image is the whole input."""
        boxes = {key: np.concatenate([part[key] for part in parts]) for key in ("bbox", "cls")}
        return dict(target, **boxes, img_size=self.resize.target_size[::-1], img_scale=1.0)

    def _put_together(self, items: list[tuple[Image.Image, Target]]) -> tuple[np.ndarray, Target]:
        height, width = self.resize.target_size
        middle_y, middle_x = (round(side * random.uniform(*_SPLIT)) for side in (height, width))
        canvas = np.empty((height, width, 3), dtype=np.uint8)
        canvas[:] = self.resize.fill_color
        targets = []
        areas = [(y, x) for y in ((0, middle_y), (middle_y, height)) for x in ((0, middle_x), (middle_x, width))]
        for (img, target), ((y0, y1), (x0, x1)) in zip(items, areas, strict=True):
            part, target = self._fill(img, target, (y1 - y0, x1 - x0))
            canvas[y0 : y0 + part.shape[0], x0 : x0 + part.shape[1]] = part
            target["bbox"] += np.array([y0, x0, y0, x0], dtype=np.float32)
            targets.append(target)
        return canvas.transpose(2, 0, 1), self._whole(targets[0], targets)

    def _fill(self, img: Image.Image, target: Target, size_hw: tuple[int, int]) -> tuple[np.ndarray, Target]:
        """Resize an image as the scale jitter would for the whole input, but so that it fills `size_hw`, and cut it.

        An image so long and thin that it would have to grow past the largest factor leaves a part empty.
        """
        fit = letterbox_scale(img.size[::-1], self.resize.target_size)
        cover = max(side / given for side, given in zip(size_hw, img.size[::-1], strict=True))
        scale = min(max(fit * random.uniform(*self.resize.scale), cover), fit * max(1.0, self.resize.scale[1]))
        scaled = scaled_hw(img.size[::-1], scale)
        if scale >= cover:
            scaled = tuple(max(side, wanted) for side, wanted in zip(scaled, size_hw, strict=True))  # not one row short
        top, left = (int(max(0, side - cut) * random.random()) for side, cut in zip(scaled, size_hw, strict=True))
        bottom, right = min(scaled[0], top + size_hw[0]), min(scaled[1], left + size_hw[1])
        part = resize_crop(img, scaled[::-1], (left, top, right, bottom), random.choice(self.resize.interpolation))
        return part, move_boxes(target, scale, (top, left), (bottom - top, right - left))

    def _blend(
        self, pixels: np.ndarray, target: Target, other: np.ndarray, other_target: Target
    ) -> tuple[np.ndarray, Target]:
        ratio = random.betavariate(_MIXUP_ALPHA, _MIXUP_ALPHA)
        first, second = (Image.fromarray(np.ascontiguousarray(p.transpose(1, 2, 0))) for p in (pixels, other))
        mixed = np.asarray(Image.blend(first, second, ratio)).transpose(2, 0, 1)
        return mixed, self._whole(target, [target, other_target])
