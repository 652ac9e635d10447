"""The two loops against slow twins, and the promise that nothing reads the device between two log lines."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from effdet import anchors as anchors_module
from effdet import loss as loss_module
from effdet.bench import DetBenchTrain
from effdet.evaluator import Evaluator
from effdet.factory import create_model
from effdet.ops import focal
from effdet.report.log import StepStats
from effdet.training.amp import Precision
from effdet.training.ema import ModelEma
from effdet.training.engine import NonFiniteError, Training, evaluate, train_one_epoch
from effdet.training.optim import build_optimizer
from effdet.training.schedule import build_schedule

CPU = torch.device("cpu")
NUM_BATCHES = 7


class Regression(nn.Module):
    """The least that trains: a linear model whose loss may be spoilt by a factor in the target."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, images: torch.Tensor, target: dict) -> dict[str, torch.Tensor]:
        error = ((self.model(images) - target["goal"]) ** 2).mean() * target["factor"]
        return {"loss": error, "class_loss": 0.75 * error, "box_loss": 0.25 * error}


class Batches(list):
    """A loader of ready batches that remembers the epochs its sampler was told."""

    def __init__(self, batches: list) -> None:
        super().__init__(batches)
        self.epochs: list[int] = []
        self.sampler = SimpleNamespace(set_epoch=self.epochs.append)


def make_batches(count: int = NUM_BATCHES, factors: dict[int, float] | None = None) -> Batches:
    generator = torch.Generator().manual_seed(2)
    return Batches(
        [
            (
                torch.randn(2, 3, 2, 2, generator=generator),
                {
                    "goal": torch.randn(2, 1, generator=generator),
                    "factor": torch.tensor((factors or {}).get(index, 1.0)),
                },
            )
            for index in range(count)
        ]
    )


def make_training(
    bench: nn.Module,
    opt: str = "fusedmomentum",
    sched: str = "constant",
    ema: bool = False,
    updates_per_epoch: int = NUM_BATCHES,
    epochs: int = 3,
    **options,
) -> Training:
    optimizer = build_optimizer(bench.model, opt, lr=0.05)
    schedule, _ = build_schedule(
        optimizer, sched, epochs, warmup_epochs=0, min_lr=0.001, cooldown_epochs=0, updates_per_epoch=updates_per_epoch
    )
    return Training(
        bench,
        bench.model,
        optimizer,
        schedule,
        Precision(CPU, enabled=False),
        CPU,
        ModelEma(bench.model, decay=0.8, warmup=False) if ema else None,
        **options,
    )


def train_slowly(
    batches: list,
    groups: list[list[int]],
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 4e-5,
    ema_decay: float = 0.8,
) -> tuple[nn.Module, nn.Module, list[float]]:
    """Train a Regression with one update for each group of batches, on the mean of the group's losses.

    Returns the bench, one with the average of its weights, and the batches' losses.
    """
    bench, losses = Regression(), []
    average = copy.deepcopy(bench)
    buffers = [torch.zeros_like(parameter) for parameter in bench.parameters()]
    for group in groups:
        outputs = [bench(*batches[index])["loss"] for index in group]
        losses += [loss.item() for loss in outputs]
        gradients = torch.autograd.grad(sum(outputs) / len(outputs), list(bench.parameters()))
        with torch.no_grad():
            for parameter, gradient, buffer in zip(bench.parameters(), gradients, buffers, strict=True):
                decay = weight_decay if parameter.ndim > 1 else 0.0
                buffer.mul_(momentum).add_(gradient + decay * parameter)
                parameter.sub_(lr * buffer)
            for parameter, mean in zip(bench.parameters(), average.parameters(), strict=True):
                mean.mul_(ema_decay).add_((1 - ema_decay) * parameter)
    return bench, average, losses


def assert_same_weights(model: nn.Module, expected: nn.Module) -> None:
    for (name, value), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, msg=name)


