"""The weight average against a slow loop, its warm-up and its counters."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from effdet.training.ema import ModelEma, unwrap_model


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(torch.randn_like(tensor) if tensor.is_floating_point() else 3)


def slow_decay(n: int, decay: float, warmup: bool) -> float:
    return min(decay, (1 + n) / (10 + n)) if warmup else decay


@pytest.mark.parametrize(("decay", "warmup"), [(0.9999, True), (0.3, True), (0.9, False), (0.0, False)])
def test_update_equals_a_loop_over_the_state(decay: float, warmup: bool) -> None:
    model = make_model()
    ema = ModelEma(model, decay, warmup)
    slow = {name: value.double() for name, value in model.state_dict().items()}
    share = 1.0
    for n in range(7):
        disturb(model)
        d = slow_decay(n, decay, warmup)
        assert ema.decay_now == d
        ema.update(model)
        share *= d
        for name, value in model.state_dict().items():
            slow[name] = d * slow[name] + (1 - d) * value.double() if value.is_floating_point() else value.double()
    assert ema.updates == 7 and ema.share_of_init() == pytest.approx(share)
    for name, value in ema.module.state_dict().items():
        torch.testing.assert_close(value.double(), slow[name], rtol=1e-5, atol=1e-6)
    assert ema.module[1].num_batches_tracked == 21  # copied, not averaged


def test_an_average_laid_out_flat_is_the_same_to_the_last_bit() -> None:
    """Part of the weights lie flat already, in another order, as an optimizer keeps them; the rest is moved."""
    model, twin = make_model(), make_model()
    ema, slow = ModelEma(model, 0.9), ModelEma(twin, 0.9)
    for step in range(6):
        for seed_of, network in ((step, model), (step, twin)):
            torch.manual_seed(seed_of)
            disturb(network)
        if step == 2:
            parts = [model[2].weight, model[1].bias, model[0].weight]
            flat = torch.cat([part.detach().reshape(-1) for part in parts])
            for part, place in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                part.data = place.view(part.shape)
            kept = {id(tensor) for tensor in [*model.parameters(), *ema.module.parameters(), *model.buffers()]}
            ema.flatten({**dict(model.named_parameters()), **dict(model.named_buffers())}, [(flat, parts)])
            now = {id(tensor) for tensor in [*model.parameters(), *ema.module.parameters(), *model.buffers()]}
            assert now == kept and len({t.untyped_storage().data_ptr() for t in ema.module.parameters()}) == 2
        ema.update(model)
        slow.update(twin)
        if step == 4:
            ema.load_state_dict(copy.deepcopy(ema.state_dict()))
        for mine, other in ((ema.module, slow.module), (model, twin)):
            for name, value in other.state_dict().items():
                assert torch.equal(mine.state_dict()[name], value), name


def test_how_cold_it_is() -> None:
    cold = ModelEma(make_model(), 0.9998, warmup=False)
    assert cold.share_of_init() == 1.0 and cold.is_cold()
    for _ in range(1000):
        cold.update({name: value for name, value in cold.module.state_dict().items()})
    assert cold.share_of_init() == pytest.approx(0.8187, abs=1e-4)  # .9998^1000: 82 % is still the initial weights
    assert cold.is_cold()
    warm = ModelEma(make_model(), 0.9998)
    for _ in range(10):
        warm.update(warm.module)
    # 1/10 * 2/11 * ... * 10/19 = 10! 9! / 19!
    assert warm.share_of_init() == pytest.approx(math.factorial(10) * math.factorial(9) / math.factorial(19))
    assert not warm.is_cold()


def test_the_share_is_what_is_left_of_the_initial_weights() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema = ModelEma(model, 0.7, warmup=True)
    nn.init.zeros_(model.weight)
    for _ in range(4):
        ema.update(model)
    assert ema.module.weight.item() == pytest.approx(ema.share_of_init(), rel=1e-5)


def test_the_average_is_an_independent_float_model_in_eval_mode() -> None:
    model = make_model().train()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    model[0].half()
    ema = ModelEma(model, 0.5, warmup=False)
    assert not any(module.training for module in ema.module.modules())
    assert all(p.dtype == torch.float32 and not p.requires_grad and p.grad is None for p in ema.module.parameters())
    start = ema.module[0].weight.clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    ema.update(model)
    assert model.training
    torch.testing.assert_close(ema.module[0].weight, (start + model[0].weight.float()) / 2)
    assert ema.module(torch.randn(1, 3, 8, 8)).shape == (1, 2, 6, 6)


def test_weights_by_name_are_taken_instead_of_the_model() -> None:
    model = make_model()
    ema = ModelEma(model, 0.75, warmup=False)
    weights = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    before = ema.module[2].bias.clone()
    ema.update(weights)
    torch.testing.assert_close(ema.module[2].bias, 0.75 * before + 0.25)


def test_tied_weights_move_once_and_unsaved_buffers_not_at_all() -> None:
    model = make_model()
    model.add_module("tied", model[2])
    model.register_buffer("grid", torch.zeros(3), persistent=False)
    ema = ModelEma(model, 0.5, warmup=False)
    start = ema.module[2].weight.clone()
    with torch.no_grad():
        model[2].weight.add_(4.0)
    ema.update(model)
    torch.testing.assert_close(ema.module[2].weight, start + 2.0)
    assert ema.module.tied is ema.module[2]


def test_wrappers_are_looked_through(tmp_path) -> None:
    model = make_model()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert unwrap_model(wrapped) is model and unwrap_model(model) is model
        ema = ModelEma(wrapped, 0.0, warmup=False)
        disturb(model)
        ema.update(wrapped)
        assert list(ema.module.state_dict()) == list(model.state_dict())
        torch.testing.assert_close(ema.module[0].weight, model[0].weight.detach())
    finally:
        torch.distributed.destroy_process_group()
    assert unwrap_model(torch.compile(model)) is model


def test_a_restored_average_continues_exactly(tmp_path) -> None:
    model = make_model()
    ema = ModelEma(model, 0.9999)
    for _ in range(3):
        disturb(model)
        ema.update(model)
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    other = ModelEma(make_model(seed=1), 0.9999)
    other.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    assert (other.updates, other.share_of_init()) == (3, ema.share_of_init())
    later = copy.deepcopy(model)
    disturb(later)
    ema.update(later)
    other.update(later)
    for mine, restored in zip(ema.module.state_dict().values(), other.module.state_dict().values(), strict=True):
        assert torch.equal(mine, restored)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_an_impossible_decay_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="below 1"):
        ModelEma(make_model(), decay)


def test_buffers_can_be_taken_over_as_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    ema = ModelEma(model, decay=0.9, warmup=False)
    model(torch.randn(8, 3, 4, 4) + 2)
    ema.update(model)
    assert not torch.equal(ema.module[1].running_mean, model[1].running_mean)
    weight = ema.module[0].weight.clone()
    with torch.no_grad():
        model[0].weight += 1
    ema.copy_buffers(model)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(ema.module[1], name), getattr(model[1], name))
    assert torch.equal(ema.module[0].weight, weight)
