"""What operators without a CPU kernel compute, in plain CPU torch.

Lives here: torch_npu's own operators (npu::) as far as a detector meets them, aten operators whose CPU kernel is
missing or has another layout of results, and the retry in float32 for those the CPU lacks in half precision.
Must not live here: how the values reach the device (kernels.py); references_norm.py has batch normalisation.

A reference takes the operator's arguments as CPU tensors and returns what the operator returns.
Sources: op-plugin's documentation of torch_npu's operators and the README of BatchMultiClassNonMaxSuppression (ops-cv).
Limit: an operator that is called and is not here raises NotImplementedError; inside other kernels it stays uncomputed,
since what they return is computed as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from npu_sim import runtime
from npu_sim.references_norm import BATCH_NORM

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
REFERENCES: dict[str, Callable] = dict(BATCH_NORM)


def reference(*names: str) -> Callable[[Callable], Callable]:
    """Register the function under these full operator names."""

    def register(function: Callable) -> Callable:
        REFERENCES.update(dict.fromkeys(names, function))
        return function

    return register


# ---- half precision


def has_half(args: list) -> bool:
    """Tell whether a tensor among the arguments is in half precision."""
    return any(isinstance(arg, Tensor) and arg.dtype in HALF for arg in args)


def in_float32(operator: Callable, args: list, kwargs: dict[str, Any]) -> Any:
    """Call the operator on float32 copies of half-precision tensors and round its float32 results once.

    Results that the operator writes in place are rounded into the given tensors.
    """
    halves: list[tuple[Tensor, Tensor]] = []

    def widen(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [widen(item) for item in value]
        if isinstance(value, Tensor) and value.dtype in HALF:
            halves.append((value, value.float()))
            return halves[-1][1]
        return value

    def narrow(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(narrow(item) for item in value)
        return value.to(halves[0][0].dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value

    result = operator(*widen(args), **{name: widen(arg) for name, arg in kwargs.items()})
    for half, wide in halves:
        half.copy_(wide)
    return narrow(result) if halves else result


# ---- dtype and layout

# c10::ScalarType, as far as the device has it: some operators of torch_npu take a dtype by its number
_DTYPES = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    15: torch.bfloat16,
}


@reference("npu::npu_dtype_cast", "npu::_npu_dtype_cast", "npu::npu_dtype_cast_backward")
def cast(x: Tensor, dtype: torch.dtype | int, *unused: Any) -> Tensor:
    return x.to(_DTYPES[dtype] if isinstance(dtype, int) else dtype)


@reference("npu::npu_format_cast", "npu::_npu_format_cast")
def change_layout(x: Tensor, *unused: Any, **unused_too: Any) -> Tensor:
    return x.clone()  # private layouts count as plain ones here


# ---- activation, pooling


@reference("npu::npu_silu")
def silu(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x)


@reference("npu::npu_silu_")
def silu_in_place(x: Tensor) -> Tensor:
    return x.copy_(torch.nn.functional.silu(x))


@reference("npu::npu_silu_backward")
def silu_backward(gradient: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return aten.silu_backward(gradient, x)


@reference("aten::max_pool2d_with_indices_backward")
def max_pool_backward(
    gradient: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    mask: Tensor,
) -> Tensor:
    # The forward's second result is a mask in torch_npu's own layout, so the positions are found anew.
    positions = aten.max_pool2d_with_indices(x.float(), kernel, stride, padding, dilation, ceil_mode)[1]
    return aten.max_pool2d_with_indices_backward(gradient, x, kernel, stride, padding, dilation, ceil_mode, positions)


# ---- backward kernels of torch_npu for operators whose forward the CPU has: autograd over that forward


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of the function's inputs for a gradient of its result."""
    # A kernel may be called where autograd is done with, and then records nothing, unless it is let back in.
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(function(*inputs), inputs, gradient)


@reference("aten::matmul_backward")
def matmul_backward(gradient: Tensor, a: Tensor, b: Tensor, wanted: list[bool]) -> list[Tensor | None]:
    results = gradients(torch.matmul, [a, b], gradient)
    return [result if want else None for result, want in zip(results, wanted, strict=True)]


@reference("npu::npu_gather_backward")
def gather_backward(gradient: Tensor, sizes: list[int], dim: int, index: Tensor, sparse: bool) -> Tensor:
    return gradient.new_zeros(sizes).scatter_add_(dim, index, gradient)


@reference("npu::l1_loss_backward")
def l1_loss_backward(gradient: Tensor, x: Tensor, target: Tensor, reduction: int) -> Tensor:
    return gradients(lambda x: aten.l1_loss(x, target, reduction), [x], gradient)[0]


@reference("npu::npu_binary_cross_entropy_with_logits_backward")
def binary_cross_entropy_backward(
    gradient: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, positive_weight: Tensor | None, reduction: int
) -> Tensor:
    return gradients(
        lambda x: aten.binary_cross_entropy_with_logits(x, target, weight, positive_weight, reduction), [x], gradient
    )[0]


@reference("npu::repeat_interleave_backward_int")
def repeat_interleave_backward(gradient: Tensor, x: Tensor, repeats: int, dim: int | None = None) -> Tensor:
    return gradients(lambda x: x.repeat_interleave(repeats, dim), [x], gradient)[0]


# ---- boxes and classes


@reference("npu::npu_one_hot")
def one_hot(x: Tensor, axis: int = -1, depth: int = 1, on: float = 1, off: float = 0) -> Tensor:
    # The schema calls `axis` num_classes. The result is float32; an index out of range gives a row of `off`.
    if axis != -1:
        raise NotImplementedError("the simulated npu_one_hot knows its second argument, the axis, as -1 only")
    return torch.where(x.int()[..., None] == torch.arange(depth, dtype=torch.int32), float(on), float(off))


