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

from effdet.config.cli import in_our_words, parse_validate_args
from effdet.config.load import split_over_devices
from effdet.runtime.console import one_line_errors, typed

from .environment import prepare_environment

PROGRAM = typed("validate.py")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, evaluate, and return the exit status."""
    arguments = in_our_words("validate.py", argv)
    cfg = parse_validate_args(arguments, __doc__)
    with one_line_errors(PROGRAM):
        prepare_environment(PROGRAM, cfg.dist.device_list, cfg.run.plain)
    from effdet.runtime import distributed, signals  # torch comes with these
    from effdet.runtime.launch import launch, needs_launch, start

    from .evaluation import check_outputs, evaluate_detector

    try:
        with signals.listening(), signals.interruptible():
            with one_line_errors(PROGRAM):
                if cfg.run.speed and (cfg.run.tta_flip or cfg.run.tta_scales):
                    raise ValueError("--speed measures one pass: leave --tta-flip and --tta-scales out")
                check_outputs(cfg)
                if needs_launch(cfg.dist.device_list):
                    # refused once, not by every process
                    split_over_devices(cfg.run.batch_size, len(cfg.dist.device_list))
                    command = ["-m", "effdet.commands.validate", *arguments]
                    return launch(command, len(cfg.dist.device_list), cfg.dist.addr, cfg.dist.master_port)
                device = start(cfg.run.device, cfg.dist.device_list)
            evaluate_detector(cfg, device)
    except signals.StopRequested as stop:
        sys.stderr.write(f"{PROGRAM}: {stop}; status {stop.exit_code}\n")
        return stop.exit_code
    finally:
        distributed.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
