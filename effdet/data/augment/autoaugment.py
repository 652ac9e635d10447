"""AutoAugment for detection: learned lists of operations on an image and on what is in its boxes.

One list of the policy is drawn for an image; its steps (operation, probability, level 0..10) follow one another, each
with its probability. Operations whose name ends in `_BBox` move the boxes with the image. Those in `_Only_BBoxes` run
inside each box on its own, with a third of the probability, and leave boxes and labels alone.

Source: policies, levels and constants of Zoph et al., Learning Data Augmentation Strategies for Object Detection,
https://arxiv.org/abs/1906.11172, as published with EfficientDet (google/automl, efficientdet/aug/autoaugment.py). The
paper's own policy is v0. Different here: a moved box is cut to what is inside the image, and goes when nothing is
(published: the extent of its corners, and one that has left the image grows at the edge); Posterize keeps at least
one bit (published: level 2 gives a black image); Contrast blends with the image's mean gray (published: with its
number of pixels / 256).
"""

import random
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from ..transforms import Target, draws_standard
from . import affine

Step = tuple[str, float, int]

_GRAY = (128, 128, 128)
_MAX_LEVEL = 10

_V0: list[list[Step]] = [
    [("TranslateX_BBox", 0.6, 4), ("Equalize", 0.8, 10)],
    [("TranslateY_Only_BBoxes", 0.2, 2), ("Cutout", 0.8, 8)],
    [("Sharpness", 0.0, 8), ("ShearX_BBox", 0.4, 0)],
    [("ShearY_BBox", 1.0, 2), ("TranslateY_Only_BBoxes", 0.6, 6)],
    [("Rotate_BBox", 0.6, 10), ("Color", 1.0, 6)],
]
POLICIES: dict[str, list[list[Step]]] = {
    "v0": _V0,
    "v1": [
        *_V0,
        [("Color", 0.0, 0), ("ShearX_Only_BBoxes", 0.8, 4)],
        [("ShearY_Only_BBoxes", 0.8, 2), ("Flip_Only_BBoxes", 0.0, 10)],
        [("Equalize", 0.6, 10), ("TranslateX_BBox", 0.2, 2)],
        [("Color", 1.0, 10), ("TranslateY_Only_BBoxes", 0.4, 6)],
        [("Rotate_BBox", 0.8, 10), ("Contrast", 0.0, 10)],
        [("Cutout", 0.2, 2), ("Brightness", 0.8, 10)],
        [("Color", 1.0, 6), ("Equalize", 1.0, 2)],
        [("Cutout_Only_BBoxes", 0.4, 6), ("TranslateY_Only_BBoxes", 0.8, 2)],
        [("Color", 0.2, 8), ("Rotate_BBox", 0.8, 10)],
        [("Sharpness", 0.4, 4), ("TranslateY_Only_BBoxes", 0.0, 4)],
        [("Sharpness", 1.0, 4), ("SolarizeAdd", 0.4, 4)],
        [("Rotate_BBox", 1.0, 8), ("Sharpness", 0.2, 8)],
        [("ShearY_BBox", 0.6, 10), ("Equalize_Only_BBoxes", 0.6, 8)],
        [("ShearX_BBox", 0.2, 6), ("TranslateY_Only_BBoxes", 0.2, 10)],
        [("SolarizeAdd", 0.6, 8), ("Brightness", 0.8, 10)],
    ],
    "v2": [
        [("Color", 0.0, 6), ("Cutout", 0.6, 8), ("Sharpness", 0.4, 8)],
        [("Rotate_BBox", 0.4, 8), ("Sharpness", 0.4, 2), ("Rotate_BBox", 0.8, 10)],
        [("TranslateY_BBox", 1.0, 8), ("AutoContrast", 0.8, 2)],
        [("AutoContrast", 0.4, 6), ("ShearX_BBox", 0.8, 8), ("Brightness", 0.0, 10)],
        [("SolarizeAdd", 0.2, 6), ("Contrast", 0.0, 10), ("AutoContrast", 0.6, 0)],
        [("Cutout", 0.2, 0), ("Solarize", 0.8, 8), ("Color", 1.0, 4)],
        [("TranslateY_BBox", 0.0, 4), ("Equalize", 0.6, 8), ("Solarize", 0.0, 10)],
        [("TranslateY_BBox", 0.2, 2), ("ShearY_BBox", 0.8, 8), ("Rotate_BBox", 0.8, 8)],
        [("Cutout", 0.8, 8), ("Brightness", 0.8, 8), ("Cutout", 0.2, 2)],
        [("Color", 0.8, 4), ("TranslateY_BBox", 1.0, 6), ("Rotate_BBox", 0.6, 6)],
        [("Rotate_BBox", 0.6, 10), ("BBox_Cutout", 1.0, 4), ("Cutout", 0.2, 8)],
        [("Rotate_BBox", 0.0, 0), ("Equalize", 0.6, 6), ("ShearY_BBox", 0.6, 8)],
        [("Brightness", 0.8, 8), ("AutoContrast", 0.4, 2), ("Brightness", 0.2, 2)],
        [("TranslateY_BBox", 0.4, 8), ("Solarize", 0.4, 6), ("SolarizeAdd", 0.2, 10)],
        [("Contrast", 1.0, 10), ("SolarizeAdd", 0.2, 8), ("Equalize", 0.2, 4)],
    ],
    "v3": [
        [("Posterize", 0.8, 2), ("TranslateX_BBox", 1.0, 8)],
        [("BBox_Cutout", 0.2, 10), ("Sharpness", 1.0, 8)],
        [("Rotate_BBox", 0.6, 8), ("Rotate_BBox", 0.8, 10)],
        [("Equalize", 0.8, 10), ("AutoContrast", 0.2, 10)],
        [("SolarizeAdd", 0.2, 2), ("TranslateY_BBox", 0.2, 8)],
        [("Sharpness", 0.0, 2), ("Color", 0.4, 8)],
        [("Equalize", 1.0, 8), ("TranslateY_BBox", 1.0, 8)],
        [("Posterize", 0.6, 2), ("Rotate_BBox", 0.0, 10)],
        [("AutoContrast", 0.6, 0), ("Rotate_BBox", 1.0, 6)],
        [("Equalize", 0.0, 4), ("Cutout", 0.8, 10)],
        [("Brightness", 1.0, 2), ("TranslateY_BBox", 1.0, 6)],
        [("Contrast", 0.0, 2), ("ShearY_BBox", 0.8, 0)],
        [("AutoContrast", 0.8, 10), ("Contrast", 0.2, 10)],
        [("Rotate_BBox", 1.0, 10), ("Cutout", 1.0, 10)],
        [("SolarizeAdd", 0.8, 6), ("Equalize", 0.8, 8)],
    ],
}

