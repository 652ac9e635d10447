"""Real processes that are signalled, killed and frozen, and how their run goes on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from real_process import REPO, Process, losses, train_argv

from effdet.data.synthetic.dataset import make_synthetic_dataset

NUM_TRAIN, BATCH = 24, 4
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_synthetic_dataset(tmp_path_factory.mktemp("data") / "set", num_train=NUM_TRAIN, num_val=6)


class Run(Process):
    """train.py with its output folder and a log of its own."""

    def __init__(self, data: Path, output: Path, *more: object, launcher: Sequence[str] = ()) -> None:
        self.folder = output / "run"
        super().__init__(
            [*launcher, "train.py", *train_argv(data, output, *more)], output.parent / f"{output.name}.txt"
        )


@pytest.fixture
def start(data: Path, tmp_path: Path) -> Iterator:
    running: list[Run] = []

    def make(name: str, *more: object, launcher: Sequence[str] = ()) -> Run:
        running.append(Run(data, tmp_path / name, *more, launcher=launcher))
        return running[-1]

    yield make
    for one in running:
        one.end()


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = (torch.load(folder / "last.pth.tar", weights_only=True) for folder in (one, other))
    assert first["epoch"] == second["epoch"] == 2
    for kind in ("state_dict", "state_dict_ema"):
        assert all(torch.equal(first[kind][name], value) for name, value in second[kind].items()), kind


AUGMENTED = (
    "--image-size",
    96,
    "--multi-scale",
    96,
    128,
    "--aa",
    "v1",
    "--color-jitter",
    0.4,
    "--mosaic",
    0.5,
    "--mixup",
    0.3,
    "--reprob",
    0.5,
)


@pytest.mark.parametrize(
    "devices", [(), ("--device-list", "0,1"), AUGMENTED], ids=["1 process", "2 processes", "augmented"]
)
def test_signals_end_a_run_within_seconds_and_nothing_is_lost(start, devices):
    straight = start("straight", *devices)
    assert straight.wait() == 0, straight.output()
    for epoch, signum in enumerate((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)):
        run = start("stopped", *devices)
        run.wait_for(rf"Train: {epoch} \[ *2/")
        run.process.send_signal(signum)
        started = time.monotonic()
        assert run.wait() == 128 + signum, run.output()
        assert time.monotonic() - started < 60, "seconds, on a machine that has other work too"
        assert f"stopped by {signum.name}" in run.output() and "Traceback" not in run.output()
        payload = torch.load(run.folder / "recovery.pth.tar", weights_only=True)
        assert payload["epoch"] == epoch - 1
        assert 2 <= payload["progress"]["batches"] <= 5, "the step under way and the one at which the ranks agree"
    run = start("stopped", *devices)
    assert run.wait() == 0, run.output()
    assert losses(run.folder) == losses(straight.folder) and len(losses(run.folder)) == 3 * NUM_TRAIN // BATCH
    assert_same_weights(run.folder, straight.folder)


def test_a_second_signal_ends_the_run_at_once(start):
    run = start("run", "--image-size", 512, "-b", 8)  # a step takes seconds
    run.wait_for("Train: 0 ")
    run.process.send_signal(signal.SIGTERM)
    time.sleep(0.8)
    if run.process.poll() is None:
        run.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert run.wait() in (-signal.SIGTERM, 128 + signal.SIGTERM)
        assert time.monotonic() - started < 1.5, run.output()


def test_two_deterministic_runs_have_the_same_bits(start):
    first, second = start("first", "--deterministic"), start("second", "--deterministic", "-j", 2)
    assert [first.wait(), second.wait()] == [0, 0], first.output() + second.output()
    words = "deterministic: the same bits on this machine with the same number of threads"
    assert words in (first.folder / "log.txt").read_text()
    assert losses(first.folder) == losses(second.folder) and len(losses(first.folder)) == 3 * NUM_TRAIN // BATCH
    assert_same_weights(first.folder, second.folder)


@pytest.mark.parametrize("launcher", ["--device-list", "torchrun"])
def test_a_killed_process_is_replaced_and_the_group_resumes(start, launcher):
    if launcher == "torchrun":
        run = start(
            "run",
            "--resume",
            "",
            "--recovery-interval",
            2,
            launcher=["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"],
        )
    else:
        run = start("run", "--device-list", "0,1", "--max-restarts", 1, "--recovery-interval", 2)
    run.wait_for(r"Train: 1 \[ *3/")
    os.kill(run.pid_of_rank(1), signal.SIGKILL)
    assert run.wait() == 0, run.output()
    assert re.search(r"resumed \S+recovery.pth.tar: continuing with epoch 1, batch [24]", run.output())
    straight = start("straight", "--device-list", "0,1")
    assert straight.wait() == 0, straight.output()
    assert losses(run.folder) == losses(straight.folder)
    assert_same_weights(run.folder, straight.folder)


def test_another_number_of_processes_continues_the_run_and_is_said(start):
    """One process, then two, then one again; each is stopped within an epoch or at the end of the run."""
    first = start("run")
    first.wait_for(r"Train: 0 \[ *3/")
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 128 + signal.SIGTERM, first.output()
    steps = [torch.load(first.folder / "recovery.pth.tar", weights_only=True)["step"]]
    assert 3 <= steps[0] <= 5

    second = start("run", "--device-list", "0,1")
    second.wait_for(r"Train: 1 \[ *2/")
    second.process.send_signal(signal.SIGTERM)
    assert second.wait() == 128 + signal.SIGTERM, second.output()
    assert "written by 1 process(es), this run has 2: random numbers start anew" in second.output()
    assert f"continuing with epoch 0, batch {steps[0]}" in second.output()
    payload = torch.load(second.folder / "recovery.pth.tar", weights_only=True)
    assert len(payload["ranks"]) == 2 and payload["epoch"] == 0
    steps.append(payload["step"])

    third = start("run")
    assert third.wait() == 0, third.output()
    assert "written by 2 process(es), this run has 1: random numbers start anew" in third.output()
    assert f"continuing with epoch 1, batch {steps[1] - 6}" in third.output()
    trace = losses(third.folder)
    assert [row[:2] for row in trace] == [(epoch, batch) for epoch in range(3) for batch in range(1, 7)]
    payload = torch.load(third.folder / "last.pth.tar", weights_only=True)
    assert (payload["step"], payload["epoch"], len(payload["ranks"])) == (3 * NUM_TRAIN // BATCH, 2, 1)


def test_without_restarts_a_killed_process_ends_the_run(start):
    run = start("run", "--device-list", "0,1")
    run.wait_for(r"Train: 0 \[ *2/")
    os.kill(run.pid_of_rank(1), signal.SIGKILL)
    assert run.wait() == 128 + signal.SIGKILL, run.output()
    assert "process of rank 1 ended with exit code -9" in run.output()


def test_a_frozen_process_is_named(start):
    run = start("run", "--device-list", "0,1", "--hang-timeout", 6, "--epochs", 50)
    run.wait_for(r"Train: 0 \[ *2/")
    os.kill(run.pid_of_rank(1), signal.SIGSTOP)
    code = run.wait()
    assert code not in (0, None)
    assert "no process has made progress for 6 s (--hang-timeout): waiting for rank 1. " in run.output()
    assert "rank 0: computing step" in run.output() and "most recent call first" in run.output()


POISONING = """
import os, sys
sys.path.insert(0, {repo!r})
import train
from effdet.data.loader import PrefetchLoader
original = PrefetchLoader.__iter__
def poisoned(self):
    for images, target in original(self):
        if os.environ["RANK"] == "1" and type(self.sampler).__name__ == "TrainSampler":
            images[0] = float("nan")
        yield images, target
