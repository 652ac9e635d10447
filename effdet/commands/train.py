"""Train EfficientDet on your images, on one device or several.

Examples:
  python train.py --root DIR -c configs/own_data.yaml
  python train.py --root DIR -c configs/own_data.yaml --image-size 256 320
  python train.py --root DIR -c configs/own_data.yaml --pretrained FILE
  python train.py --root DIR --device npu --amp        (or cuda)
  python train.py --root DIR --device-list 0,1,2,3 -b 128 --sync-bn
  python train.py --root DIR --experiment NAME --resume auto
  python train.py --root DIR optim.lr=0.16 loss.gamma=2.0

DIR is the folder as the annotation tool wrote it: COCO, Roboflow, CVAT, Label
Studio, YOLO, Pascal VOC, ... (docs/own_data.md).
A run writes into output/train/RUN. docs/flags.md is this list as a page.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence

from effdet.config.cli import parse_train_args
from effdet.config.load import split_over_devices
from effdet.config.schema import RunConfig

from .environment import prepare_environment

_logger = logging.getLogger("effdet.train")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, train, and return the exit status."""
    prepare_environment()
    cfg = parse_train_args(argv, __doc__)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if cfg.run.check:
        from effdet.datacheck.check import main as check  # torch comes with it, as with what run() imports

        return check(arguments)
    return run(cfg, arguments)


def run(cfg: RunConfig, arguments: Sequence[str]) -> int:
    """Start a process for each device, or train in this one; `arguments` are those that gave `cfg`."""
    from effdet.data.corrupt import BadImagesError
    from effdet.report import progress
    from effdet.runtime import distributed, heartbeat, signals
    from effdet.runtime.console import dead_workers_in_one_line, one_line_errors
    from effdet.runtime.launch import launch, needs_launch, start
    from effdet.training.auto_batch import AUTO
    from effdet.training.postmortem import DivergedError
    from effdet.training.resume import newest_checkpoint
    from effdet.training.run_dir import make_run_folder
    from effdet.training.trainer import fit, prepare

    with one_line_errors("train.py"):
        if needs_launch(cfg.dist.device_list):
            if cfg.run.batch_size != AUTO:
                split_over_devices(cfg.run.batch_size, len(cfg.dist.device_list))  # refused once, not by every process
            command = ["-m", "effdet.commands.train", *arguments]
            if cfg.dist.max_restarts and not (cfg.run.experiment or cfg.run.resume):
                command += ["--experiment", make_run_folder(cfg).name]  # so that restarted processes find their run
            return launch(
                command, len(cfg.dist.device_list), cfg.dist.addr, cfg.dist.master_port, cfg.dist.max_restarts
            )
        device = start(cfg.run.device, cfg.dist.device_list)
    try:
        with one_line_errors("train.py"):
            prepared = prepare(cfg, device)
        watch = heartbeat.start(cfg.dist.hang_timeout)
        with (
            signals.listening(),
            progress.ended(),
            contextlib.closing(prepared),
            dead_workers_in_one_line("train.py"),
            one_line_errors("train.py", (BadImagesError, DivergedError)),
        ):
            status = fit(prepared)
        if watch is not None:
            watch.end()
    except signals.StopRequested as stop:
        _logger.info(
            "%s; status %d. Continue with --resume %s", stop, stop.exit_code, newest_checkpoint(prepared.output_dir)
        )
        return stop.exit_code
    finally:
        distributed.shutdown()
    return status


if __name__ == "__main__":
    sys.exit(main())
