"""Batch norm with SiLU and squeeze-and-excitation as Triton kernels, against timm's layers in float64."""
from __future__ import annotations

import copy
import os

import pytest
import torch
from timm.layers import BatchNormAct2d
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import nn

from timm_patches import fused_layers

pytest.importorskip("triton")
DEVICE = os.environ.get("EFFDET_TEST_DEVICE", "cpu")
TOLERANCES = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch):
    from timm_patches import norm_kernels
    monkeypatch.setattr(fused_layers, "triton_kernels", lambda x: norm_kernels)


def error(actual, expected):
    difference = (actual.detach().double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-9))


def make_input(shape, dtype, mean=0.0):
    torch.manual_seed(0)
    x = (torch.randn(shape) * 3 + mean).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    return x, torch.randn_like(x)


def run_both(layer, fused, x, gradient):
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    y, expected = fused(a), layer(b)
    y.backward(gradient)
    expected.backward(gradient.double())
    assert y.dtype == x.dtype and y.is_contiguous(memory_format=torch.channels_last)
    return (y, a.grad), (expected, b.grad)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(2, 40, 9, 8), (3, 16, 16, 16), (2, 100, 7, 5), (1, 7, 4, 4), (1, 144, 8, 16)])
@pytest.mark.parametrize("activate", [True, False])
def test_batch_norm(shape, dtype, activate):
    layer = BatchNormAct2d(shape[1], apply_act=activate, act_layer=nn.SiLU).to(DEVICE).train()
    nn.init.uniform_(layer.weight, 0.5, 2)
    nn.init.normal_(layer.bias)
    fused = copy.deepcopy(layer)
    fused_layers.convert_fused_layers(fused)
    assert type(fused) is fused_layers.FusedBatchNormAct2d
    layer.double()
    # A mean of six deviations: E[x^2] - E[x]^2 would lose digits.
    actual, expected = run_both(layer, fused, *make_input(shape, dtype, mean=20.0))
    for one, other in zip(actual, expected, strict=True):
        assert error(one, other) < TOLERANCES[dtype]
    for name in ("weight", "bias"):
        assert error(getattr(fused, name).grad, getattr(layer, name).grad) < 5e-6
    for name in ("running_mean", "running_var"):
        assert error(getattr(fused, name), getattr(layer, name)) < 1e-6
    assert fused.num_batches_tracked == 1


def test_batch_norm_of_many_rows_is_summed_in_several_splits(monkeypatch):
    from timm_patches import norm_kernels
    x, gradient = make_input((1, 32, 64, 32), torch.float32, mean=5.0)
    cut = norm_kernels._Rows(x)
    assert cut.splits > 1 and cut.repeats == 4
    layer = BatchNormAct2d(32, act_layer=nn.SiLU).to(DEVICE).train()
    fused = copy.deepcopy(layer)
    fused_layers.convert_fused_layers(fused)
    actual, expected = run_both(layer.double(), fused, x, gradient)
    assert max(error(one, other) for one, other in zip(actual, expected, strict=True)) < 5e-6


def test_a_frozen_norm_goes_timms_way():
    layer = BatchNormAct2d(8, act_layer=nn.SiLU).to(DEVICE)
    fused = copy.deepcopy(layer)
    fused_layers.convert_fused_layers(fused)
    x, _ = make_input((2, 8, 4, 4), torch.float32)
    torch.testing.assert_close(fused.eval()(x), layer.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(2, 40, 9, 8), (3, 96, 16, 16), (1, 7, 5, 3)])
def test_squeeze_excite(shape, dtype):
    torch.manual_seed(1)
    layer = SqueezeExcite(shape[1], rd_channels=8, act_layer=nn.SiLU).to(DEVICE)
    fused = copy.deepcopy(layer).to(dtype)
    fused_layers.convert_fused_layers(fused)
    actual, expected = run_both(layer.double(), fused, *make_input(shape, dtype))
    for one, other in zip(actual, expected, strict=True):
        assert error(one, other) < TOLERANCES[dtype]
    for (name, one), other in zip(fused.named_parameters(), layer.parameters(), strict=True):
        assert error(one.grad, other.grad) < 4 * TOLERANCES[dtype], name


def test_squeeze_excite_behind_frozen_layers_has_gradients_too():
    torch.manual_seed(1)
    layer = SqueezeExcite(12, rd_channels=4, act_layer=nn.SiLU).to(DEVICE)
    fused = copy.deepcopy(layer)
    fused_layers.convert_fused_layers(fused)
    x, gradient = make_input((2, 12, 6, 6), torch.float32)
    layer(x).backward(gradient)
    fused(x).backward(gradient)
    for one, other in zip(fused.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)
