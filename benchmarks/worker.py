"""One side of a comparison: build the work of a script, then compute, compare or time it on request.

Run by pairing.py as `worker.py SIDE SCRIPT CASE`. Requests come as JSON lines on standard input, answers go to standard
output; whatever the work prints goes to standard error.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REPO = Path(__file__).resolve().parents[1]


def load_file(name: str, path: Path) -> Any:
    """Import a module by its path, without its folder becoming a place to import from."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def prepare(side: str) -> None:
    """Make `import effdet` mean this side's package, and check that it does."""
    if side == "ours":
        sys.path.insert(1, str(REPO))
    else:
        import peer

        peer.prepare()
    import effdet

    is_ours = Path(effdet.__file__).is_relative_to(REPO / "effdet")
    if is_ours != (side == "ours"):
        raise RuntimeError(f"the side '{side}' imported {effdet.__file__}")


def versions() -> dict[str, str]:
    names = {"torch": "torch", "timm": "timm", "numpy": "numpy", "pillow": "pillow", "pycocotools": "pycocotools"}
    found = {"python": sys.version.split()[0]}
    for name, package in names.items():
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def effdet_version(side: str) -> str:
    if side == "ours":
        from effdet.version import __version__

        return __version__
    return importlib.metadata.version("effdet")


class Worker:
    """Answers requests about one `Work`."""

    def __init__(self, work: Any) -> None:
        self.work = work
        self.calls = 1

    def outputs(self, path: str) -> dict[str, Any]:
        import numpy as np

        arrays = {}
        for name, value in self.work.outputs().items():
            if hasattr(value, "detach"):
                value = value.detach().cpu()
                value = value.float() if value.is_floating_point() else value
            arrays[name] = np.asarray(value)
        np.savez(path, **arrays)
        return {}

    def _timed(self, calls: int) -> float:
        self.work.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            self.work.run()
        self.work.synchronize()
        return (time.perf_counter() - started) / calls / self.work.steps

    def calibrate(self, seconds: float) -> dict[str, Any]:
        if self.work.measure is None:
            self._timed(1)
            self.calls = max(1, min(1000, math.ceil(seconds / self.work.steps / self._timed(1))))
        return {"calls": self.calls}

    def sample(self) -> dict[str, Any]:
        return {"value": self._timed(self.calls) if self.work.measure is None else float(self.work.measure())}

    def traffic(self) -> dict[str, float]:
        if self.work.device is None:
            return {}
        from traffic import ByteCounter, copy_speed

        with ByteCounter() as counter:
            (self.work.count or self.work.run)()
        return {"bytes_moved": counter.moved, "copy_bytes_per_s": copy_speed(self.work.device, self.work.synchronize)}


def main() -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        channel.write(json.dumps(content) + "\n")
        channel.flush()

    side, script, case = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    try:
        import torch

        torch.set_num_threads(case["threads"])
        prepare(side)
        work = load_file("benchmark", Path(script)).build(side, SimpleNamespace(**case))
        worker = Worker(work)
        answer({"versions": {**versions(), "effdet": effdet_version(side)}, **(work.about or {})})
        for line in sys.stdin:
            request = json.loads(line)
            answer(getattr(worker, request.pop("do"))(**request))
    except Exception:
        answer({"error": traceback.format_exc()})


if __name__ == "__main__":
    main()
