"""metrics.jsonl and TensorBoard: every number a run measures, as it goes on.

metrics.jsonl has one json object a line. All have `kind`, `epoch` (from 0) and `global_step` (batches since the start
of the run); numbers that are NaN or infinite are null. By kind:

    interval     step, steps (batches of the epoch so far, and in all), loss, class_loss, box_loss (before its weight),
                 lr, img_per_s (over all devices), data_share (of the time, spent waiting for data), memory_mib (peak)
    epoch        loss, class_loss, box_loss (means over the epoch), lr, img_per_s, memory_mib, skipped (updates left out
                 for inf or NaN, since the start of the run)
    evaluation   AP, AP50, AP75, AP_small, AP_medium, AP_large, AR1, AR10, AR100, AR_small, AR_medium, AR_large

A resumed run takes up the file where its checkpoint stands, as for the csv files; in TensorBoard's files, which cannot
be cut, it hides what lies behind (purge_step).
"""
from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from effdet.report.log import rather_go_on, replacing

NAME = "metrics.jsonl"
_INTERVAL = ("step", "steps", "loss", "class_loss", "box_loss", "lr", "img_per_s", "data_share", "memory_mib")
_GROUPS = {"interval": "train", "epoch": "epoch", "evaluation": "val"}  # how TensorBoard groups its charts


def check_tensorboard(wanted: bool) -> None:
    """Refuse what cannot be had.

    Raises:
        ValueError: it is wanted, and the package is not installed.
    """
    if wanted and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs the package tensorboard, which is not installed: pip install "
                         "tensorboard, or leave it out; the same numbers are in metrics.jsonl and report.html")


class MetricsLog:
    """Write the numbers of a run to its folder; for rank 0.

    Args:
        folder: the run's.
        tensorboard: also write TensorBoard's event files there.
        global_step: tells how many batches the run has done.
    """

    def __init__(self, folder: Path, tensorboard: bool, global_step: Callable[[], int]) -> None:
        self.path = folder / NAME
        self.global_step = global_step
        self.writer: Any = None
        self._tensorboard = tensorboard

    def begin(self, epoch: int, step: int = 0) -> None:
        """Drop what the run will write anew, and take every interval line that is logged from here on.

        Args:
            epoch: the first epoch to be trained.
            step: batches of it that are done already.
        """
        drop_from(self.path, epoch, step)
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            done = self.global_step()
            self.writer = SummaryWriter(str(self.path.parent), purge_step=done + 1 if done else None)
            atexit.register(self.writer.close)
        logging.getLogger("effdet").addHandler(_IntervalHandler(self))

    def add(self, kind: str, epoch: int, values: Mapping[str, float | int | None]) -> None:
        """Write one line; it is on disk when this returns, unless the disk is full: that is said once.

        Args:
            kind: see the module's docstring.
            epoch: from 0.
            values: see the module's docstring.
        """
        step = self.global_step()
        row = {"kind": kind, "epoch": epoch, "global_step": step, **{key: _finite(v) for key, v in values.items()}}
        with rather_go_on(self.path), self.path.open("a+b") as file:
            if file.tell() and not _ends_with_newline(file):
                file.write(b"\n")  # the last line was cut off by a crash
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        if self.writer is not None:
            for key, value in values.items():
                if value is not None and key not in ("step", "steps"):
                    self.writer.add_scalar(f"{_GROUPS[kind]}/{key}", value, step)
            if kind != "interval":
                self.writer.flush()


class _IntervalHandler(logging.Handler):
    """Take the numbers of interval lines; see `log.IntervalLine`."""

    def __init__(self, log: MetricsLog) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        live = getattr(record.msg, "live", None)
        if live is not None:
            self._log.add("interval", live["epoch"], {key: live[key] for key in _INTERVAL})


def _finite(value: float | int | None) -> float | int | None:
    return None if value is None or not math.isfinite(value) else value


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, 2)
    return file.read(1) == b"\n"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl in order, without broken ones; empty where there is no file."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    try:
        rows = json.loads(f"[{','.join(lines)}]")  # all at once is several times faster than one by one
    except ValueError:
        rows = []
        for line in lines:
            with contextlib.suppress(ValueError):  # cut off by a crash
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "kind" in row and "epoch" in row]


def drop_from(path: Path, epoch: int, step: int = 0) -> None:
    """Drop the lines of an epoch and later, and broken ones; of the epoch itself intervals up to `step` stay."""
    if not path.exists():
        return
    kept = [row for row in read_rows(path) if row["epoch"] < epoch or
            row["epoch"] == epoch and row["kind"] == "interval" and row["step"] <= step]
    with replacing(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)