# Largest shift and largest half side of a cut-out in pixels, for the whole image and inside a box.
_SHIFT_PX = {"": 250, "Only_BBoxes": 120}
_CUTOUT_PX = {"": 100, "Only_BBoxes": 50}
_BOX_CUTOUT_SHARE = 0.75  # largest cut-out of BBox_Cutout, as a share of the box's sides


def _signed(value: float) -> float:
    return value if random.random() < 0.5 else -value


def _matrix(operation: str, share: float, scope: str, size_wh: tuple[int, int]) -> affine.Matrix | None:
    """Draw the map of a geometric operation; None for any other."""
    if operation == "TranslateX":
        return affine.translation(_signed(share * _SHIFT_PX[scope]), 0)
    if operation == "TranslateY":
        return affine.translation(0, _signed(share * _SHIFT_PX[scope]))
    if operation == "ShearX":
        return affine.shear_x(_signed(share * 0.3))
    if operation == "ShearY":
        return affine.shear_y(_signed(share * 0.3))
    if operation == "Rotate":
        return affine.rotation(_signed(share * 30), size_wh)
    return None


_ENHANCERS = {
    "Color": ImageEnhance.Color,
    "Contrast": ImageEnhance.Contrast,
    "Brightness": ImageEnhance.Brightness,
    "Sharpness": ImageEnhance.Sharpness,
}


def _recolor(operation: str, share: float, img: Image.Image) -> Image.Image:
    """Run an operation that leaves every object where it is."""
    if operation in _ENHANCERS:
        return _ENHANCERS[operation](img).enhance(share * 1.8 + 0.1)
    if operation == "AutoContrast":
        return ImageOps.autocontrast(img)
    if operation == "Equalize":
        return ImageOps.equalize(img)
    if operation == "Posterize":
        return ImageOps.posterize(img, max(1, int(share * 4)))
    if operation == "Solarize":
        return ImageOps.solarize(img, int(share * 256))
    if operation == "SolarizeAdd":
        added = int(share * 110)
        return img.point([min(255, value + added) if value < 128 else value for value in range(256)] * 3)
    if operation == "Flip":
        return img.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    raise ValueError(f"AutoAugment has no operation {operation!r}")


