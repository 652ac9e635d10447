#!/usr/bin/env python3
"""Post-processing alone: DetBenchPredict around a network that returns fixed head outputs.

Compared: the detections row by row; classes must be equal, boxes and scores to 1e-5 (another order of the same
floating-point operations).
"""

from __future__ import annotations

import sys
from typing import Any

import pairing


def build(side: str, case: Any) -> pairing.Work:
    import inputs
    import torch
    from torch import nn

    from effdet import DetBenchPredict

    device = inputs.pick_device(case.device)
    config = inputs.make_config(case)
    layout = torch.contiguous_format
    if case.layout == "channels_last":
        layout = torch.channels_last
    heads = [
        [level.to(device, dtype=getattr(torch, case.dtype)).contiguous(memory_format=layout) for level in levels]
        for levels in inputs.make_head_outputs(case.batch, case.image_size, case.classes)
    ]

    class FixedHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = config

        def forward(self, x: torch.Tensor) -> Any:
            return heads

    bench = DetBenchPredict(FixedHeads()).to(device).eval()
    images = torch.zeros(case.batch, 3, 1, 1, device=device)
    info = {
        "img_scale": torch.full((case.batch,), 1.25, device=device),
        "img_size": torch.tensor([[640.0, 480.0]] * case.batch, device=device),
    }

    @torch.no_grad()
    def run() -> torch.Tensor:
        return bench(images, info)

    def outputs() -> dict[str, torch.Tensor]:
        rows = run()
        return {"boxes": rows[..., :4], "scores": rows[..., 4], "classes": rows[..., 5]}

    return pairing.Work(run, outputs, inputs.synchronizer(device), device=device)


def make_cases(options: Any) -> list[dict[str, Any]]:
    return [
        pairing.base_case(
            options,
            "post_process",
            batch=batch,
            dtype=dtype,
            images=batch,
            layout=options.layout,
            tolerance={"classes": 0, "": 1e-5},
        )
        for dtype in options.dtype
        for batch in options.batch
    ]


if __name__ == "__main__":
    parser = pairing.make_parser(__doc__)
    parser.set_defaults(batch=[1, 8])
    parser.add_argument(
        "--layout",
        default="contiguous",
        choices=("contiguous", "channels_last"),
        help="memory layout of the head outputs, on both sides",
    )
    options = parser.parse_args()
    sys.exit(pairing.main(__file__, options, make_cases(options)))
