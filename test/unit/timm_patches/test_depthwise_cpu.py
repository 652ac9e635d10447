"""Depthwise convolutions on CPUs against torch's in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_patches import depthwise_cpu, fused_layers
from timm_patches.depthwise_cpu import COLUMNS, depthwise_conv2d
from timm_patches.fused_layers import FusedConv2d, FusedConv2dSame, convert_fused_layers

CHANNELS = 17  # a block of 16 in oneDNN, and a rest
AVX = torch.backends.cpu.get_cpu_capability().startswith("AVX")
pytestmark = pytest.mark.skipif(not AVX, reason="this way is for processors with AVX")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(fused_layers, "SMALLEST_STRIDED", 0)


def make_layers(kernel: int, stride: int, padding: int | None) -> tuple[nn.Module, nn.Module]:
    """Return torch's or timm's layer and the converted one; no padding is SAME."""
    torch.manual_seed(0)
    cls, options = (Conv2dSame, {}) if padding is None else (nn.Conv2d, {"padding": padding})
    layer = cls(CHANNELS, CHANNELS, kernel, stride, groups=CHANNELS, bias=False, **options)
    model = nn.Sequential(copy.deepcopy(layer))
    assert convert_fused_layers(model) == 1 and type(model[0]) is (FusedConv2dSame if padding is None else FusedConv2d)
    return layer, model[0]


def make_input(height: int = 9, width: int = 8, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, CHANNELS, height, width).contiguous(memory_format=torch.channels_last)


def run(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, (x, layer.weight), dy)


@pytest.mark.parametrize("images", [1, 2, 8])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"),
    [
        (5, 1, 2, (9, 8)),
        (5, 1, 2, (2, 1)),
        (5, 1, 0, (6, 9)),
        (5, 2, 2, (8, 7)),
        (7, 1, 3, (5, 9)),
        (9, 3, 4, (12, 7)),
        (5, 2, None, (8, 8)),
        (5, 2, None, (9, 7)),
        (5, 2, None, (1, 1)),
        (3, 2, None, (8, 8)),
        (3, 2, None, (7, 8)),
        (3, 3, None, (8, 7)),
        (7, 2, None, (2, 6)),
        (5, 1, None, (4, 5)),
    ],
)
def test_equals_float64(kernel, stride, padding, size, images, monkeypatch):
    monkeypatch.setattr(depthwise_cpu, "PIECE", images * CHANNELS * size[0] * size[1])  # of 3: pieces of 1, 2 + 1, 3
    layer, fused = make_layers(kernel, stride, padding)
    x = make_input(*size)
    calls = count_calls(monkeypatch)
    for mine, theirs in zip(run(fused, x), run(layer.double(), x.double()), strict=True):
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-5, atol=1e-5)
    assert len(calls) == 1


def count_calls(monkeypatch) -> list:
    calls = []
    monkeypatch.setattr(fused_layers, "depthwise_conv2d", lambda *args: calls.append(args) or depthwise_conv2d(*args))
    return calls


def test_gradient_of_another_layout_and_of_one_input_only():
    layer, fused = make_layers(5, 1, 2)
    x = make_input()
    for wanted in ("input", "weight"):
        found = []
        for module in (layer, fused):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_(wanted == "input")
            dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))  # channels-first
            found += torch.autograd.grad(module(leaf), leaf if wanted == "input" else module.weight, dy)
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


class WeightGradients(TorchDispatchMode):
    """Collects the shapes of the weights whose gradients convolutions compute, and of what pad operators pad."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.pads: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default and args[10][1]:
            self.shapes.append(tuple(args[2].shape[2:]))
        if function is torch.ops.aten.constant_pad_nd.default:
            self.pads.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "expected"),
    [
        (5, 1, 2, [(5, 3), (5, 2)]),
        (5, 2, None, [(5, 3), (5, 2)]),
        (3, 2, None, [(3, 3)]),
        (7, 1, 3, [(7, 3), (7, 3), (7, 1)]),
    ],
)
def test_no_convolution_has_more_columns_than_onednn_takes_and_no_input_is_padded(kernel, stride, padding, expected):
    _, fused = make_layers(kernel, stride, padding)
    with WeightGradients() as seen:
        run(fused, make_input(8, 8))
    assert seen.shapes == expected and max(columns for _, columns in expected) <= COLUMNS
    assert all(shape == tuple(fused.weight.shape) for shape in seen.pads)


@pytest.mark.parametrize("change", ["contiguous", "no gradient", "frozen", "float64", "autocast", "empty", "traced"])
@pytest.mark.parametrize("padding", [2, None], ids=["plain", "same"])
def test_goes_the_plain_way_elsewhere(padding, change, monkeypatch):
    layer, fused = make_layers(5, 1 if padding else 2, padding)
    monkeypatch.setattr(fused_layers, "depthwise_conv2d", lambda *arguments: pytest.fail("the quick way was taken"))
    x = make_input(batch=0) if change == "empty" else make_input()
    if change == "contiguous":
        x = x.contiguous()
    if change == "frozen":
        fused.weight.requires_grad_(False)
    if change == "float64":
        layer, fused, x = layer.double(), fused.double(), x.double()
    with torch.set_grad_enabled(change != "no gradient"), torch.autocast("cpu", enabled=change == "autocast"):
        mine = torch.jit.trace(fused, x)(x) if change == "traced" else fused(x)
        assert torch.equal(mine, layer(x))


def test_short_layers_of_few_columns_go_timms_way(monkeypatch):
    layer, fused = make_layers(3, 2, None)
    x = make_input()
    monkeypatch.setattr(fused_layers, "SMALLEST_STRIDED", x.numel() + 1)
    monkeypatch.setattr(fused_layers, "depthwise_conv2d", lambda *arguments: pytest.fail("the quick way was taken"))
    assert torch.equal(fused(x), layer(x))


def test_only_depthwise_layers_of_many_columns_are_changed_and_can_be_changed_back():
    layers = nn.Sequential(
        nn.Conv2d(8, 8, 5, groups=8, bias=False),
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.Conv2d(8, 8, 5, bias=False),
        nn.Conv2d(8, 8, 5, groups=8),
        nn.Conv2d(8, 16, 5, groups=8, bias=False),
        nn.Conv2d(8, 8, 5, groups=8, bias=False, dilation=2),
        nn.Conv2d(8, 8, 5, groups=8, bias=False, padding="same"),
        nn.Conv2d(8, 8, 5, groups=8, bias=False, padding=2, padding_mode="reflect"),
    )
    assert convert_fused_layers(layers) == 1 and type(layers[0]) is FusedConv2d
    assert {type(layer) for layer in layers[1:]} == {nn.Conv2d}
    assert convert_fused_layers(layers, fused=False) == 1 and type(layers[0]) is nn.Conv2d


def test_a_wrong_channel_count_gets_torchs_error():
    _, fused = make_layers(5, 1, 2)
    with pytest.raises(RuntimeError, match="channels"):
        fused(torch.randn(1, CHANNELS + 1, 9, 9).contiguous(memory_format=torch.channels_last))
