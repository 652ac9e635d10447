"""Write down a batch whose gradients are not finite, for whoever has to find out why."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from effdet.checkpoint.manager import save_checkpoint
from effdet.runtime import distributed

from .ema import unwrap_model

_DEPTH = 3  # of the module names that gradient norms are given for, such as backbone.blocks.4


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Return the gradient's norm by module, in the order of the network; NaN and inf included."""
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            module = ".".join(name.split(".")[:-1][:_DEPTH])
            squares[module] = squares.get(module, 0.0) + float(parameter.grad.detach().float().norm()) ** 2
    return {module: math.sqrt(square) for module, square in squares.items()}


def write_postmortem(folder: Path, run: Any, images: Tensor, target: dict[str, Any], image_ids: list[Any]) -> Path:
    """Compute a batch once more, without an update, and write what came out; every process calls it together.

    The file holds `step`, `image_ids`, `losses`, `gradient_norms` by module, `loss_scale`, and the batch itself as
    `images` and `target`. A loss scale is not applied: gradients that are finite here overflowed by the scale alone.

    Args:
        folder: the run's.
        run: the engine's Training.
        images: the batch, as the model got it.
        target: the same.
        image_ids: ids in the annotation file of its images.

    Returns:
        The file, loadable with `torch.load(weights_only=True)`: nonfinite-rank0.pt for the first process.
    """
    bench = unwrap_model(run.bench)  # not through DistributedDataParallel, which would mix the processes' gradients
    for parameter in bench.parameters():
        parameter.grad = None
    with run.precision.autocast():
        output = bench(images, target)
    output["loss"].backward()
    path = folder / f"nonfinite-rank{distributed.rank()}.pt"
    save_checkpoint(
        path,
        {
            "step": run.steps,
            "image_ids": [str(image_id) for image_id in image_ids],
            "losses": {name: float(output[name].detach()) for name in ("loss", "class_loss", "box_loss")},
            "gradient_norms": gradient_norms(run.model),
            "loss_scale": run.precision.loss_scale(),
            "images": images,
            "target": {name: value for name, value in target.items() if isinstance(value, Tensor)},
        },
    )
    return path
