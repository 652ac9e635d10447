"""Image and target together: resize, pad, crop, flip, and to numpy.

Every transform is a callable (Pillow image, target dict) -> (image, target dict). Boxes are `bbox` float32 [n, 4]
yxyx in pixels with labels `cls` int64 [n]; both stay aligned. The dict that comes back is the one that was given, with
new values, as in effdet, whose names the parameters have; its arrays are replaced, never written into.
Random ones draw from the standard `random` module: the dataset seeds it per image (see `dataset.py`), which makes
users' own transforms repeatable in the same way. Source: recipe and constants of rwightman/efficientdet-pytorch,
itself after google/automl efficientdet's dataloader.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from effdet.ops.boxes import letterbox_scale, scaled_hw

from .images import pillow_resize_crop, resize_crop

IMAGENET_DEFAULT_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEFAULT_STD = (0.229, 0.224, 0.225)
IMAGENET_INCEPTION_MEAN = (0.5, 0.5, 0.5)
IMAGENET_INCEPTION_STD = (0.5, 0.5, 0.5)

_RANDOM_INTERPOLATION = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
_INTERPOLATION = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "hamming": Image.Resampling.HAMMING,
}

Target = dict[str, Any]


def _pil_interp(method: str) -> Image.Resampling:
    if method not in _INTERPOLATION:
        raise ValueError(
            f"interpolation {method!r} is unknown, choose one of {', '.join(_INTERPOLATION)} or random (training)"
        )
    return _INTERPOLATION[method]


def _size_tuple(size: int | Sequence[int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, (int, np.integer)) else tuple(size)
    if len(pair) != 2 or any(int(s) != s or s < 1 for s in pair):
        raise ValueError(f"image size {size!r} is neither a positive int nor a pair (height, width) of them")
    return int(pair[0]), int(pair[1])


def clip_boxes_(boxes: np.ndarray, img_size: Sequence[float]) -> None:
    """Clip boxes [n, 4] yxyx to an image of `img_size` (height, width), in place."""
    height, width = img_size
    np.clip(boxes, 0, np.array([height, width, height, width], dtype=boxes.dtype), out=boxes)


def clip_boxes(boxes: np.ndarray, img_size: Sequence[float]) -> np.ndarray:
    """Clip boxes [n, 4] yxyx to an image of `img_size` (height, width); the argument stays as it is."""
    clipped = boxes.copy()
    clip_boxes_(clipped, img_size)
    return clipped


def resolve_fill_color(fill_color: Any, img_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN) -> tuple[int, int, int]:
    """Turn 'mean', one number (also as text) or three numbers, in 0..255, into an RGB colour.

    Raises:
        ValueError: anything else.
    """
    if isinstance(fill_color, str) and fill_color == "mean":
        return tuple(int(round(255 * x)) for x in img_mean)
    try:
        rgb = (int(fill_color),) * 3 if isinstance(fill_color, (int, float, str)) else tuple(int(c) for c in fill_color)
    except (TypeError, ValueError):
        rgb = ()
    if len(rgb) != 3 or not all(0 <= c <= 255 for c in rgb):
        raise ValueError(f"fill_color {fill_color!r} is not 'mean', a number 0..255 or three of them")
    return rgb


def move_boxes(target: Target, scale: float, offset_yx: tuple[int, int], bound_hw: tuple[int, int]) -> Target:
    """Scale, shift and clip the boxes of the target given; rows left without an area go, with their labels."""
    target["img_scale"] = 1.0 / scale
    if "bbox" in target:
        bbox = target["bbox"] * np.float32(scale)
        bbox -= np.array(offset_yx * 2, dtype=np.float32)
        clip_boxes_(bbox, bound_hw)
        keep = (bbox[:, :2] < bbox[:, 2:4]).all(axis=1)
        target["bbox"], target["cls"] = bbox[keep], target["cls"][keep]
    return target


class ResizePad:
    """Letterbox: scale to fit, put the image at the top left, fill the rest.

    Sets target['img_scale'], original pixels per output pixel.

    Args:
        target_size: output size in pixels, an int or (height, width).
        interpolation: bilinear, bicubic, lanczos or hamming; 'random' means bilinear here, because evaluation has to
            repeat.
        fill_color: RGB, 0..255.
    """

    def __init__(self, target_size: int, interpolation: str = "bilinear", fill_color: tuple = (0, 0, 0)) -> None:
        self.target_size = _size_tuple(target_size)
        self.interpolation = "bilinear" if interpolation == "random" else interpolation
        self.fill_color = tuple(fill_color)
        _pil_interp(self.interpolation)

    def __call__(self, img: Image.Image, anno: Target) -> tuple[Image.Image, Target]:
        """Return the letterboxed image and its target, boxes moved."""
        width, height = img.size
        scale = letterbox_scale((height, width), self.target_size)
        scaled_h, scaled_w = scaled_hw((height, width), scale)
        out = Image.new("RGB", (self.target_size[1], self.target_size[0]), color=self.fill_color)
        out.paste(img.resize((scaled_w, scaled_h), _pil_interp(self.interpolation)), (0, 0))
        return out, move_boxes(anno, scale, (0, 0), (scaled_h, scaled_w))


class RandomResizePad:
    """Scale jitter: resize to a random fraction of the letterbox size, then crop at random or fill to the target size.

    Args:
        target_size: output size in pixels, an int or (height, width).
        scale: range of the size relative to the letterbox fit.
        interpolation: as ResizePad's, or 'random' for bilinear or bicubic with equal chance.
        fill_color: RGB, 0..255.
    """

    def __init__(
        self, target_size: int, scale: tuple = (0.1, 2.0), interpolation: str = "random", fill_color: tuple = (0, 0, 0)
    ) -> None:
        self.target_size = _size_tuple(target_size)
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale {scale!r} is not a range (low, high) with 0 < low <= high")
        self.scale = tuple(scale)
        self.interpolation = _RANDOM_INTERPOLATION if interpolation == "random" else (_pil_interp(interpolation),)
        self.fill_color = tuple(fill_color)

    def set_size(self, size_hw: tuple[int, int]) -> None:
        """Choose the output size (height, width) of the images that come next."""
        self.target_size = size_hw

    def _resize(self, img: Image.Image, size_wh: tuple, crop_xyxy: tuple, method: Image.Resampling) -> Any:
        out = Image.new("RGB", self.target_size[::-1], color=self.fill_color)
        out.paste(pillow_resize_crop(img, size_wh, crop_xyxy, method), (0, 0))
        return out

    def __call__(self, img: Image.Image, anno: Target) -> tuple[Any, Target]:
        """Return the image at a random size and its target, boxes moved and clipped."""
        width, height = img.size
        target_h, target_w = self.target_size
        factor = random.uniform(*self.scale)
        scale = letterbox_scale((height, width), (factor * target_h, factor * target_w))
        scaled_h, scaled_w = scaled_hw((height, width), scale)
        top = int(max(0, scaled_h - target_h) * random.uniform(0, 1))
        left = int(max(0, scaled_w - target_w) * random.uniform(0, 1))
        bottom, right = min(scaled_h, top + target_h), min(scaled_w, left + target_w)
        interpolation = random.choice(self.interpolation) if len(self.interpolation) > 1 else self.interpolation[0]
        out = self._resize(img, (scaled_w, scaled_h), (left, top, right, bottom), interpolation)
        return out, move_boxes(anno, scale, (top, left), (bottom - top, right - left))


class RandomResizePadToNumpy(RandomResizePad):
    """RandomResizePad that gives uint8 numpy [3, H, W] at once, a view without a copy into that order.

    The same draws and boxes; pixels as `images.resize_crop` says.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_size(self.target_size)

    def set_size(self, size_hw: tuple[int, int]) -> None:
        """Choose the output size (height, width) of the images that come next."""
        super().set_size(size_hw)
        # To copy from: rows go over whole, where numpy would write a colour of three numbers one number at a time.
        self._filled = np.full((*size_hw, 3), self.fill_color, dtype=np.uint8)

    def _resize(self, img: Image.Image, size_wh: tuple, crop_xyxy: tuple, method: Image.Resampling) -> np.ndarray:
        pixels = resize_crop(img, size_wh, crop_xyxy, method)
        if pixels.shape[:2] != self.target_size:
            part = pixels
            height, width = part.shape[:2]
            pixels = np.empty((*self.target_size, 3), dtype=np.uint8)
            pixels[:height, :width] = part
            pixels[:height, width:] = self._filled[:height, width:]
            pixels[height:] = self._filled[height:]
        return pixels.transpose(2, 0, 1)


