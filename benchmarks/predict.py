#!/usr/bin/env python3
"""Prediction from a normalised batch on the device: the network and post-processing.

Ours is the bench that effdet.predictor.Predictor sets up, the peer's is DetBenchPredict. Compared: the detections; a row
in twenty may be another one, because thousands of candidates have scores that differ by less than the rounding of two
ways to compute the same network.
"""
from __future__ import annotations

import sys
from typing import Any

import pairing


def build(side: str, case: Any) -> pairing.Work:
    import inputs
    import torch
    device = inputs.pick_device(case.device)
    model = inputs.make_model(case)
    bench = make_bench(side, model, device, case.batch)
    images = inputs.make_images(case.batch, case.image_size).to(device)

    @torch.no_grad()
    def run() -> torch.Tensor:
        with inputs.autocast(device, case.dtype):
            return bench(images)

    def outputs() -> dict[str, torch.Tensor]:
        rows = run().float()
        return {"scores": rows[..., 4], "rows": rows}
    return pairing.Work(run, outputs, inputs.synchronizer(device))


def make_bench(side: str, model: Any, device: Any, batch: int) -> Any:
    if side == "ours":
        from effdet.device import tune
        from effdet.predictor import Predictor
        tune(device)
        return Predictor(model, device, batch_size=batch).bench
    from effdet import DetBenchPredict
    return DetBenchPredict(model).to(device).eval()


def make_cases(options: Any) -> list[dict[str, Any]]:
    tolerances = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
    return [pairing.base_case(options, "predict", batch=batch, dtype=dtype, pictures=batch, tolerance=tolerances[dtype])
            for dtype in options.dtype for batch in options.batch]


if __name__ == "__main__":
    parser = pairing.make_parser(__doc__)
    parser.set_defaults(batch=[1, 8])
    options = parser.parse_args()
    sys.exit(pairing.main(__file__, options, make_cases(options)))
