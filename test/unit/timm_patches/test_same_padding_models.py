"""The switch of SAME padding: what it exchanges and puts back, and whole models that no longer pad an activation."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from timm.layers import AvgPool2dSame, BlurPool2d, CondConv2d, Conv2dSame, MixedConv2d, ScaledStdConv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from effdet.config import get_efficientdet_config
from effdet.factory import create_model_from_config
from timm_patches.conv2d_same import Conv2dSameNoPad
from timm_patches.pool2d_same import AvgPool2dSameNoPad, MaxPool2dSameNoPad
from timm_patches.same_padding import convert_same_padding, restore_same_padding


def random_input(channels: int, *size: int) -> torch.Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        Conv2dSame(3, 8, 3, 2),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1),
        MixedConv2d(8, 8, [3, 5], stride=2, padding="same", depthwise=True),
        MaxPool2dSame(3, 2),
        AvgPool2dSame((3, 1), (2, 1)),
    )


def test_the_report_counts_each_kind_and_a_second_call_finds_nothing():
    network = small_network()
    report = convert_same_padding(network)
    assert report == (3, 1, 1, ()) and report.converted == 5
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

    network = nn.ModuleDict(
        {
            "subclass": Scaled(4, 4, 3, 2),
            "standardised": ScaledStdConv2dSame(4, 4, 3, 2),
            "static": ScaledStdConv2dSame(4, 4, 3, 1),
            "conditional": CondConv2d(4, 4, 3, 2, padding="same", num_experts=2),
            "dilated": MaxPool2dSame(3, 2, dilation=2),
            "blur": BlurPool2d(4),
            "plain": nn.Conv2d(4, 4, 3),
            "same": Conv2dSame(4, 4, 3, 2),
        }
    )
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
    assert {
        "aten::convolution",
        "aten::convolution_backward",
        "aten::max_pool2d_with_indices_backward",
    } <= recorder.names
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
    return create_model_from_config(
        config, pretrained_backbone=False, image_size=size, num_classes=3, pad_type=pad_type
    ).eval()


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
    # Each layer pads once forward and once for the gradient, which the image needs not.
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
