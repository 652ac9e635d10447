"""Layers computed in pieces against timm's."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import timm_patches  # noqa: F401
from timm_patches import fused_layers
from timm_patches.fused_layers import FusedBatchNormAct2d, FusedSqueezeExcite, convert_fused_layers

SHAPE = (3, 5, 7, 6)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(fused_layers, "SMALLEST_NORM", 1)
    monkeypatch.setattr(fused_layers, "SMALLEST_SQUEEZE", 1)
    monkeypatch.setattr(fused_layers, "PIECE", 64)  # 12 rows and a rest


def make_norms(**options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    layer = BatchNormAct2d(SHAPE[1], act_layer=nn.SiLU, momentum=0.2, eps=1e-3, **options)
    if layer.weight is not None:
        nn.init.uniform_(layer.weight, 0.5, 2)
        nn.init.normal_(layer.bias)
    return layer, convert(layer, FusedBatchNormAct2d)


def make_squeezes() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    layer = SqueezeExcite(SHAPE[1], rd_channels=2, act_layer=nn.SiLU)
    return layer, convert(layer, FusedSqueezeExcite)


def convert(layer: nn.Module, expected: type) -> nn.Module:
    model = nn.Sequential(copy.deepcopy(layer))
    assert convert_fused_layers(model) == 1 and convert_fused_layers(model) == 0 and type(model[0]) is expected
    return model[0]


def make_input(offset: float = 0.0) -> torch.Tensor:
    return (torch.randn(SHAPE) + offset).contiguous(memory_format=torch.channels_last)


def run(layer: nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], list[int]]:
    """Return output, gradients and statistics, and the sizes of what was kept for the backward pass."""
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = layer(x)
    weights = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    (result * weights).sum().backward()
    gradients = [parameter.grad for parameter in layer.parameters()]
    return [result.detach(), x.grad, *gradients, *layer.buffers()], sizes


@pytest.mark.parametrize("offset", [0.0, 30.0], ids=["centred", "far from zero"])
def test_norm_equals_timms_layers(offset):
    layer, fused = make_norms()
    x = make_input(offset)
    (expected, before), (found, after) = run(layer, x), run(fused, x)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-4 if offset else 1e-5)
    assert fused.num_batches_tracked == 1 and not torch.equal(fused.running_var, torch.ones(SHAPE[1]))
    large = [size for size in after if size >= x.numel()]
    assert len(large) == 1 < len([size for size in before if size >= x.numel()])


def test_squeeze_equals_timms_layer():
    layer, fused = make_squeezes()
    x = make_input()
    (expected, _), (found, _) = run(layer, x), run(fused, x)
    assert len(found) == 6
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_squeeze_makes_one_large_tensor_in_its_backward_pass():
    """And autograd one, in adding the gradient of the mean; timm's layer makes two products and an expanded mean."""
    counts = []
    for layer in make_squeezes():
        x = make_input().requires_grad_()
        result = layer(x)
        gradient = torch.ones_like(result)
        with LargeResults(x.numel()) as made:
            result.backward(gradient)
        counts.append(len(made.names))
    assert counts == [4, 2]


class LargeResults(TorchDispatchMode):
    """Collects the names of operators that return a new tensor of a size or more."""

    def __init__(self, smallest: int) -> None:
        super().__init__()
        self.smallest = smallest
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage().nbytes() >= 4 * self.smallest
                and tensor.numel() >= self.smallest
                and not any(is_same(tensor, value) for value in args)
            ):
                self.names.append(str(function))
        return result


def is_same(tensor: torch.Tensor, value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("change", ["eval", "contiguous", "no gradient", "no statistics", "bfloat16", "small"])
def test_norm_goes_timms_way_elsewhere(change, monkeypatch):
    layer, fused = make_norms(track_running_stats=False) if change == "no statistics" else make_norms()
    forbid(monkeypatch, fused_layers._BatchNormSiLU)
    if change == "eval":
        layer.eval(), fused.eval()
    check_the_same(layer, fused, change, monkeypatch)


@pytest.mark.parametrize("change", ["contiguous", "no gradient", "bfloat16", "small"])
def test_squeeze_goes_timms_way_elsewhere(change, monkeypatch):
    layer, fused = make_squeezes()
    forbid(monkeypatch, fused_layers._Excite)
    if change == "bfloat16":
        layer.bfloat16(), fused.bfloat16()
    check_the_same(layer, fused, change, monkeypatch)


def forbid(monkeypatch, function: type) -> None:
    monkeypatch.setattr(function, "apply", lambda *arguments: pytest.fail("the fused way was taken"))


def check_the_same(layer: nn.Module, fused: nn.Module, change: str, monkeypatch) -> None:
    x = make_input().contiguous() if change == "contiguous" else make_input()
    if change == "small":
        monkeypatch.setattr(fused_layers, "SMALLEST_NORM", x.numel() + 1)
        monkeypatch.setattr(fused_layers, "SMALLEST_SQUEEZE", x.numel() + 1)
    if change == "bfloat16":
        x = x.bfloat16()
    with torch.set_grad_enabled(change != "no gradient"):
        assert torch.equal(fused(x), layer(x))


def test_can_be_undone():
    model = nn.Sequential(make_norms()[1], make_squeezes()[1], nn.BatchNorm2d(3))
    assert convert_fused_layers(model, fused=False) == 2
    assert [type(layer) for layer in model] == [BatchNormAct2d, SqueezeExcite, nn.BatchNorm2d]
