"""What a run says: its numbers as records, the formats of lines, and the logger with its file.

Nothing here touches a device or another process. Files for programs are written by recorder.py, from the same records.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from effdet.runtime.progress import keep_lines, make_handler

_LOGGER_NAMES = ("effdet", "timm_patches")
METRICS_NAME = "metrics.json"


@dataclass(frozen=True)
class StepStats:
    """What one log interval of training came to; losses are means over all processes, rates count all devices."""

    epoch: int  # from 0
    global_step: int  # batches since the start of the run
    step: int  # batches of the epoch so far, 1 to steps
    steps: int  # batches in the epoch
    loss: float  # of the last batch
    loss_average: float  # over the epoch so far
    class_loss: float  # of the last batch
    box_loss: float  # likewise, before its weight
    lr: float
    step_s: float  # seconds a step in this interval
    step_average_s: float  # the same over the epoch
    img_per_s: float  # in this interval
    img_per_s_average: float  # over the epoch
    data_s: float  # seconds a step spent waiting for data in this interval
    data_average_s: float  # the same over the epoch
    eta_s: float  # seconds to the end of the run
    memory_mib: float  # peak so far

    @property
    def data_share(self) -> float:
        """The share of the interval spent waiting for data, 0..1."""
        return self.data_s / self.step_s if self.step_s > 0 else 0.0


@dataclass(frozen=True)
class EpochStats:
    """What one epoch of training came to; losses are means over its batches and over all processes."""

    epoch: int
    global_step: int
    loss: float
    class_loss: float
    box_loss: float
    lr: float
    img_per_s: float
    memory_mib: float  # peak so far
    skipped: int  # updates left out for inf or NaN, since the start of the run


@dataclass(frozen=True)
class EvalStats:
    """What one evaluation came to."""

    metric: float  # the evaluator's, the same on all processes
    seconds: float  # until this process had predicted its last batch
    scores: Mapping[str, float]  # all of the evaluator's numbers, by name; NaN where undefined


def setup_logging(output_dir: str | Path | None, rank: int = 0, to_stderr: bool = False) -> logging.Logger:
    """Send the packages' log to the screen, and on rank 0 to log.txt too.

    Rank 0 logs from INFO on, a terminal in colours and with bars (runtime/progress.py). Other ranks log warnings and
    errors, marked with their number. The file has everything, with time and level. Handlers of an earlier call are
    replaced, so that no line comes twice; records do not go on to the root logger for the same reason.

    Args:
        output_dir: folder of the run, made if need be; log.txt in it is appended to. None for no file.
        rank: number of this process in the whole run.
        to_stderr: use standard error, as standard output is for a result in json; else standard output.

    Returns:
        The logger 'effdet'.
    """
    lines = logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(levelname)s: %(message)s")
    stream = sys.stderr if to_stderr else sys.stdout
    screen = make_handler(stream) if rank == 0 else logging.StreamHandler(stream)
    screen.setFormatter(lines)
    screen.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    handlers = [screen]
    if output_dir is not None and rank == 0:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        file = keep_lines(_LogFile(Path(output_dir) / "log.txt", encoding="utf-8"))
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S"))
        handlers.append(file)
    old = {handler for name in _LOGGER_NAMES for handler in logging.getLogger(name).handlers}
    for name in _LOGGER_NAMES:
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG if len(handlers) > 1 else screen.level)
        logger.propagate = False
        logger.handlers[:] = handlers
    for handler in old:
        handler.close()
    return logging.getLogger(_LOGGER_NAMES[0])


class _LogFile(logging.FileHandler):
    """log.txt, which may fail on a full disk."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            return super().handleError(record)
        with tolerate_write_error(Path(self.baseFilename)):
            raise error

    def close(self) -> None:
        """Close the file; what the disk did not take stays unwritten."""
        with contextlib.suppress(OSError):
            super().close()


_unwritten: set[Path] = set()


@contextlib.contextmanager
def tolerate_write_error(path: Path) -> Iterator[None]:
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
                "%s cannot be written (%s): what comes now is missing in it; the run goes on", path, error
            )


def format_duration(seconds: float) -> str:
    """Return a duration as H:MM:SS, with days in front from 24 hours on, such as '2d 03:04:05'."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02d}:{minute:02d}:{second:02d}" if days else f"{hour}:{minute:02d}:{second:02d}"


def format_interval_line(stats: StepStats) -> str:
    """Format the training line of one log interval, with 'Loss:', 'Time:', 'FPS:', 'LR:' and 'Data:' in it.

    Means over the epoch so far stand in brackets behind the numbers of the interval.
    """
    return (
        f"Train: {stats.epoch} [{stats.step:>{max(4, len(str(stats.steps)))}d}/{stats.steps} "
        f"({100 * stats.step / max(1, stats.steps):>3.0f}%)]  Loss: {stats.loss:.5f} ({stats.loss_average:.5f})  "
        f"Class: {stats.class_loss:.5f}  Box: {stats.box_loss:.6f}  "
        f"Time: {stats.step_s:.3f}s ({stats.step_average_s:.3f}s)  "
        f"FPS: {stats.img_per_s:.2f} ({stats.img_per_s_average:.2f}) img/s  LR: {stats.lr:.3e}  "
        f"Data: {stats.data_s:.3f}s ({stats.data_average_s:.3f}s)  ETA: {format_duration(stats.eta_s)}"
    )


def format_best_metric(metric: float | None, epoch: int | None) -> str:
    """Format the line that gives the run's best metric; without an evaluation it says n/a."""
    if metric is None:
        return "*** Best metric: n/a (no evaluation)"
    return f"*** Best metric: {metric:.5f} (epoch {epoch})"