@contextmanager
def captured_lines(name: str = "effdet.training.engine") -> Iterator[list[str]]:
    """Collect a logger's lines; not caplog, which sees nothing once a script has stopped propagation."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger(name)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class Recorded:
    """A recorder that keeps what it was given."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int, int, torch.Tensor]] = []
        self.intervals: list[StepStats] = []

    def on_batch(
        self, epoch: int, step: int, steps: int, images: torch.Tensor, target: dict, losses: torch.Tensor | None
    ) -> None:
        self.batches.append((epoch, step, steps, images))

    def on_interval(self, stats: StepStats) -> None:
        self.intervals.append(stats)


# ---- updates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grad_accum", "groups"),
    [
        (1, [[0], [1], [2], [3], [4], [5], [6]]),
        (3, [[0, 1, 2], [3, 4, 5], [6]]),
        (10, [[0, 1, 2, 3, 4, 5, 6]]),
    ],
)
def test_an_update_is_the_mean_over_its_group_also_in_the_short_last_one(grad_accum, groups):
    batches = make_batches()
    run = make_training(Regression(), grad_accum=grad_accum, ema=True)
    start = copy.deepcopy(run.model)
    stats = train_one_epoch(run, batches, epoch=4)
    expected, average, losses = train_slowly(batches, groups)
    assert_same_weights(run.model, expected.model)
    assert_same_weights(run.ema.module, average.model)
    assert not torch.allclose(start[1].weight, run.model[1].weight, atol=1e-3)
    assert run.steps == NUM_BATCHES
    assert run.updates == run.ema.updates == run.schedule.updates == len(groups)
    assert stats.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert (stats.class_loss, stats.box_loss) == pytest.approx((0.75 * stats.loss, 0.25 * stats.loss), rel=1e-5)
    assert (stats.epoch, stats.global_step, stats.skipped) == (4, NUM_BATCHES, 0)
    assert stats.img_per_s > 0 and stats.memory_mib > 0
    assert batches.epochs == [4]


def test_the_learning_rate_follows_the_updates():
    run = make_training(Regression(), sched="cosine", grad_accum=3, updates_per_epoch=3, epochs=2)
    rates = []
    for epoch in range(2):
        stats = train_one_epoch(run, make_batches(), epoch)
        rates.append(stats.lr)
    # 3 of 6 and 6 of 6 updates along a half cosine from 0.05 to 0.001
    assert rates == pytest.approx([(0.05 + 0.001) / 2, 0.001], rel=1e-6)


def test_max_steps_ends_the_run_within_an_epoch():
    batches = make_batches()
    run = make_training(Regression(), grad_accum=4, max_steps=6)
    stats = train_one_epoch(run, batches, epoch=0)
    expected, _, losses = train_slowly(batches, [[0, 1, 2, 3], [4, 5]])
    assert_same_weights(run.model, expected.model)
    assert (run.steps, run.updates, run.is_finished) == (6, 2, True)
    assert stats.loss == pytest.approx(sum(losses) / 6, rel=1e-5)


def test_max_steps_counts_over_epochs():
    run = make_training(Regression(), max_steps=NUM_BATCHES + 3)
    train_one_epoch(run, make_batches(), epoch=0)
    assert (run.steps, run.is_finished) == (NUM_BATCHES, False)
    train_one_epoch(run, make_batches(), epoch=1)
    assert (run.steps, run.updates, run.is_finished) == (NUM_BATCHES + 3, NUM_BATCHES + 3, True)


@pytest.mark.parametrize("opt", ["fusedmomentum", "adamw", "lamb"])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_changes_nothing_and_is_counted(opt, factor):
    run = make_training(Regression(), opt)
    stats = train_one_epoch(run, make_batches(factors={3: factor}), epoch=0)
    without = make_training(Regression(), opt)
    clean = make_batches()
    del clean[3]
    train_one_epoch(without, clean, epoch=0)
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), without.model.parameters(), strict=True))
    assert (stats.skipped, run.steps, run.updates) == (1, NUM_BATCHES, NUM_BATCHES)
    assert not math.isfinite(stats.loss), "the epoch's loss says so"


