#!/usr/bin/env python3
"""The time of `from effdet import create_model` in new processes, interpreter included; `import torch` is the floor.

A plain `import effdet` would compare two different things: the peer's loads torch and timm, ours waits until a name is
asked for that needs them. `create_model` needs both on both sides.

Compared: both packages define the names that the peer's __init__ exports.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pairing

REPO = Path(__file__).resolve().parents[1]


def build(side: str, case: Any) -> pairing.Work:
    import numpy as np

    # The peer's torchvision may need its operators declared before it is imported; ours does that by itself.
    before = f"import sys; sys.path.insert(0, {str(REPO)!r})"
    if side == "peer":
        before = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import worker; "
            "worker.load_file('tv', worker.REPO / 'timm_patches' / 'torchvision_ops.py')"
        )
    if case.figure == "startup_import_torch":
        before = "pass"
    command = [sys.executable, "-c", f"{before}; {case.statement}"]

    def run() -> None:
        subprocess.run(command, check=True)

    def outputs() -> dict[str, Any]:
        import effdet

        names = (
            "create_model",
            "DetBenchPredict",
            "DetBenchTrain",
            "EfficientDet",
            "create_dataset",
            "create_loader",
            "create_parser",
            "create_evaluator",
            "get_efficientdet_config",
            "load_checkpoint",
            "load_pretrained",
        )
        return {"names": np.asarray([hasattr(effdet, name) for name in names], dtype=float)}

    return pairing.Work(run, outputs)


def make_cases(options: Any) -> list[dict[str, Any]]:
    return [
        pairing.base_case(options, name, dtype="float32", batch=0, statement=statement, tolerance=0)
        for name, statement in (
            ("startup_create_model", "from effdet import create_model"),
            ("startup_import_torch", "import torch"),
        )
    ]


if __name__ == "__main__":
    options = pairing.make_parser(__doc__).parse_args()
    sys.exit(pairing.main(__file__, options, make_cases(options)))
