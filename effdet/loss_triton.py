"""The focal loss of one level on a GPU: one pass forward and one backward, which computes the gradient again.

Kept for the backward pass are the logits and the targets, nothing of the size of the logits besides. The formulas are
those of focal.py.
"""
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # logits of one program


@triton.jit
def _log1p(x):
    """Return log(1 + x) for x in 0..1; below 1/32 by its series, as 1 + x would lose the digits of x."""
    return tl.where(x < 0.03125, x * (1 - x * (0.5 - x * (1 / 3 - x * 0.25))), tl.log(1 + x))


@triton.jit
def _focal_kernel(logits, targets, factor, out, count, NUM_CLASSES: tl.constexpr, ALPHA: tl.constexpr,
                  GAMMA: tl.constexpr, SMOOTHING: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """Write each program's sum of the loss, or with BACKWARD the gradient of all logits times `factor`."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < count - first
    # Divisions by the number of classes are of small numbers, as 64 bits are slow to divide.
    row, rest = first // NUM_CLASSES, (first % NUM_CLASSES).to(tl.int32)
    position = rest + lane
    target = tl.load(targets + row + position // NUM_CLASSES, mask=inside, other=-2).to(tl.int32)
    x = tl.load(logits + first + lane, mask=inside, other=0.0).to(tl.float32)
    own = target == position % NUM_CLASSES
    x = tl.where(own, -x, x)  # an object's term is the background's mirrored
    weight = tl.where(target == -2, 0.0, tl.where(own, ALPHA, 1 - ALPHA))
    small = tl.exp(-tl.abs(x))
    log_term = _log1p(small)
    larger = 1 / (1 + small)
    p = tl.where(x >= 0, larger, small * larger)
    rest_p = tl.where(x >= 0, small * larger, larger)
    ce = tl.maximum(x, 0.0) + log_term - 0.5 * SMOOTHING * x
    if GAMMA == 1.5:
        modulator = p * tl.sqrt(p)
    elif GAMMA == 2.0:
        modulator = p * p
    else:
        modulator = tl.exp(-GAMMA * (tl.maximum(-x, 0.0) + log_term))  # log(p) = -softplus(-x)
    if BACKWARD:
        gradient = weight * modulator * (GAMMA * rest_p * ce + p - 0.5 * SMOOTHING)
        gradient = tl.where(own, -gradient, gradient) * tl.load(factor)
        tl.store(out + first + lane, gradient.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + tl.program_id(0), tl.sum(weight * modulator * ce))


def can_compute(logits: Tensor, gamma: float) -> bool:
    """Tell whether the kernel takes logits [B, A * K, height, width]: channels-last, and gamma above 0."""
    return gamma > 0 and logits.is_contiguous(memory_format=torch.channels_last)


class FocalLossSum(torch.autograd.Function):
    """Sum of the focal loss over one level, a float32 scalar; arguments as `loss.focal_loss_sum`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, class_targets: Tensor, num_classes: int, alpha: float, gamma: float,
                smoothing: float) -> Tensor:
        """Return the sum; targets are int64 [B, height, width, A]."""
        class_targets = class_targets.contiguous()
        ctx.save_for_backward(logits, class_targets)
        ctx.constants = num_classes, alpha, gamma, smoothing
        sums = torch.empty(triton.cdiv(logits.numel(), _BLOCK), dtype=torch.float32, device=logits.device)
        _launch(logits, class_targets, sums, sums, ctx.constants, backward=False)
        return sums.sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient in the logits' dtype: the loss scale is multiplied in before it is rounded."""
        logits, class_targets = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        _launch(logits, class_targets, grad_output.float(), gradient, ctx.constants, backward=True)
        return gradient, None, None, None, None, None


def _launch(logits: Tensor, targets: Tensor, factor: Tensor, out: Tensor, constants: tuple, backward: bool) -> None:
    if logits.numel():
        _focal_kernel[(triton.cdiv(logits.numel(), _BLOCK),)](
            logits, targets, factor, out, logits.numel(), *constants, BACKWARD=backward, BLOCK=_BLOCK, num_warps=8)
