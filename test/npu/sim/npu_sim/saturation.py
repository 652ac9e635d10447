"""What a saturating device (910A) does with results that are too large: the limit instead of inf, 0 instead of NaN.

CANN documents it for computing: exp(12) in float16 is 65504, sqrt(-1) is 0 (INF_NAN_MODE_ENABLE,
aclrtFloatOverflowMode). The device then also raises its overflow flag, which npu_get_float_status reads and
npu_clear_float_status clears; loss scalers look there. The flag lies in cann/runtime.c.

Operators that only move or choose values keep an inf they are given (masked_fill with -inf, a maximum over it): whether
hardware changes them is not documented.
Limits: only an operator's result is looked at, so an overflow inside one that does not show in its result is missed;
and computing with an inf raises the flag whether or not hardware would.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from npu_sim import runtime

# By base name, without a trailing underscore or overload.
MOVES = {
    "amax",
    "amin",
    "bernoulli",
    "cat",
    "clamp",
    "clamp_max",
    "clamp_min",
    "clone",
    "constant_pad_nd",
    "cummax",
    "cummin",
    "fill",
    "flip",
    "full",
    "full_like",
    "gather",
    "index",
    "index_copy",
    "index_fill",
    "index_put",
    "_index_put_impl",
    "index_select",
    "masked_fill",
    "masked_scatter",
    "masked_select",
    "max",
    "maximum",
    "max_pool2d_with_indices",
    "median",
    "min",
    "minimum",
    "npu_format_cast",
    "_npu_format_cast",
    "npu_reshape",
    "repeat",
    "repeat_interleave",
    "roll",
    "scatter",
    "select_scatter",
    "slice_scatter",
    "sort",
    "stack",
    "topk",
    "tril",
    "triu",
    "unfold",
    "where",
    "zero",
}
CASTS = {"copy", "_to_copy", "npu_dtype_cast", "_npu_dtype_cast"}  # they move, unless the dtype changes


def saturate(name: str, dtypes: set[torch.dtype], device: int | None, results: Any, written: Iterable[Any]) -> None:
    """Saturate an operator's values in place, and raise the overflow flag where there was something to saturate.

    Args:
        name: the operator, such as 'aten::mul.Tensor'.
        dtypes: of its NPU tensors.
        device: the index of theirs; None: it has none.
        results: what it returns, as CPU tensors that are not yet on the device.
        written: what it writes in place, likewise.
    """
    base = name.partition("::")[2].partition(".")[0].rstrip("_")
    if base in MOVES:
        return
    values = _floats((results, *written))
    if base in CASTS:  # what comes from the host was converted there, and keeps its inf
        values = [value for value in values if dtypes - {value.dtype}]
    overflowed = [value for value in values if not _is_finite(value)]
    for value in overflowed:
        value.nan_to_num_()  # inf to the dtype's limits, NaN to 0
    if overflowed and device is not None:
        runtime.set_overflow(device)


def _floats(values: Any) -> list[Tensor]:
    if isinstance(values, (list, tuple)):
        return [tensor for value in values for tensor in _floats(value)]
    return [values] if isinstance(values, Tensor) and values.is_floating_point() else []


def _is_finite(value: Tensor) -> bool:
    return not value.numel() or all(math.isfinite(extreme) for extreme in torch.aminmax(value))
