"""What the pieces of synchronised batch normalisation compute, in plain CPU torch.

torch.nn.SyncBatchNorm calls them; none has a CPU kernel. Statistics are per channel (dimension 1), in float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from npu_sim import chips

BATCH_NORM: dict[str, Callable] = {}


def _reference(name: str) -> Callable[[Callable], Callable]:
    def register(function: Callable) -> Callable:
        BATCH_NORM[name] = function
        return function

    return register


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


def _all_but_channel(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _update_running(running: Tensor | None, new: Tensor, momentum: float) -> None:
    if running is not None:
        running.mul_(1 - momentum).add_(new, alpha=momentum)


@_reference("aten::batch_norm_stats")
def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.bfloat16 and chips.concern(os.environ["NPU_SIM_SOC"], "aclnnBatchNormStats", ("bfloat16",)):
        raise RuntimeError("aclnnBatchNormStats failed, error code is 161002: it takes no bfloat16 on this chip")
    x = x.float()
    return x.mean(_all_but_channel(x)), (x.var(_all_but_channel(x), unbiased=False) + eps).rsqrt()


@_reference("aten::batch_norm_gather_stats_with_counts")
def gather_stats(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """mean, invstd: [ranks, channels]; counts: [ranks]."""
    share, total = counts.view(-1, 1) / counts.sum(), counts.sum()
    all_mean = (mean * share).sum(0)
    var = ((invstd**-2 - eps + (mean - all_mean) ** 2) * share).sum(0)
    _update_running(running_mean, all_mean, momentum)
    _update_running(running_var, var * total / (total - 1), momentum)
    return all_mean, (var + eps).rsqrt()


@_reference("aten::batch_norm_elemt")
def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float
) -> Tensor:
    y = (x.float() - _per_channel(mean, x)) * _per_channel(invstd, x)
    if weight is not None:
        y = y * _per_channel(weight, x) + _per_channel(bias, x)
    return y.to(x.dtype)


@_reference("aten::batch_norm_backward_reduce")
def backward_sums(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    for_input: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradient = gradient.float()
    sum_dy = gradient.sum(_all_but_channel(x))
    sum_dy_xmu = (gradient * (x.float() - _per_channel(mean, x))).sum(_all_but_channel(x))
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy.clone()


@_reference("aten::batch_norm_backward_elemt")
def backward(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    counts: Tensor,
) -> Tensor:
    total = counts.sum()
    slope = invstd**2 * sum_dy_xmu / total
    result = gradient.float() - _per_channel(sum_dy / total, x)
    result = (result - (x.float() - _per_channel(mean, x)) * _per_channel(slope, x)) * _per_channel(invstd, x)
    return (result if weight is None else result * _per_channel(weight, x)).to(x.dtype)
