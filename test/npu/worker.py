"""One rank of the tests in test_npu_distributed.py: `worker.py SCENARIO FOLDER`, started by torch.distributed.run.

Each scenario writes what it saw to FOLDER/RANK.json.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import npu_sim
import torch
import torch_npu  # noqa: F401
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from effdet.bench import DetBenchTrain
from effdet.factory import create_model, place_model
from effdet.runtime import distributed
from effdet.runtime.device import tune
from effdet.runtime.launch import start
from effdet.training.amp import Precision
from effdet.training.optim import build_optimizer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.silu(self.norm(self.conv(x))))


def finite(net: nn.Module) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in net.state_dict().values())


def overflow(device: torch.device, rank: int) -> list[dict]:
    """Overflow float16 on rank 1 in the second of four steps."""
    results = []
    for level, scale in (("O1", "dynamic"), ("O1", 64.0), ("O2", "dynamic"), ("O2", 64.0)):
        precision = Precision(device, opt_level=level, loss_scale=scale, init_scale=64.0)
        net = precision.prepare_model(Net().to(device))
        optimizer = build_optimizer(net, "fusedmomentum", lr=0.05, masters=precision.master_parameters(net))
        wrapped = DistributedDataParallel(net, device_ids=[device.index], broadcast_buffers=False)
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(rank)).to(device)
        weights = []
        for step in range(4):
            optimizer.zero_grad()
            with precision.autocast():
                output = wrapped(images)
            factor = 1e9 if step == 1 and rank == 1 else 1.0  # 1e9 * 64 / (numbers in output) is far above 65504
            precision.backward((output.float() - 1).square().mean() * factor)
            precision.step(optimizer, (10.0, "norm"))
            weights.append(precision.float_state_dict(net)["conv.weight"].cpu())
        results.append(
            {
                "level": level,
                "scale": scale,
                "skipped": precision.skipped(),
                "scale_after": precision.loss_scale(),
                "same_in_overflow": torch.equal(weights[0], weights[1]),
                "moved_after": not torch.equal(weights[1], weights[2]) and not torch.equal(weights[2], weights[3]),
                "finite": finite(net),
                "sum": weights[-1].double().sum().item(),
            }
        )
    return results


def exchange(device: torch.device, rank: int) -> list[dict]:
    """Average gradients in DistributedDataParallel's buckets and flat, with accumulation over two batches."""
    results = []
    for enabled in (False, True):
        nets = []
        for flat in (False, True):
            precision = Precision(device, enabled, loss_scale=64.0 if enabled else "dynamic")
            net = precision.prepare_model(Net().to(device))
            optimizer = build_optimizer(net, "fusedmomentum", lr=0.05)
            wrapped = DistributedDataParallel(net, device_ids=[device.index], broadcast_buffers=False)
            images = torch.randn(6, 2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(rank)).to(device)
            for step in images:
                optimizer.zero_grad()
                for index, batch in enumerate(step):
                    waits_for_more = wrapped.no_sync() if flat or index == 0 else contextlib.nullcontext()
                    with waits_for_more, precision.autocast(net if flat else None):
                        output = wrapped(batch)
                        precision.backward((output.float() - 1).square().mean())
                precision.step(optimizer, (10.0, "norm"), average_gradients=flat)
            nets.append(net)
        own = dict(nets[0].named_parameters())
        results.append(
            {
                "equal": all(torch.equal(value, own[name]) for name, value in nets[1].named_parameters()),
                "moved": not torch.equal(own["conv.weight"].cpu(), Net().conv.weight),
                "sum": own["conv.weight"].sum().item(),
            }
        )
    return results


def waits(device: torch.device, rank: int) -> list[dict]:
    return [train_synchronised(device, rank, equal_batches) for equal_batches in (True, False)]


def train_synchronised(device: torch.device, rank: int, equal_batches: bool) -> dict:
    """Count what a distributed training step with synchronised batch norm waits for."""
    torch.manual_seed(0)
    model = create_model("tf_efficientdet_d0", num_classes=3, image_size=(64, 64), pretrained_backbone=False)
    model = place_model(distributed.convert_sync_batchnorm(model, equal_batches), device)
    precision = Precision(device, loss_scale=16.0)
    optimizer = build_optimizer(model, "fusedmomentum", lr=1e-3)
    bench = DetBenchTrain(model, normalize_over_ranks=True).to(device)
    wrapped = DistributedDataParallel(bench, device_ids=[device.index], broadcast_buffers=False)
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(2, 3, 64, 64, generator=generator).to(device)
    target = {"bbox": torch.tensor([[[4.0, 4, 40, 40]]] * 2).to(device), "cls": torch.ones(2, 1).to(device)}
    for _ in range(3):  # in the second, DistributedDataParallel arranges its buckets anew, with copies to the host
        with npu_sim.count_waits() as meters:
            optimizer.zero_grad()
            with precision.autocast():
                loss = wrapped(images, target)["loss"]
            precision.backward(loss)
            precision.step(optimizer, (10.0, "norm"))
    return {
        "waits": dict(meters.waits),
        "copies": dict(meters.copies_to_host),
        "float64": dict(meters.float64),
        "calls": meters.calls.total(),
        "loss": loss.item(),
        "skipped": precision.skipped(),
        "first": precision.float_state_dict(model)["fpn.resample.3.conv.conv.weight"].double().sum().item(),
    }


def bfloat16(device: torch.device, rank: int) -> dict:
    """Compare synchronised batch norm in bfloat16 with that of the whole batch: output and gradient, largest error."""
    whole = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = whole.float().requires_grad_()
    torch.nn.BatchNorm2d(3)(expected).square().sum().backward()
    norm = distributed.convert_sync_batchnorm(torch.nn.BatchNorm2d(3), equal_batches=True).to(device)
    x = whole[2 * rank : 2 * rank + 2].to(device).requires_grad_()
    output = norm(x)
    output.float().square().sum().backward()
    with torch.no_grad():
        normal = torch.nn.BatchNorm2d(3)(expected)[2 * rank : 2 * rank + 2]
    return {
        "dtype": str(output.dtype),
        "output": (output.float().cpu() - normal).abs().max().item(),
        "gradient": (x.grad.float().cpu() - expected.grad[2 * rank : 2 * rank + 2]).abs().max().item(),
    }


def main() -> None:
    scenario, folder = sys.argv[1:]
    device = start("npu", [])
    tune(device)
    rank = distributed.rank()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(globals()[scenario](device, rank)))
    distributed.shutdown()


if __name__ == "__main__":
    main()
