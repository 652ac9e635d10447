#!/usr/bin/env python3
"""A training step on a machine where something else runs: one process per core that computes all the time.

Threads of OpenMP that wait for each other can spin or sleep. Those that spin take the core from the one they wait for,
where the cores are not theirs alone. Measured is the step of train_step.py, ours alone, with the variables that
train.py sets before torch is loaded and with none of them, each alone and beside the load, in turns.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pairing

sys.path.insert(0, str(pairing.REPO))
from effdet.commands.environment import WAITING  # noqa: E402


@contextmanager
def load(processes: int) -> Iterator[None]:
    """Keep as many cores busy for the block."""
    command = [sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(command) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def measure(case: dict[str, Any], settings: dict[str, dict[str, str]], repeats: int, cores: int) -> dict[str, Any]:
    """Return the seconds of a step by name of the setting: 'quiet' and 'busy' medians, all samples, their ratio."""
    script = str(Path(__file__).with_name("train_step.py"))
    samples: dict[str, dict[str, list[float]]] = {name: {"quiet": [], "busy": []} for name in settings}
    with ExitStack() as stack:
        sides = {}
        for name, environment in settings.items():
            sides[name] = pairing.Side("ours", sys.executable, script, {**case, "environment": environment})
            stack.callback(sides[name].close)
        for side in sides.values():
            side.wait_until_built()
            side.calibrate()
        for turn in range(repeats):
            names = list(sides) if turn % 2 == 0 else list(sides)[::-1]
            for name in names:
                samples[name]["quiet"].append(sides[name].sample())
            with load(cores):
                for name in names:
                    samples[name]["busy"].append(sides[name].sample())
    result = {}
    for name, found in samples.items():
        quiet, busy = statistics.median(found["quiet"]), statistics.median(found["busy"])
        result[name] = {"quiet": quiet, "busy": busy, "ratio": busy / quiet, "samples": found}
    return result


def main() -> int:
    """Measure, print a line for each setting and a JSON line."""
    parser = pairing.make_parser(__doc__)
    parser.set_defaults(batch=[8], image_size=256, model="tf_efficientdet_lite0")
    parser.add_argument(
        "--environment",
        action="append",
        metavar="NAME=VALUE,...",
        help="measure these variables instead of ours and none; give it again for more",
    )
    options = parser.parse_args()
    settings = {"ours": WAITING, "nothing set": {}}
    if options.environment:
        settings = {text: dict(part.split("=") for part in text.split(",") if part) for text in options.environment}
    with tempfile.TemporaryDirectory() as folder:
        case = pairing.base_case(
            options,
            "busy_machine",
            data=pairing.make_file(folder, "make_coco_folder", 4, options.classes),
            folder=folder,
            ema=False,
            steps=1,
        )
        found = measure(case, settings, 3 if options.quick else options.repeats, os.cpu_count() or 1)
    for name, one in found.items():
        print(
            f"busy_machine {case['threads']}t batch {case['batch']}  {name:<24} quiet {one['quiet']:.2f} s   "
            f"beside a load {one['busy']:.2f} s   {one['ratio']:.2f}x"
        )
    pairing.write_figure({**case, "settings": found}, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
