"""The two loops: one epoch of training, one evaluation.

They take built objects (build.py) and know nothing of flags, files or checkpoints; numbers leave as records (log.py).
Between two log lines nothing here reads a value from the device.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from effdet.efficientdet import EfficientDet
from effdet.evaluator import Evaluator
from effdet.report.log import EpochStats, EvalStats, StepStats
from effdet.runtime import heartbeat
from effdet.runtime import signals as stopping
from effdet.runtime.device import few_launches_pay, synchronize
from effdet.runtime.distributed import all_gather_object, all_reduce_mean, world_size
from effdet.runtime.memory import peak_memory_bytes
from timm_patches.optim_factory import flat_parameters

from .amp import Precision
from .ema import ModelEma
from .schedule import Schedule
from .statistics_guard import StatisticsGuard, count_batches_on_host

_logger = logging.getLogger(__name__)

_LOSSES = ("loss", "class_loss", "box_loss")


@dataclass
class Training:
    """Everything one training run consists of, and how far it has come."""

    bench: nn.Module  # DetBenchTrain, wrapped in DistributedDataParallel where there are several processes
    model: EfficientDet  # the network inside it
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    precision: Precision
    device: torch.device
    ema: ModelEma | None = None
    clip: tuple[float | None, str] = (None, "norm")
    grad_accum: int = 1
    log_interval: int = 50
    total_steps: int = 0  # batches in the whole run, for the ETA
    max_steps: int = 0  # stop after this many batches; 0: never
    max_skipped: int = 0  # give up when so many updates in a row were skipped, found at a log line; 0: never
    updates: int = 0  # optimizer updates done
    steps: int = 0  # batches done
    guard: StatisticsGuard | None = None  # made by the first epoch
    flat_exchange: bool = False  # gradients are averaged by the update, and not by DistributedDataParallel
    is_laid_out: bool = False  # see _lay_out

    @property
    def cast_together(self) -> EfficientDet | None:
        """The model whose weights may be cast together; their gradients then come too late for DDP's buckets."""
        return self.model if self.flat_exchange or not isinstance(self.bench, DistributedDataParallel) else None

    @property
    def is_finished(self) -> bool:
        """True once `max_steps` batches are done."""
        return self.max_steps > 0 and self.steps >= self.max_steps


class NonFiniteError(RuntimeError):
    """Too many updates in a row had an inf or a NaN in their gradients.

    Attributes:
        images, target: this process's last batch, whose update was one of them.
    """

    def __init__(self, count: int, images: Tensor, target: Any) -> None:
        super().__init__(f"{count} updates in a row were skipped, as their gradients have inf or NaN (--max-skipped)")
        self.images, self.target = images, target


class Recorder(Protocol):
    """What `train_one_epoch` tells how it goes."""

    def on_batch(self, epoch: int, step: int, steps: int, images: Tensor, target: Any, losses: Tensor | None) -> None:
        """Take note of a batch that will be trained on now; `step` of `steps` are done in this epoch.

        The losses are those of the batch before, the sum first, on the device: reading them waits for it.
        """

    def on_interval(self, stats: StepStats) -> None:
        """Take the numbers of a log interval."""


@dataclass
class Progress:
    """How far an epoch of training has come on this process."""

    batches: int = 0
    totals: Tensor | None = None  # sums of the losses over them, in the order of _LOSSES, on the device


