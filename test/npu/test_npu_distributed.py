"""Several NPUs: overflow on one rank, and what a distributed step waits for; real processes, real ProcessGroupHCCL."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("worker.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def run_ranks(run_simulated, tmp_path):
    def run(scenario: str, ranks: int = 2) -> list:
        done = run_simulated(
            [
                "-m",
                "torch.distributed.run",
                f"--nproc-per-node={ranks}",
                f"--master-port={free_port()}",
                WORKER,
                scenario,
                tmp_path,
            ],
            devices=ranks,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]

    return run


def test_all_ranks_skip_the_step_in_which_one_overflows(run_ranks):
    for one, other in zip(*run_ranks("overflow"), strict=True):
        for result in (one, other):
            assert result["skipped"] == 1 and result["same_in_overflow"] and result["moved_after"], result
            assert result["finite"]
            assert result["scale_after"] == (32.0 if result["scale"] == "dynamic" else 64.0)
        assert one["sum"] == other["sum"]  # the ranks still have the same weights


def test_gradients_averaged_flat_are_those_of_ddp_to_the_last_bit(run_ranks):
    for one, other in zip(*run_ranks("exchange"), strict=True):  # float32, then float16 by autocast
        assert one["equal"] and other["equal"] and one["moved"]
        assert one["sum"] == other["sum"]


def test_synchronised_batch_norm_takes_bfloat16(run_ranks, is_910a):
    if is_910a:
        pytest.skip("the chip has no bfloat16")
    for rank in run_ranks("bfloat16"):
        assert rank["dtype"] == "torch.bfloat16" and rank["output"] < 0.02 and rank["gradient"] < 0.05, rank


def test_a_distributed_step_waits_for_nothing(run_ranks, is_910a):
    if not is_910a:
        pytest.skip("takes a minute, so on the chip with the longer way only: it also asks for its overflow register")
    ranks = run_ranks("waits")
    for result in (*ranks[0], *ranks[1]):
        assert not result["waits"] and not result["copies"] and not result["float64"], result
        assert result["calls"] > 1000 and result["skipped"] == 0
    (first, with_counts), (second, _) = ranks
    assert first["first"] == second["first"] == with_counts["first"]
