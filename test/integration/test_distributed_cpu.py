"""Real gloo processes: the launcher, the collectives, sync batch norm and the evaluator on two and three ranks."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_worker import SHARDS, make_coco
from torch.nn.parallel import DistributedDataParallel

from effdet.evaluator import CocoEvaluator
from effdet.runtime import distributed

REPO = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("distributed_worker.py")
TIMEOUT_S = 120  # a hang fails the test instead of stopping the run
LAUNCH = "import sys; from effdet.runtime.launch import launch; sys.exit(launch(sys.argv[2:], int(sys.argv[1])))"


def _environment() -> dict[str, str]:
    ours = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"}
    return {k: v for k, v in os.environ.items() if k not in ours} | {"PYTHONPATH": str(REPO)}


def _launch(case: str, out_dir: Path, processes: int, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", LAUNCH, str(processes), str(WORKER), case, str(out_dir), *arguments],
        env=_environment(),
        timeout=TIMEOUT_S,
        capture_output=True,
        text=True,
    )


def _results(cases: str, out_dir: Path, processes: int, *arguments: str) -> list[dict]:
    done = _launch(cases, out_dir, processes, *arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads((out_dir / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> tuple[list[dict], Path]:
    """Run everything that two ranks can succeed at in one pair of processes, because starting them is what costs."""
    out_dir = tmp_path_factory.mktemp("two_ranks")
    return _results("collectives,effdets_collectives,sync_bn,evaluate", out_dir, 2), out_dir


# ---- launcher --------------------------------------------------------------------------------------------------------


def test_launch_starts_one_process_per_rank_with_the_same_arguments(tmp_path):
    ranks = _results("place", tmp_path, 2, "--lr", "0.1", "-v")
    assert [(r["RANK"], r["LOCAL_RANK"], r["WORLD_SIZE"]) for r in ranks] == [("0", "0", "2"), ("1", "1", "2")]
    assert all(r["argv"] == [str(WORKER), "place", str(tmp_path), "--lr", "0.1", "-v"] for r in ranks)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert all(r["OMP_NUM_THREADS"] == str(threads) for r in ranks)


def test_launch_returns_the_exit_code_of_the_failed_process(tmp_path):
    done = _launch("exit7", tmp_path, 2)
    assert done.returncode == 7, done.stderr
    assert "process of rank 1 ended with exit code 7" in done.stderr


def test_launch_reports_a_killed_process_as_the_shell_does(tmp_path):
    assert _launch("killed", tmp_path, 2).returncode == 128 + 9


PORTS = """
import sys
from effdet.runtime import launch
taken, free_port = int(sys.argv[1]), launch._free_port
answers = [taken]  # as if somebody had taken the port between looking and using it
launch._free_port = lambda: answers.pop() if answers else free_port()
sys.exit(launch.launch(sys.argv[2:], 2, master_port=taken))
"""


def test_launch_takes_another_port_when_one_is_in_use_or_is_taken_meanwhile(tmp_path):
    with socket.socket() as occupied:
        occupied.bind(("", 0))
        occupied.listen()
        port = str(occupied.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-c", PORTS, port, str(WORKER), "place", str(tmp_path)],
            env=_environment(),
            timeout=TIMEOUT_S,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert f"port {port} is in use on this machine: a free one is taken instead" in done.stderr
    assert f"port {port} was taken by another process just now: trying another" in done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"] != port


# ---- collectives -----------------------------------------------------------------------------------------------------


def test_collectives_on_two_ranks(two_ranks):
    first, second = (results["collectives"] for results in two_ranks[0])
    for rank, out in enumerate((first, second)):
        assert (out["rank"], out["world"], out["local"]) == (rank, 2, rank)
        assert out["primary"] is (rank == 0) and out["distributed"] is True
        assert out["sum"] == [3.0, 30.0] and out["sum_dtype"] == "torch.float32"
        assert out["untouched"] == [1.0 * (rank + 1), 10.0 * (rank + 1)]
        assert out["int_sum"] == [2**41 + 1, "torch.int64"]
        assert out["mean"] == 0.5
        assert out["half_mean"] == 60000.0
        assert out["broadcast"] == {"from": 0}
        assert out["all_gather"] == ["", "x"]
        assert out["primary_result"] == {"rank": 0}
        assert out["after_failures"] == [0, 1]
        assert out["bn"]["reduce"] == [[1.5, 3.0], [6.0, 6.0], 5 + rank, 60000.0]
        assert out["bn"]["broadcast"] == [[1.0, 2.0], [4.0, 4.0], 5 + rank, 60000.0]
        assert out["bn"][""][0] == [1.0 * (rank + 1), 2.0 * (rank + 1)]
    assert first["gather"] is None and second["gather"] == [0, 10]


def test_effdets_collectives_on_two_ranks(two_ranks):
    first, second = (results["effdets_collectives"] for results in two_ranks[0])
    assert first["place"] == [2, 0, 2, True] and second["place"] == [2, 1, 2, False]
    assert first["gather"] == [[], []] and second["gather"] == [[0, 10]] * 2
    assert first["gather_container"] == [None] and second["gather_container"] == [[[0, 10], [1, 11]]]
    for out in (first, second):
        assert out["all_gather"] == [["", "x"]] * 2 and out["seed"] == first["seed"]
        assert out["reduce"] == [{"a": 3.0, "b": 1.5}, {"a": 6.0, "b": 3.0}]
        assert out["all_gather_container"] == [
            [[0, 10], [1, 11]],
            [[0, 10, 1, 11]],
            [[[0, 10], [1, 11]], [[1, 11], [2, 12]]],
        ]


def test_a_failure_on_rank_0_reaches_every_rank_with_its_text(two_ranks):
    first, second = (results["collectives"] for results in two_ranks[0])
    assert first["failures"][0] == "ZeroDivisionError: division by zero"
    assert first["failures"][2] == "SystemExit: gone"
    for text, words in zip(
        second["failures"], ("ZeroDivisionError: division by zero", "pickle", "SystemExit: gone"), strict=True
    ):
        assert text.startswith("RuntimeError: rank 0 failed: ") and words in text
    assert "divide_by_zero" in second["failures"][0]  # says where


# ---- sync batch norm -------------------------------------------------------------------------------------------------


def test_sync_bn_equals_one_process_with_the_whole_batch(two_ranks):
    for out in (results["sync_bn"] for results in two_ranks[0]):
        assert out["loss"] == pytest.approx(out["reference_loss"], rel=1e-5)
        assert out["grad_error"] < 1e-5
        assert out["buffer_error"] < 1e-5
        assert out["eval_error"] == 0.0
        # float32 steps by 5e-4 at 5000, so that much the mean may be off; a naive variance would be off by 2
        assert out["large_mean"][0] < 1e-3 and out["large_mean"][1] < 1e-3
        assert out["empty"]["grad"] == pytest.approx(0.0, abs=1e-5)
        assert out["empty"]["mean"] < 1e-6 and out["empty"]["var"] < 1e-6
        # values 0..7 and 16..23 in channel 0, 8..15 and 24..31 in channel 1; momentum 0.1
        assert out["bfloat16"][:3] == ["torch.bfloat16", "torch.bfloat16", "torch.float32"]
        assert out["bfloat16"][3] == pytest.approx([1.15, 1.95], rel=1e-6)
        assert all(part in out["too_few"] for part in ("batch norm", "at least 2 ", "all ranks", "got 1"))


# ---- evaluator -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single() -> CocoEvaluator:
    """Return the evaluator of one process that has seen every image once."""
    import torch

    dataset, detections = make_coco()
    evaluator = CocoEvaluator(dataset)
    evaluator.add_predictions(detections, {"img_idx": torch.arange(7)})
    assert 0.05 < evaluator.evaluate() < 0.95  # neither trivial number would tell right from wrong
    return evaluator


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_evaluator_gives_every_rank_the_number_of_one_process(tmp_path, single, processes, request):
    shards = SHARDS[processes]
    assert len({len(s) for s in shards}) > 1 and sum(map(len, shards)) == 9  # uneven, two repeats
    if processes == 2:
        ranks, out_dir = request.getfixturevalue("two_ranks")
    else:
        ranks, out_dir = _results("evaluate", tmp_path, processes), tmp_path
    ranks = [results["evaluate"] for results in ranks]
    for out in ranks:
        assert out["ap"] == single.stats["AP"] and out["type"] == "float"
        assert out["stats"] == pytest.approx(single.stats, rel=0, abs=0, nan_ok=True)
        assert out["summary"] == single.summary()
        assert [tuple(line) for line in out["per_class"]] == [tuple(line) for line in single.per_class()]
        assert out["collected"] == 0
        assert 0 < out["second_ap"] == ranks[0]["second_ap"] < out["ap"]  # 2 of 7 images: the others are missed
        assert out["third_ap"] == out["second_ap"], "whichever rank has them"
        assert out["float32"][0] == out["float32"][1] == pytest.approx(out["ap"], rel=1e-6)
        assert out["nothing_ap"] == 0.0
    rows = json.loads((out_dir / "results.json").read_text())
    assert len(rows) == 7 * 5  # each image once
    assert json.loads((out_dir / "saved.json").read_text()) == rows
    assert json.loads((out_dir / "metrics.json").read_text())["stats"]["AP"] == single.stats["AP"]


def test_evaluator_failure_on_rank_0_ends_every_rank(tmp_path):
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), "evaluate_broken", str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
            env=_environment() | {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in "01"
    ]
    try:
        errors = [process.communicate(timeout=TIMEOUT_S)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [1, 1], errors
    assert "FileNotFoundError: annotations went away" in errors[0]
    assert "RuntimeError: rank 0 failed: FileNotFoundError: annotations went away" in errors[1]


# ---- leaving ---------------------------------------------------------------------------------------------------------


def train_and_leave(rank: int, folder: str, rounds: int) -> None:
    """Join a group, train with DistributedDataParallel, leave the group, and drop the wrapper; again and again."""
    torch.set_num_threads(1)
    for number in range(rounds):
        faulthandler.dump_traceback_later(60, exit=True)
        dist.init_process_group("gloo", init_method=f"file://{folder}/{number}", rank=rank, world_size=2)
        _train_and_leave_once(rank)
    faulthandler.cancel_dump_traceback_later()


def _train_and_leave_once(rank: int) -> None:
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    vote = distributed.LateMax()
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
        vote(0)
    assert distributed.all_gather_object(rank) == [0, 1]
    distributed.barrier()
    distributed.shutdown()


@pytest.mark.slow
def test_leaving_a_group_never_hangs(tmp_path):
    """The reducer in DistributedDataParallel, where it is the last to refer to the group, waits for it forever."""
    torch.multiprocessing.spawn(train_and_leave, args=(str(tmp_path), 300), nprocs=2)
