"""The switch between F.silu and npu_silu; a stand-in for the device's operator shows when it is called."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from timm_patches import activations
from timm_patches.activations import NpuSiLU, convert_silu


class Halved(nn.SiLU):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return super().forward(x) / 2


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Sequential(nn.SiLU(inplace=True), nn.ReLU()), Halved())


def test_layers_are_exchanged_counted_and_restored():
    model = network()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    expected, keys = model(x), list(model.state_dict())
    assert convert_silu(model) == 2
    assert convert_silu(model) == 0
    assert [type(m) for m in model.modules()].count(NpuSiLU) == 2 and type(model[3]) is Halved
    assert model[2][0].inplace and list(model.state_dict()) == keys
    for twin in (model, copy.deepcopy(model)):  # off the NPU it is nn.SiLU
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    assert convert_silu(model, "silu") == 2
    assert convert_silu(model, "silu") == 0
    assert [type(m) for m in model.modules()].count(nn.SiLU) == 2


def test_on_an_npu_the_operator_is_called(monkeypatch):
    monkeypatch.setattr(activations, "_is_on_npu", lambda tensor: True)
    calls = []

    def npu_silu(x):
        calls.append(tuple(x.shape))
        return x * torch.sigmoid(x)

    monkeypatch.setattr(torch.ops.npu, "npu_silu", npu_silu, raising=False)
    model = network()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    assert calls == []  # not without being asked for
    convert_silu(model)
    torch.testing.assert_close(model(x), expected)
    assert calls == [(5, 4), (5, 4)]


def test_an_unknown_operator_is_refused():
    with pytest.raises(ValueError, match="'swish'.*'silu'.*'npu_silu'"):
        convert_silu(network(), "swish")
