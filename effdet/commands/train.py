"""Train EfficientDet on your images, on one device or several.

Examples:
  python train.py --root DIR
  python train.py --root DIR --epochs 60 --image-size 256 320
  python train.py --root DIR --pretrained FILE
  python train.py --root DIR --device npu --amp        (or cuda)
  python train.py --root DIR --device-list 0,1,2,3 -b 128 --sync-bn
  python train.py --root DIR --experiment NAME --resume auto
  python train.py --root DIR optim.lr=0.16 loss.gamma=2.0

DIR is the folder as the annotation tool wrote it: COCO, Roboflow, CVAT, Label
Studio, YOLO, Pascal VOC, ... (docs/own_data.md).
A run writes into output/train/RUN. docs/flags.md is --help-all as a page.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effdet.config.cli import in_our_words, parse_train_args, read_train_args
from effdet.config.load import split_over_devices
from effdet.config.recipe import wants_recipe
from effdet.config.schema import RunConfig
from effdet.runtime.console import error_line, one_line_errors, typed

from .environment import prepare_environment

_logger = logging.getLogger("effdet.train")

PROGRAM = typed("train.py")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, train, and return the exit status."""
    arguments = in_our_words("train.py", argv)
    cfg = parse_train_args(arguments, __doc__)
    with one_line_errors(PROGRAM):
        prepare_environment(PROGRAM, cfg.dist.device_list, cfg.run.plain)
    if cfg.run.check:
        from effdet.datacheck.check import main as check  # torch comes with it, as with what run() imports

        return check(arguments)
    return run(cfg, arguments)[0]


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run that ended: its folder, its best checkpoint, and what its metrics.json says."""

    folder: Path
    checkpoint: Path
    metrics: dict[str, Any]


def train(root: str | Path = "", **settings: Any) -> TrainedRun:
    """Train as the command does: `effdet.train("mydata", epochs=20)`, also from a notebook.

    Args:
        root: the data folder, as `--root`.
        settings: flags by name (`image_size=[256, 320]`, `amp=True`) and settings by dotted key
            (`**{"optim.clip_grad": 5}`); docs/flags.md lists them.

    Raises:
        ValueError: an unknown or wrong setting, or data that cannot be used.
        RuntimeError: the run could not go on, or was stopped.
    """
    words = ["--root", str(root)] if root else []
    for name, value in settings.items():
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        flag = name.replace("_", "-")
        if "." in name:
            words.append(f"{name}={text}")
        elif isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"--{flag}={text}")
    cfg = read_train_args(words)
    prepare_environment(PROGRAM, cfg.dist.device_list, cfg.run.plain)
    from effdet.report.log import METRICS_NAME  # torch comes with it

    try:
        status, folder = run(cfg, words)
    except SystemExit as end:  # how the command says in one line that it cannot go on
        kind = ValueError if isinstance(end.__context__, ValueError | OSError) else RuntimeError
        raise kind(str(end.code).removeprefix(error_line(PROGRAM, ""))) from end.__context__
    if status or folder is None:
        raise RuntimeError(f"the training ended with status {status}")
    metrics = json.loads((folder / METRICS_NAME).read_text(encoding="utf-8"))
    return TrainedRun(folder, Path(metrics["run"]["checkpoint"]), metrics)


def run(cfg: RunConfig, arguments: Sequence[str]) -> tuple[int, Path | None]:
    """Start a process for each device, or train in this one.

    Args:
        cfg: what to do.
        arguments: the command line that gave it.

    Returns:
        The exit status, and the run's folder, None where a signal came before there was one.
    """
    from effdet.data.corrupt import BadImagesError
    from effdet.report.log import METRICS_NAME
    from effdet.runtime import distributed, heartbeat, signals
    from effdet.runtime.console import dead_workers_in_one_line
    from effdet.runtime.launch import needs_launch, start
    from effdet.training.footprint import OutOfMemory
    from effdet.training.postmortem import DivergedError
    from effdet.training.resume import newest_checkpoint
    from effdet.training.run_dir import newest_run_folder
    from effdet.training.trainer import fit, prepare

    def parse(base: Mapping[str, Any]) -> RunConfig:
        return parse_train_args(arguments, base=base)

    prepared = None
    try:
        with signals.listening():
            with one_line_errors(PROGRAM), signals.interruptible():
                if needs_launch(cfg.dist.device_list):
                    status = start_processes(cfg, arguments, wants_recipe(parse))
                    return status, newest_run_folder(Path(cfg.run.output))
                device = start(cfg.run.device, cfg.dist.device_list)
                prepared = prepare(cfg, device, parse)
            watch = heartbeat.start(cfg.dist.hang_timeout)
            with (
                contextlib.closing(prepared),
                dead_workers_in_one_line(PROGRAM, "; continue with --resume auto"),
                one_line_errors(PROGRAM, (BadImagesError, DivergedError, OutOfMemory)),
            ):
                status = fit(prepared)
                if cfg.run.json and distributed.is_primary():
                    metrics = json.loads((prepared.output_dir / METRICS_NAME).read_text(encoding="utf-8"))
                    sys.stdout.write(json.dumps({**metrics, "folder": str(prepared.output_dir)}) + "\n")
            if watch is not None:
                watch.end()
    except signals.StopRequested as stop:
        again = f". Continue with --resume {newest_checkpoint(prepared.output_dir)}" if prepared else ""
        _logger.info("%s; status %d%s", stop, stop.exit_code, again)
        status = stop.exit_code
    finally:
        distributed.shutdown()
    return status, prepared.output_dir if prepared else None


def start_processes(cfg: RunConfig, arguments: Sequence[str], has_recipe: bool) -> int:
    """Start a process for each device and return the exit status of all; a recipe brings a batch that can be split."""
    from effdet.checkpoint.io import ensure_writable
    from effdet.runtime.launch import launch
    from effdet.training.auto_batch import AUTO
    from effdet.training.run_dir import make_run_folder

    devices = cfg.dist.device_list
    if cfg.run.batch_size != AUTO and not has_recipe:
        split_over_devices(cfg.run.batch_size, len(devices))  # refused once, not by every process
    command = ["-m", "effdet.commands.train", *arguments]
    if cfg.dist.max_restarts and not (cfg.run.experiment or cfg.run.resume):
        ensure_writable(Path(cfg.run.output) / "run", "--output")
        command += ["--experiment", make_run_folder(cfg).name]  # so that restarted processes find their run
    return launch(command, len(devices), cfg.dist.addr, cfg.dist.master_port, cfg.dist.max_restarts)


if __name__ == "__main__":
    sys.exit(main())
