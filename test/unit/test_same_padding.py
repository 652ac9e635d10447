"""SAME padding without a pad operator: plans against brute force, layers and whole models against timm's own."""
from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import AvgPool2dSame, BlurPool2d, CondConv2d, Conv2dSame, MixedConv2d, ScaledStdConv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from effdet.config import get_efficientdet_config
from effdet.factory import create_model_from_config
from timm_patches.conv2d_same import Conv2dSameNoPad
from timm_patches.padding import ConvPlan, MaxPoolPlan, plan_conv, plan_max_pool, same_length, same_padding
from timm_patches.pool2d_same import AvgPool2dSameNoPad, MaxPool2dSameNoPad
from timm_patches.same_padding import convert_same_padding, restore_same_padding

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
    found = [window[plan.lead:] for window in windows(plan.length, cells, stride, dilation, -plan.padding)]
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
    assert windows(computed, kernel, stride, 1, -plan.padding)[plan.skip:] == expected
    assert all(window[0] < size and window[-1] >= 0 for window in expected)  # none sees padding only


# --- the layers -----------------------------------------------------------------------------------------------------


def without_pad(layer: nn.Module) -> nn.Module:
    twin = copy.deepcopy(layer)
    assert convert_same_padding(twin).converted == 1
    return twin


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


def random_input(channels: int, *size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(seed))


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
@pytest.mark.parametrize("layer", [Conv2dSame(4, 4, 3, 2), Conv2dSame(4, 4, 5, 2, groups=4), MaxPool2dSame(3, 2),
                                   AvgPool2dSame(3, 2)], ids=repr)
def test_autocast_and_low_precision_inputs(layer, dtype):
    tolerance = 8 * torch.finfo(dtype).eps
    with torch.autocast("cpu", dtype):
        for x in (random_input(4, 8, 8), random_input(4, 8, 8).to(dtype)):
            assert_equal_layers(layer, x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layer", [Conv2dSame(16, 16, 3, 2), Conv2dSame(16, 16, 5, 2, groups=16), MaxPool2dSame(3, 2),
                                   AvgPool2dSame(3, 2)], ids=repr)
def test_channels_last_is_kept(layer):
    layer = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    x = random_input(16, 8, 8).contiguous(memory_format=torch.channels_last)
    found = without_pad(layer)(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_equal_layers(layer, x)


# --- the switch -----------------------------------------------------------------------------------------------------


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Conv2dSame(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1),
                         MixedConv2d(8, 8, [3, 5], stride=2, padding="same", depthwise=True),
                         MaxPool2dSame(3, 2), AvgPool2dSame((3, 1), (2, 1)))


def test_the_report_counts_each_kind_and_a_second_call_finds_nothing():
    network = small_network()
    report = convert_same_padding(network)
    assert report == (3, 1, 1, ()) and report.converted == 5
    assert str(report) == "3 convolutions, 1 max pools and 1 average pools exchanged; left as explicit padding: 0"
    kinds = [type(module) for module in network.modules() if "Same" in type(module).__name__]
    assert kinds == [Conv2dSameNoPad] * 3 + [MaxPool2dSameNoPad, AvgPool2dSameNoPad]
    assert convert_same_padding(network) == (0, 0, 0, ())


def test_restoring_is_the_exact_reverse_and_keeps_every_tensor():
    network = small_network()
    classes = [type(module) for module in network.modules()]
    attributes = [dict(vars(module)) for module in network.modules()]
    state = network.state_dict()
    tensors = {name: id(tensor) for name, tensor in [*network.named_parameters(), *network.named_buffers()]}
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for change in (convert_same_padding, restore_same_padding):
        report = change(network)
        assert report[:3] == (3, 1, 1)
        assert {n: id(t) for n, t in [*network.named_parameters(), *network.named_buffers()]} == tensors
        assert list(network.state_dict()) == list(state)
        assert [dict(vars(module)) for module in network.modules()] == attributes
    assert [type(module) for module in network.modules()] == classes
    assert report.left == ("0", "3.0", "3.1", "4", "5")
    assert restore_same_padding(network).converted == 0
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in network.parameters()]


def test_mode_pad_restores_and_an_unknown_mode_is_refused():
    network = small_network()
    convert_same_padding(network, "kernel")
    assert convert_same_padding(network, mode="pad").converted == 5
    assert type(network[0]) is Conv2dSame
    with pytest.raises(ValueError, match="'symmetric'.*'kernel'.*'pad'"):
        convert_same_padding(network, "symmetric")


