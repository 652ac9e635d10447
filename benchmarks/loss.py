#!/usr/bin/env python3
"""The detection loss forward and backward, from head outputs and given labels to the gradients of the head outputs.

Head outputs lie in memory as the side's training has them: ours channels-last where train.py chooses that. Half
precision means that the head outputs and their gradients have that dtype, as under autocast. Compared: the three losses
and all gradients.
"""

from __future__ import annotations

import sys
from typing import Any

import pairing


def build(side: str, case: Any) -> pairing.Work:
    import inputs
    import torch

    from effdet.anchors import AnchorLabeler, Anchors
    from effdet.loss import DetectionLoss

    device = inputs.pick_device(case.device)
    config = inputs.make_config(case)
    labeler = AnchorLabeler(Anchors.from_config(config).to(device), case.classes)
    target = inputs.make_target(side, case.batch, case.image_size, case.classes, device)
    make_labels = labeler.assign if side == "ours" else labeler.batch_label_anchors
    labels = make_labels(target["bbox"], target["cls"])
    layout = torch.contiguous_format
    if side == "ours":
        from effdet.runtime.device import use_channels_last

        layout = torch.channels_last if use_channels_last(device) else layout
    heads = [
        [
            level.to(device, getattr(torch, case.dtype)).contiguous(memory_format=layout).requires_grad_()
            for level in levels
        ]
        for levels in inputs.make_head_outputs(case.batch, case.image_size, case.classes)
    ]
    leaves = [level for levels in heads for level in levels]
    loss_fn = DetectionLoss(config)

    def run() -> tuple[torch.Tensor, ...]:
        for leaf in leaves:
            leaf.grad = None
        losses = loss_fn(*heads, *labels)
        losses[0].backward()
        return losses

    def outputs() -> dict[str, torch.Tensor]:
        losses = torch.stack([loss.detach() for loss in run()])
        return {"losses": losses, **{f"gradient {number}": leaf.grad for number, leaf in enumerate(leaves)}}

    return pairing.Work(run, outputs, inputs.synchronizer(device), about={"layout": str(layout)}, device=device)


def make_cases(options: Any) -> list[dict[str, Any]]:
    tolerances = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}
    return [
        pairing.base_case(options, "loss", batch=batch, dtype=dtype, images=batch, tolerance=tolerances[dtype])
        for dtype in options.dtype
        for batch in options.batch
    ]


if __name__ == "__main__":
    parser = pairing.make_parser(__doc__)
    parser.set_defaults(dtype=pairing.fast_dtypes())
    options = parser.parse_args()
    sys.exit(pairing.main(__file__, options, make_cases(options)))