@reference("npu::npu_batch_nms")
def batch_nms(
    boxes: Tensor,
    scores: Tensor,
    score_threshold: float,
    iou_threshold: float,
    max_per_class: int,
    max_total: int,
    change_coordinate_frame: bool = False,
    transpose_box: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each class, keep boxes from the best score down that overlap no kept one; then the best over all classes.

    A score must be above its threshold, an IoU at most its own. Boxes without area are dropped.
    Of equal scores the lower class and then the lower index comes first; the device promises no order.
    """
    _check_batch_nms(boxes, scores, iou_threshold, max_per_class, max_total, change_coordinate_frame, transpose_box)
    batch, classes = scores.shape[0], scores.shape[2]
    out_boxes, out_scores = boxes.new_zeros(batch, max_total, 4), boxes.new_zeros(batch, max_total)
    out_classes, counts = boxes.new_zeros(batch, max_total), torch.zeros(batch, dtype=torch.int32)
    for image in range(batch):
        found = []
        for c in range(classes):
            candidates = boxes[image, :, min(c, boxes.shape[2] - 1)].float()
            for n in _keep(candidates, scores[image, :, c].float(), score_threshold, iou_threshold, max_per_class):
                found.append((scores[image, n, c].item(), c, candidates[n]))
        found = sorted(found, key=lambda entry: -entry[0])[:max_total]
        counts[image] = len(found)
        for k, (score, c, box) in enumerate(found):
            out_boxes[image, k], out_scores[image, k], out_classes[image, k] = box, score, c
    return out_boxes, out_scores, out_classes, counts


def _check_batch_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_per_class: int,
    max_total: int,
    change_coordinate_frame: bool,
    transpose_box: bool,
) -> None:
    shapes = f"boxes {tuple(boxes.shape)} {boxes.dtype}, scores {tuple(scores.shape)} {scores.dtype}"
    if boxes.dim() != 4 or scores.dim() != 3 or boxes.shape[2] not in (1, scores.shape[2]):
        raise RuntimeError(f"npu_batch_nms takes boxes [B, N, 1 or C, 4] and scores [B, N, C], got {shapes}")
    if boxes.dtype != scores.dtype or boxes.dtype not in (torch.float16, torch.float32):
        raise RuntimeError(f"npu_batch_nms takes float16 or float32, the same for both, got {shapes}")
    if not (1 <= max_per_class <= 1000 and 1 <= max_total <= 1000 and 0 <= iou_threshold <= 1):
        raise RuntimeError(
            "npu_batch_nms takes 1 to 1000 boxes per class and in total and an IoU threshold in [0, 1], "
            f"got {max_per_class}, {max_total} and {iou_threshold}"
        )
    if change_coordinate_frame or transpose_box:
        raise NotImplementedError("the simulated npu_batch_nms knows neither change_coordinate_frame nor transpose_box")


def _keep(boxes: Tensor, scores: Tensor, score_threshold: float, iou_threshold: float, limit: int) -> list[int]:
    """Return the indices of the boxes of one class that are kept, best first."""
    top_left, bottom_right = boxes[:, :2], boxes[:, 2:]
    area = (bottom_right - top_left).prod(1)
    usable = (scores > score_threshold) & (bottom_right > top_left).all(1)
    order = [n for n in torch.argsort(scores, descending=True, stable=True).tolist() if usable[n]]
    kept: list[int] = []
    while order and len(kept) < limit:
        best = order.pop(0)
        kept.append(best)
        if order:
            low = torch.maximum(top_left[order], top_left[best])
            high = torch.minimum(bottom_right[order], bottom_right[best])
            common = (high - low).clamp(min=0).prod(1)
            iou = common / (area[order] + area[best] - common).clamp(min=1e-12)
            stays = (iou <= iou_threshold).tolist()  # compared in float32, as the device does
            order = [n for n, good in zip(order, stays, strict=True) if good]
    return kept


# ---- dropout: torch_npu keeps the mask as bits, padded to whole blocks of 128

_BIT_WEIGHTS = 2 ** torch.arange(8)


@reference("aten::native_dropout")
def dropout(x: Tensor, p: float, train: bool | None = True) -> tuple[Tensor, Tensor]:
    kept = torch.rand(x.shape) >= p if train else torch.ones(x.shape, dtype=torch.bool)
    bits = torch.zeros((x.numel() + 127) // 128 * 128, dtype=torch.int64)
    bits[: x.numel()] = kept.flatten()
    return x * kept / (1 - p if train and p < 1 else 1), (bits.view(-1, 8) * _BIT_WEIGHTS).sum(1).to(torch.uint8)


@reference("aten::native_dropout_backward")
def dropout_backward(gradient: Tensor, mask: Tensor, scale: float) -> Tensor:
    kept = (mask.long()[:, None] // _BIT_WEIGHTS % 2).flatten()[: gradient.numel()].view(gradient.shape)
    return gradient * kept * scale


# ---- loss scaling


@reference("aten::_amp_foreach_non_finite_check_and_unscale_")
def check_and_unscale(gradients: list[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    """Look for inf and NaN; a saturating device asks its flag instead, and leaves the gradients scaled if it is up."""
    if not runtime.saturates():
        aten._amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, inverse_scale)
    elif runtime.overflow():  # of the current device; the real kernel, which runs next, clears it
        found_inf.fill_(1)
    else:
        for gradient in gradients:
            gradient.mul_(inverse_scale)
