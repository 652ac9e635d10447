#!/usr/bin/env python3
"""Memory of the training step: the peak of two steps beyond the built model, and the bytes kept for the backward pass.

The peak is that of new processes that do nothing else: on the CPU the resident set (VmHWM, Linux), on an accelerator
what the allocator has handed out. The bytes kept for backward are counted from the tensors that autograd saves, each
storage once, without parameters; they do not depend on the machine. Work and comparison are train_step.py's.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pairing
import train_step


def build(side: str, case: Any) -> pairing.Work:
    import inputs
    import torch

    work = train_step.build(side, case)
    device = inputs.pick_device(case.device)

    def peak() -> float:
        if device.type != "cpu":
            module = getattr(torch, device.type)
            before = module.memory_allocated()
            module.reset_peak_memory_stats()
            for _ in range(2):
                work.run()
            return module.max_memory_allocated() - before
        before = read_status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        for _ in range(2):
            work.run()
        return read_status("VmHWM") - before

    def saved() -> float:
        sizes: dict[int, int] = {}
        kept = []  # or an address could come twice

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
                kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            (work.count or work.run)()
        return sum(sizes.values())

    return pairing.Work(
        work.run, work.outputs, work.synchronize, peak if case.figure == "memory_peak" else saved, work.about
    )


def read_status(name: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status: this needs Linux")


def make_cases(options: Any, folder: str) -> list[dict[str, Any]]:
    data = pairing.make_file(folder, "make_coco_folder", train_step.IMAGES, options.classes)
    return [
        pairing.base_case(
            options,
            figure,
            batch=batch,
            dtype=dtype,
            ema=False,
            steps=1,
            folder=folder,
            data=data,
            tolerance=train_step.TOLERANCES[dtype],
            unit="bytes",
            fresh=True,
            repeats_factor=factor,
        )
        for dtype in options.dtype
        for batch in options.batch
        for figure, factor in (("memory_peak", 1), ("memory_saved_for_backward", 0.01))
    ]


if __name__ == "__main__":
    parser = pairing.make_parser(__doc__)
    parser.set_defaults(repeats=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(pairing.main(__file__, options, make_cases(options, folder)))
