"""Learning rates at points worked out by hand, and against timm's own per-epoch schedules."""

from __future__ import annotations

import logging
import math
import random

import pytest
import torch
from timm.scheduler import create_scheduler_v2

from effdet.training.schedule import Noise, Plateau, build_schedule


def make_optimizer(lr: float = 0.16) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=lr)


def test_cosine_by_hand() -> None:
    optimizer = make_optimizer(0.16)
    schedule, total = build_schedule(
        optimizer,
        "cosine",
        epochs=10,
        warmup_epochs=2,
        warmup_lr=1e-4,
        min_lr=1e-5,
        cooldown_epochs=3,
        updates_per_epoch=100,
    )
    assert total == 13
    assert optimizer.param_groups[0]["lr"] == schedule.lr == 1e-4
    span = 0.16 - 1e-5
    for updates, expected in [
        (1, 1e-4 + 0.1599 / 200),
        (100, 0.08005),
        (199, 1e-4 + 0.1599 * 199 / 200),
        (200, 1e-5 + span * (1 + math.cos(math.pi * 0.2)) / 2),  # the cosine has run since update 0
        (500, (0.16 + 1e-5) / 2),
        (999, 1e-5 + span * (1 + math.cos(math.pi * 0.999)) / 2),
        (1000, 1e-5),
        (1299, 1e-5),
    ]:
        schedule.step_update(updates)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12), updates


def test_poly_by_hand() -> None:
    schedule, total = build_schedule(
        make_optimizer(0.1),
        "poly",
        epochs=10,
        warmup_epochs=0,
        min_lr=0.02,
        decay_rate=2.0,
        cooldown_epochs=1,
        updates_per_epoch=10,
    )
    assert total == 11
    for updates, expected in [(0, 0.1), (50, 0.02 + 0.08 * 0.5**2), (90, 0.02 + 0.08 * 0.1**2), (100, 0.02)]:
        schedule.step_update(updates)
        assert schedule.lr == pytest.approx(expected, rel=1e-9), updates


def test_a_run_of_one_epoch_warms_up_in_steps() -> None:
    schedule, total = build_schedule(
        make_optimizer(0.1),
        epochs=1,
        warmup_epochs=0.25,
        warmup_lr=0.0,
        min_lr=0.0,
        cooldown_epochs=0,
        updates_per_epoch=8,
    )
    rates = [schedule.lr]
    for updates in range(1, 8):
        schedule.step_update(updates)
        rates.append(schedule.lr)
    assert total == 1
    assert rates[:2] == pytest.approx([0.0, 0.05])
    assert rates[2:] == pytest.approx([0.05 * (1 + math.cos(math.pi * t / 8)) for t in range(2, 8)])


@pytest.mark.parametrize(
    ("sched", "extra", "expected"),
    [
        ("step", {"decay_epochs": 2, "decay_rate": 0.5}, {9: 0.9, 10: 1.0, 19: 1.0, 20: 0.5, 39: 0.5, 40: 0.25}),
        ("multistep", {"decay_milestones": [3, 4], "decay_rate": 0.1}, {10: 1.0, 28: 1.0, 30: 0.1, 38: 0.1, 40: 0.01}),
        ("constant", {}, {0: 0.0, 5: 0.5, 10: 1.0, 59: 1.0}),
        ("none", {}, {0: 0.0, 5: 0.5, 10: 1.0, 59: 1.0}),
    ],
)
def test_other_shapes_by_hand(sched: str, extra: dict, expected: dict[int, float]) -> None:
    schedule, total = build_schedule(
        make_optimizer(1.0), sched, epochs=6, warmup_epochs=1, warmup_lr=0.0, updates_per_epoch=10, **extra
    )
    assert total == 6
    for updates, lr in expected.items():
        schedule.step_update(updates)
        assert schedule.lr == pytest.approx(lr, rel=1e-9), updates


