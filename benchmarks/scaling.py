#!/usr/bin/env python3
"""Pictures a second of the training step for 1, 2, 4 ... processes, and how much of the gradient exchange is hidden.

Ours alone: the figure of one process is what the others are compared with. Each process has --batch pictures. On the
CPU --threads is for all processes together, so on one machine more processes can gain little; on cards it shows what
the exchange costs. `overlap` is the share of the exchange that the step does not wait for: 1 - (step - step without
exchange) / (exchange alone), where the exchange alone is one all-reduce of as many bytes as the gradients have.
"""
from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pairing


def measure_rank(case: Any) -> dict[str, float]:
    """Run in each process: time steps with and without exchange, and the exchange alone."""
    sys.path.insert(1, str(pairing.REPO))
    import torch
    torch.set_num_threads(case.threads)
    import inputs
    from train_step import Batches, make_session

    import effdet  # noqa: F401  (declares what timm's import needs)
    from effdet import distributed
    from effdet.engine import train_one_epoch
    case.batch *= int(os.environ["WORLD_SIZE"])  # train.py's batch size is that of all processes
    session = make_session(case, case.batch, "--workers", "0")
    device, batch = session.device, session.batch_size
    layout = torch.channels_last if session.channels_last else torch.contiguous_format
    images = inputs.make_images(batch, case.image_size, distributed.rank()).to(device, memory_format=layout)
    loader = Batches([(images, inputs.make_target("ours", batch, case.image_size, case.classes, device))])
    training, synchronize = session.training, inputs.synchronizer(device)
    count = sum(parameter.numel() for parameter in training.model.parameters() if parameter.requires_grad)
    gradients = torch.zeros(count, device=device)

    def timed(work: Callable[[], Any]) -> float:
        work()
        samples = []
        for _ in range(case.repeats):
            synchronize()
            distributed.barrier()
            started = time.perf_counter()
            work()
            synchronize()
            samples.append(time.perf_counter() - started)
        return statistics.median(samples)

    def step() -> None:
        train_one_epoch(training, loader, 0)
    found = {"step_s": timed(step), "gradient_bytes": 4 * count}
    if distributed.world_size() > 1:
        found["exchange_s"] = timed(lambda: torch.distributed.all_reduce(gradients))
        training.bench = training.bench.module
        found["step_alone_s"] = timed(step)
    distributed.shutdown()
    return found


def run(case: dict[str, Any], processes: int) -> dict[str, float]:
    """Start the processes of one figure and return what the first of them measured."""
    environment = {**os.environ, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": str(case["threads"]),
                   "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, __file__, "--rank-of", json.dumps(case)]
        started = []
        for rank in range(processes):
            with open(f"{folder}/{rank}", "w") as file:
                ids = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                started.append(subprocess.Popen(arguments, env={**environment, **ids}, stdout=file))
        failed = [rank for rank, process in enumerate(started) if process.wait() != 0]
        if failed:
            raise RuntimeError(f"processes {failed} of {processes} failed; their messages are above")
        return json.loads(Path(folder, "0").read_text().splitlines()[-1])


def free_port() -> int:
    import socket
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> int:
    parser = pairing.make_parser(__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rank-of", help="(a process of this script)")
    if "--rank-of" in sys.argv:
        print(json.dumps(measure_rank(SimpleNamespace(**json.loads(sys.argv[-1])))))
        return 0
    options = parser.parse_args()
    counts = options.processes[:2] if options.quick else options.processes
    if options.device != "cpu":
        import inputs
        devices = inputs.count_devices(options.device)
        counts = [count for count in counts if count <= devices]
        print(f"scaling  {devices} devices: measured for {counts} processes")
    base = None
    with tempfile.TemporaryDirectory() as folder:
        data = pairing.make_file(folder, "make_coco_folder", options.batch[0] * max(counts), options.classes)
        for processes in counts:
            threads = max(1, options.threads // processes) if options.device == "cpu" else options.threads
            case = pairing.base_case(options, f"scaling_{processes}", threads=threads, folder=folder, data=data,
                                     ema=False, repeats=3 if options.quick else options.repeats)
            found = run(case, processes)
            speed = processes * case["batch"] / found["step_s"]
            base = base or speed / processes
            figure = {**case, **found, "processes": processes, "pictures_per_s": speed,
                      "efficiency": speed / (base * processes)}
            if "exchange_s" in found:
                waited = found["step_s"] - found["step_alone_s"]
                figure["overlap"] = 1 - waited / found["exchange_s"]
            print(f"scaling  {processes} processes of {threads} threads, batch {case['batch']} each: {speed:.2f} "
                  f"pictures/s, {speed / base:.2f}x of one process"
                  + (f", exchange alone {1e3 * found['exchange_s']:.0f} ms, step with it {found['step_s']:.2f} s, "
                     f"without {found['step_alone_s']:.2f} s" if "exchange_s" in found else ""))
            pairing.write_figure(figure, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
