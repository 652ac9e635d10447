"""How many operators a training step and a prediction give an NPU: counted on the simulated device, nothing is timed.

Beside them: the bytes copied to make tensors contiguous before an operator (a gather along another axis than the last
is one that transposes), and what CANN's sources and pages say against an operator on a chip (npu_sim/chips.yaml).

    .venv-npu/bin/python benchmarks/npu_launches.py             a table for two chips; --json FILE keeps all names
    .venv-npu/bin/python benchmarks/npu_launches.py --top 20 --chips Ascend910B1

A step on an NPU is very likely bound by the host, which launches each operator; the simulator (test/npu/sim) counts
what the real torch_npu launches. The counts do not depend on the batch or on the size of the images, but for labels of
large images with many objects; the bytes grow with both. test/npu/test_npu_launches.py holds the budgets.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npu_sim import Launches

REPO = Path(__file__).resolve().parents[1]
CHIPS = ("Ascend910B1", "Ascend910A")
SIZE = (64, 64)
BATCH = 2
# What is measured with one device, and what every rank of two measures.
ONE_DEVICE = ("training step", "EMA", "momentum", "adamw", "O2", "prediction", "prediction, --nms exact")
TWO_DEVICES = ("two devices", "two devices, DDP's buckets", "two devices, sync-BN")


def add_paths() -> None:
    """Make the simulator and this checkout importable."""
    for folder in (REPO / "test" / "npu" / "sim", REPO):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


def make_batch(device: Any) -> tuple[Any, dict[str, Any]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(BATCH, 4, 2, generator=generator) * 30
    boxes = torch.cat((corners, corners + 6 + torch.rand(BATCH, 4, 2, generator=generator) * 28), -1)
    return torch.randn(BATCH, 3, *SIZE, generator=generator).to(device), {
        "bbox": boxes.to(device),
        "cls": torch.randint(1, 4, (BATCH, 4), generator=generator).float().to(device),
    }


def make_run(device: Any, world: int = 1, **sections: dict[str, Any]) -> Any:
    """Build the step of `train.py --amp --loss-scale 128` as the program does."""
    import torch

    from effdet.config.load import replace_settings
    from effdet.config.schema import RunConfig
    from effdet.training.build import Placement, build_step, build_training

    torch.manual_seed(0)
    settings: dict[str, dict[str, Any]] = {
        "model": {"name": "tf_efficientdet_d0", "image_size": list(SIZE), "pretrained_backbone": False},
        "amp": {"enabled": True, "loss_scale": "128"},
        "run": {"batch_size": BATCH * world},
    }
    for section, values in sections.items():
        settings.setdefault(section, {}).update(values)
    cfg = replace_settings(RunConfig(), **settings)
    place = Placement(device, world, 0, channels_last=False)
    training, _ = build_training(cfg, place, build_step(cfg, place, 3, {}), steps_per_epoch=10)
    training.bench.train()
    return training


def count(work: Callable[[], Any], warm_up: int = 2) -> Launches:
    """Count the launches of `work` after some runs of it, which move the optimizer's memory and DDP's buckets."""
    import npu_sim

    for _ in range(warm_up):
        work()
    with npu_sim.count_launches() as launches:
        work()
    return launches


def train_step(run: Any, batch: tuple[Any, Any]) -> Callable[[], None]:
    """Return what trains on a batch as engine.train_one_epoch does."""
    from effdet.training import engine

    def step() -> None:
        with engine._no_gradient_sync(run.bench, run.flat_exchange), run.precision.autocast(run.cast_together):
            output = run.bench(*batch)
        run.precision.backward(output["loss"])
        engine._update(run)

    return step


def measure_one_device(device: Any, wanted: tuple[str, ...] = ONE_DEVICE) -> dict[str, Launches]:
    """Count what one device does, by the names of ONE_DEVICE; a training step includes the EMA's update."""
    batch, result = make_batch(device), {}
    settings = {
        "training step": {},
        "momentum": {"optim": {"opt": "momentum"}},
        "adamw": {"optim": {"opt": "adamw"}},
        "O2": {"amp": {"opt_level": "O2"}},
    }
    run = None
    for name in settings.keys() & set(wanted):
        run = make_run(device, **settings[name])
        result[name] = count(train_step(run, batch))
        if name == "training step" and "EMA" in wanted:
            result["EMA"] = count(lambda run=run: run.ema.update(run.precision.float_state_dict(run.model)))
    for name, keys in {"prediction": {}, "prediction, --nms exact": {"nms": "exact"}}.items():
        if name in wanted:
            result[name] = count(make_prediction(device, **keys))
    return {name: result[name] for name in wanted if name in result}