@pytest.mark.parametrize(
    ("sched", "noise", "cycles"),
    [
        ("cosine", None, 1),
        ("cosine", [0.4, 0.9], 1),
        ("cosine", 0.5, 2),
        ("tanh", [0.4, 0.9], 1),
        ("step", [0.2, 0.9], 1),
    ],
)
def test_epoch_starts_agree_with_timm_by_epochs(sched: str, noise: float | list[float] | None, cycles: int) -> None:
    mine, theirs = make_optimizer(), make_optimizer()
    common = {
        "warmup_epochs": 3,
        "warmup_lr": 1e-4,
        "min_lr": 1e-5,
        "cooldown_epochs": 4,
        "cycle_limit": cycles,
        "decay_epochs": 5,
    }
    schedule, total = build_schedule(mine, sched, epochs=30, lr_noise=noise, seed=42, updates_per_epoch=7, **common)
    oracle, oracle_total = create_scheduler_v2(
        theirs, sched, num_epochs=30, noise=noise, noise_seed=42, cycle_decay=0.1, decay_rate=0.1, **common
    )
    assert total == oracle_total
    for epoch in range(total):
        schedule.step_update(epoch * 7)
        oracle.step(epoch)
        assert mine.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9), epoch


def test_a_rate_per_epoch_is_that_of_its_first_update() -> None:
    common = {"epochs": 6, "warmup_epochs": 2, "cooldown_epochs": 1, "lr_noise": [0.4, 0.9], "updates_per_epoch": 5}
    (smooth, total), (steps, _) = (build_schedule(make_optimizer(), **common, per_epoch=each) for each in (False, True))
    for epoch in range(total):
        smooth.step_update(epoch * 5)
        for updates in range(epoch * 5, epoch * 5 + 5):
            steps.step_update(updates)
            assert steps.lr == smooth.lr, updates
    steps.step_update(4)
    assert steps.lr == 1e-4  # the whole first epoch is trained at the warm-up's first rate


def test_noise_is_one_draw_an_epoch_and_the_same_everywhere() -> None:
    def rates(seed: int, noise: tuple[float, float] | None) -> list[float]:
        torch.manual_seed(random.randrange(10**6))  # ranks differ in their global generators
        schedule, _ = build_schedule(
            make_optimizer(1.0), "constant", epochs=10, warmup_epochs=0, lr_noise=noise, seed=seed, updates_per_epoch=4
        )
        result = []
        for updates in range(40):
            schedule.step_update(updates)
            result.append(schedule.lr)
        return result

    noisy = rates(42, (0.4, 0.9))
    assert noisy == rates(42, (0.4, 0.9)) != rates(43, (0.4, 0.9))
    by_epoch = [noisy[4 * epoch] for epoch in range(10)]
    assert noisy == [lr for lr in by_epoch for _ in range(4)]
    assert by_epoch[:4] == [1.0] * 4 and by_epoch[9] == 1.0
    assert all(lr != 1.0 and abs(lr - 1) < 0.67 for lr in by_epoch[4:9]) and len(set(by_epoch[4:9])) == 5


def test_noise_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    draws = [Noise(0, 100, limit=0.1, std=1.0, seed=7).at(epoch) for epoch in range(100)]
    assert torch.equal(torch.rand(3), expected)
    assert max(map(abs, draws)) < 0.1 and abs(sum(draws)) < 1.5


def test_groups_keep_their_own_rates() -> None:
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1], "lr": 1.0}, {"params": parameters[1:], "lr": 0.1}], lr=1.0)
    schedule, _ = build_schedule(
        optimizer, epochs=2, warmup_epochs=0, min_lr=0.0, lr_noise=(0.5, 1.0), updates_per_epoch=10
    )
    schedule.step_update(10)
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert first == pytest.approx(10 * second) and first != pytest.approx(0.5)


def test_plateau_follows_torch() -> None:
    generator = random.Random(0)
    metrics = [min(1.0, 0.02 * step) + generator.random() * 0.3 for step in range(60)]
    mine, theirs = make_optimizer(0.1), make_optimizer(0.1)
    schedule, total = build_schedule(
        mine, "plateau", epochs=60, warmup_epochs=0, min_lr=2e-4, decay_rate=0.2, patience=3, updates_per_epoch=5
    )
    oracle = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, "max", factor=0.2, patience=3, min_lr=2e-4, eps=0)
    assert total == 60
    for epoch, metric in enumerate(metrics, start=1):
        schedule.step_update(epoch * 5)
        schedule.step(epoch, metric)
        oracle.step(metric)
        assert mine.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"]), epoch
    assert mine.param_groups[0]["lr"] == pytest.approx(2e-4)  # the floor was reached


