"""Many processes, many epochs, several runs at once, processes that are killed: nothing hangs, nothing is left."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from real_process import Process, children_of, losses, wait_until_gone

from effdet.data.synthetic.dataset import make_synthetic_dataset

pytestmark = pytest.mark.slow
# The smallest model. One image to a process is too few for the coarsest level's batch norms, so they are fixed.
LIGHT = (
    "--model",
    "tf_efficientdet_lite0",
    "--no-pretrained-backbone",
    "--freeze-backbone",
    "--freeze-bn",
    "--opt",
    "momentum",
    "--lr",
    0.001,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_synthetic_dataset(tmp_path_factory.mktemp("data") / "set", num_train=200, num_val=5)


@pytest.fixture
def start(data: Path, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    running: list[Process] = []

    def make(log: str, *more: object) -> Process:
        argv = [
            "--root",
            data,
            "--image-size",
            64,
            "-b",
            4,
            "-j",
            2,
            "--device",
            "cpu",
            "--warmup-epochs",
            0,
            "--cooldown-epochs",
            0,
            "--log-interval",
            1,
            "--output",
            tmp_path / "out",
            *LIGHT,
            *more,
        ]
        running.append(Process(["train.py", *map(str, argv)], tmp_path / log))
        return running[-1]

    yield make
    for one in running:
        one.end()


def test_eight_processes_with_two_loader_processes_each_do_a_thousand_steps(start, tmp_path):
    """Three of the processes have no validation image."""
    steps, per_epoch = 1000, 200 // 8
    run = start(
        "log",
        "--device-list",
        "0,1,2,3,4,5,6,7",
        "-b",
        8,
        "-j",
        16,
        "--epochs",
        steps // per_epoch,
        "--val-interval",
        10,
        "--log-interval",
        per_epoch,
        "--hang-timeout",
        300,
        "--experiment",
        "run",
    )
    run.wait_for(rf"Train: 0 \[ *{per_epoch}/", 600)
    family = run.family()
    assert len(family) >= 1 + 8 + 8 * 2
    started = time.monotonic()
    assert run.wait(3600) == 0, run.output()
    print(f"{steps - per_epoch} steps in {time.monotonic() - started:.0f} s")
    last = torch.load(tmp_path / "out/run/last.pth.tar", weights_only=True)
    assert last["step"] == steps and len(last["ranks"]) == 8
    assert "8 process(es), batch 8 (1 each), 2 loader process(es) each" in run.output()
    assert run.output().count("Evaluation of ") == 4
    assert not wait_until_gone(family)


def memory_mib(pid: int) -> float:
    """Return the memory that a process has to itself."""
    return (
        sum(
            int(line.split()[1])
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            if line.startswith("Private_")
        )
        / 1024
    )


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(("torch_", "sem.", "pym-"))}


def test_fifty_epochs_leave_files_memory_threads_and_processes_as_they_were(start, tmp_path):
    before = shared_memory()
    epochs, seen = 50, {}
    run = start("log", "--epochs", epochs, "-b", 100, "--max-steps", 0, "--experiment", "run", "--keep-best", 1)
    family: set[int] = set()
    while run.process.poll() is None:
        epoch = run.output().count("*** Best metric") - 1
        if epoch >= 0 and epoch not in seen:
            pid, children = run.process.pid, children_of(run.process.pid)
            try:
                seen[epoch] = {
                    "files": len(os.listdir(f"/proc/{pid}/fd")),
                    "threads": len(os.listdir(f"/proc/{pid}/task")),
                    "children": len(children),
                    "children_files": sum(len(os.listdir(f"/proc/{child}/fd")) for child in children),
                    "memory": memory_mib(pid),
                    "children_memory": sum(map(memory_mib, children)),
                }
                family |= {pid, *children}
            except (FileNotFoundError, ProcessLookupError):
                pass  # it ends just now
        time.sleep(0.02)
    assert run.wait() == 0, run.output()
    assert run.output().count("Train: ") == 2 * epochs
    assert {0, 10, 48} <= seen.keys(), "each epoch lasts long enough to be seen"
    for epoch in (0, 10, 20, 30, 40, 48):
        print(epoch, {key: round(value, 1) for key, value in seen.get(epoch, {}).items()})
    early, late = (
        {key: [seen[epoch][key] for epoch in span if epoch in seen] for key in seen[10]}
        for span in (range(8, 18), range(39, 49))
    )
    for key in ("files", "threads", "children", "children_files"):
        assert max(late[key]) <= max(early[key]), key
    assert max(late["children"]) == 2 * 2, "the loader processes of training and of evaluation"
    for key, allowed in (("memory", 10), ("children_memory", 10)):  # MiB
        middle = [sorted(values[key])[len(values[key]) // 2] for values in (early, late)]
        assert middle[1] < middle[0] + allowed, f"{key}: {middle}"
    assert not wait_until_gone(list(family))
    assert shared_memory() <= before


@pytest.mark.parametrize("devices", [(), ("--device-list", "0,1")], ids=["1 process", "2 processes"])
def test_a_killed_loader_process_ends_the_run_with_a_sentence(start, devices, tmp_path):
    run = start("log", "--epochs", 50, "-j", 4, "--recovery-interval", 2, "--experiment", "run", *devices)
    run.wait_for(r"Train: 0 \[ *6/", 600)
    family = run.family()
    rank = run.pid_of_rank(1) if devices else run.process.pid
    worker = children_of(rank)[0]
    os.kill(worker, signal.SIGKILL)
    started = time.monotonic()
    assert run.wait(120) == 1, run.output()
    print(f"ended after {time.monotonic() - started:.1f} s")
    error = re.search(r"train\.py: error: .*", run.output())[0]
    assert f"a loader process (pid {worker}) was ended from outside" in error and "(-j)" in error
    assert devices or ("Traceback" not in run.output() and run.output().strip().endswith(error))
    assert not wait_until_gone(family)
    again = start("log", "--epochs", 50, "--max-steps", 9, "--experiment", "run", "--resume", "auto", *devices)
    assert again.wait(600) == 0, again.output()
    assert re.search(r"resumed \S+recovery.pth.tar: continuing with epoch 0, batch [4-8]", again.output())


@pytest.mark.parametrize("devices", [(), ("--device-list", "0,1")], ids=["1 process", "launcher and 2 processes"])
def test_a_killed_parent_leaves_no_process_behind(start, devices, tmp_path):
    run = start("log", "--epochs", 50, "-j", 4, "--experiment", "run", *devices)
    run.wait_for(r"Train: 0 \[ *3/", 600)
    family = run.family()
    assert len(family) >= (7 if devices else 5)
    run.process.kill()
    started = time.monotonic()
    left = wait_until_gone(family, 120)
    print(f"gone after {time.monotonic() - started:.1f} s")
    assert not left, run.output()
    if devices:
        assert f"the launcher (process {run.process.pid}) is gone" in run.output()
        payload = torch.load(tmp_path / "out/run/recovery.pth.tar", weights_only=True)
        assert payload["progress"]["batches"] >= 3, "they end as with a signal: nothing is lost"


def test_runs_side_by_side_keep_to_themselves(start, tmp_path):
    """The same command line three times at once, then a fourth in the folder of a run that is under way."""
    options = ("--device-list", "0,1", "--epochs", 1, "--max-steps", 12, "--master-port", 29555)
    runs = [start(f"log{number}", *options) for number in range(3)]
    runs[0].wait_for(r"Train: 0 \[ *2/", 600)
    folder = Path(re.search(r"output (\S+)", runs[0].output())[1])
    os.kill(runs[0].pid_of_rank(0), signal.SIGSTOP)  # so that it is still there
    fourth = start("log3", "--epochs", 1, "--experiment", folder.name)
    assert fourth.wait(600) == 1, fourth.output()
    os.kill(runs[0].pid_of_rank(0), signal.SIGCONT)
    assert "is in use: process " in fourth.output().splitlines()[-1] and str(folder) in fourth.output()
    assert [run.wait(900) for run in runs] == [0, 0, 0], [run.output() for run in runs]
    folders = sorted((tmp_path / "out").iterdir())
    assert len(folders) == 3
    traces = [losses(folder) for folder in folders]
    assert len(traces[0]) == 12 and traces[0] == traces[1] == traces[2], "each as if it were alone"
    for folder in folders:
        assert torch.load(folder / "last.pth.tar", weights_only=True)["step"] == 12
        assert (folder / "log.txt").read_text().count("Train: ") == 12
    assert sum("port 29555" in run.output() for run in runs) >= 2, "who found it taken took another"
