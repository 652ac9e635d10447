"""The folder of a run: which one it is, what it is called, whether it can be written and there is room in it."""
from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from . import distributed
from .config.schema import RunConfig
from .engine import Training
from .log import LOSSES_NAME
from .processes import INPUT_ERRORS
from .run_state import AUTO

_PREFETCHED = 2  # batches that each loading process makes ahead, torch's default


def choose_output_dir(cfg: RunConfig, wants_newest: bool) -> Path:
    """Return the run's folder, the same on all ranks: the resumed run's own, or a new one, which is made.

    Raises:
        ValueError: it cannot be made or written to; on the other ranks RuntimeError with the same text.
    """
    def choose() -> str:
        output = Path(cfg.run.output)
        if cfg.run.experiment:
            path = output / cfg.run.experiment
        elif cfg.run.resume not in ("", AUTO):
            path = Path(cfg.run.resume).resolve().parent
        else:
            path = newest_run_folder(output) if wants_newest else None
            path = path or output / new_run_name(cfg)
        try:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            raise ValueError(f"the run's folder {path} cannot be written ({error.strerror}): choose another --output, "
                             "or change its permissions") from error
        return str(path)
    return Path(distributed.run_on_primary(choose))


@contextlib.contextmanager
def kept_unless_refused(folder: Path) -> Iterator[None]:
    """Remove a new run's folder again when the block refuses the run (no data, no room) before anything is in it.

    Errors of other kinds than a wrong input keep it, and with it the log.
    """
    is_new = distributed.is_primary() and not any(folder.iterdir())
    try:
        yield
    except INPUT_ERRORS:
        if is_new and {path.name for path in folder.iterdir()} <= {"log.txt", LOSSES_NAME}:
            shutil.rmtree(folder)
        raise


def new_run_name(cfg: RunConfig) -> str:
    """Return a folder's name from date, model and input size."""
    size = "" if cfg.model.image_size is None else "-" + "x".join(map(str, cfg.model.image_size))
    return f"{datetime.now():%Y%m%d-%H%M%S}-{cfg.model.name}{size}"


def newest_run_folder(output: Path) -> Path | None:
    """Return the run folder (one with a config.yaml or checkpoints) below `output` that was written to last."""
    folders = [path for path in output.glob("*") if path.is_dir()
               and ((path / "config.yaml").exists() or any(path.glob("*.pth.tar")))]
    return max(folders, key=lambda path: (path.stat().st_mtime_ns, path.name), default=None)


def check_shared_memory(processes: int, workers: int, batch_size: int, image_size: tuple[int, int],
                        folder: str = "/dev/shm") -> None:
    """Refuse to start where the batches on their way from the loading processes do not fit into shared memory.

    Args:
        processes: of the run on this machine. workers, batch_size: of each of them.
        image_size: height and width of the network's input in pixels.
        folder: where shared memory lies; without such a folder nothing is checked.

    Raises:
        ValueError: says how much is free and how much is needed. Without the check a worker would die of a bus error.
    """
    if workers == 0 or not Path(folder).is_dir():
        return
    batches = processes * (_PREFETCHED * workers + 1)  # and the one that is trained on
    needed = batches * batch_size * 3 * image_size[0] * image_size[1]
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"{folder} has {free / 2**20:.0f} MiB free, but the loader processes need about "
                         f"{needed / 2**20:.0f} MiB for {batches} batches: give the container more (docker run "
                         f"--shm-size={-(-needed // 2**30) + 1}g, or --ipc=host), or use fewer -j or a smaller -b.")


def check_space(folder: Path, training: Training) -> None:
    """Refuse to start where not even one checkpoint fits on the disk.

    Raises:
        ValueError: says how much is free and how much is needed.
    """
    model_bytes = sum(value.numel() * value.element_size() for value in training.model.state_dict().values())
    needed = (2 + (training.ema is not None)) * model_bytes  # weights, optimizer's state, average
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"{folder} has {free / 2**20:.0f} MiB free, but one checkpoint takes about "
                         f"{needed / 2**20:.0f} MiB: free some space, or choose another --output.")
