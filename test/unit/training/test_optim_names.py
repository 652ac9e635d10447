"""Every optimizer that `--opt` takes trains, is saved, and goes on from there; the others are refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from timm.optim import get_optimizer_info, list_optimizers

from effdet.checkpoint.io import load_checkpoint_file, save_checkpoint
from effdet.config.model_config import stored_model_spec
from effdet.efficientdet import EfficientDet
from effdet.training.optim import build_optimizer, check_optimizer
from timm_patches.optim_factory import _FUSED_SGD_NAMES

NAMES = sorted({*_FUSED_SGD_NAMES, *list_optimizers()})
OWN_PACKAGES = ("bnb", "fused")  # bitsandbytes and apex, which need a card
REFUSED = {
    "adafactorbv": "adafactor",
    "adafactorbvc": "adafactor",
    "cadafactorbv": "adafactor",
    "cadafactorbvc": "adafactor",
    "kron": "muon",
    "kronc": "muon",
    "kronw": "muon",
    "adahessian": "adamw",
}


def needs_a_package(name: str) -> bool:
    return name.startswith(OWN_PACKAGES) and name not in _FUSED_SGD_NAMES


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_train_or_be_saved_is_refused_with_what_can(name):
    with pytest.raises(ValueError, match=REFUSED[name]):
        check_optimizer(name, None, torch.device("cpu"))
    check_optimizer(REFUSED[name], None, torch.device("cpu"))


def test_refused_are_all_variants_of_their_classes():
    kinds = {get_optimizer_info(name).opt_class for name in REFUSED}
    same = {name for name in list_optimizers() if get_optimizer_info(name).opt_class in kinds}
    assert same == set(REFUSED)


@pytest.fixture(scope="module")
def network(small_model) -> EfficientDet:
    torch.manual_seed(0)
    return EfficientDet(stored_model_spec(small_model), pretrained_backbone=False).train()


def take_steps(model: EfficientDet, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for number in range(first, last):
        images = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        class_logits, box_deltas = model(images)
        sum(level.square().mean() for level in (*class_logits, *box_deltas)).backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(name for name in NAMES if name not in REFUSED), "lookahead_adamw"])
def test_two_steps_saved_and_resumed_are_those_of_an_uninterrupted_run(name, network, tmp_path: Path):
    if needs_a_package(name):
        with pytest.raises(ValueError, match="'fusedmomentum' and 'adamw' are fused without"):
            check_optimizer(name, None, torch.device("cpu"))
        return
    more = 6 if name.startswith("lookahead") else 1  # lookahead acts at each sixth step
    whole = copy.deepcopy(network)
    optimizer = build_optimizer(whole, name, 0.001)
    take_steps(whole, optimizer, 0, 2)
    save_checkpoint(tmp_path / "a.pth", {"model": whole.state_dict(), "optimizer": optimizer.state_dict()})
    take_steps(whole, optimizer, 2, 2 + more)

    stored = load_checkpoint_file(tmp_path / "a.pth")
    resumed = copy.deepcopy(network)
    resumed.load_state_dict(stored["model"])
    optimizer = build_optimizer(resumed, name, 0.001)
    optimizer.load_state_dict(stored["optimizer"])
    take_steps(resumed, optimizer, 2, 2 + more)
    start = network.state_dict()
    for key, value in whole.state_dict().items():
        assert torch.isfinite(value).all() and torch.equal(value, resumed.state_dict()[key]), key
    assert any(not torch.equal(value, start[key]) for key, value in whole.named_parameters())
