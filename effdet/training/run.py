"""What a training run consists of, and what it writes while it trains: checkpoints, and each epoch's numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from effdet.bench import DetBenchPredict
from effdet.checkpoint.io import write_json
from effdet.checkpoint.manager import CheckpointManager
from effdet.config.schema import RunConfig
from effdet.report.log import EpochStats, EvalStats, format_best_metric
from effdet.runtime import distributed
from effdet.runtime.progress import IN_LINES

from . import resume
from .build import Data, Loaders, Placement, uneven_models
from .engine import Progress, Training
from .profiling import StepProfiler
from .recorder import RunRecorder
from .resume import Position

DETECTIONS_NAME = "best_detections.json"
"""Of the best epoch, in COCO's result format; `effdet compare` draws its intervals from it."""

_logger = logging.getLogger("effdet.train")
T = TypeVar("T")


@dataclass(frozen=True)
class Start:
    """What a run starts from."""

    output_dir: Path
    payload: dict[str, Any]  # the checkpoint that it continues; empty for a new run
    source: str  # the file it came from


@dataclass(frozen=True)
class Run:
    """A run that is ready to train."""

    cfg: RunConfig
    place: Placement
    output_dir: Path
    data: Data
    loaders: Loaders
    training: Training
    eval_bench: DetBenchPredict
    fits: int | None  # images a step that the memory is likely to hold, where that was estimated
    epochs: int  # with the cooldown
    position: Position  # where it starts
    manager: CheckpointManager
    recorder: RunRecorder
    started: float  # time.time()
    lock: IO[str] | None  # holds the folder as long as it is open
    profiler: StepProfiler | None = None  # of the first process, with --profile
    vote: distributed.LateMax = field(default_factory=distributed.LateMax)  # on signals, see EpochState.after_update

    def close(self) -> None:
        """End the loader processes, write what was traced, and give the folder up."""
        if self.profiler is not None:
            self.profiler.close()
        self.loaders.close()
        if self.lock is not None:
            self.lock.close()


def save(run: Run, write: Callable[[], T]) -> T | None:
    """Run what writes files on rank 0; with --save-errors warn, a failure is logged and None comes back."""

    def guarded() -> T | None:
        try:
            return write()
        except OSError as error:
            if run.cfg.run.save_errors == "stop":
                raise
            _logger.error("%s Training goes on (--save-errors warn).", error)
            return None

    return distributed.run_on_primary(guarded)


def save_recovery(run: Run, epoch: int, done: Progress, trained: bool = False) -> None:
    """Write recovery.pth.tar: all that is needed to go on within an epoch."""
    cfg = run.cfg
    models = uneven_models(cfg, run.place, run.training)
    ranks = distributed.gather_object(resume.capture_rank(run.place.device, done.totals, models)) or []

    def write() -> None:
        position = {
            "batches": done.batches,
            "batch_size": cfg.run.batch_size,
            "trained": trained,
            "grad_accum": cfg.optim.grad_accum,
            "images": len(run.data.train_set),
        }
        payload = resume.collect(run.training, cfg, run.data.categories, ranks, run.recorder.initial_weights)
        path = run.manager.save_recovery(payload | {"epoch": epoch - 1, "progress": position})
        _logger.info("saved %s: epoch %d, batch %d", path, epoch, done.batches)

    save(run, write)


def finish_epoch(run: Run, stats: EpochStats, evaluation: EvalStats | None) -> None:
    """Write the numbers of an epoch, its checkpoints and the report."""
    bad, metric = run.data.bad_images.exchange(), None if evaluation is None else evaluation.metric
    _logger.info(
        "epoch %d: loss %.5f, %.1f img/s, peak memory %.0f MiB, %d skipped step(s)%s",
        stats.epoch,
        stats.loss,
        stats.img_per_s,
        stats.memory_mib,
        stats.skipped,
        f", {bad} unreadable image(s)" if bad else "",
    )
    ranks = distributed.gather_object(resume.capture_rank(run.place.device)) or []

    def write() -> None:
        run.recorder.add_epoch(stats, evaluation)  # before the checkpoint: resuming drops a row, but cannot add one
        payload = resume.collect(run.training, run.cfg, run.data.categories, ranks, run.recorder.initial_weights)
        if evaluation is not None:
            payload["score_threshold"] = run.loaders.evaluator.score_curves.to_plain()
        _, best_epoch = run.manager.save(payload, stats.epoch, metric)
        if best_epoch == stats.epoch:
            write_json(run.output_dir / DETECTIONS_NAME, run.loaders.evaluator.scored_rows())

    save(run, write)
    if evaluation is not None:
        run.recorder.write_report()
    if metric is not None and distributed.is_primary():
        _logger.info("%s", format_best_metric(*run.manager.best), extra=IN_LINES)