def _cut_out(img: Image.Image, within: tuple[int, int, int, int], half_wh: tuple[int, int]) -> Image.Image:
    """Turn a rectangle gray whose centre is drawn from `within` (left, top, right, bottom)."""
    left, top, right, bottom = within
    x, y = random.randrange(left, max(right, left + 1)), random.randrange(top, max(bottom, top + 1))
    half_w, half_h = half_wh
    area = max(0, x - half_w), max(0, y - half_h), min(img.width, x + half_w), min(img.height, y + half_h)
    if area[0] < area[2] and area[1] < area[3]:
        img = img.copy()
        img.paste(_GRAY, area)
    return img


def _pixels_of(box_yxyx: np.ndarray, img: Image.Image) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of the pixels a box touches; at least one of the image's."""
    y0, x0, y1, x1 = box_yxyx.tolist()
    left, top = min(max(0, int(x0)), img.width - 1), min(max(0, int(y0)), img.height - 1)
    return left, top, max(left + 1, min(img.width, -int(-x1 // 1))), max(top + 1, min(img.height, -int(-y1 // 1)))


def _apply(operation: str, share: float, scope: str, img: Image.Image) -> Image.Image:
    """Run an operation on an image or on a box's part of one."""
    if operation == "Cutout":
        half = int(share * _CUTOUT_PX[scope])
        return _cut_out(img, (0, 0, *img.size), (half, half))
    matrix = _matrix(operation, share, scope, img.size)
    return _recolor(operation, share, img) if matrix is None else affine.warp_image(img, matrix, _GRAY)


def run_step(step: Step, img: Image.Image, target: Target) -> tuple[Image.Image, Target]:
    """Run one step of a policy, with its probability.

    Args:
        step: (name of the operation, probability, level 0..10).
        img: in mode RGB.
        target: with `bbox` and `cls` or without.
    """
    name, probability, level = step
    operation, _, scope = name.partition("_")
    share = level / _MAX_LEVEL
    boxes = target["bbox"][target["cls"] > 0] if "bbox" in target else np.zeros((0, 4), np.float32)
    if scope == "Only_BBoxes":
        for k in random.sample(range(len(boxes)), len(boxes)):
            if random.random() < probability / 3:
                area = _pixels_of(boxes[k], img)
                img = img.copy()
                img.paste(_apply(operation, share, scope, img.crop(area)), area)
        return img, target
    if random.random() >= probability:
        return img, target
    if name == "BBox_Cutout":
        if len(boxes):
            area = left, top, right, bottom = _pixels_of(boxes[random.randrange(len(boxes))], img)
            half = [int(share * _BOX_CUTOUT_SHARE * side / 2) for side in (right - left, bottom - top)]
            img = _cut_out(img, area, tuple(half))
        return img, target
    if scope == "BBox":
        return affine.warp(img, target, _matrix(operation, share, "", img.size), _GRAY)
    return _apply(operation, share, scope, img), target


@draws_standard
class AutoAugment:
    """Change an image and its boxes by one list, drawn anew, of a published policy.

    Args:
        policy: v0, v1, v2 or v3.

    Raises:
        ValueError: another policy.
    """

    def __init__(self, policy: str) -> None:
        if policy not in POLICIES:
            raise ValueError(f"AutoAugment policy {policy!r} is unknown, choose one of {', '.join(POLICIES)}")
        self.steps = POLICIES[policy]

    def __call__(self, img: Image.Image, target: Target) -> tuple[Any, Target]:
        """Apply the steps of one sub-policy, drawn at random."""
        for step in random.choice(self.steps):
            img, target = run_step(step, img, target)
        return img, target


@draws_standard
class ColorJitter:
    """Change brightness, contrast and saturation, in random order, each by a factor drawn around 1.

    Args:
        strength: factors are drawn from 1 - strength (at least 0) to 1 + strength.
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def __call__(self, img: Image.Image, target: Target) -> tuple[Image.Image, Target]:
        """Change brightness, contrast and saturation in an order drawn at random; boxes stay as they are."""
        for name in random.sample(("Brightness", "Contrast", "Color"), 3):
            img = _ENHANCERS[name](img).enhance(random.uniform(max(0, 1 - self.strength), 1 + self.strength))
        return img, target
