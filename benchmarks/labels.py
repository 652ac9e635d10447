#!/usr/bin/env python3
"""Anchor labels of a batch: AnchorLabeler.batch_label_anchors on boxes as many as COCO has.

Compared: classes of all anchors (equal), box codes to 1e-5, numbers of positive anchors (equal).
"""

from __future__ import annotations

import sys
from typing import Any

import pairing


def build(side: str, case: Any) -> pairing.Work:
    import inputs
    import torch

    from effdet.anchors import AnchorLabeler, Anchors

    device = inputs.pick_device(case.device)
    anchors = Anchors.from_config(inputs.make_config(case)).to(device)
    labeler = AnchorLabeler(anchors, case.classes)
    target = inputs.make_target(side, case.batch, case.image_size, case.classes, device)

    @torch.no_grad()
    def run() -> Any:
        return labeler.batch_label_anchors(target["bbox"], target["cls"])

    def outputs() -> dict[str, torch.Tensor]:
        classes, codes, positives = run()
        named = {f"classes {level}": value for level, value in enumerate(classes)}
        return {**named, **{f"codes {level}": value for level, value in enumerate(codes)}, "positives": positives}

    return pairing.Work(run, outputs, inputs.synchronizer(device), device=device)


def make_cases(options: Any) -> list[dict[str, Any]]:
    exact = {**{f"classes {level}": 0 for level in range(5)}, "positives": 0, "": 1e-5}
    return [
        pairing.base_case(options, "labels", batch=batch, dtype="float32", images=batch, tolerance=exact)
        for batch in options.batch
    ]


if __name__ == "__main__":
    options = pairing.make_parser(__doc__).parse_args()
    sys.exit(pairing.main(__file__, options, make_cases(options)))
