"""What a training run leaves behind and shows beside its checkpoints: the loops hand records in, files come out.

That is: metrics.jsonl, summary.csv, metrics.json, the report, the first batch, lines of the log, the bar, and what
services and viewers get (trackers.py). All of it happens on rank 0, and none of it reads an accelerator, but for the
first batch, once.

metrics.jsonl has one json object a line. All have `kind`, `epoch` (from 0) and `global_step` (batches since the start
of the run); numbers that are NaN or infinite are null. By kind:

    interval     step, steps (batches of the epoch so far, and in all), loss, class_loss, box_loss (before its weight),
                 lr, img_per_s (over all devices), data_share (of the time, spent waiting for data), memory_mib (peak)
    epoch        loss, class_loss, box_loss (means over the epoch), lr, img_per_s, memory_mib, skipped (updates left out
                 for inf or NaN, since the start of the run)
    evaluation   AP, AP50, AP75, AP_small, AP_medium, AP_large, AR1, AR10, AR100, AR_small, AR_medium, AR_large

A resumed run takes metrics.jsonl and summary.csv up where its checkpoint stands.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from effdet.checkpoint.io import replacing
from effdet.config.load import to_plain
from effdet.config.schema import RunConfig
from effdet.evaluator import CocoEvaluator
from effdet.predict.gallery import draw_training_batch
from effdet.report import html as report
from effdet.report.images import BATCH_NAME
from effdet.report.log import (
    METRICS_NAME,
    EpochStats,
    EvalStats,
    StepStats,
    format_best_metric,
    format_duration,
    format_interval_line,
    tolerate_write_error,
)
from effdet.report.summary import describe_start, next_commands
from effdet.runtime import device as device_layer
from effdet.runtime import distributed, progress
from effdet.runtime.progress import IN_LINES, ON_TERMINAL

from .engine import Training
from .trackers import Trackers

_logger = logging.getLogger("effdet.train")

METRICS_LOG_NAME, SUMMARY_NAME = "metrics.jsonl", "summary.csv"
_INTERVAL_KEYS = (
    "epoch",
    "global_step",
    "step",
    "steps",
    "loss",
    "class_loss",
    "box_loss",
    "lr",
    "img_per_s",
    "data_share",
    "memory_mib",
)
_CHARTS = {"interval": "train", "epoch": "epoch", "evaluation": "val"}  # how the services group them
_SUMMARY_COLUMNS = {
    "epoch": "epoch",
    "train_loss": "loss",
    "train_class_loss": "class_loss",
    "train_box_loss": "box_loss",
    "lr": "lr",
    "img_per_s": "img_per_s",
    "skipped": "skipped",
}
_NOT_CHARTED = ("epoch", "global_step", "step", "steps")


def trackers_of(cfg: RunConfig) -> list[str]:
    """Return the names of the services that the run's numbers also go to, each once."""
    return list(dict.fromkeys([*cfg.run.log_to, *(["tensorboard"] if cfg.run.tensorboard else [])]))