def train_one_epoch(
    run: Training,
    loader: Any,
    epoch: int,
    start: Progress | None = None,
    after_update: Callable[[Progress], None] | None = None,
    recorder: Recorder | None = None,
) -> EpochStats:
    """Train on every batch of `loader` once.

    Args:
        run: what to train; its counters are advanced.
        loader: gives (images [B, 3, H, W], target) on the device; its sampler is told the epoch.
        epoch: number of the epoch, from 0.
        start: where an epoch that was broken off goes on, between two updates; `loader` gives what comes behind it.
        after_update: called after each update with the progress so far; what it raises ends the epoch there.
        recorder: told of each batch, and each `log_interval` batches and at the end what was measured.

    Returns:
        The epoch's means; a batch that `max_steps` cuts off does not count.

    Raises:
        RuntimeError: the loader gave no batch.
        NonFiniteError: on all processes together, after `max_skipped` skipped updates in a row.
    """
    if hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(epoch)
    run.bench.train()
    start = start or Progress()
    guard = run.guard or StatisticsGuard(run.model, *([run.ema.module] if run.ema else []))
    run.guard = guard
    guard.keep_or_restore(damaged=False)
    clock = _Clock(run, guard, len(loader), epoch, start, recorder)
    run.optimizer.zero_grad()
    num_batches = len(loader)
    if run.max_steps > 0:
        num_batches = min(num_batches, start.batches + run.max_steps - run.steps)
    clock.start()
    for index, (images, target) in enumerate(loader if start.batches < num_batches else (), start.batches):
        clock.data_ready()
        if recorder is not None:
            recorder.on_batch(epoch, index, len(loader), images, target, clock.losses)
        heartbeat.tick(run.steps, 1, f"computing step {run.steps + 1}")
        is_last = index + 1 == num_batches
        updates_now = (index + 1) % run.grad_accum == 0 or is_last
        with _no_gradient_sync(run.bench, wanted=run.flat_exchange or not updates_now):
            with run.precision.autocast(run.cast_together):
                output = run.bench(images, target)
            # The last group may be smaller; its update still is the mean over its batches.
            group = min(run.grad_accum, num_batches - index // run.grad_accum * run.grad_accum)
            run.precision.backward(output["loss"] / group)
        if updates_now:
            _update(run)
        run.steps += 1
        heartbeat.tick(run.steps, 0, f"between steps {run.steps} and {run.steps + 1}, waiting for data or saving")
        clock.step_done(output, images.shape[0], is_last)
        if 0 < run.max_skipped <= clock.skipped_in_a_row:
            raise NonFiniteError(clock.skipped_in_a_row, images, target)
        if updates_now and after_update is not None:
            after_update(Progress(clock.batches, clock.totals))
        if is_last:
            break
    if clock.batches == 0:
        raise RuntimeError("The training loader gave no batch: the data set is smaller than one batch.")
    return clock.finish()


def _update(run: Training) -> None:
    """Take one optimizer step and move everything that follows the number of updates."""
    run.precision.step(run.optimizer, run.clip, run.flat_exchange)
    run.optimizer.zero_grad()
    run.updates += 1
    if few_launches_pay(run.device) and not run.is_laid_out:
        _lay_out(run)
    if run.ema is not None:
        run.ema.update(run.precision.float_tensors(run.model))
    run.schedule.step_update(run.updates)


def _lay_out(run: Training) -> None:
    """Arrange weights, average and counters so that an update takes few operations; the optimizer has done its part."""
    count_batches_on_host(run.model, *([run.ema.module] if run.ema else []))
    if run.ema is not None:
        run.ema.flatten(run.precision.float_tensors(run.model), flat_parameters(run.optimizer))
    run.is_laid_out = True


def _no_gradient_sync(bench: nn.Module, wanted: bool) -> contextlib.AbstractContextManager:
    """Keep DistributedDataParallel from exchanging gradients that are not complete yet."""
    if wanted and isinstance(bench, DistributedDataParallel):
        return bench.no_sync()
    return contextlib.nullcontext()


def _by_name(losses: Tensor) -> dict[str, Tensor]:
    return dict(zip(_LOSSES, losses.unbind(), strict=True))


def _read_means(values: dict[str, Tensor]) -> dict[str, float]:
    """Average numbers on the device over all processes and read them: one exchange and one read for all of them.

    Args:
        values: tensors without dimensions, by name.

    Returns:
        The means by the same names.
    """
    return dict(zip(values, all_reduce_mean(torch.stack(list(values.values()))).tolist(), strict=True))


class _Clock:
    """Sums losses on the device, and times; reads the device only when a record is due."""

    def __init__(
        self,
        run: Training,
        guard: StatisticsGuard,
        num_batches: int,
        epoch: int,
        start: Progress,
        recorder: Recorder | None,
    ) -> None:
        self.run, self.guard, self.num_batches, self.epoch, self.recorder = run, guard, num_batches, epoch, recorder
        self.batches = self.batches_before = start.batches
        self.images = 0
        self.totals = start.totals
        self.losses: Tensor | None = None  # of the last batch
        self.skipped_in_a_row = 0  # as of the last log line
        self.data_s = self.interval_data_s = 0.0
        self.interval_batches = self.interval_images = 0

    def start(self) -> None:
        self.started = self.interval_started = self.waiting_since = time.perf_counter()

    def data_ready(self) -> None:
        waited = time.perf_counter() - self.waiting_since
        self.data_s += waited
        self.interval_data_s += waited

    def step_done(self, output: dict[str, Tensor], images: int, is_last: bool) -> None:
        losses = torch.stack([output[key].detach().float() for key in _LOSSES])
        self.losses = losses
        self.totals = losses if self.totals is None else self.totals + losses
        count = images * world_size()
        self.batches += 1
        self.interval_batches += 1
        self.images += count
        self.interval_images += count
        if self.batches % self.run.log_interval == 0 or is_last:
            self._finish_interval(losses)
        self.waiting_since = time.perf_counter()

    def _averages(self) -> dict[str, Tensor]:
        assert self.totals is not None  # a batch is done
        return _by_name(self.totals / self.batches)

    def _finish_interval(self, losses: Tensor) -> None:
        run = self.run
        values = _read_means(
            {
                **_by_name(losses),
                "loss_average": self._averages()["loss"],
                "skipped_in_a_row": run.precision.skipped_in_a_row(),
                "damage": self.guard.damage(losses.device),
            }
        )
        self.skipped_in_a_row, damaged = round(values.pop("skipped_in_a_row")), values.pop("damage") > 0
        self.guard.keep_or_restore(damaged)
        if damaged:
            _logger.warning("batch-norm statistics were inf or NaN: those of the last log line were put back")
        now = time.perf_counter()
        interval_s, elapsed_s = max(now - self.interval_started, 1e-9), max(now - self.started, 1e-9)
        done = self.batches - self.batches_before
        end = min(filter(None, (run.total_steps, run.max_steps)), default=run.steps)
        if self.recorder is not None:
            self.recorder.on_interval(
                StepStats(
                    epoch=self.epoch,
                    global_step=run.steps,
                    step=self.batches,
                    steps=self.num_batches,
                    **values,
                    lr=run.schedule.lr,
                    step_s=interval_s / self.interval_batches,
                    step_average_s=elapsed_s / done,
                    img_per_s=self.interval_images / interval_s,
                    img_per_s_average=self.images / elapsed_s,
                    data_s=self.interval_data_s / self.interval_batches,
                    data_average_s=self.data_s / done,
                    eta_s=max(0, end - run.steps) * (elapsed_s / done),
                    memory_mib=peak_memory_bytes(run.device) / 2**20,
                )
            )
        self.interval_started = now
        self.interval_batches = self.interval_images = 0
        self.interval_data_s = 0.0

    def finish(self) -> EpochStats:
        run = self.run
        synchronize(run.device)
        elapsed_s = time.perf_counter() - self.started
        means = _read_means(self._averages())
        return EpochStats(
            self.epoch,
            run.steps,
            **means,
            lr=run.schedule.lr,
            img_per_s=self.images / elapsed_s,
            memory_mib=peak_memory_bytes(run.device) / 2**20,
            skipped=run.precision.skipped(),
        )


@torch.no_grad()
def evaluate(
    bench: nn.Module,
    loader: Iterable,
    evaluator: Evaluator,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    log_interval: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> EvalStats:
    """Predict every batch of `loader` and score the predictions.

    Args:
        bench: a DetBenchPredict; put into eval mode.
        loader: gives (images, target) on the device, this process's share of the data set.
        evaluator: collects the predictions of all processes.
        autocast: makes the context to predict in.
        log_interval: batches between two progress lines; 0: none.
        on_batch: called before each batch with the number of those done.

    Returns:
        The metric, all numbers, and the time.

    Raises:
        StopRequested: on every process, when a signal asked one of them to stop (signals.py).
        BadImagesError: on every process, when too many images cannot be read.
    """
    bench.eval()
    batches = 0
    started = time.perf_counter()
    for images, target in loader:
        if stopping.requested() or evaluator.is_hopeless:
            break
        heartbeat.tick_within(f"evaluating, batch {batches + 1}")
        if on_batch is not None:
            on_batch(batches)
        with autocast():
            output = bench(images, target)
        evaluator.add_predictions(output, target)
        batches += 1
        if log_interval and batches % log_interval == 0:
            number = f"/{len(loader)}" if isinstance(loader, Sized) else ""
            _logger.info("Eval: [%d%s]  %.2f s per batch", batches, number, (time.perf_counter() - started) / batches)
    seconds = time.perf_counter() - started
    heartbeat.tick_within("evaluation: exchanging and scoring predictions", 3)
    signum = max(all_gather_object(stopping.requested()))
    if signum:
        evaluator.reset()
        raise stopping.StopRequested(signum)
    return EvalStats(evaluator.evaluate(), seconds, evaluator.stats)
