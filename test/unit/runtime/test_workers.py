"""workers.py: what a loading process cannot hand over is an error in its parent, in real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effdet.data.loader import create_loader
from effdet.runtime.workers import WorkerError, check_shared_memory

REPO = Path(__file__).resolve().parents[3]

SIDE = 256


class Stubborn:
    """Cannot be sent to another process."""

    def __reduce__(self):
        raise OSError(28, "No space left on device")


class Images(torch.utils.data.Dataset):
    """Images of which the third cannot be handed over."""

    def __init__(self, stubborn: bool) -> None:
        self.stubborn, self.transform = stubborn, None

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int):
        return torch.full(
            (3, SIDE, SIDE), index, dtype=torch.uint8
        ), Stubborn() if index == 2 and self.stubborn else index


def first_of(batch: list) -> tuple:
    return batch[0]


def loader_of(stubborn: bool):
    return create_loader(
        Images(stubborn),
        SIDE,
        1,
        use_prefetcher=False,
        num_workers=1,
        transform_fn=tuple,
        collate_fn=first_of,
    )


def test_what_cannot_be_handed_over_is_an_error_at_its_place():
    seen = []
    with pytest.raises(WorkerError, match="No space left on device.*--shm-size"):
        for _, target in loader_of(stubborn=True):
            seen.append(target)
    assert seen == [0, 1]
    assert [target for _, target in loader_of(stubborn=False)] == [0, 1, 2, 3]


def test_choosing_a_loaders_context_leaves_the_callers_choice_open():
    code = (
        "import multiprocessing, effdet.runtime.workers as w; w.make_context(); "
        "multiprocessing.set_start_method('spawn'); assert w.make_context().get_start_method() == 'spawn'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


def test_shared_memory_that_does_not_hold_the_batches_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"MiB free, but .* need about \d+ MiB for 10 batches: .*--shm-size"):
        check_shared_memory(10, 10**13, str(tmp_path))
    check_shared_memory(10, 1000, str(tmp_path))
    check_shared_memory(10, 10**13, str(tmp_path / "none"))


LOAD = """
import multiprocessing.util, sys
sys.path.insert(0, {here!r})
from test_workers import loader_of
print([target for _, target in loader_of(False)], multiprocessing.util.get_temp_dir())
"""


def test_a_temporary_folder_too_long_for_sockets_is_worked_around(tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    code = LOAD.format(here=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPO,
        env=os.environ | {"TMPDIR": str(long), "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    numbers, _, folder = done.stdout.strip().rpartition(" ")
    assert numbers == "[0, 1, 2, 3]" and not Path(folder).exists() and list(long.iterdir()) == []


SMALL_SHM = """
import os, shutil, sys
sys.path.insert(0, {here!r})
import test_workers
test_workers.Images.__len__ = lambda self: {images}
loader = test_workers.loader_of(False)
with open("/dev/shm/full", "wb") as file:
    os.posix_fallocate(file.fileno(), 0, shutil.disk_usage("/dev/shm").free - {left_kib} * 1024)
for _ in loader:
    pass
"""


def in_small_shm(code: str, kib: int) -> subprocess.CompletedProcess[str]:
    """Run a program where /dev/shm is a file system of its own, of that size."""
    inside = f'mount -t tmpfs -o size={kib}k tmpfs /dev/shm && exec "$0" -c "$1"'
    command = ["unshare", "-rm", "sh", "-c", inside, sys.executable, code]
    return subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(REPO)}
    )


@pytest.fixture(scope="module")
def small_shm():
    try:
        if in_small_shm("", 64).returncode == 0:
            return in_small_shm
    except FileNotFoundError:
        pass
    pytest.skip("needs the right to mount a file system in a namespace (unshare -rm)")


@pytest.mark.parametrize("left_kib", [128, 0])
def test_shared_memory_that_fills_up_later_ends_the_program(left_kib, small_shm):
    """Either not even the processes can be started, or they can and no batch of 192 KiB is handed over."""
    done = small_shm(SMALL_SHM.format(here=str(Path(__file__).parent), images=4, left_kib=left_kib), 4096)
    assert done.returncode == 1 and "WorkerError: " in done.stderr.splitlines()[-1], done.stderr
    assert "No space left" in done.stderr and "--shm-size" in done.stderr.splitlines()[-1]


def test_a_loader_that_does_not_fit_into_shared_memory_is_refused(small_shm):
    done = small_shm(SMALL_SHM.format(here=str(Path(__file__).parent), images=4, left_kib=0), 500)
    assert done.returncode == 1 and "MiB free" in done.stderr.splitlines()[-1], done.stderr