def test_a_spoilt_batch_skips_the_whole_update_it_belongs_to():
    run = make_training(Regression(), grad_accum=3)
    stats = train_one_epoch(run, make_batches(factors={4: math.nan}), epoch=0)
    assert_same_weights(run.model, train_slowly(make_batches(), [[0, 1, 2], [6]])[0].model)
    assert (stats.skipped, run.updates) == (1, 3)


class Normed(Regression):
    """Regression behind a batch norm, whose running statistics see every image first."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.BatchNorm2d(3), *self.model)


def poison(batches: Batches, *numbers: int) -> Batches:
    for number in numbers:
        batches[number][0][0, 0, 0, 0] = float("nan")
    return batches


def test_a_spoilt_batch_leaves_no_trace_in_running_statistics():
    run = make_training(Normed(), ema=True, log_interval=2)
    with captured_lines() as lines:
        train_one_epoch(run, poison(make_batches(5), 1), epoch=0)
    assert sum("those of the last log line were put back" in line for line in lines) == 1
    for model in (run.model, run.ema.module):
        assert all(torch.isfinite(buffer).all() for buffer in model.buffers())
    clean = make_training(Normed(), ema=True, log_interval=2)
    train_one_epoch(clean, make_batches(5), epoch=0)
    assert not torch.equal(clean.model[0].running_mean, torch.zeros(3)), "they do move"
    assert run.precision.skipped() == 1 and clean.precision.skipped() == 0


def test_too_many_skipped_updates_in_a_row_end_the_run():
    run = make_training(Normed(), log_interval=1)
    run.max_skipped = 3
    batches = poison(make_batches(9), 0, 1, 3, 4, 5, 7)
    with pytest.raises(NonFiniteError, match="^3 updates in a row were skipped") as caught:
        train_one_epoch(run, batches, epoch=0)
    assert run.steps == 6 and caught.value.images is batches[5][0], "two in a row are none too many"
    run = make_training(Normed(), log_interval=1)
    train_one_epoch(run, batches, epoch=0)
    assert run.precision.skipped() == 6, "without a limit it goes on"


def test_an_empty_loader_is_an_error():
    with pytest.raises(RuntimeError, match="no batch"):
        train_one_epoch(make_training(Regression()), Batches([]), epoch=0)


def test_accumulation_exchanges_gradients_once_for_each_update():
    """Under DistributedDataParallel, whose hook is called for each exchange of its one bucket."""
    exchanges: list[int] = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        bench = Regression()
        run = make_training(bench, grad_accum=3)
        run.bench = DistributedDataParallel(bench)

        def count(_state, bucket):  # annotated, torch would insist on its own types, which are texts here
            exchanges.append(run.steps)
            done: torch.futures.Future = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        run.bench.register_comm_hook(None, count)
        batches = make_batches()
        train_one_epoch(run, batches, epoch=0)
        assert exchanges == [2, 5, 6]  # while the batch of this number is trained
        assert_same_weights(run.model, train_slowly(batches, [[0, 1, 2], [3, 4, 5], [6]])[0].model)
    finally:
        dist.destroy_process_group()


# ---- what is recorded ------------------------------------------------------------------------------------------------


def test_a_record_comes_at_each_interval_and_at_the_end():
    batches = make_batches()
    run = make_training(Regression(), log_interval=3, total_steps=2 * NUM_BATCHES)
    recorder = Recorded()
    for epoch in (0, 1):
        train_one_epoch(run, batches, epoch, recorder=recorder)
    _, _, losses = train_slowly(batches + batches, [[index] for index in range(2 * NUM_BATCHES)])
    expected = [(epoch, step) for epoch in (0, 1) for step in (3, 6, 7)]
    assert [(stats.epoch, stats.step) for stats in recorder.intervals] == expected
    for stats, (epoch, step) in zip(recorder.intervals, expected, strict=True):
        first = epoch * NUM_BATCHES
        assert (stats.global_step, stats.steps, stats.lr) == (first + step, NUM_BATCHES, 0.05)
        assert stats.loss == pytest.approx(losses[first + step - 1], rel=1e-5)
        assert (stats.class_loss, stats.box_loss) == pytest.approx((0.75 * stats.loss, 0.25 * stats.loss), rel=1e-6)
        assert stats.loss_average == pytest.approx(sum(losses[first : first + step]) / step, rel=1e-5)
        assert stats.memory_mib > 0
    assert recorder.intervals[-1].eta_s == 0


def test_each_batch_is_shown_to_the_recorder_before_it_is_trained_on():
    batches = make_batches()
    run, recorder, seen = make_training(Regression(), max_steps=5), Recorded(), []
    recorder.on_batch = lambda *batch: seen.append((run.steps, *batch))
    train_one_epoch(run, batches, epoch=2, recorder=recorder)
    assert [row[:4] for row in seen] == [(step, 2, step, NUM_BATCHES) for step in range(5)]
    assert all(row[4] is images and row[5] is target for row, (images, target) in zip(seen, batches, strict=False))


def test_the_recorder_is_shown_the_losses_of_the_batch_before():
    run, recorder, seen = make_training(Regression(), log_interval=1), Recorded(), []
    recorder.on_batch = lambda *batch: seen.append(batch[5])
    train_one_epoch(run, make_batches(), epoch=0, recorder=recorder)
    assert seen[0] is None
    assert [losses.tolist() for losses in seen[1:]] == [
        pytest.approx([stats.loss, stats.class_loss, stats.box_loss]) for stats in recorder.intervals[:-1]
    ]


def test_rates_and_remaining_time_come_from_the_clock(monkeypatch):
    """A clock that moves by what things take: 1 s to read a batch of 2, 1 s for each step and 2 s for the third."""
    now = [0.0]
    monkeypatch.setattr("effdet.training.engine.time", SimpleNamespace(perf_counter=lambda: now[0]))

    class SlowBatches(Batches):
        def __iter__(self):
            for batch in super().__iter__():
                now[0] += 1.0
                yield batch

    class SlowRegression(Regression):
        def forward(self, images, target):
            now[0] += 2.0 if now[0] == 5.0 else 1.0
            return super().forward(images, target)

    run, recorder = make_training(SlowRegression(), log_interval=2, total_steps=10), Recorded()
    train_one_epoch(run, SlowBatches(list(make_batches(4))), epoch=0, recorder=recorder)
    first, second = recorder.intervals
    assert (first.step_s, first.step_average_s, first.img_per_s, first.img_per_s_average) == (2.0, 2.0, 1.0, 1.0)
    assert (first.data_s, first.data_average_s, first.data_share) == (1.0, 1.0, 0.5)
    assert first.eta_s == 16.0  # 8 steps to go at 2 s
    assert (second.step_s, second.step_average_s, second.img_per_s) == (2.5, 2.25, 0.8)
    assert (second.data_s, second.data_share) == (1.0, 0.4)
    assert second.img_per_s_average == pytest.approx(8 / 9)
    assert second.eta_s == 13.5  # 6 steps at 2.25 s


# ---- reading the device ----------------------------------------------------------------------------------------------

_READERS = ("item", "tolist", "cpu", "numpy", "nonzero", "__float__", "__int__", "__bool__", "__index__")
_READING_OPS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique2", "_unique2"}


class _ReadingOps(TorchDispatchMode):
    """Report operators that give the host a value, or a shape that depends on one; also those called from C++."""

    def __init__(self, report) -> None:
        super().__init__()
        self.report = report

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in _READING_OPS:
            self.report(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def reads_by_step(run: Training, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """Count by the number of finished batches how often a tensor's value is asked for."""
    reads: Counter = Counter()

    def watch(name: str) -> None:
        original = getattr(torch.Tensor, name)

        def wrapper(self, *args, **kwargs):
            reads[run.steps] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, wrapper)

    with monkeypatch.context() as patches:
        monkeypatch = patches
        for name in _READERS:
            watch(name)
        with _ReadingOps(lambda name: reads.update([run.steps])):
            yield reads


