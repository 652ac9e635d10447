"""The folder of a run: which one it is, what it is called, whether there is room in it."""
from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path

from . import distributed
from .config.schema import RunConfig
from .engine import Training
from .run_state import AUTO


def choose_output_dir(cfg: RunConfig, wants_newest: bool) -> Path:
    """Return the run's folder, the same on all ranks: the resumed run's own, or a new one, which is made."""
    def choose() -> str:
        output = Path(cfg.run.output)
        if cfg.run.experiment:
            path = output / cfg.run.experiment
        elif cfg.run.resume not in ("", AUTO):
            path = Path(cfg.run.resume).resolve().parent
        else:
            path = newest_run_folder(output) if wants_newest else None
            path = path or output / new_run_name(cfg)
        path.mkdir(parents=True, exist_ok=True)
        return str(path)
    return Path(distributed.run_on_primary(choose))


def new_run_name(cfg: RunConfig) -> str:
    """Return a folder's name from date, model and input size."""
    size = "" if cfg.model.image_size is None else "-" + "x".join(map(str, cfg.model.image_size))
    return f"{datetime.now():%Y%m%d-%H%M%S}-{cfg.model.name}{size}"


def newest_run_folder(output: Path) -> Path | None:
    """Return the run folder (one with a config.yaml or checkpoints) below `output` that was written to last."""
    folders = [path for path in output.glob("*") if path.is_dir()
               and ((path / "config.yaml").exists() or any(path.glob("*.pth.tar")))]
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
        raise ValueError(f"{folder} has {free / 2**20:.0f} MiB free, but one checkpoint takes about "
                         f"{needed / 2**20:.0f} MiB: free some space, or choose another --output.")
