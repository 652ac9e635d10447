"""Evaluate a checkpoint on labelled images, on one device or several.

Examples:
  python validate.py --root DIR --checkpoint output/train/RUN/model_best.pth.tar
  python validate.py --root DIR --checkpoint FILE --results detections.json
  python validate.py --root DIR --checkpoint FILE --tta-flip
  python validate.py --root COCO --model tf_efficientdet_d0 --pretrained
  python validate.py --val-images pics --val-ann val.json --checkpoint FILE

A checkpoint of train.py knows its model, input size and classes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from effdet.config.cli import parse_validate_args
from effdet.config.load import split_over_devices

from .environment import prepare_environment


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, evaluate, and return the exit status."""
    prepare_environment()
    cfg = parse_validate_args(argv, __doc__)
    from effdet.runtime import distributed  # torch comes with it
    from effdet.runtime.console import one_line_errors
    from effdet.runtime.launch import launch, needs_launch, start

    from .evaluation import evaluate_detector

    with one_line_errors("validate.py"):
        if cfg.run.speed and (cfg.run.tta_flip or cfg.run.tta_scales):
            raise ValueError("--speed measures one pass: leave --tta-flip and --tta-scales out")
        if needs_launch(cfg.dist.device_list):
            split_over_devices(cfg.run.batch_size, len(cfg.dist.device_list))  # refused once, not by every process
            command = ["-m", "effdet.commands.validate", *(sys.argv[1:] if argv is None else argv)]
            return launch(command, len(cfg.dist.device_list), cfg.dist.addr, cfg.dist.master_port)
        device = start(cfg.run.device, cfg.dist.device_list)
    try:
        evaluate_detector(cfg, device)
    finally:
        distributed.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
