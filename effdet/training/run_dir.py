"""The folder of a run: which one, its name, whether it can be written, has room and is nobody else's just now."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]  # Windows has no such locks

from effdet.config.schema import RunConfig
from effdet.data import settle
from effdet.runtime import distributed, signals
from effdet.runtime.console import INPUT_ERRORS

from .engine import Training
from .resume import AUTO

LOCK_NAME = ".lock"


def choose_output_dir(cfg: RunConfig, wants_newest: bool) -> Path:
    """Return the run's folder, the same on all ranks: the resumed run's own, or a new one, which is made.

    Raises:
        ValueError: it cannot be made or written to; on the other ranks RuntimeError with the same text.
    """

    def choose() -> str:
        output = path = Path(cfg.run.output)
        try:
            if cfg.run.experiment:
                path = output / cfg.run.experiment
            elif cfg.run.resume not in ("", AUTO):
                path = Path(cfg.run.resume).resolve().parent
            else:
                path = (newest_run_folder(output) if wants_newest else None) or make_run_folder(cfg)
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            raise ValueError(
                f"the run's folder {path} cannot be written ({error.strerror}): choose another --output, "
                "or change its permissions"
            ) from error
        return str(path)

    return Path(distributed.run_on_primary(choose))


@contextlib.contextmanager
def discard_if_refused(folder: Path) -> Iterator[None]:
    """Remove a new run's folder, while it is empty, when the block refuses the run (no data, no room) or is stopped.

    Errors of other kinds than a wrong input keep it, and with it the log.
    """
    is_new = distributed.is_primary() and not any(folder.iterdir())
    try:
        yield
    except (*INPUT_ERRORS, signals.StopRequested):
        if is_new and {path.name for path in folder.iterdir()} <= {"log.txt", LOCK_NAME, settle.FOLDER}:
            shutil.rmtree(folder)
        raise


def make_run_folder(cfg: RunConfig) -> Path:
    """Make a folder named by date, model and input size, which no other run has, also of those started just now."""
    size = "" if cfg.model.image_size is None else "-" + "x".join(map(str, cfg.model.image_size))
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{cfg.model.name}{size}"
    Path(cfg.run.output).mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = Path(cfg.run.output) / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise AssertionError("not reached: the count has no end")


def hold_run_folder(folder: Path) -> IO[str] | None:
    """Refuse to train in a folder in which another process trains now.

    The system gives the folder up with this process, however it ends. Where it has no such locks, nothing is checked.

    Returns:
        The locked file, which holds the folder until it is closed; None on ranks other than 0.

    Raises:
        ValueError: another run has it (RuntimeError on ranks other than 0).
    """
    held: list[IO[str]] = []

    def hold() -> None:
        file = open(folder / LOCK_NAME, "a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise ValueError(
                f"{folder} is in use: {owner} trains there. Wait until it has ended, or give another --experiment."
            ) from None
        except OSError:
            pass  # a network file system without locks
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        held.append(file)

    if fcntl is not None:
        distributed.run_on_primary(hold)
    return held[0] if held else None


def newest_run_folder(output: Path) -> Path | None:
    """Return the run folder (one with a config.yaml or checkpoints) below `output` that was written to last."""
    folders = [
        path
        for path in output.glob("*")
        if path.is_dir() and ((path / "config.yaml").exists() or any(path.glob("*.pth.tar")))
    ]
    return max(folders, key=lambda path: (path.stat().st_mtime_ns, path.name), default=None)


def check_space(folder: Path, training: Training) -> None:
    """Refuse to start where not even one checkpoint fits on the disk.

    Raises:
        ValueError: says how much is free and how much is needed.
    """
    model_bytes = sum(value.numel() * value.element_size() for value in training.model.state_dict().values())
    needed = (2 + (training.ema is not None)) * model_bytes  # weights, optimizer's state, average
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} has {free / 2**20:.0f} MiB free, but one checkpoint takes about "
            f"{needed / 2**20:.0f} MiB: free some space, or choose another --output."
        )
