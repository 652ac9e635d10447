"""SAME padding without a pad operator: the plans against brute force, the layers against timm's own."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import AvgPool2dSame, Conv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from torch import nn

from timm_patches.padding import ConvPlan, MaxPoolPlan, plan_conv, plan_max_pool, same_length, same_padding
from timm_patches.same_padding import convert_same_padding

# --- the arithmetic -------------------------------------------------------------------------------------------------

# size, kernel, stride, dilation -> before, after; conv: padding, lead, length; max pool: padding, ceil_mode, skip
TABLE = [
    ((512, 3, 2, 1), (0, 1), (1, 1, 256), (0, True, 0)),  # the stem of every tf_ model, and the FPN's pools
    ((511, 3, 2, 1), (1, 1), (1, 0, 256), (1, False, 0)),
    ((512, 5, 2, 1), (1, 2), (2, 1, 256), (1, True, 0)),
    ((1, 3, 2, 1), (1, 1), (1, 0, 1), (1, False, 0)),
    ((2, 7, 2, 1), (2, 3), (3, 1, 1), (2, True, 0)),
    ((8, 2, 2, 1), (0, 0), (0, 0, 4), (0, False, 0)),
    ((8, 1, 2, 1), (0, 0), (0, 0, 4), (0, False, 0)),
    ((9, 2, 1, 1), (0, 1), (1, 1, 9), (1, False, 1)),
    ((9, 4, 1, 1), (1, 2), (2, 1, 9), (2, False, 1)),
    ((9, 3, 1, 1), (1, 1), (1, 0, 9), (1, False, 0)),
    ((8, 3, 2, 2), (1, 2), (3, 1, 4), None),
    ((9, 3, 3, 1), (0, 0), (0, 0, 3), (0, False, 0)),
    ((10, 5, 3, 1), (2, 2), (2, 0, 4), (2, False, 0)),
    ((8, 5, 3, 1), (1, 2), (2, 1, 3), (1, True, 0)),
    ((9, 2, 1, 3), (1, 2), (4, 1, 9), None),  # dilation above stride: the convolution's end is cut off
]


@pytest.mark.parametrize(("arguments", "padding", "conv", "pool"), TABLE, ids=lambda value: str(value))
def test_plans_of_known_cases(arguments, padding, conv, pool):
    assert same_padding(*arguments) == padding
    assert plan_conv(*arguments) == ConvPlan(*conv)
    if arguments[3] == 1:
        assert plan_max_pool(*arguments[:3]) == MaxPoolPlan(*pool)


axes = st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4))


def windows(count: int, kernel: int, stride: int, dilation: int, first: int) -> list[list[int]]:
    """Return the input cell under each kernel cell, for each output cell; `first` is where the first window starts."""
    return [[first + out * stride + cell * dilation for cell in range(kernel)] for out in range(count)]


@given(axes)
def test_same_padding_is_tensorflows(axis):
    size, kernel, stride, dilation = axis
    before, after = same_padding(*axis)
    assert after - before in (0, 1)
    length = same_length(size, stride)
    assert (length - 1) * stride < size <= length * stride
    last = windows(length, kernel, stride, dilation, -before)[-1][-1]
    assert last <= size - 1 + after  # the last window ends inside the padding
    assert last == size - 1 + after or before == after == 0  # and no cell of padding is without use


@given(axes)
def test_a_convolutions_plan_reads_the_same_cells(axis):
    size, kernel, stride, dilation = axis
    plan = plan_conv(*axis)
    cells = kernel + plan.lead
    computed = (size + 2 * plan.padding - dilation * (cells - 1) - 1) // stride + 1
    assert computed >= plan.length == same_length(size, stride)
    assert computed == plan.length or dilation > stride
    found = [window[plan.lead :] for window in windows(plan.length, cells, stride, dilation, -plan.padding)]
    assert found == windows(plan.length, kernel, stride, dilation, -same_padding(*axis)[0])


@given(axes)
def test_a_max_pools_plan_reads_the_same_cells(axis):
    size, kernel, stride, _ = axis
    plan = plan_max_pool(size, kernel, stride)
    assert plan.padding <= kernel // 2  # torch refuses more
    slack = stride - 1 if plan.ceil_mode else 0
    computed = (size + 2 * plan.padding - kernel + slack) // stride + 1
    if plan.ceil_mode and (computed - 1) * stride >= size + plan.padding:
        computed -= 1  # torch drops a window that starts behind the input
    expected = windows(same_length(size, stride), kernel, stride, 1, -same_padding(size, kernel, stride)[0])
    assert windows(computed, kernel, stride, 1, -plan.padding)[plan.skip :] == expected
    assert all(window[0] < size and window[-1] >= 0 for window in expected)  # none sees padding only


# --- the layers -----------------------------------------------------------------------------------------------------


def without_pad(layer: nn.Module) -> nn.Module:
    twin = nn.Sequential(copy.deepcopy(layer))
    assert convert_same_padding(twin).converted == 1
    return twin[0]


def assert_same_cells(layer: nn.Module, x: torch.Tensor) -> None:
    """Compare a timm layer with its converted copy in float64, where only a wrong cell makes a difference."""
    assert_equal_layers(layer.double(), x.double(), rtol=1e-12, atol=1e-12)


def assert_equal_layers(layer: nn.Module, x: torch.Tensor, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """Compare a timm layer with its converted copy: output, gradient of the input and of each parameter."""
    results = []
    for module in (copy.deepcopy(layer), without_pad(layer)):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = module(leaf)
        # A gradient that differs from cell to cell, so that a shift by one cannot go unseen.
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        (out * weights).sum().backward()
        results.append([out.detach(), leaf.grad, *(parameter.grad for parameter in module.parameters())])
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def random_input(channels: int, *size: int) -> torch.Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))


SIZES = [(8, 8), (7, 7), (8, 7), (13, 16), (1, 2)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", range(1, 8))
def test_convolution_equals_timms(kernel, stride, size):
    torch.manual_seed(0)
    for groups, out, dilation in itertools.product((1, 2, 4), (4, 8), (1, 2)):  # groups 4: depthwise
        layer = Conv2dSame(4, out, kernel, stride, dilation=dilation, groups=groups, bias=out == 8)
        assert_same_cells(layer, random_input(4, *size))


pairs = st.tuples(st.integers(1, 5), st.integers(1, 5))
small_pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
sizes = st.tuples(st.integers(1, 14), st.integers(1, 14))


@settings(max_examples=60, deadline=None)
@given(sizes, pairs, small_pairs, small_pairs)
def test_convolution_of_any_shape_equals_timms(size, kernel, stride, dilation):
    torch.manual_seed(0)
    assert_same_cells(Conv2dSame(2, 2, kernel, stride, dilation=dilation, groups=2), random_input(2, *size))


@pytest.mark.parametrize("pool", [MaxPool2dSame, AvgPool2dSame])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kernel", range(1, 8))
def test_pool_equals_timms(kernel, size, pool):
    for stride, ceil_mode in itertools.product((1, 2, 3), (False, True)):
        assert_same_cells(pool(kernel, stride, ceil_mode=ceil_mode), random_input(3, *size))


@settings(max_examples=60, deadline=None)
@given(sizes, pairs, small_pairs)
def test_pool_of_any_shape_equals_timms(size, kernel, stride):
    x = random_input(2, *size)
    assert_same_cells(MaxPool2dSame(kernel, stride), x)
    assert_same_cells(AvgPool2dSame(kernel, stride, count_include_pad=False), x)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_max_pool_sends_the_gradient_of_equal_maxima_to_the_same_cell(size):
    x = random_input(3, *size).sign()  # of two values only, so nearly every window has several maxima
    for kernel, stride in ((2, 1), (3, 2), (4, 2), (5, 3)):
        assert_equal_layers(MaxPool2dSame(kernel, stride), x, rtol=0, atol=0)


def test_max_pool_of_negative_cells_never_takes_the_padding():
    found = without_pad(MaxPool2dSame(3, 2))(torch.full((1, 1, 4, 4), -5.0))
    assert found.tolist() == [[[[-5.0, -5.0], [-5.0, -5.0]]]]


def test_average_pool_counts_the_padding_as_zeros():
    found = without_pad(AvgPool2dSame(3, 2))(torch.full((1, 1, 4, 4), 9.0))
    torch.testing.assert_close(found, torch.tensor([[[[9.0, 6.0], [6.0, 4.0]]]]))


@pytest.mark.parametrize("layer", [Conv2dSame(4, 4, 3, 2), MaxPool2dSame(3, 2), AvgPool2dSame(3, 2)], ids=repr)
def test_one_image_without_a_batch_axis(layer):
    x = random_input(4, 8, 7)[0]
    torch.testing.assert_close(without_pad(layer)(x), layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "layer",
    [Conv2dSame(4, 4, 3, 2), Conv2dSame(4, 4, 5, 2, groups=4), MaxPool2dSame(3, 2), AvgPool2dSame(3, 2)],
    ids=repr,
)
def test_autocast_and_low_precision_inputs(layer, dtype):
    tolerance = 8 * torch.finfo(dtype).eps
    with torch.autocast("cpu", dtype):
        for x in (random_input(4, 8, 8), random_input(4, 8, 8).to(dtype)):
            assert_equal_layers(layer, x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "layer",
    [Conv2dSame(16, 16, 3, 2), Conv2dSame(16, 16, 5, 2, groups=16), MaxPool2dSame(3, 2), AvgPool2dSame(3, 2)],
    ids=repr,
)
def test_channels_last_is_kept(layer):
    layer = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    x = random_input(16, 8, 8).contiguous(memory_format=torch.channels_last)
    found = without_pad(layer)(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_equal_layers(layer, x)
