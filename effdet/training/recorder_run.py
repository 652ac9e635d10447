"""What a training run leaves behind and shows beside its checkpoints.

That is: metrics, TensorBoard, the report, the first batch, the live line, and the summaries at its start and end. All
of it happens on rank 0, and none of it reads the device, but for the first batch, once.
"""
from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effdet.config.schema import RunConfig
from effdet.evaluator import CocoEvaluator
from effdet.predict.gallery import draw_training_batch
from effdet.report import html as report
from effdet.report import progress as live_line
from effdet.report.images import BATCH_NAME
from effdet.report.summary import describe_start, next_commands
from effdet.runtime import device as device_layer
from effdet.runtime import distributed

from . import metrics_log
from .engine import EpochStats, Progress, Training

_logger = logging.getLogger("effdet.train")


class RunRecord:
    """Collect and write what a run has to show; does nothing on ranks other than 0.

    Args:
        cfg: the resolved settings.
        folder: the run's.
        training: what is trained.
        train_set, val_set: data sets.
        steps_per_epoch: batches.
        epochs: in all.
        channels_last: as chosen.
    """

    def __init__(self, cfg: RunConfig, folder: Path, training: Training, train_set: Any, val_set: Any,
                 steps_per_epoch: int, epochs: int, channels_last: bool) -> None:
        self.cfg, self.folder, self.training = cfg, folder, training
        self.train_set, self.val_set, self.steps_per_epoch = train_set, val_set, steps_per_epoch
        self.primary = distributed.is_primary()
        self.metrics: metrics_log.MetricsLog | None = None
        if not self.primary:
            return
        device = device_layer.describe(training.device)
        self.report = report.Report(folder / report.NAME, folder.name, cfg, training.model.config, val_set, train_set,
                                    device)
        precision = training.precision.level
        precision = "float32" if precision == "O0" else f"mixed precision {precision} in {cfg.amp.dtype}"
        for line in describe_start(cfg, training.model, train_set, val_set, device, distributed.world_size(),
                                   channels_last, epochs, steps_per_epoch, precision, folder):
            _logger.info("%s", line)

    def begin(self, epoch: int, batches: int) -> None:
        """Open the files, without what the run will write anew."""
        if self.primary:
            self.metrics = metrics_log.MetricsLog(self.folder, self.cfg.run.tensorboard, lambda: self.training.steps)
            self.metrics.begin(epoch, batches)

    def watch(self, loader: Any) -> Any:
        """Return the training loader, or one like it that draws its first batch if that has not been done."""
        path = self.folder / BATCH_NAME
        return _FirstBatch(loader, path, self.train_set) if self.primary and not path.exists() else loader

    def step(self, epoch: int, progress: Progress) -> None:
        """Move the live line on."""
        if self.primary:
            live_line.step(epoch=epoch, step=progress.batches, steps=self.steps_per_epoch)

    def add_epoch(self, epoch: int, stats: EpochStats, evaluator: CocoEvaluator | None) -> None:
        """Write an epoch's numbers and, where it was evaluated, those of the evaluation and the report."""
        if self.metrics is None:
            return
        self.metrics.add("epoch", epoch, {
            "loss": stats.loss, "class_loss": stats.class_loss, "box_loss": stats.box_loss, "lr": stats.lr,
            "img_per_s": stats.fps, "memory_mib": stats.peak_memory_mib, "skipped": stats.skipped})
        if evaluator is not None:
            self.metrics.add("evaluation", epoch, evaluator.stats)
            self.report.write(evaluator, metrics_log.read_rows(self.metrics.path))

    def end(self, checkpoint: Path) -> None:
        """Say where the report is and what to do next."""
        _logger.info("report: %s", self.report.path)
        parser = self.val_set.parser
        picture = Path(self.val_set.data_dir) / parser.img_infos[0]["file_name"] if len(parser.img_infos) else None
        for command in next_commands(self.cfg, self.folder, checkpoint, picture):
            _logger.info("next: %s", command)


class _FirstBatch:
    """A loader that draws the first batch it hands on."""

    def __init__(self, loader: Any, path: Path, dataset: Any) -> None:
        self.loader, self.path, self.dataset = loader, path, dataset

    def __iter__(self) -> Iterator[Any]:
        for number, (images, target) in enumerate(self.loader):
            if number == 0:
                self._draw(images, target)
            yield images, target

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def sampler(self) -> Any:
        """The loader's."""
        return self.loader.sampler

    def _draw(self, images: Any, target: Any) -> None:
        try:
            sheet = draw_training_batch(images, target, self.dataset.parser.category_map.class_names,
                                        self.loader.mean, self.loader.std, num_pictures=8)
            sheet.save(self.path, quality=85)
        except Exception as error:  # a picture for the eye is no reason to end a run
            _logger.warning("the first training batch could not be drawn (%s: %s)", type(error).__name__, error)