class RandomFlip:
    """Mirror the image, each enabled direction on its own with probability `prob`."""

    def __init__(self, horizontal: bool = True, vertical: bool = False, prob: float = 0.5) -> None:
        self.horizontal = horizontal
        self.vertical = vertical
        self.prob = prob

    def __call__(self, img: Image.Image, annotations: Target) -> tuple[Image.Image, Target]:
        """Return the image and its target, both mirrored or neither."""
        flip_x = self.horizontal and random.random() < self.prob
        flip_y = self.vertical and random.random() < self.prob
        width, height = img.size
        if flip_x:
            img = img.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if flip_y:
            img = img.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        if "bbox" in annotations and (flip_x or flip_y):
            y0, x0, y1, x1 = annotations["bbox"].T
            if flip_x:
                x0, x1 = width - x1, width - x0
            if flip_y:
                y0, y1 = height - y1, height - y0
            annotations["bbox"] = np.stack([y0, x0, y1, x1], axis=1)
        return img, annotations


class ImageToNumpy:
    """Turn the image into uint8 numpy [C, H, W]."""

    def __call__(self, pil_img: Image.Image, annotations: Target) -> tuple[np.ndarray, Target]:
        """Return the pixels and the target as it is."""
        pixels = np.array(pil_img, dtype=np.uint8)
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)), annotations