def test_plateau_waits_for_the_warm_up() -> None:
    schedule, _ = build_schedule(
        make_optimizer(1.0),
        "plateau",
        epochs=20,
        warmup_epochs=2,
        warmup_lr=0.0,
        min_lr=0.0,
        decay_rate=0.5,
        patience=0,
        updates_per_epoch=2,
    )
    seen = []
    for epoch, metric in enumerate([9.0, 1.0, 5.0, 6.0, 6.0, None, math.nan, 7.0], start=1):
        schedule.step_update(2 * epoch)
        schedule.step(epoch, metric)
        seen.append(schedule.lr)
    assert seen == [0.5, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


def test_plateau_forgives_a_nan_at_the_start() -> None:
    plateau = Plateau(rate=0.5, patience=0, min_lr=0.0)
    plateau.observe(math.nan)
    plateau.observe(0.3)
    assert plateau.best == 0.3 and plateau.reductions == 0


@pytest.mark.parametrize("sched", ["cosine", "plateau"])
def test_a_restored_schedule_goes_on_where_it_was(sched: str, tmp_path) -> None:
    def build(epochs: int = 20):
        optimizer = make_optimizer(0.1)
        return optimizer, build_schedule(
            optimizer,
            sched,
            epochs=epochs,
            warmup_epochs=1,
            decay_rate=0.5,
            patience=0,
            lr_noise=(0.4, 0.9),
            updates_per_epoch=3,
        )[0]

    optimizer, schedule = build()
    metrics = [0.1, 0.2, 0.1, 0.1, 0.3, 0.2, 0.2, 0.5, 0.4, 0.4, 0.4]
    expected = []
    for epoch, metric in enumerate(metrics, start=1):
        schedule.step_update(3 * epoch)
        schedule.step(epoch, metric)
        expected.append(schedule.lr)
        if epoch == 9:
            torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    optimizer, schedule = build()
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    assert schedule.lr == optimizer.param_groups[0]["lr"] == expected[8] and schedule.updates == 27
    for epoch in (10, 11):
        schedule.step_update(3 * epoch)
        schedule.step(epoch, metrics[epoch - 1])
        assert schedule.lr == expected[epoch - 1]
    if sched == "cosine":  # more epochs on resume: the longer schedule's rate, not the old one's
        _, longer = build(epochs=100)
        longer.load_state_dict(state["schedule"])
        assert longer.lr == pytest.approx(1e-5 + (0.1 - 1e-5) * (1 + math.cos(math.pi * 0.09)) / 2)


@pytest.mark.parametrize("epoch", [0, 3, 7])
def test_a_run_that_starts_later_has_the_rate_of_one_that_came_there(epoch: int) -> None:
    def build():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        return build_schedule(optimizer, "cosine", epochs=10, warmup_epochs=2, updates_per_epoch=5)[0]

    came, skipped = build(), build()
    for update in range(epoch * 5 + 1):
        came.step_update(update)
    assert skipped.skip_to(epoch) == epoch * 5 == skipped.updates
    assert skipped.lr == came.lr


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"sched": "cosin"}, "did you mean cosine"),
        ({"sched": "zzz"}, "Choose from cosine"),
        ({"epochs": 0}, "at least 1 epoch"),
        ({"updates_per_epoch": 0}, "fills one batch"),
        ({"warmup_epochs": -1}, "0 or more"),
        ({"lr": 1e-6}, "min_lr 1e-05 is above the rate 1e-06"),
        ({"lr": 5e-5}, "Set --warmup-lr to at most 5e-05"),
        ({"lr_noise": (0.9, 0.4)}, "ascending"),
        ({"lr_noise": (0.4, 90)}, "fractions"),
        ({"lr_noise": 0.4, "lr_noise_pct": 0.0}, "lr_noise_pct"),
    ],
)
def test_settings_nobody_means_are_refused(changes: dict, text: str) -> None:
    changes = dict(changes)
    optimizer = make_optimizer(changes.pop("lr", 0.16))
    with pytest.raises(ValueError, match=text):
        build_schedule(optimizer, **{"epochs": 10, "updates_per_epoch": 10, **changes})


def test_a_warm_up_as_long_as_the_run_is_named(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("effdet.training.schedule")
    logger.addHandler(caplog.handler)  # the packages' log need not reach the root logger
    try:
        build_schedule(make_optimizer(), epochs=3, warmup_epochs=5, updates_per_epoch=10)
    finally:
        logger.removeHandler(caplog.handler)
    assert "never reaches 0.16" in caplog.text