def make_prediction(device: Any, **keys: Any) -> Callable[[], Any]:
    """Return what predicts a batch of a detector with COCO's 90 classes, in float16."""
    import torch

    from effdet.bench import DetBenchPredict
    from effdet.factory import create_model, place_model
    from effdet.training.amp import Precision

    model = create_model("tf_efficientdet_d0", image_size=SIZE, pretrained_backbone=False)
    bench = DetBenchPredict(place_model(model, device), **keys).to(device).eval()
    images, precision = make_batch(device)[0], Precision(device)
    info = {"img_scale": torch.ones(BATCH).to(device), "img_size": torch.full((BATCH, 2), 64.0).to(device)}

    def predict() -> Any:
        with torch.no_grad(), precision.autocast(model):
            return bench(images, info)

    return predict


def measure_ranks(wanted: tuple[str, ...] = TWO_DEVICES) -> dict[str, Launches]:
    """Count, in one of two processes, what a step gives its device, by the names of TWO_DEVICES."""
    from effdet.runtime import distributed
    from effdet.runtime.device import tune
    from effdet.runtime.launch import start

    device = start("npu", [])
    tune(device)
    settings: dict[str, dict[str, Any]] = {
        "two devices": {"dist": {"sync_bn": False}},
        "two devices, DDP's buckets": {"dist": {"sync_bn": False, "grad_exchange": "buckets"}},
        "two devices, sync-BN": {"dist": {"sync_bn": True}},
    }
    result = {}
    for name in wanted:
        if name in settings:
            run = make_run(device, distributed.world_size(), **settings[name])
            result[name] = count(train_step(run, make_batch(device)), 3)
    rank = distributed.rank()
    distributed.shutdown()
    return result if rank == 0 else {}


def plain(counted: dict[str, Launches]) -> dict[str, Any]:
    """Return counts, with their attributes, in JSON's types."""
    return {name: {"launches": one, **vars(one)} for name, one in counted.items()}


def read(file: Path) -> dict[str, Launches]:
    """Read a file of `plain` counts."""
    from npu_sim import Launches

    counted = {}
    for name, parts in json.loads(file.read_text()).items():
        counted[name] = Launches()
        counted[name].update(parts.pop("launches"))
        for attribute, values in parts.items():
            getattr(counted[name], attribute).update(values)
    return counted


def split(launches: Counter[str]) -> tuple[int, int]:
    """Return the number of operators and that of collectives."""
    collectives = sum(number for name, number in launches.items() if name.startswith("Hccl"))
    return launches.total() - collectives, collectives


def start_process(chip: str, devices: int, file: Path) -> None:
    """Measure in processes of their own: a chip is chosen once in a process."""
    environment = os.environ | {
        "NPU_SIM_SOC": chip,
        "NPU_SIM_DEVICES": str(devices),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "OMP_NUM_THREADS": "1",
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={devices}", f"--master-port={port}"]
    command = [sys.executable, *(launcher if devices > 1 else []), __file__, "--measure", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")


def measure_here(file: Path) -> None:
    """Measure in this process, one of those `start_process` makes, and write the counts."""
    import npu_sim

    devices, chip = npu_sim.from_environment()
    npu_sim.load(devices, chip)
    import torch

    from effdet.runtime.device import tune

    if devices > 1:
        counts = measure_ranks()
    else:
        device = torch.device("npu", 0)
        tune(device)
        counts = measure_one_device(device)
    if counts:
        file.write_text(json.dumps(plain(counts)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=CHIPS, metavar="CHIP")
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2], choices=[1, 2])
    parser.add_argument("--top", type=int, default=0, metavar="N", help="print the N most frequent operators of each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts by name")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    add_paths()
    if args.measure:
        measure_here(args.measure)
        return
    table: dict[str, dict[str, Launches]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for chip in args.chips:
            for devices in args.devices:
                file = Path(folder) / f"{chip}-{devices}.json"
                start_process(chip, devices, file)
                for name, counts in read(file).items():
                    table.setdefault(name, {})[chip] = counts
    print_table(table, args.chips)
    for name, by_chip in table.items():
        for chip, counts in by_chip.items():
            if args.top:
                print(f"{name}, {chip}: " + ", ".join(f"{key} {n}" for key, n in counts.most_common(args.top)))
                print("    copied: " + ", ".join(f"{key} {n:,}" for key, n in counts.copied.most_common(args.top)))
            if counts.concerns:
                print(f"{name}, {chip}: " + ", ".join(f"{text} ({n})" for text, n in sorted(counts.concerns.items())))
    if args.json:
        args.json.write_text(json.dumps({name: plain(by_chip) for name, by_chip in table.items()}, indent=1))


def print_table(table: dict[str, dict[str, Launches]], chips: list[str]) -> None:
    print(f"| operators launched (collectives), kB copied | {' | '.join(chips)} |\n|---|{'---|' * len(chips)}")
    for name, by_chip in table.items():
        cells = []
        for chip in chips:
            if chip not in by_chip:
                cells.append("")
                continue
            operators, collectives = split(by_chip[chip])
            kilobytes = by_chip[chip].copied.total() / 1000
            cells.append(f"{operators:,}" + (f" ({collectives})" if collectives else "") + f", {kilobytes:,.0f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