class ImageToTensor:
    """Turn the image into a tensor [C, H, W] of `dtype` with values 0..255."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def __call__(self, pil_img: Image.Image, annotations: Target) -> tuple[torch.Tensor, Target]:
        """Return the pixels and the target as it is."""
        pixels, annotations = ImageToNumpy()(pil_img, annotations)
        return torch.from_numpy(pixels).to(self.dtype), annotations


class Normalize:
    """Turn a tensor [3, H, W] with values 0..255 into (x - 255 mean) / (255 std), float32."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = torch.tensor([255 * x for x in mean], dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor([255 * x for x in std], dtype=torch.float32).view(-1, 1, 1)

    def __call__(self, img: torch.Tensor, target: Target) -> tuple[torch.Tensor, Target]:
        """Return the normalised image and the target as it is."""
        return img.float().sub(self.mean).div(self.std), target


_DRAW_STANDARD = {
    ResizePad,
    RandomResizePad,
    RandomResizePadToNumpy,
    RandomFlip,
    ImageToNumpy,
    ImageToTensor,
    Normalize,
}


def draws_standard(transform: type) -> type:
    """Declare that a class of transforms draws all its random numbers from the standard `random` module."""
    _DRAW_STANDARD.add(transform)
    return transform


class Compose:
    """Run transforms one after the other."""

    def __init__(self, transforms: list) -> None:
        self.transforms = transforms

    @property
    def draws_standard_only(self) -> bool:
        """Whether all random numbers come from the standard `random` module, as far as is known."""
        return all(type(t) in _DRAW_STANDARD for t in self.transforms)

    def set_size(self, size_hw: tuple[int, int]) -> None:
        """Choose the output size (height, width) of the images that come next."""
        for transform in self.transforms:
            if hasattr(transform, "set_size"):
                transform.set_size(size_hw)

    def __call__(self, img: Any, annotations: Target) -> tuple[Any, Target]:
        """Return what the last transform makes of image and target."""
        for transform in self.transforms:
            img, annotations = transform(img, annotations)
        return img, annotations


def _to_output(use_prefetcher: bool, mean: Sequence[float], std: Sequence[float]) -> list[Callable]:
    """The last steps: uint8 where the prefetcher normalises on the device, else normalised floats."""
    return [ImageToNumpy()] if use_prefetcher else [ImageToTensor(), Normalize(mean, std)]


def transforms_coco_eval(
    img_size: int = 224,
    interpolation: str = "bilinear",
    use_prefetcher: bool = False,
    fill_color: Any = "mean",
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> Compose:
    """Make the evaluation transform: letterbox.

    Args:
        img_size: output size in pixels, an int or (height, width).
        interpolation: as ResizePad's.
        use_prefetcher: True ends in uint8 numpy [3, H, W]; False in a normalised float32 tensor.
        fill_color: of the padding: 'mean', or RGB 0..255.
        mean: of the pixels, 0..1 a channel.
        std: of the pixels.

    Returns:
        A callable (image, target) -> (image, target).
    """
    pad = ResizePad(img_size, interpolation=interpolation, fill_color=resolve_fill_color(fill_color, mean))
    return Compose([pad, *_to_output(use_prefetcher, mean, std)])


def transforms_coco_train(
    img_size: int = 224,
    interpolation: str = "random",
    use_prefetcher: bool = False,
    fill_color: Any = "mean",
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    *,
    scale: tuple[float, float] = (0.1, 2.0),
    hflip: float = 0.5,
    before: Sequence[Callable] = (),
) -> Compose:
    """Make the training transform: horizontal flip, then scale jitter with a random crop.

    Args:
        img_size: as for `transforms_coco_eval`, like the next five.
        interpolation: as RandomResizePad's.
        use_prefetcher: see there.
        fill_color: see there.
        mean: see there.
        std: see there.
        scale: range of the scale jitter relative to the letterbox fit.
        hflip: probability of the flip.
        before: transforms (Pillow image, target) -> (Pillow image, target) of the image as it was read.
    """
    flip = RandomFlip(horizontal=True, prob=hflip)
    options = (img_size, scale, interpolation, resolve_fill_color(fill_color, mean))
    if use_prefetcher:
        return Compose([*before, flip, RandomResizePadToNumpy(*options)])
    return Compose([*before, flip, RandomResizePad(*options), *_to_output(False, mean, std)])
