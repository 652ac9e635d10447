"""Folded batch norms: the same outputs from fewer layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effdet import create_model
from effdet.network.folding import fold_batch_norm


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, image_size=(64, 64), pretrained_backbone=False).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics of a trained network
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model


@pytest.mark.parametrize("name", ["tf_efficientdet_d0", "tf_efficientdet_lite0", "resdet50", "cspresdet50"])
def test_outputs_stay(name):
    model = make_model(name)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        total = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        in_heads = sum(
            isinstance(module, nn.BatchNorm2d) for head in (model.class_net, model.box_net) for module in head.modules()
        )
        folded = fold_batch_norm(model, torch.zeros(1, 3, 64, 64))
        found = model(images)
    assert folded == total - in_heads > 20
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == in_heads
    for mine, theirs in zip(sum(found, []), sum(expected, []), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


def test_training_mode_is_refused():
    model = make_model("tf_efficientdet_d0").train()
    with pytest.raises(ValueError, match="call eval"):
        fold_batch_norm(model, torch.zeros(1, 3, 64, 64))


def test_a_norm_without_its_own_convolution_stays():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.first, self.second = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.second(self.first(self.conv(x)) + self.conv(x))

    assert fold_batch_norm(Shared().eval(), torch.zeros(1, 3, 8, 8)) == 0
