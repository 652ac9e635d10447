"""Detect objects in images, draw them, and write what was found as a table and a json.

Examples:
  python demo.py                       (newest checkpoint, default data set)
  python demo.py a.jpg b.jpg --checkpoint output/train/RUN/model_best.pth.tar
  python demo.py "pics/*.jpg" --score-thr 0.3 --output drawn
  python demo.py pics --model tf_efficientdet_d0 --checkpoint WEIGHTS.pth
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from effdet.config.cli import parse_demo_args
from effdet.runtime.console import one_line_errors, typed

from .environment import prepare_environment

PROGRAM = typed("demo.py")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, detect and draw, and return the exit status."""
    cfg = parse_demo_args(argv, __doc__)
    prepare_environment(plain=cfg.run.plain)
    from effdet.report.log import setup_logging  # torch comes with these
    from effdet.runtime import signals

    from .drawing import detect_and_draw

    setup_logging(None)
    try:
        with signals.listening(), one_line_errors(PROGRAM):
            return detect_and_draw(cfg)
    except signals.StopRequested as stop:
        print(f"{PROGRAM}: {stop}; status {stop.exit_code}", file=sys.stderr)
        return stop.exit_code


if __name__ == "__main__":
    sys.exit(main())
