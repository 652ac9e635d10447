"""Exchanging layers of a model: what goes over to the new layer, and what stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from timm_patches.exchange import exchange_layers


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Outer(nn.Sequential):
    pass


def double(layer: nn.Module) -> type[nn.Module] | None:
    return {nn.Conv2d: Doubled, nn.Sequential: Outer}.get(type(layer))


def make_model() -> nn.Module:
    """Return a model with a layer that has two names, one of them inside a layer that is exchanged too, and none."""
    model = nn.ModuleDict({"inner": nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU()), "norm": nn.BatchNorm2d(2)})
    model["again"] = model["inner"][0]
    model.register_module("nothing", None)
    return model


def test_tensors_names_flags_and_references_stay():
    model = make_model()
    model["again"].eval()
    tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    old = model["inner"], model["again"]
    assert exchange_layers(model, double) == list(old)
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == tensors
    assert type(model["inner"]) is Outer and type(model["again"]) is Doubled and model["again"] is model["inner"][0]
    assert not model["again"].training and model["inner"].training and type(model["norm"]) is nn.BatchNorm2d
    assert exchange_layers(model, double) == []
    x = torch.randn(1, 2, 3, 3)
    assert torch.equal(model["again"](x), 2 * nn.functional.conv2d(x, old[1].weight, old[1].bias))


def test_hooks_go_over_and_can_still_be_removed():
    model = make_model()
    calls = []
    handle = model["again"].register_forward_hook(lambda layer, args, out: calls.append(type(layer)))
    exchange_layers(model, double)
    model["inner"](torch.zeros(1, 2, 1, 1))
    handle.remove()
    model["inner"](torch.zeros(1, 2, 1, 1))
    assert calls == [Doubled]


@pytest.mark.parametrize("wanted", [True, False])
def test_the_model_itself_is_not_exchanged(wanted):
    model = nn.Sequential(nn.Sequential()) if wanted else nn.Sequential()
    assert len(exchange_layers(model, double)) == wanted and type(model) is nn.Sequential
