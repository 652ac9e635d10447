"""The simulated NPU computes what the CPU computes: values, dtypes and gradients, operator by operator."""

from __future__ import annotations

from types import SimpleNamespace

import npu_sim
import pytest
import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor


def make_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = {
        "x": rand(4, 6),
        "y": rand(4, 6),
        "image": rand(2, 4, 9, 9),
        "channel": rand(4),
        "dense": rand(5, 4, 3, 3),
        "depth": rand(4, 1, 3, 3),
        "index": torch.tensor([0, 5, 2, 2]),
        "row": torch.tensor([1, 3, 0]),
    }
    inputs["mask"] = inputs["x"] > 0
    return inputs


# Differentiable: checked forward, and backward to every float input it uses.
SMOOTH = {
    "convolution": lambda t: F.conv2d(t.image, t.dense, stride=2, padding=1),
    "convolution with bias and dilation": lambda t: F.conv2d(t.image, t.dense[:4], t.channel, padding=2, dilation=2),
    "depthwise convolution": lambda t: F.conv2d(t.image, t.depth, padding=1, groups=4),
    "pointwise convolution": lambda t: F.conv2d(t.image, t.dense[:, :, :1, :1]),
    "batch norm, training": lambda t: F.batch_norm(
        t.image, torch.zeros(4, device=t.device), torch.ones(4, device=t.device), t.channel, t.channel, True
    ),
    "batch norm, running statistics": lambda t: F.batch_norm(
        t.image, torch.zeros(4, device=t.device), torch.full((4,), 2.0, device=t.device), t.channel, t.channel
    ),
    "max pool": lambda t: F.max_pool2d(t.image, 3, 2, 1),
    "max pool, ceil mode": lambda t: F.max_pool2d(t.image, 2, 2, ceil_mode=True),
    "average pool": lambda t: F.avg_pool2d(t.image, 3, 2, 1, count_include_pad=False),
    "adaptive average pool": lambda t: F.adaptive_avg_pool2d(t.image, 1),
    "upsample nearest": lambda t: F.interpolate(t.image, size=(18, 18), mode="nearest"),
    "upsample bilinear": lambda t: F.interpolate(t.image, size=(5, 7), mode="bilinear"),
    "pad": lambda t: F.pad(t.image, (0, 1, 1, 2)),
    "crop by negative padding": lambda t: F.pad(t.image, (-1, 0, 0, -1)),
    "silu": lambda t: F.silu(t.x),
    "npu_silu": lambda t: F.silu(t.x) if t.device.type == "cpu" else torch_npu.npu_silu(t.x),
    "sigmoid": lambda t: t.x.sigmoid(),
    "relu6": lambda t: F.relu6(t.x),
    "hardswish": lambda t: F.hardswish(t.x),
    "log-sigmoid": lambda t: F.logsigmoid(t.x),
    "softmax": lambda t: t.x.softmax(1),
    "power": lambda t: t.x.abs() ** 0.25,
    "exp": lambda t: (t.x - 1).exp(),
    "division": lambda t: t.x / (t.y.abs() + 1),
    "number minus tensor": lambda t: 1 - t.x,
    "clamp": lambda t: t.x.clamp(-0.5, 0.5),
    "clamp from below": lambda t: t.x.clamp(min=0),
    "minimum": lambda t: torch.minimum(t.x, t.y),
    "maximum": lambda t: torch.maximum(t.x, t.y),
    "where": lambda t: torch.where(t.mask, t.x, t.y),
    "where with a number": lambda t: torch.where(t.mask, t.x, 0.0),
    "masked_fill": lambda t: t.x.masked_fill(t.mask, 2.0),
    "sum over a dimension": lambda t: t.x.sum(1, keepdim=True),
    "mean over several dimensions": lambda t: t.image.mean((2, 3)),
    "variance": lambda t: t.x.var(0),
    "norm": lambda t: t.x.norm(),
    "largest of each row": lambda t: t.x.amax(1),
    "gather": lambda t: t.x.gather(1, t.index[:, None]),
    "index_select": lambda t: t.x.index_select(0, t.row),
    "index by integers": lambda t: t.x[t.row],
    "index by two integer tensors": lambda t: t.x[torch.arange(4, device=t.device), t.index],
    "largest with index": lambda t: t.x.max(1)[0],
    "repeat_interleave": lambda t: t.x.repeat_interleave(2, 0),
    "cat": lambda t: torch.cat([t.x, t.y], 1),
    "stack": lambda t: torch.stack([t.x, t.y], -1),
    "permute and reshape": lambda t: t.image.permute(0, 2, 3, 1).reshape(2, -1, 4),
    "strided slice": lambda t: t.image[:, 1:3, ::2, 3:] * 2,
    "matrix product": lambda t: t.x @ t.y.t(),
    "batched product": lambda t: torch.bmm(t.image[:, 0], t.image[:, 1]),
    "linear": lambda t: F.linear(t.x, t.y, t.channel),
    "einsum": lambda t: torch.einsum("ij,kj->ik", t.x, t.y),
    "weighted sum of a list": lambda t: sum(w * v for w, v in zip(t.channel[:2].softmax(0), (t.x, t.y), strict=True)),
    "cross entropy with logits": lambda t: F.binary_cross_entropy_with_logits(t.x, t.mask.float(), reduction="none"),
    "cross entropy": lambda t: F.cross_entropy(t.x, t.index),
    "smooth L1": lambda t: F.smooth_l1_loss(t.x, t.y, reduction="none", beta=0.1),
    "L1": lambda t: F.l1_loss(t.x, t.y.detach()),
    "mean square": lambda t: F.mse_loss(t.x, t.y),
    "cast to half and back": lambda t: (t.x.half() * t.y.half()).float(),
    "lerp": lambda t: t.x.lerp(t.y, 0.3),
    "expand": lambda t: t.x[:, None].expand(4, 2, 6) * 1.5,
}
# Not differentiable, or not usefully so.
DISCRETE = {
    "topk": lambda t: t.x.flatten().topk(5),
    "sort": lambda t: t.x.sort(1, descending=True),
    "stable sort": lambda t: t.index.sort(stable=True),
    "argsort": lambda t: t.x.argsort(1),
    "argmax": lambda t: t.x.argmax(1),
    "max with index": lambda t: t.x.max(1),
    "comparison": lambda t: (t.x > t.y, t.index == 2, t.x >= 0),
    "logic": lambda t: (t.mask & (t.y > 0), t.mask | (t.y > 0), ~t.mask),
    "any and all": lambda t: (t.mask.any(1), t.mask.all()),
    "isfinite": lambda t: torch.isfinite(t.x.masked_fill(t.mask, float("inf"))),
    "count": lambda t: t.mask.sum(),
    "cumulated sum": lambda t: t.mask.cumsum(0),
    "one_hot": lambda t: F.one_hot(t.index, 7),
    "nonzero": lambda t: t.mask.nonzero(),
    "where with one argument": lambda t: torch.where(t.mask),
    "index by mask": lambda t: t.x[t.mask],
    "masked_select": lambda t: t.x.masked_select(t.mask),
    "unique": lambda t: t.index.unique(),
    "unique rows": lambda t: t.index.view(2, 2).unique(dim=0),
    "unique neighbours": lambda t: t.index.unique_consecutive(),
    "scatter a number": lambda t: torch.zeros_like(t.x).scatter_(1, t.index[:, None], 1.0),
    "scatter": lambda t: torch.zeros_like(t.x).scatter_(1, t.index[:, None], t.y),
    "scatter_add": lambda t: torch.zeros_like(t.x).scatter_add_(0, t.row[:, None].expand(3, 6), t.y[:3]),
    "index_add": lambda t: torch.zeros_like(t.x).index_add_(0, t.row, t.y[:3]),
    "assign by mask": lambda t: assign(t.x, t.mask, 1.0),
    "assign by integers": lambda t: assign(t.x, t.row, t.y[:3]),
    "assign a slice": lambda t: assign(t.x, (slice(None), slice(1, 3)), 3.0),
    "fill the diagonal": lambda t: t.x.clone().fill_diagonal_(3.0),
    "out argument": lambda t: torch.max(t.x, t.y, out=torch.empty_like(t.x)),
    "arange": lambda t: torch.arange(0, 10, 2, device=t.device),
    "linspace": lambda t: torch.linspace(0, 1, 5, device=t.device),
    "meshgrid": lambda t: torch.meshgrid(t.index, t.row, indexing="ij"),
    "full and eye": lambda t: (torch.full((2, 2), True, device=t.device), torch.eye(3, device=t.device)),
    "repeat and flip": lambda t: (t.x.repeat(2, 1), t.x.flip(1), t.x.roll(1, 0)),
    "integer division": lambda t: (t.index // 4, t.index % 4),
    "npu_silu_": lambda t: (F.silu if t.device.type == "cpu" else torch_npu.npu_silu_)(t.x.clone()),
    "npu_dtype_cast": lambda t: t.x.int() if t.device.type == "cpu" else torch_npu.npu_dtype_cast(t.x, torch.int32),
    "npu_format_cast": lambda t: t.x if t.device.type == "cpu" else torch_npu.npu_format_cast(t.x, 2),
    "same storage": lambda t: torch.tensor([t.x.is_set_to(t.x[:]), t.x.is_set_to(t.y), t.x.is_set_to(t.x[1:])]),
    "casts": lambda t: ((t.x * 3).int(), (t.x * 3).long(), t.x.bool(), t.index.float()),
    "foreach": lambda t: (
        *torch._foreach_mul([t.x, t.y], 2.0),
        *torch._foreach_add([t.x, t.y], [t.y, t.x], alpha=3),
        *torch._foreach_norm([t.x, t.y]),
        *torch._foreach_lerp([t.x], [t.y], 0.1),
    ),
    "foreach in place": lambda t: foreach_in_place([t.x.clone(), t.y.clone()]),
    "in place": lambda t: t.x.clone().mul_(2).add_(t.y).addcmul_(t.x, t.y, value=0.5).clamp_(min=0),
    "in place on a view": lambda t: assign(t.image, (0, 2), t.image[1, 1]),
    "copy between dtypes": lambda t: torch.empty_like(t.x, dtype=torch.float16).copy_(t.x),
}


def assign(tensor: Tensor, where, what) -> Tensor:
    tensor = tensor.clone()
    tensor[where] = what
    return tensor


def foreach_in_place(tensors: list[Tensor]) -> list[Tensor]:
    torch._foreach_mul_(tensors, 0.9)
    torch._foreach_addcdiv_(tensors, tensors, [tensor.abs() + 1 for tensor in tensors], value=-0.1)
    torch._foreach_sqrt_([tensor.abs_() for tensor in tensors])
    return tensors


def flatten(value) -> list[Tensor]:
    return [tensor for item in value for tensor in flatten(item)] if isinstance(value, (tuple, list)) else [value]


def run(function, device: torch.device, backward: bool) -> list[Tensor]:
    """Results, and gradients of a weighted sum of them, on the CPU."""
    inputs = {name: tensor.to(device) for name, tensor in make_inputs().items()}
    floats = {name: tensor.requires_grad_(backward) for name, tensor in inputs.items() if tensor.is_floating_point()}
    results = flatten(function(SimpleNamespace(**inputs, device=torch.device(device))))
    if not backward:
        return [result.cpu() for result in results]
    weights = [torch.linspace(-1, 2, result.numel()).view(result.shape).to(device) for result in results]
    loss = sum((result * weight).sum() for result, weight in zip(results, weights, strict=True))
    gradients = torch.autograd.grad(loss, list(floats.values()), allow_unused=True)
    assert any(gradient is not None for gradient in gradients)
    return [tensor.detach().cpu() for tensor in (*results, *gradients) if tensor is not None]


@pytest.mark.parametrize("name", [*SMOOTH, *DISCRETE])
def test_values_dtypes_and_gradients_are_the_cpus(name, device, exact_products):
    function = (SMOOTH | DISCRETE)[name]
    expected = run(function, torch.device("cpu"), backward=name in SMOOTH)
    with npu_sim.count_waits() as meters:
        got = run(function, device, backward=name in SMOOTH)
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        # torch_npu takes some operators apart (the average pool's backward on 910A), which rounds otherwise.
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    assert not meters.mismatches
    assert meters.calls.total() > 0
