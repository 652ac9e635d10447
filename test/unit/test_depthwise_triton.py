"""The depthwise convolution in Triton against timm's: on a GPU as compiled, on CPUs in Triton's interpreter."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.layers import Conv2dSame
from timm.layers.conv2d_same import conv2d_same

from timm_patches import depthwise_triton, triton_switch
from timm_patches.depthwise_triton import DepthwiseConv2dSame, depthwise_conv2d_same

pytest.importorskip("triton")
DEVICE = os.environ.get("EFFDET_TEST_DEVICE", "cpu")


def inputs(shape, kernel, stride, dtype=torch.float32, seed=0):
    """Return x, weight and the output's gradient."""
    generator = torch.Generator().manual_seed(seed)
    batch, channels, height, width = shape
    sizes = shape, (channels, 1, *kernel), (batch, channels, -(-height // stride), -(-width // stride))
    x, weight, dy = (torch.randn(size, generator=generator).to(DEVICE, dtype) for size in sizes)
    return x.contiguous(memory_format=torch.channels_last), weight, dy.contiguous(memory_format=torch.channels_last)


def run(function, x, weight, dy):
    """Return the output and the gradients of x and weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy.to(y.dtype))


def timms(stride):
    def function(x, weight):
        return conv2d_same(x, weight, None, (stride, stride), groups=x.shape[1])

    return function


def ours(stride):
    return lambda x, weight: depthwise_conv2d_same(x, weight, stride)


def assert_close(results, expected, tolerance):
    """Compare relative to the largest value of each tensor."""
    for name, result, reference in zip(("y", "dx", "dweight"), results, expected, strict=True):
        assert result.shape == reference.shape, name
        error = (result.double() - reference.double()).abs().max() / reference.double().abs().max()
        assert error <= tolerance, (name, error)


# shape, kernel, stride; few rows, columns and channels, as Triton's interpreter takes its time
CASES = [
    ((1, 40, 3, 4), (3, 3), 2),  # more than one block of channels
    ((2, 5, 4, 5), (3, 3), 2),
    ((1, 5, 2, 70), (3, 3), 2),  # more than one block of columns
    ((1, 5, 1, 1), (3, 3), 2),
    ((1, 40, 2, 5), (5, 5), 2),
    ((2, 5, 3, 4), (5, 5), 2),
    ((1, 5, 2, 1), (5, 5), 2),
    ((1, 100, 1, 3), (3, 5), 2),
    ((1, 5, 4, 3), (5, 3), 2),
    ((1, 5, 3, 2), (3, 3), 1),
    ((1, 5, 2, 3), (5, 5), 1),
]
if DEVICE != "cpu":  # a selection only, as each size has kernels of its own to compile
    CASES += [((2, channels, *size), (kernel, kernel), 2) for channels in (96, 100)
              for size in ((64, 64), (63, 80), (7, 9)) for kernel in (3, 5)]
    CASES += [((2, 240, 64, 64), (3, 3), 2), ((2, 672, 32, 32), (5, 5), 2), ((2, 40, 31, 64), (5, 5), 1)]


@pytest.mark.parametrize(("shape", "kernel", "stride"), CASES, ids=str)
def test_float32_is_timms(shape, kernel, stride):
    x, weight, dy = inputs(shape, kernel, stride)
    results = run(ours(stride), x, weight, dy)
    assert all(result.dtype == torch.float32 for result in results)
    assert results[0].is_contiguous(memory_format=torch.channels_last)
    assert results[1].is_contiguous(memory_format=torch.channels_last)
    assert_close(results, run(timms(stride), x.double(), weight.double(), dy.double()), 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-4), (torch.bfloat16, 8e-3)], ids=str)
def test_half_precision_rounds_only_the_results(dtype, tolerance):
    x, weight, dy = inputs((1, 32, 4, 5), (3, 3), 2, dtype)
    results = run(ours(2), x, weight, dy)
    assert all(result.dtype == dtype for result in results)
    # Half a unit in the last place; a whole one of bfloat16, where Triton's interpreter cuts digits off.
    assert_close(results, run(timms(2), x.double(), weight.double(), dy.double()), tolerance)


@pytest.mark.parametrize("programs", [1, 5, 10**6])
def test_splits_of_the_weights_gradient(programs, monkeypatch):
    x, weight, dy = inputs((2, 35, 5, 18), (3, 3), 2)
    expected = run(timms(2), x.double(), weight.double(), dy.double())[2]
    monkeypatch.setattr(depthwise_triton, "_WEIGHT_PROGRAMS", programs)
    result = depthwise_triton._grad_weight(x, dy, (3, 3), 2).t().reshape(weight.shape)
    assert_close([result] * 3, [expected] * 3, 1e-5)


def test_other_memory_layouts_are_copied():
    x, weight, dy = inputs((1, 8, 3, 4), (3, 3), 2)
    expected = run(ours(2), x, weight, dy)
    for result, reference in zip(run(ours(2), x.contiguous(), weight, dy.contiguous()), expected, strict=True):
        assert torch.equal(result, reference)
    dy = dy[:1, :1, :1, :1].expand_as(dy)
    assert_close(run(ours(2), x, weight, dy), run(timms(2), x.double(), weight.double(), dy.double()), 1e-5)


def test_padding_meets_no_neighbours():
    """What lies beyond the edges belongs to another row or image, or is no number."""
    x, weight, dy = inputs((3, 8, 2, 3), (3, 3), 2)
    expected = [result[1:2] for result in run(ours(2), x, weight, dy)[:2]]
    x[0] = x[2] = dy[0] = dy[2] = float("nan")
    for result, reference in zip(run(ours(2), x, weight, dy)[:2], expected, strict=True):
        assert torch.equal(result[1:2], reference)


def test_only_the_gradients_asked_for():
    x, weight, dy = inputs((1, 8, 2, 4), (3, 3), 2)
    dx, dweight = run(ours(2), x, weight, dy)[1:]
    x.requires_grad_()
    assert torch.equal(torch.autograd.grad(ours(2)(x, weight), x, dy)[0], dx)
    x = x.detach()
    weight.requires_grad_()
    assert torch.equal(torch.autograd.grad(ours(2)(x, weight), weight, dy)[0], dweight)


def test_autocast_works_as_for_torchs_convolution():
    x, weight, dy = inputs((1, 8, 4, 5), (3, 3), 2)
    with torch.autocast(DEVICE, torch.bfloat16):
        results = run(ours(2), x, weight, dy)
        expected = run(timms(2), x, weight, dy)
    assert [result.dtype for result in results] == [torch.bfloat16, torch.float32, torch.float32]
    assert [result.dtype for result in expected] == [result.dtype for result in results]
    assert_close(results, expected, 8e-3)
    rounded = [tensor.bfloat16().double() for tensor in (x, weight, dy)]
    assert_close(results, run(timms(2), *rounded), 8e-3)


def test_unknown_arguments_raise():
    x, weight, _ = inputs((1, 8, 4, 4), (3, 3), 2)
    for arguments in ((x, weight, 3), (x, weight[:4], 2), (x.double(), weight, 2), (x[0], weight, 2),
                      (x, torch.zeros(8, 1, 7, 7), 2), (x[:0], weight, 2)):
        with pytest.raises(ValueError, match="No depthwise kernel"):
            depthwise_conv2d_same(*arguments)


# --- the layer ------------------------------------------------------------------------------------------------------


def layer(channels=8, kernel=3, stride=2, bias=False, groups=None, cls=DepthwiseConv2dSame, **arguments):
    return cls(channels, channels, kernel, stride, groups=groups or channels, bias=bias, **arguments)


def test_pays_where_the_kernels_fit(monkeypatch):
    x = torch.zeros(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    assert not layer().pays(x)  # on CPUs
    monkeypatch.setattr(depthwise_triton, "uses_triton", lambda device: True)
    assert layer().pays(x)
    assert layer(kernel=5).half().pays(x.half())
    assert not layer().pays(x.contiguous())
    assert not layer().pays(x.double())
    assert not layer().pays(x.half())
    assert not layer().pays(x[:0])
    for other in ({"bias": True}, {"stride": 1}, {"stride": (2, 1)}, {"groups": 4}, {"dilation": 2}, {"kernel": 7}):
        assert not layer(**other).pays(x), other
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer().pays(x)
        assert layer().pays(x.half())
        assert not layer().pays(x.double())


@pytest.mark.parametrize("wanted", [True, False])
def test_the_switch_is_for_gpus_and_off_at_first(wanted):
    assert not triton_switch.uses_triton(torch.device("cuda"))
    try:
        triton_switch.use_triton(wanted)
        assert triton_switch.uses_triton(torch.device("cuda")) is wanted
        assert not triton_switch.uses_triton(torch.device("cpu"))
    finally:
        triton_switch.use_triton(False)


@pytest.mark.parametrize("where", ["kernel", "timm"])
def test_layer_is_timms(where, monkeypatch):
    theirs = layer(cls=Conv2dSame).to(DEVICE)
    mine = layer().to(DEVICE)
    mine.load_state_dict(theirs.state_dict())
    calls = []

    def count(*arguments):
        calls.append(arguments)
        return depthwise_conv2d_same(*arguments)

    monkeypatch.setattr(depthwise_triton, "depthwise_conv2d_same", count)
    monkeypatch.setattr(DepthwiseConv2dSame, "pays", lambda self, x: where == "kernel")
    x, _, dy = inputs((1, 8, 4, 3), (3, 3), 2)
    results = []
    for module in (mine, theirs):
        leaf = x.detach().requires_grad_()
        y = module(leaf)
        results.append((y.detach(), *torch.autograd.grad(y, (leaf, module.weight), dy)))
    assert len(calls) == (where == "kernel")
    assert_close(*results, 1e-5 if DEVICE == "cpu" else 1e-2)  # cuDNN may round to TF32


@pytest.mark.skipif(DEVICE == "cpu", reason="torch's convolution runs out of memory and time on CPUs")
@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    x = torch.empty(34, 64, 1024, 1024, device=DEVICE, dtype=torch.float16, memory_format=torch.channels_last)
    x.normal_(generator=torch.Generator(DEVICE).manual_seed(0))
    weight = torch.randn(64, 1, 3, 3, device=DEVICE, dtype=torch.float16)
    dy = torch.zeros(34, 64, 512, 512, device=DEVICE, dtype=torch.float16).to(memory_format=torch.channels_last)
    dy[-1] = torch.randn(64, 512, 512, device=DEVICE)
    y, dx, dweight = run(ours(2), x, weight, dy)
    assert_close((y[-1:], dx[-1:], dweight), run(timms(2), x[-1:].double(), weight.double(), dy[-1:].double()), 1e-3)
    assert not dx[:-1].any()


def test_importing_the_layers_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import timm_patches.fused_layers, effdet.loss, effdet.anchors"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(depthwise_triton.__file__).parents[1])
