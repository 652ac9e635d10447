"""Collectives and DistributedDataParallel over torch_npu's real 'hccl' process group, between two processes.

Started by torch.distributed.run this file is the worker: it runs every case below and writes what it saw as JSON.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from npu_sim import rounding
from torch import nn
from torch.nn.parallel import DistributedDataParallel

LARGEST = torch.finfo(torch.float32).max


# ---- the worker's cases: each returns plain values


def reduced(rank: int, device, dtype: torch.dtype = torch.float32, op=dist.ReduceOp.SUM):
    values = (torch.arange(3) + rank + 1).to(dtype).to(device)
    dist.all_reduce(values, op=op)
    return [str(values.dtype).removeprefix("torch."), values.float().tolist()]


def gathered_objects(rank: int, device):
    result = [None, None]
    dist.all_gather_object(result, {"rank": rank, "text": "é" * rank})  # of unequal lengths
    return result


def broadcast(rank: int, device):
    values, objects = torch.full((3,), float(rank), device=device), [rank + 7]
    dist.broadcast(values, 1)
    dist.broadcast_object_list(objects, 0)
    return values.tolist() + objects


def gathered(rank: int, device):
    parts = [torch.zeros(2, device=device) for _ in range(2)]
    dist.all_gather(parts, torch.tensor([rank, 10.0 * rank]).to(device))
    return torch.stack(parts).tolist()


def scattered_sums(rank: int, device):
    result = torch.zeros(2, device=device)
    dist.reduce_scatter_tensor(result, torch.arange(4.0).to(device) + rank)
    return result.tolist()


def longer_than_a_slot(rank: int, device):
    values = torch.arange(400_000, dtype=torch.float32).to(device) * (rank + 1)  # 1.6 MB in slots of 1 MB
    dist.all_reduce(values)
    return bool(torch.equal(values.cpu(), torch.arange(400_000, dtype=torch.float32) * 3))


def too_large_a_sum(rank: int, device):
    values = torch.tensor([3e38, -3e38, 1.0]).to(device)
    dist.all_reduce(values)
    return [str(value) for value in values.tolist()]


def make_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


@rounding.exact()
def ddp(rank: int, device, sync: bool = False):
    """Largest difference after three steps: to the mean of the halves' losses, or with sync-BN to the whole batch."""
    reference = make_network()
    model = copy.deepcopy(reference)
    model = (nn.SyncBatchNorm.convert_sync_batchnorm(model) if sync else model).to(device)
    model = DistributedDataParallel(model, device_ids=[device.index])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, reference)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        batch = torch.randn(4, 3, 8, 8, generator=generator)
        losses = [model(batch[2 * rank : 2 * rank + 2].to(device)).square().mean()]
        halves = [batch] if sync else batch.chunk(2)
        losses.append(sum(reference(half).square().mean() for half in halves) / len(halves))
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return max(
        (a.detach().cpu() - b.detach()).abs().max().item()
        for a, b in zip(model.parameters(), reference.parameters(), strict=True)
    )


def overflow_on_one_rank(rank: int, device):
    """torch_npu's dynamic scaler: both ranks must skip the second step."""
    from torch_npu.npu.amp import GradScaler

    model = DistributedDataParallel(nn.Linear(3, 1, bias=False).to(device), device_ids=[device.index])
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), GradScaler(init_scale=1024.0)
    seen = []
    for factor in (1.0, float("inf") if rank else 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 3, device=device)).mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.append(model.module.weight.detach().cpu().tolist())
    return [scaler.get_scale(), seen[0] == seen[1], bool(torch.isfinite(torch.tensor(seen)).all())]


def error_of(call: Callable) -> str:
    try:
        call()
        torch.npu.synchronize()
    except RuntimeError as error:
        return str(error)
    return ""


def float64_sum(rank: int, device):
    return error_of(lambda: dist.all_reduce(torch.zeros(3, dtype=torch.float64).to(device)))


def unequal_sizes(rank: int, device):
    return error_of(lambda: dist.all_reduce(torch.zeros(3 + rank, device=device)))


