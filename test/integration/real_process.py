"""train.py in a process of its own, to be watched, signalled and killed; what the tests on reliability share."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
}
ENVIRONMENT["OMP_NUM_THREADS"] = "1"


def train_argv(data: Path, output: Path, *more: object) -> list[str]:
    """Return train.py's arguments for three epochs at 64 pixels on the CPU, in the folder `output`/run."""
    argv = [
        "--root",
        data,
        "--image-size",
        64,
        "-b",
        4,
        "-j",
        0,
        "--device",
        "cpu",
        "--epochs",
        3,
        "--warmup-epochs",
        0,
        "--cooldown-epochs",
        0,
        "--log-interval",
        1,
        "--output",
        output,
        "--experiment",
        "run",
        "--resume",
        "auto",
        "--recipe",
        "coco",
        *more,
    ]
    return [str(part) for part in argv]


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started and that live."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def family_of(pid: int) -> list[int]:
    """Return a process and all below it."""
    return [pid, *(one for child in children_of(pid) for one in family_of(child))]


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids: list[int], timeout_s: float = 60) -> list[int]:
    """Wait until processes have ended and return those that have not."""
    end = time.monotonic() + timeout_s
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < end:
        time.sleep(0.1)
    return left


class Process:
    """A script in a process of its own, whose output goes to a file.

    Args:
        argv: its arguments, after the interpreter.
        log: takes what it prints, behind what is there.
        prefix: a command that starts it, such as `ip netns exec NAME`.
        environment: more variables.
    """

    def __init__(
        self, argv: list[str], log: Path, prefix: list[str] | None = None, environment: dict[str, str] | None = None
    ) -> None:
        self.log = log
        self.before = log.stat().st_size if log.exists() else 0  # an earlier process's output
        with open(log, "a") as file:
            self.process = subprocess.Popen(
                [*(prefix or []), sys.executable, *argv],
                cwd=REPO,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT | (environment or {}),
            )

    def output(self) -> str:
        return self.log.read_text()[self.before :]

    def wait_for(self, pattern: str, timeout_s: float = 180) -> None:
        end = time.monotonic() + timeout_s
        while not re.search(pattern, self.output()):
            assert time.monotonic() < end and self.process.poll() is None, self.output()
            time.sleep(0.02)

    def wait(self, timeout_s: float = 180) -> int:
        return self.process.wait(timeout=timeout_s)

    def family(self) -> list[int]:
        return family_of(self.process.pid)

    def pid_of_rank(self, rank: int) -> int:
        for pid in self.family():
            if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
                return pid  # the rank itself comes before the loader processes that it has started
        raise AssertionError(f"no process of rank {rank}")

    def end(self) -> None:
        """Kill it and all that it has started."""
        for pid in self.family():
            if is_alive(pid):
                os.kill(pid, 9)
        self.process.wait()


def losses(folder: Path) -> list[tuple[float, ...]]:
    """Return what a run has recorded for each step, without times."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        tuple(row[key] for key in ("epoch", "step", "loss", "class_loss", "box_loss", "lr"))
        for row in rows
        if row["kind"] == "interval"
    ]