def test_copies_and_pickles_of_a_converted_network_stay_converted():
    network = small_network().eval()
    convert_same_padding(network)
    x = random_input(3, 32, 32)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert type(twin[0]) is Conv2dSameNoPad and twin[0].weight is not network[0].weight
        torch.testing.assert_close(twin(x), network(x), rtol=0, atol=0)
        restore_same_padding(twin)
        assert type(twin[0]) is Conv2dSame and type(network[0]) is Conv2dSameNoPad


def test_layers_with_a_forward_of_their_own_are_left_and_named():
    class Scaled(Conv2dSame):
        def forward(self, x):
            return 2 * super().forward(x)

    network = nn.ModuleDict({
        "subclass": Scaled(4, 4, 3, 2), "standardised": ScaledStdConv2dSame(4, 4, 3, 2),
        "static": ScaledStdConv2dSame(4, 4, 3, 1), "conditional": CondConv2d(4, 4, 3, 2, padding="same", num_experts=2),
        "dilated": MaxPool2dSame(3, 2, dilation=2),
        "blur": BlurPool2d(4), "plain": nn.Conv2d(4, 4, 3), "same": Conv2dSame(4, 4, 3, 2)})
    x = random_input(4, 8, 8)
    expected = network["subclass"](x), network["standardised"](x)
    report = convert_same_padding(network)
    assert report == (1, 0, 0, ("subclass", "standardised", "conditional", "dilated", "blur"))
    torch.testing.assert_close((network["subclass"](x), network["standardised"](x)), expected, rtol=0, atol=0)
    assert convert_same_padding(Scaled(4, 4, 3, 2)).left == ("Scaled",)


# --- whole models ---------------------------------------------------------------------------------------------------


class PadRecorder(TorchDispatchMode):
    """Note what every pad operator is given and returns, and which other operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.padded: list[tuple[int, torch.Size, torch.Size]] = []  # the input's address and shape, the result's shape
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        self.names.add(name)
        if "pad" in name.partition("::")[2]:
            self.padded.append((args[0].data_ptr(), args[0].shape, out.shape))
        return out


def pads_of_activations(model: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """Run forward and backward; return how often a pad operator saw a kernel (or its gradient), and anything else."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    with PadRecorder() as recorder:
        loss = sum(level.square().mean() for level in itertools.chain(*model(x)))
        loss.backward()
    assert {"aten::convolution", "aten::convolution_backward", "aten::max_pool2d_with_indices_backward"} \
        <= recorder.names
    of_weights, extended = [], set()
    for address, before, after in recorder.padded:
        is_weight = address in weights
        if is_weight:
            extended.add(after)
        of_weights.append(is_weight or before in extended)  # the gradient of an extended kernel is cut back
    return of_weights.count(True), of_weights.count(False)


def build(name: str, size: tuple[int, int], pad_type: str | None = None, downsample: str = "max") -> nn.Module:
    config = get_efficientdet_config(name)
    config.downsample_type = downsample
    torch.manual_seed(0)
    return create_model_from_config(config, pretrained_backbone=False, image_size=size, num_classes=3,
                                    pad_type=pad_type).eval()


MODELS = [  # the FPN's pools: two below the backbone's last level, four in each of three cells
    ("tf_efficientdet_d0", None, (128, 256), (5, 14, 0)),
    ("tf_efficientdet_lite0", None, (128, 128), (5, 14, 0)),
    ("mixdet_m", "same", (128, 128), (15, 14, 0)),  # several kernels of different size in one mixed convolution
    ("cspresdet50", None, (128, 128), (0, 0, 0)),  # pads symmetrically by nature
]


@pytest.mark.parametrize(("name", "pad_type", "size", "counts"), MODELS, ids=[row[0] for row in MODELS])
def test_models_compute_the_same_and_pad_no_activation(name, pad_type, size, counts):
    model = build(name, size, pad_type)
    x = random_input(3, *size)
    with torch.no_grad():
        expected = model(x)
    pads_before = pads_of_activations(model, x)
    report = convert_same_padding(model)
    assert report[:3] == counts and report.left == ()
    with torch.no_grad():
        found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # Each layer pads once forward and once for the gradient, which the picture needs not.
    assert pads_before == (0, max(2 * report.converted - 1, 0))
    weights, activations = pads_of_activations(model, x)
    assert activations == 0 and weights == 2 * counts[0]


def test_average_pools_of_a_model_that_downsamples_by_averages():
    model = build("tf_efficientdet_d0", (128, 128), downsample="avg")
    x = random_input(3, 128, 128)
    with torch.no_grad():
        expected = model(x)
        report = convert_same_padding(model)
        assert report.avg_pools >= 2 and report.left == ()
        with PadRecorder() as recorder:
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    kernels = [before[-2:] for _, before, _ in recorder.padded]  # features have 64, 32, ... 1 cells
    assert len(kernels) == report.converted and set(kernels) == {(3, 3), (5, 5)}