@pytest.fixture(scope="module")
def detector() -> DetBenchTrain:
    torch.manual_seed(0)
    model = create_model("tf_efficientdet_d0", num_classes=3, image_size=(64, 64), pretrained_backbone=False)
    return DetBenchTrain(model, create_labeler=True)


def make_images(count: int) -> Batches:
    generator = torch.Generator().manual_seed(3)
    target = {
        "bbox": torch.tensor([[[8.0, 8.0, 40.0, 50.0], [0, 0, 0, 0]], [[20.0, 4.0, 60.0, 30.0], [2, 2, 30, 30]]]),
        "cls": torch.tensor([[1, -1], [3, 2]]),
        "img_scale": torch.ones(2),
        "img_size": torch.full((2, 2), 64.0),
    }
    return Batches([(torch.randn(2, 3, 64, 64, generator=generator), target) for _ in range(count)])


@pytest.mark.parametrize("options", [{"clip": (10.0, "norm")}, {"grad_accum": 2, "clip": (0.1, "value")}])
def test_the_device_is_read_only_for_log_lines(detector, options, monkeypatch):
    for module in (anchors_module, focal, loss_module):  # the way of accelerators
        monkeypatch.setattr(module, "is_host", lambda device: False)
    run = make_training(detector, "fusedmomentum", ema=True, log_interval=2, **options)
    recorder = Recorded()
    with reads_by_step(run, monkeypatch) as reads:
        train_one_epoch(run, make_images(5), epoch=0, recorder=recorder)
    assert len(recorder.intervals) == 3
    assert reads.pop(0, 0) <= 2, "a bench looks at the labels of its first batch, the next ones are not looked at"
    assert set(reads) == {2, 4, 5}, f"reads by finished steps: {dict(reads)}"
    assert reads[2] == reads[4] <= 2, "one read for a line"