def same_device(rank: int, device):
    """As when a script forgets torch.npu.set_device: in a new group, both ranks compute on device 0."""
    group = dist.new_group([0, 1])
    torch.npu.set_device(0)
    error = error_of(lambda: dist.all_reduce(torch.zeros(1, device="npu:0"), group=group))
    torch.npu.set_device(rank)
    return error


CASES = {
    "all_reduce float32": reduced,
    "all_reduce float16": lambda r, d: reduced(r, d, torch.float16),
    "all_reduce bfloat16": lambda r, d: reduced(r, d, torch.bfloat16),
    "all_reduce int64": lambda r, d: reduced(r, d, torch.int64),
    "all_reduce maximum": lambda r, d: reduced(r, d, op=dist.ReduceOp.MAX),
    "all_reduce mean": lambda r, d: reduced(r, d, op=dist.ReduceOp.AVG),
    "all_gather_object": gathered_objects,
    "broadcast": broadcast,
    "all_gather": gathered,
    "reduce_scatter": scattered_sums,
    "longer than a slot": longer_than_a_slot,
    "too large a sum": too_large_a_sum,
    "DDP": ddp,
    "DDP with sync-BN": lambda r, d: ddp(r, d, sync=True),
    "overflow on one rank": overflow_on_one_rank,
    "all_reduce float64": float64_sum,
    "same device": same_device,
    "unequal sizes": unequal_sizes,  # last: the ranks are out of step after it
}


def main() -> None:
    import torch_npu  # noqa: F401

    rank = int(os.environ["LOCAL_RANK"])
    torch.npu.set_device(rank)
    dist.init_process_group("hccl")
    seen = {name: case(rank, torch.device("npu", rank)) for name, case in CASES.items()}
    Path(f"{sys.argv[1]}.{rank}").write_text(json.dumps(seen))
    os._exit(0)  # after the mismatch there is no common way out of the process group


# ---- the tests


@pytest.fixture(scope="module")
def seen(run_simulated, tmp_path_factory) -> list[dict]:
    """What each rank saw."""
    result = tmp_path_factory.mktemp("hccl") / "seen"
    done = run_simulated(
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, result],
        devices=2,
        env={"HCCL_EXEC_TIMEOUT": "60"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(result.with_suffix(f".{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("all_reduce float32", ["float32", [3, 5, 7]]),
        ("all_reduce float16", ["float16", [3, 5, 7]]),
        ("all_reduce bfloat16", ["bfloat16", [3, 5, 7]]),
        ("all_reduce int64", ["int64", [3, 5, 7]]),
        ("all_reduce maximum", ["float32", [2, 3, 4]]),
        ("all_reduce mean", ["float32", [1.5, 2.5, 3.5]]),
        ("all_gather_object", [{"rank": 0, "text": ""}, {"rank": 1, "text": "é"}]),
        ("broadcast", [1, 1, 1, 7]),
        ("all_gather", [[0, 0], [1, 10]]),
        ("longer than a slot", True),
    ],
)
def test_collectives(name, expected, seen):
    assert [rank[name] for rank in seen] == [expected, expected]


def test_reduce_scatter_gives_each_rank_its_part(seen):
    assert [rank["reduce_scatter"] for rank in seen] == [[1, 3], [5, 7]]


def test_sums_saturate_where_arithmetic_does(seen, is_910a):
    expected = [str(LARGEST), str(-LARGEST), "2.0"] if is_910a else ["inf", "-inf", "2.0"]
    assert [rank["too large a sum"] for rank in seen] == [expected, expected]


def test_ddp_follows_one_process(seen):
    for rank in seen:
        assert rank["DDP"] <= 1e-6 and rank["DDP with sync-BN"] <= 1e-5


def test_an_overflow_on_one_rank_stops_both(seen):
    assert [rank["overflow on one rank"] for rank in seen] == [[512.0, True, True]] * 2


@pytest.mark.parametrize("name", ["all_reduce float64", "same device", "unequal sizes"])
def test_what_hccl_refuses(name, seen):
    for rank in seen:
        assert re.search("hccl", rank[name], re.IGNORECASE)  # torch_npu names the library or its function


if __name__ == "__main__":
    main()
