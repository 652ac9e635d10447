"""What a run says: the logger and its lines, meters, and the files for programs: csv of epochs and of losses, json.

Lives here: formats and arithmetic on plain numbers. Nothing here touches a device or another process; whoever calls a
meter with a tensor decides when to read it.
"""
from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from .progress import LiveLineHandler, is_terminal

_LOGGER_NAMES = ("effdet", "timm_patches")
LOSSES_NAME = "losses.csv"
METRICS_NAME = "metrics.json"


def setup_logging(output_dir: str | Path | None, rank: int = 0) -> logging.Logger:
    """Send the packages' log to standard output, and on rank 0 to log.txt and its losses to losses.csv too.

    Rank 0 logs from INFO on, in plain lines; a terminal gets one live line for each epoch (progress.py). Other ranks
    log warnings and errors, marked with their number. Handlers of an earlier call are replaced, so that no line comes
    twice; records do not go on to the root logger for the same reason.

    Args:
        output_dir: folder of the run, made if need be; the two files in it are appended to. None for no file.
        rank: number of this process in the whole run.

    Returns:
        The logger 'effdet'.
    """
    kind = LiveLineHandler if is_terminal(sys.stdout) else logging.StreamHandler
    handlers: list[logging.Handler] = [kind(sys.stdout)]  # it flushes after each record
    if output_dir is not None and rank == 0:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFile(Path(output_dir) / "log.txt", encoding="utf-8"))
        handlers.append(_LossesHandler(Path(output_dir) / LOSSES_NAME))
    formatter = logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(levelname)s: %(message)s")
    for handler in handlers:
        handler.setFormatter(formatter)
        handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    old = {handler for name in _LOGGER_NAMES for handler in logging.getLogger(name).handlers}
    for name in _LOGGER_NAMES:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
        logger.propagate = False
        logger.handlers[:] = handlers
    for handler in old:
        handler.close()
    return logging.getLogger(_LOGGER_NAMES[0])


class AverageMeter:
    """Hold the last value and the weighted mean of a series; tensors stay tensors, on their device.

    Attributes:
        value: the last value, 0.0 before the first.
        count: sum of the weights.
    """

    def __init__(self) -> None:
        self.value: Any = 0.0
        self.count = 0
        self._sum: Any = 0.0

    def update(self, value: Any, weight: int = 1) -> None:
        """Add a value (a number, or a tensor without gradient) that stands for `weight` items."""
        self.value = value
        self._sum = self._sum + value * weight
        self.count += weight

    @property
    def average(self) -> Any:
        """The mean so far; 0.0 before the first value."""
        return self._sum / self.count if self.count else 0.0


class ThroughputMeter:
    """Collect images per second of the logged intervals; `AvgFPS` is their mean.

    Args:
        warmup_intervals: how many at the start do not count (kernels are compiled and workers started then).
    """

    def __init__(self, warmup_intervals: int = 1) -> None:
        self._warmup_intervals = warmup_intervals
        self._rates: list[float] = []

    def add(self, images: int, seconds: float) -> float:
        """Add one logged interval.

        Args:
            images: images trained in it, over all devices.
            seconds: its duration, > 0.

        Returns:
            Its images per second.
        """
        self._rates.append(images / seconds)
        return self._rates[-1]

    @property
    def intervals(self) -> int:
        """How many intervals `average` takes."""
        return len(self._counted())

    def average(self) -> float:
        """Return the mean images per second without the warm-up intervals and the last one.

        A run too short for that is averaged over what it has, the first interval left out if there are two; 0.0 for
        none.
        """
        rates = self._counted()
        return sum(rates) / len(rates) if rates else 0.0

    def _counted(self) -> list[float]:
        return self._rates[self._warmup_intervals:-1] or self._rates[1:] or self._rates


class CsvLog:
    """Append rows to a csv file, also across restarts of a run.

    Args:
        path: the file, made with its folder at the first row. An existing one is continued.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; it is on disk when this returns.

        Args:
            row: values by column; the first row of a new file fixes the columns and their order.

        Raises:
            ValueError: the columns are not those of the file.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        columns = next(csv.reader([text.splitlines()[0]])) if text.strip() else []
        if columns and set(columns) != set(row):
            raise ValueError(f"{self.path} has the columns {', '.join(columns)}; the new row has {', '.join(row)}. "
                             "Continue it with the same settings, or give the run another output folder.")
        with self.path.open("a", encoding="utf-8", newline="") as file:
            if text and not text.endswith("\n"):
                file.write("\n")  # the last row was cut off by a crash; keep the new one apart from it
            writer = csv.DictWriter(file, columns or list(row), lineterminator="\n")
            if not columns:
                writer.writeheader()
            writer.writerow(row)

    def drop_from(self, number: int, step: int = 0) -> None:
        """Drop the rows of epoch `number` and later, and broken ones: a resumed run writes them anew.

        Args:
            number: the first epoch to go.
            step: in a file with steps, keep that epoch's rows up to this one.
        """
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if None not in row.values() and
                    (int(row["epoch"]), int(row.get("step", 1))) <= (number, step)]
        with replacing(self.path) as file:
            writer = csv.DictWriter(file, reader.fieldnames or [], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


class _LossesHandler(logging.Handler):
    """Append the numbers of each interval line to a csv file, so that no program has to read them out of the log."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._csv = CsvLog(path)

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.msg, IntervalLine):
            with rather_go_on(self._csv.path):
                self._csv.append(record.msg.values)