class RunRecorder:
    """Collect and write what a run has to show; an engine.Recorder. Does nothing on ranks other than 0.

    Args:
        cfg: the resolved settings.
        folder: the run's.
        training: what is trained.
        train_loader: its data set and normalisation.
        val_set: data set of the evaluations.
        evaluator: that evaluates.
        initial_weights: what the run started from, in a line.
    """

    def __init__(
        self,
        cfg: RunConfig,
        folder: Path,
        training: Training,
        train_loader: Any,
        val_set: Any,
        evaluator: CocoEvaluator,
        initial_weights: str = "",
    ) -> None:
        self.cfg, self.folder, self.training, self.train_loader = cfg, folder, training, train_loader
        self.val_set, self.evaluator, self.initial_weights = val_set, evaluator, initial_weights
        self.primary = distributed.is_primary()
        self.rates: list[float] = []  # images per second of each interval
        self.trackers = Trackers([], folder, {}, 0)
        self.draws_batch = False
        self.move: progress.Move | None = None  # of the epoch's bar
        self.step_s: float | None = None  # seconds a step took in the last interval
        self.reads_loss = device_layer.is_host(training.device)
        self.device = device_layer.describe(training.device)
        self.report = report.Report(
            folder / report.NAME,
            folder.name,
            cfg,
            training.model.config,
            val_set,
            train_loader.dataset,
            self.device,
            initial_weights=initial_weights,
        )

    def describe(self, epochs: int, channels_last: bool) -> None:
        """Log what the run is: so many epochs in all, with this memory layout."""
        if not self.primary:
            return
        precision = self.training.precision.level
        precision = "float32" if precision == "O0" else f"mixed precision {precision} in {self.cfg.amp.dtype}"
        lines, details = describe_start(
            self.cfg,
            self.training.model,
            self.train_loader.dataset,
            self.val_set,
            self.device,
            distributed.world_size(),
            channels_last,
            epochs,
            len(self.train_loader),
            precision,
            self.folder,
            self.initial_weights,
        )
        for line in lines:
            _logger.info("%s", line)
        for line in details:
            _logger.debug("%s", line)

    def begin(self, epoch: int, batches: int) -> None:
        """Open the files, without what the run will write anew.

        Args:
            epoch: the first epoch to be trained.
            batches: those of it that are done already.
        """
        if not self.primary:
            return
        drop_rows_from(self.folder / METRICS_LOG_NAME, epoch, batches)
        if (self.folder / SUMMARY_NAME).exists():
            write_summary(self.folder)
        self.draws_batch = not (self.folder / BATCH_NAME).exists()
        self.trackers = Trackers(trackers_of(self.cfg), self.folder, to_plain(self.cfg), self.training.steps)

    @contextlib.contextmanager
    def show_epoch(self, epoch: int, batches: int, batch_size: int) -> Iterator[None]:
        """Show a bar of the epoch's batches, each of so many images over all devices, while the block trains."""
        if not self.primary:
            yield
            return
        with progress.bar(f"Epoch {epoch}", batches, "img", batch_size, self.step_s) as self.move:
            yield
        self.move = None

    def on_batch(
        self, epoch: int, step: int, steps: int, images: Any, target: Any, losses: torch.Tensor | None = None
    ) -> None:
        """Move the bar on, and draw the run's first batch; see engine.Recorder."""
        self._move(step, float(losses[0]) if losses is not None and self.reads_loss and self.move else None)
        if self.draws_batch:
            self.draws_batch = False
            self._draw(images, target)

    def on_interval(self, stats: StepStats) -> None:
        """Write, log and show the numbers of an interval; see engine.Recorder."""
        if not self.primary:
            return
        self.rates.append(stats.img_per_s)
        row = {key: getattr(stats, key) for key in _INTERVAL_KEYS}
        _logger.info("%s", format_interval_line(stats), extra=IN_LINES)
        self.step_s = stats.step_s
        self._move(stats.step, stats.loss)
        self._write("interval", row)

    def _move(self, step: int, loss: float | None) -> None:
        if self.move is not None:
            run = self.training
            end = min(filter(None, (run.total_steps, run.max_steps)), default=run.steps)
            self.move(step, max(0, end - run.steps), loss)

    def add_epoch(self, stats: EpochStats, evaluation: EvalStats | None) -> None:
        """Write an epoch's numbers, and those of the evaluation after it if there was one; call it on rank 0.

        Raises:
            OSError: the disk does not take summary.csv.
        """
        self._write("epoch", dataclasses.asdict(stats))
        if evaluation is not None:
            self._write("evaluation", {"epoch": stats.epoch, "global_step": stats.global_step, **evaluation.scores})
        write_summary(self.folder)

    def write_report(self) -> None:
        """Write the report anew, after an evaluation."""
        if self.primary:
            self.report.write(self.evaluator, read_rows(self.folder / METRICS_LOG_NAME))

    def end(self, run: Mapping[str, Any], seconds: float, images: Path) -> None:
        """Write metrics.json, say what came out, where it is and what to do next; call it on rank 0.

        Args:
            run: what the run came to, by name, for metrics.json; throughput and duration are added here.
            seconds: its duration.
            images: where predictions were drawn.
        """
        rates, checkpoint = steady_rates(self.rates), Path(run["checkpoint"])
        img_per_s = sum(rates) / len(rates) if rates else 0.0
        self.evaluator.write_metrics(self.folder / METRICS_NAME, {**run, "img_per_s": img_per_s, "seconds": seconds})
        stats = self.evaluator.stats
        parser = self.val_set.parser
        image = Path(self.val_set.data_dir) / parser.img_infos[0]["file_name"] if len(parser.img_infos) else None
        if self.evaluator.scores is not None:
            _logger.info("%s", self.evaluator.scores.table(), extra=ON_TERMINAL)
        for line in (
            f"TrainAvgFPS: mean img/s of {len(rates)} intervals AvgFPS:{img_per_s:.2f}",
            format_best_metric(run["best_AP"], run["best_epoch"]),
            f"AP {stats['AP']:.4f}  AP50 {stats['AP50']:.4f}  (last epoch, {format_duration(seconds)})",
            f"checkpoint: {checkpoint}",
            f"images: {images}",
            f"report: {self.report.path}",
            *(f"next: {command}" for command in next_commands(self.cfg, self.folder, checkpoint, image)),
        ):
            _logger.info("%s", line)
        self.trackers.close()

    def _write(self, kind: str, values: Mapping[str, float | None]) -> None:
        """Write one row; it is on disk when this returns, unless the disk is full: that is said once."""
        path = self.folder / METRICS_LOG_NAME
        with tolerate_write_error(path), path.open("a+b") as file:
            if file.tell() and not _ends_with_newline(file):
                file.write(b"\n")  # the last row was cut off by a crash
            row = {"kind": kind, **{key: _finite(value) for key, value in values.items()}}
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        charted = {f"{_CHARTS[kind]}/{key}": value for key, value in values.items() if key not in _NOT_CHARTED}
        self.trackers.log(charted, int(values["global_step"] or 0), flush=kind != "interval")

    def _draw(self, images: Any, target: Any) -> None:
        try:
            names = self.train_loader.dataset.parser.category_map.class_names
            sheet = draw_training_batch(
                images, target, names, self.train_loader.mean, self.train_loader.std, num_images=8
            )
            sheet.save(self.folder / BATCH_NAME, quality=85)
        except Exception as error:  # an image for the eye is no reason to end a run
            _logger.warning("the first training batch could not be drawn (%s: %s)", type(error).__name__, error)


