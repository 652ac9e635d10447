#!/usr/bin/env python3
"""Prediction from a normalised batch on the device: the network and post-processing.

Ours is the bench that effdet.load sets up, the peer's is DetBenchPredict. Compared: the scores, and the
detections, of which 2 % may be others: where two candidates have almost the same score, rounding decides. In half
precision only the scores are compared.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import pairing


def build(side: str, case: Any) -> pairing.Work:
    import inputs
    import torch

    device = inputs.pick_device(case.device)
    model = inputs.make_model(case)
    model.load_state_dict(torch.load(case.weights, weights_only=True))
    bench = make_bench(side, model, device, case.batch)
    images = inputs.make_images(case.batch, case.image_size).to(device)

    @torch.no_grad()
    def run() -> torch.Tensor:
        with inputs.autocast(device, case.dtype):
            return bench(images)

    def outputs() -> dict[str, torch.Tensor]:
        rows = run().float()
        if case.dtype != "float32":
            return {"scores": rows[..., 4]}
        return {"scores": rows[..., 4], "detections": rows}

    return pairing.Work(run, outputs, inputs.synchronizer(device), device=device)


def make_bench(side: str, model: Any, device: Any, batch: int) -> Any:
    if side == "ours":
        from effdet.config.schema import DemoModelConfig
        from effdet.predict.load import Detector, build_predictor

        return build_predictor(Detector(model.eval(), None, ""), DemoModelConfig(), device.type, batch).bench
    from effdet import DetBenchPredict

    return DetBenchPredict(model).to(device).eval()


def make_cases(options: Any, folder: str) -> list[dict[str, Any]]:
    weights = pairing.make_file(folder, "make_weights", options.model, options.image_size, options.classes)
    tolerances = {"float32": {"scores": 1e-3, "detections": (1e-3, 0.98)}, "bfloat16": 0.1, "float16": 2e-2}
    return [
        pairing.base_case(
            options, "predict", batch=batch, dtype=dtype, images=batch, weights=weights, tolerance=tolerances[dtype]
        )
        for dtype in options.dtype
        for batch in options.batch
    ]


if __name__ == "__main__":
    parser = pairing.make_parser(__doc__)
    parser.set_defaults(batch=[1, 8])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(pairing.main(__file__, options, make_cases(options, folder)))