class _LogFile(logging.FileHandler):
    """log.txt, which may fail on a full disk."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            return super().handleError(record)
        with rather_go_on(Path(self.baseFilename)):
            raise error

    def close(self) -> None:
        """Close the file; what the disk did not take stays unwritten."""
        with contextlib.suppress(OSError):
            super().close()


_unwritten: set[Path] = set()


@contextlib.contextmanager
def rather_go_on(path: Path) -> Iterator[None]:
    """Keep a failed write to a file that only informs, as on a full disk, from ending a run.

    It is said once, and again after a write that succeeded. Checkpoints and summary.csv do not go this way:
    --save-errors decides there.

    Args:
        path: the file.
    """
    try:
        yield
        _unwritten.discard(path)
    except OSError as error:
        if path not in _unwritten:
            _unwritten.add(path)
            logging.getLogger(_LOGGER_NAMES[0]).warning(
                "%s cannot be written (%s): what comes now is missing in it; the run goes on", path, error)


def add_run_facts(path: str | Path, facts: Mapping[str, Any]) -> None:
    """Add what a run came to, under `run`, to the metrics file that its evaluation has written.

    Args:
        path: the json file; it changes atomically.
        facts: plain values by name.
    """
    path = Path(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    with replacing(path) as file:
        json.dump({**content, "run": dict(facts)}, file, allow_nan=False)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Open a text file that takes the place of `path` when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class IntervalLine(str):
    """The training line of one log interval, with its main numbers by name in `values`.

    `live` is what a terminal shows instead of it (progress.py).
    """

    values: dict[str, float]
    live: dict[str, Any]


def format_duration(seconds: float) -> str:
    """Return a duration as H:MM:SS, with days in front from 24 hours on, such as '2d 03:04:05'."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02d}:{minute:02d}:{second:02d}" if days else f"{hour}:{minute:02d}:{second:02d}"


def format_interval_line(*, epoch: int, step: int, steps: int, loss: float, loss_average: float, class_loss: float,
                         box_loss: float, step_s: float, step_average_s: float, fps: float, fps_average: float,
                         lr: float, data_s: float, data_average_s: float, eta_s: float,
                         memory_mib: float = 0.0) -> IntervalLine:
    """Format the training line of one log interval, with 'Loss:', 'Time:', 'FPS:', 'LR:' and 'Data:' in it.

    Args:
        epoch: number of the epoch, from 0.
        step: steps done in this epoch, 1 to steps.
        steps: steps in the epoch.
        loss: total loss now; the mean over the epoch so far stands in brackets behind it, as for the other pairs.
        loss_average: see loss.
        class_loss: class part of the loss now.
        box_loss: box part of the loss now, before its weight.
        step_s: seconds per step in this interval.
        step_average_s: the same over the epoch.
        fps: images per second in this interval, over all devices.
        fps_average: the same over the epoch.
        lr: learning rate.
        data_s: seconds per step spent waiting for data in this interval.
        data_average_s: the same over the epoch.
        eta_s: seconds to the end of the run.
        memory_mib: peak memory so far; not in the line.

    Returns:
        One line without a newline; logged, it becomes a row of losses.csv as well.
    """
    line = IntervalLine(
        f"Train: {epoch} [{step:>{max(4, len(str(steps)))}d}/{steps} ({100 * step / max(1, steps):>3.0f}%)]  "
        f"Loss: {loss:.5f} ({loss_average:.5f})  Class: {class_loss:.5f}  Box: {box_loss:.6f}  "
        f"Time: {step_s:.3f}s ({step_average_s:.3f}s)  FPS: {fps:.2f} ({fps_average:.2f}) img/s  "
        f"LR: {lr:.3e}  Data: {data_s:.3f}s ({data_average_s:.3f}s)  ETA: {format_duration(eta_s)}")
    line.values = {"epoch": epoch, "step": step, "loss": loss, "class_loss": class_loss, "box_loss": box_loss,
                   "lr": lr, "img_per_s": fps}
    line.live = {**line.values, "steps": steps, "data_share": data_s / step_s if step_s > 0 else 0.0,
                 "memory_mib": memory_mib, "eta": format_duration(eta_s)}
    return line


def format_train_avg_fps(meter: ThroughputMeter) -> str:
    """Format the line that gives the run's throughput, behind 'AvgFPS:'."""
    return f"TrainAvgFPS: mean img/s of {meter.intervals} intervals AvgFPS:{meter.average():.2f}"


def format_best_metric(metric: float | None, epoch: int | None) -> str:
    """Format the line that gives the run's best metric; without an evaluation it says n/a."""
    if metric is None:
        return "*** Best metric: n/a (no evaluation)"
    return f"*** Best metric: {metric:.5f} (epoch {epoch})"