def steady_rates(rates: Sequence[float]) -> Sequence[float]:
    """Return those of the intervals' rates that a run's throughput is the mean of.

    The first does not count, as kernels are compiled and workers started then, nor the last, which may be short; of a
    run too short for that, all that it has but the first.
    """
    return rates[1:-1] or rates[1:] or rates


# ---- metrics.jsonl ---------------------------------------------------------------------------------------------------


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, 2)
    return file.read(1) == b"\n"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl in order, without broken ones; empty where there is no file."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    try:
        rows = json.loads(f"[{','.join(lines)}]")  # all at once is several times faster than one by one
    except ValueError:
        rows = []
        for line in lines:
            with contextlib.suppress(ValueError):  # cut off by a crash
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "kind" in row and "epoch" in row]


def drop_rows_from(path: Path, epoch: int, step: int = 0) -> None:
    """Drop the rows of an epoch and later, and broken ones; of the epoch itself intervals up to `step` stay."""
    if not path.exists():
        return
    kept = [
        row
        for row in read_rows(path)
        if row["epoch"] < epoch or row["epoch"] == epoch and row["kind"] == "interval" and row["step"] <= step
    ]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


# ---- summary.csv -----------------------------------------------------------------------------------------------------


def write_summary(folder: Path) -> None:
    """Write summary.csv, a row for each epoch, from the rows of metrics.jsonl beside it."""
    rows = read_rows(folder / METRICS_LOG_NAME)
    evaluations = {row["epoch"]: row for row in rows if row["kind"] == "evaluation"}
    path = folder / SUMMARY_NAME
    try:
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*_SUMMARY_COLUMNS, "AP", "AP50"])
            for row in rows:
                if row["kind"] == "epoch":
                    evaluation = evaluations.get(row["epoch"], {})
                    writer.writerow([*map(row.get, _SUMMARY_COLUMNS.values()), *map(evaluation.get, ("AP", "AP50"))])
    except OSError as error:
        raise OSError(f"Could not write {path} ({error}). Check the disk's free space.") from error
