"""Where processes meet what is around them: the folder of a run, loader processes that die, a launcher that is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.data import DataLoader

from effdet.config.cli import parse_train_args
from effdet.data.loader import PrefetchLoader
from effdet.runtime import signals as stopping
from effdet.runtime.console import dead_workers_in_one_line
from effdet.training.run_dir import LOCK_NAME, hold_run_folder, make_run_folder


def test_runs_that_start_in_the_same_second_get_folders_of_their_own(tmp_path):
    cfg = parse_train_args(["--output", str(tmp_path / "new"), "--root", "x", "--image-size", "64"])
    folders = [make_run_folder(cfg) for _ in range(12)]
    assert len(set(folders)) == 12 and set(folders) == set((tmp_path / "new").iterdir())
    names = sorted((path.name for path in folders), key=len)
    assert names[0].endswith("-tf_efficientdet_d0-64x64") and f"{names[0]}-2" in names


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("process 7 on earth", file=file, flush=True)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs locks of POSIX")
def test_a_folder_is_held_until_its_process_ends_however_it_ends(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / LOCK_NAME], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=rf"{tmp_path} is in use: process 7 on earth trains there.*--experiment"):
            hold_run_folder(tmp_path)
    finally:
        other.kill()
        other.wait()
    with hold_run_folder(tmp_path) as held:
        assert (tmp_path / LOCK_NAME).read_text().startswith(f"process {os.getpid()} on ")
    assert held.closed


class Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((3, 2, 2), index, dtype=torch.uint8)


def collate(items: list[torch.Tensor]) -> tuple[torch.Tensor, dict]:
    return torch.stack(items), {}


def make_loader() -> PrefetchLoader:
    loader = DataLoader(
        Numbers(),
        2,
        num_workers=2,
        persistent_workers=True,
        collate_fn=collate,
        worker_init_fn=stopping.ignore_in_worker,
    )
    return PrefetchLoader(loader, device="cpu")


@pytest.mark.parametrize("frozen", [False, True])
def test_closing_a_loader_ends_its_processes_also_those_that_hang(frozen):
    loader = make_loader()
    iterator = iter(loader)  # as a traceback does, it keeps the loader's insides alive
    next(iterator)
    workers = list(loader.loader._iterator._workers)
    assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
    if frozen:
        os.kill(workers[0].pid, signal.SIGSTOP)
        for worker in workers:  # five seconds is long in a test
            worker.join = lambda timeout=None, join=worker.join: join(min(timeout or 1, 0.5))
    loader.close()
    end = time.monotonic() + 5
    while any(worker.is_alive() for worker in workers) and time.monotonic() < end:
        time.sleep(0.02)
    assert [worker.is_alive() for worker in workers] == [False, False]
    loader.close()
    PrefetchLoader([], device="cpu").close()
    assert len(list(loader)) == 4, "it can be used again"
    loader.close()


def test_a_killed_loader_process_is_one_line_and_other_errors_stay():
    loader = make_loader()
    with pytest.raises(SystemExit) as caught, dead_workers_in_one_line("train.py"):
        for _ in loader:
            worker = loader.loader._iterator._workers[1]
            os.kill(worker.pid, signal.SIGKILL)
            time.sleep(5)  # less: its end breaks this off
    loader.close()
    (line,) = str(caught.value).splitlines()
    assert line.startswith("train.py: error: ") and f"pid {worker.pid}" in line and "Killed" in line
    for text in ("CUDA error", "DataLoader worker is fine"):
        with pytest.raises(RuntimeError, match=text), dead_workers_in_one_line("train.py"):
            raise RuntimeError(text)


def test_the_end_of_the_launcher_asks_to_stop_but_that_of_a_shell_does_not(monkeypatch, caplog):
    parent = os.getppid()
    for variable, asked in (("", 0), ("TORCHELASTIC_RUN_ID", signal.SIGTERM)):
        if variable:
            monkeypatch.setenv(variable, "none")
        else:
            monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        monkeypatch.setattr(os, "getppid", lambda: parent)
        with stopping.listening():
            assert stopping.requested() == 0
            monkeypatch.setattr(os, "getppid", lambda: parent + 1)
            assert stopping.requested() == stopping.requested() == asked
        assert stopping.requested() == 0
    assert caplog.text.count(f"the launcher (process {parent}) is gone") == 1