PrefetchLoader.__iter__ = poisoned
sys.exit(train.main())
"""


@pytest.mark.parametrize("limit", [0, 3])
def test_a_bad_batch_on_one_rank_is_skipped_by_all(data, tmp_path, limit):
    (tmp_path / "poison.py").write_text(POISONING.format(repo=str(REPO)))
    argv = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
        tmp_path / "poison.py",
        "--root",
        data,
        "--image-size",
        64,
        "-b",
        BATCH,
        "-j",
        0,
        "--device",
        "cpu",
        "--epochs",
        1,
        "--warmup-epochs",
        0,
        "--cooldown-epochs",
        0,
        "--log-interval",
        1,
        "--output",
        tmp_path,
        "--experiment",
        "run",
        "--max-skipped",
        limit,
    ]
    done = subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=REPO,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    if limit == 0:
        assert done.returncode == 0, done.stdout
        assert f"{NUM_TRAIN // BATCH} skipped step(s)" in done.stdout
        payload = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=True)
        assert all(torch.isfinite(value).all() for value in payload["state_dict"].values())
        return
    assert done.returncode == 1 and "3 updates in a row were skipped" in done.stdout, done.stdout
    mine, theirs = (torch.load(tmp_path / "run" / f"nonfinite-rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.isfinite(mine["images"]).all() and torch.isnan(theirs["images"]).any()
    assert mine["losses"]["loss"] == mine["losses"]["loss"] and theirs["losses"]["loss"] != theirs["losses"]["loss"]
    assert not set(mine["image_ids"]) & set(theirs["image_ids"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=150m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("choice", ["stop", "warn"])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(start, small_disk, choice):
    run = start("disk", "--save-errors", choice)  # the output folder is the file system
    run.wait_for(r"Train: 1 \[ *1/")
    with open(small_disk / "filler", "wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
    code = run.wait()
    assert torch.load(run.folder / "last.pth.tar", weights_only=True)["epoch"] == 0
    assert "Could not write" in run.output() and "Check the disk's free space" in run.output()
    if choice == "stop":
        assert code == 1
    else:
        assert "Training goes on (--save-errors warn)" in run.output() and "Train: 2 [" in run.output()
    (small_disk / "filler").unlink()
    again = start("disk", "--save-errors", choice)
    assert again.wait() == 0, again.output()
    assert torch.load(run.folder / "last.pth.tar", weights_only=True)["epoch"] == 2


def test_a_disk_without_room_for_a_checkpoint_is_refused_at_the_start(start, small_disk):
    with open(small_disk / "filler", "wb") as file:
        file.write(bytes(130 << 20))
    run = start("disk")
    assert run.wait() == 1
    assert re.search(r"train.py: error: \S+ has \d+ MiB free, but one checkpoint takes about \d+ MiB", run.output())
