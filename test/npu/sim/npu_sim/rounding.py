"""What the device rounds before it computes: float32 that a chip's units take in a shorter form only.

- First generation: convolutions, matrix products, sort and top-k from 8 values on take float16, whatever was asked
  for; the result of a convolution is float16 as well. Sources: hicann/ops-nn, aclnn_convolution.cpp
  (UpdateOutputDtype), aclnn_topk.cpp (float32 is cast "on 910"), pages of aclnnConvolutionBackward, aclnnMatmul
  (cubeMathType) and aclnnSort.
- A2, A3, 950: convolutions take HF32 while `torch.npu.conv.allow_hf32` (on by default), matrix products while
  `torch.npu.matmul.allow_hf32` (off). HF32 has float32's range and 11 bits of mantissa, rounded to nearest even.
  Sources: CANN's pages of --allow_hf32 (ATC) and SetHF32 (Ascend C).

Products are summed in float32 everywhere. Limits: a sum's order is the CPU's; matrix products in other operators
(einsum calls bmm, which is seen) and losses of precision in vector units are not simulated.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from npu_sim import runtime

# Operators by base name: the arguments that are factors, which are rounded; a bias is added in float32.
CONVOLUTIONS = {"convolution": (0, 1), "_convolution": (0, 1), "convolution_backward": (0, 1, 2)}
MATRICES = {
    "matmul": (0, 1),
    "matmul_backward": (0, 1, 2),
    "mm": (0, 1),
    "addmm": (1, 2),
    "bmm": (0, 1),
    "baddbmm": (1, 2),
}
PRODUCTS = CONVOLUTIONS | MATRICES
SMALLEST_HALF_TOP_K = 8
_DROPPED_BITS = 23 - 11
_exact = False


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Round nothing in this block: for tests of something else, which compare with the CPU to the last digits."""
    global _exact
    before, _exact = _exact, True
    try:
        yield
    finally:
        _exact = before


def round_arguments(base: str, args: list, device: int | None) -> list:
    """Return an operator's arguments as its unit takes them.

    Args:
        base: the operator's name without namespace, overload and underscore.
        args: its positional arguments, tensors on the CPU.
        device: the index of its device, whose overflow flag a value beyond float16 raises; None: none is raised.
    """
    positions = PRODUCTS.get(base, ())
    if _has_half_units() and (base == "sort" or base == "topk" and args[1] >= SMALLEST_HALF_TOP_K):
        positions = (0,)
    if not positions or _exact:
        return args
    if _has_half_units():
        shorten = _to_half
    elif _allows_hf32(base):
        shorten = to_hf32
    else:
        return args
    args = list(args)
    for index in positions:
        if index < len(args) and isinstance(args[index], Tensor) and args[index].dtype == torch.float32:
            args[index] = shorten(args[index], device)
    return args


def round_result(base: str, result: Any, device: int | None) -> Any:
    """Return an operator's result as its unit gives it."""
    if base not in ("convolution", "_convolution") or _exact or not _has_half_units():
        return result
    return _to_half(result, device) if isinstance(result, Tensor) and result.dtype == torch.float32 else result


def to_hf32(x: Tensor, device: int | None = None) -> Tensor:
    """Round float32 to HF32, kept in float32."""
    bits = x.contiguous().view(torch.int32)
    odd = bits >> _DROPPED_BITS & 1
    rounded = bits + (odd + (1 << _DROPPED_BITS - 1) - 1) & -1 << _DROPPED_BITS
    return torch.where(x.isfinite(), rounded.view(torch.float32), x)


def _to_half(x: Tensor, device: int | None) -> Tensor:
    short = x.half()
    if device is not None and not short.isfinite().all():
        runtime.set_overflow(device)
    return short.float() if device is None else short.nan_to_num_().float()


def _has_half_units() -> bool:
    return os.environ["NPU_SIM_SOC"] == "Ascend910A"


def _allows_hf32(base: str) -> bool:
    return (torch.npu.conv if base in CONVOLUTIONS else torch.npu.matmul).allow_hf32
