"""Random erasing on a batch of normalised images, inside each image's own area (not in its padding).

Source: Zhong et al., Random Erasing Data Augmentation, https://arxiv.org/abs/1708.04896; ranges and the limit to the
image's area after
rwightman/efficientdet-pytorch.
"""

import math
import random
from collections.abc import Mapping

import torch


def _get_pixels(
    per_pixel: bool,
    rand_color: bool,
    patch_size: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Make what replaces a patch of `patch_size` (C, h, w): noise per pixel, one random colour, or 0 (the mean)."""
    shape = patch_size if per_pixel else (patch_size[0], 1, 1)
    if per_pixel or rand_color:
        return torch.randn(shape, dtype=dtype, device=device)
    return torch.zeros(shape, dtype=dtype, device=device)


class RandomErasing:
    """Erase random rectangles of a batch, in place.

    Rectangles come from the standard `random` module, pixels from torch's generator of `device`.

    Args:
        probability: chance that an image is touched.
        min_area, max_area: erased part of the image's area.
        min_aspect, max_aspect: height / width of a rectangle; max_aspect defaults to 1 / min_aspect.
        mode: 'const' (0), 'rand' (one normal colour a rectangle) or 'pixel' (normal noise).
        min_count, max_count: rectangles an image, sharing the area.
        num_splits: leave the first 1 / num_splits of the batch alone; 0 and 1 touch all of it.
        device: where the noise is drawn; default is the images' device.
    """

    def __init__(
        self,
        probability: float = 0.5,
        min_area: float = 0.02,
        max_area: float = 1 / 4,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
        mode: str = "const",
        min_count: int = 1,
        max_count: int | None = None,
        num_splits: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        mode = mode.lower() or "const"
        if mode not in ("const", "rand", "pixel"):
            raise ValueError(f"random erasing mode {mode!r} is unknown, choose 'const', 'rand' or 'pixel'")
        self.probability = probability
        self.min_area = min_area
        self.max_area = max_area
        self.log_aspect_ratio = (math.log(min_aspect), math.log(max_aspect or 1 / min_aspect))
        self.rand_color = mode == "rand"
        self.per_pixel = mode == "pixel"
        self.min_count = min_count
        self.max_count = max_count or min_count
        self.num_splits = num_splits
        self.device = device

    def draw_rectangles(self, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """Draw the rectangles (top, left, height, width) of one image of the given size in pixels; often none."""
        if random.random() > self.probability:
            return []
        count = self.min_count if self.min_count == self.max_count else random.randint(self.min_count, self.max_count)
        rectangles = []
        for _ in range(count):
            for _attempt in range(10):
                area = random.uniform(self.min_area, self.max_area) * (height * width) / count
                aspect = math.exp(random.uniform(*self.log_aspect_ratio))
                h, w = int(round(math.sqrt(area * aspect))), int(round(math.sqrt(area / aspect)))
                if w < width and h < height:
                    rectangles.append((random.randint(0, height - h), random.randint(0, width - w), h, w))
                    break
        return rectangles

    def __call__(self, input: torch.Tensor, target: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Erase in `input` [B, C, H, W]. `target` gives img_size [B, 2] (original width, height) and img_scale [B].

        Keep `target` on the host: sizes are needed there, and reading them off a device would wait for it.
        """
        batch, channels, input_h, input_w = input.shape
        # Truncated, as the letterbox's own size is.
        sizes_wh = (target["img_size"] / target["img_scale"].unsqueeze(1)).int().tolist()
        device = self.device or input.device
        for i in range(batch // self.num_splits if self.num_splits > 1 else 0, batch):
            width, height = min(sizes_wh[i][0], input_w), min(sizes_wh[i][1], input_h)
            for top, left, h, w in self.draw_rectangles(height, width):
                pixels = _get_pixels(
                    self.per_pixel, self.rand_color, (channels, h, w), dtype=input.dtype, device=device
                )
                input[i, :, top : top + h, left : left + w] = pixels.to(input.device, non_blocking=True)
        return input