def test_the_guard_above_sees_a_read(monkeypatch):
    class Curious(Regression):
        def forward(self, images, target):
            output = super().forward(images, target)
            assert not output["loss"] > 1e9  # asks for the value
            return output

    run = make_training(Curious(), log_interval=100)
    with reads_by_step(run, monkeypatch) as reads:
        train_one_epoch(run, make_batches(4), epoch=0)
    assert set(reads) == {0, 1, 2, 3, 4}


# ---- evaluation ------------------------------------------------------------------------------------------------------


class Collected(Evaluator):
    """Scores by the sum of all scores."""

    def evaluate(self, output_result_file: str = "") -> float:
        return float(sum(rows[:, 4].sum() for rows in self.predictions))


class Detecting(nn.Module):
    """One detection for each image, with the image's mean as score."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor, target: dict) -> torch.Tensor:
        assert not self.training
        rows = torch.zeros(len(images), 1, 6)
        rows[:, 0, 4] = images.mean((1, 2, 3)) * self.weight
        rows[:, 0, 5] = 1
        assert not rows.requires_grad
        return rows


def test_evaluation_scores_every_batch():
    batches = [
        (torch.full((2, 3, 4, 4), 0.25), {"img_idx": torch.tensor([0, 1])}),
        (torch.full((1, 3, 4, 4), 0.75), {"img_idx": torch.tensor([2])}),
    ]
    evaluator = Collected()
    done: list[int] = []
    stats = evaluate(Detecting().train(), batches, evaluator, on_batch=done.append)
    assert stats.metric == 1.25 and stats.seconds > 0
    assert evaluator.img_indices == [0, 1, 2] and done == [0, 1]
    with captured_lines() as lines:
        stats = evaluate(Detecting(), batches, Collected(), log_interval=1)
    assert stats.metric == 1.25
    assert [line.partition("]")[0] for line in lines] == ["Eval: [1/2", "Eval: [2/2"]


def test_evaluation_of_nothing_is_zero():
    assert evaluate(Detecting(), [], Collected()).metric == 0.0
