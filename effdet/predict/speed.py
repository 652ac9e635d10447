"""How long a detector takes for an image: the network and the post-processing apart, on one batch again and again."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from effdet.bench import DetBenchPredict
from effdet.runtime.device import synchronize

_WARMUP, _BATCHES = 3, 30  # batches before the first that counts, and that count
_LIMIT_S = 20.0  # fewer count where this is over, but at least one


class Speed(NamedTuple):
    """Milliseconds for an image, medians over the measured batches."""

    model_ms: float
    post_ms: float
    batch_size: int
    batches: int

    def __str__(self) -> str:
        total = self.model_ms + self.post_ms
        return (
            f"{self.model_ms:.2f} ms model + {self.post_ms:.2f} ms post-processing an image, {1000 / total:.1f} "
            f"images/s (median of {self.batches} batches of {self.batch_size})"
        )


@torch.no_grad()
def measure_speed(
    bench: DetBenchPredict,
    images: Tensor,
    info: Mapping[str, Tensor],
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Speed:
    """Run a batch through a detector again and again, waiting for the device around each part.

    Args:
        bench: in eval mode.
        images: float [B, 3, H, W] on the device.
        info: 'img_scale' [B] and 'img_size' [B, 2] on the device.
        autocast: makes the context to predict in.
    """
    model_s, post_s = [], []
    device, started = images.device, time.perf_counter()
    for number in range(_WARMUP + _BATCHES):
        with autocast():
            synchronize(device)
            begin = time.perf_counter()
            outputs = bench.head_outputs(images)
            synchronize(device)
            middle = time.perf_counter()
            bench.post_process(*outputs, info.get("img_scale"), info.get("img_size"))
            synchronize(device)
        if number >= _WARMUP:
            model_s.append(middle - begin)
            post_s.append(time.perf_counter() - middle)
            if time.perf_counter() - started > _LIMIT_S:
                break
    scale = 1000 / len(images)
    return Speed(scale * statistics.median(model_s), scale * statistics.median(post_s), len(images), len(model_s))
