#!/usr/bin/env python3
"""What follows the backward pass: clipping, SGD with momentum, and the moving average of the weights.

Ours is Precision.step with train.py's default optimizer, and ModelEma; the peer's is timm's: clip_grad_norm_, the
optimizer 'momentum', ModelEmaV2. Gradients are fixed. Compared: weights and averages after one update.
"""

from __future__ import annotations

import sys
from typing import Any

import pairing
from train_step import CLIP, LR, MOMENTUM, WEIGHT_DECAY

DECAY = 0.99


def build(side: str, case: Any) -> pairing.Work:
    import inputs
    import torch

    device = inputs.pick_device(case.device)
    model = inputs.make_model(case).to(device)
    if side == "ours":
        from effdet.config.schema import OptimConfig
        from effdet.training.amp import Precision
        from effdet.training.ema import ModelEma
        from effdet.training.optim import build_optimizer

        precision = Precision(device, enabled=False)
        optimizer = build_optimizer(model, OptimConfig().opt, LR, MOMENTUM, WEIGHT_DECAY)
        ema = ModelEma(model, DECAY, warmup=False)

        def update() -> None:
            precision.step(optimizer, (CLIP, "norm"))
            ema.update(precision.float_state_dict(model))
    else:
        from timm.optim import create_optimizer_v2
        from timm.utils import ModelEmaV2

        optimizer = create_optimizer_v2(model, opt="momentum", lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        ema = ModelEmaV2(model, decay=DECAY)

        def update() -> None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            ema.update(model)

    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(model.named_parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)

    def outputs() -> dict[str, torch.Tensor]:
        update()
        weights = torch.cat([parameter.detach().flatten() for _, parameter in sorted(model.named_parameters())])
        average = torch.cat(
            [value.flatten() for name, value in sorted(ema.module.state_dict().items()) if value.is_floating_point()]
        )
        return {"weights": weights, "average": average}

    return pairing.Work(
        update, outputs, inputs.synchronizer(device), about={"optimizer": type(optimizer).__name__}, device=device
    )


def make_cases(options: Any) -> list[dict[str, Any]]:
    return [pairing.base_case(options, "optimizer_and_ema", dtype="float32", batch=0, tolerance=1e-6)]


if __name__ == "__main__":
    options = pairing.make_parser(__doc__).parse_args()
    sys.exit(pairing.main(__file__, options, make_cases(options)))
