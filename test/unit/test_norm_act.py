"""Batch norm and SiLU in one against timm's two."""
from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

import timm_patches  # noqa: F401
from timm_patches import norm_act
from timm_patches.norm_act import FusedBatchNormAct2d, convert_norm_act

SHAPE = (3, 5, 7, 6)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(norm_act, "SMALLEST", 1)
    monkeypatch.setattr(norm_act, "PIECE", 64)  # 12 rows and a rest


def make_layers(**options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    layer = BatchNormAct2d(SHAPE[1], act_layer=nn.SiLU, momentum=0.2, eps=1e-3, **options)
    if layer.weight is not None:
        nn.init.uniform_(layer.weight, 0.5, 2)
        nn.init.normal_(layer.bias)
    fused = copy.deepcopy(layer)
    assert convert_norm_act(fused) == 1 and convert_norm_act(fused) == 0 and type(fused) is FusedBatchNormAct2d
    return layer, fused


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
def test_equals_timms_layers(offset):
    layer, fused = make_layers()
    x = (torch.randn(SHAPE) + offset).contiguous(memory_format=torch.channels_last)
    (expected, before), (found, after) = run(layer, x), run(fused, x)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-4 if offset else 1e-5)
    assert fused.num_batches_tracked == 1 and not torch.equal(fused.running_var, torch.ones(SHAPE[1]))
    large = [size for size in after if size >= x.numel()]
    assert len(large) == 1 < len([size for size in before if size >= x.numel()])


@pytest.mark.parametrize("change", ["eval", "contiguous", "no gradient", "no statistics", "bfloat16", "small"])
def test_goes_timms_way_elsewhere(change, monkeypatch):
    layer, fused = make_layers(track_running_stats=False) if change == "no statistics" else make_layers()
    monkeypatch.setattr(norm_act._BatchNormSiLU, "apply", lambda *arguments: pytest.fail("the fused way was taken"))
    x = torch.randn(SHAPE)
    x = x if change == "contiguous" else x.contiguous(memory_format=torch.channels_last)
    if change == "eval":
        layer.eval(), fused.eval()
    if change == "small":
        monkeypatch.setattr(norm_act, "SMALLEST", x.numel() + 1)
    with torch.set_grad_enabled(change != "no gradient"):
        if change == "bfloat16":
            x = x.bfloat16()
        assert torch.equal(fused(x), layer(x))


def test_can_be_undone():
    _, fused = make_layers()
    assert convert_norm_act(nn.Sequential(fused, nn.BatchNorm2d(3)), fused=False) == 1
    assert type(fused) is BatchNormAct2d
