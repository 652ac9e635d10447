"""Write down a batch whose gradients are not finite, for whoever has to find out why."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from effdet.checkpoint.manager import save_checkpoint
from effdet.runtime import distributed

from .ema import unwrap_model
from .engine import NonFiniteError, Training

_DEPTH = 3  # of the module names that gradient norms are given for, such as backbone.blocks.4


class DivergedError(RuntimeError):
    """Training cannot go on; the text says why, where the batch is written down, and what to try."""


def explain_divergence(error: NonFiniteError, training: Training, train_set: Any, folder: Path) -> DivergedError:
    """Write the batch behind an error down, in the run's folder, and return the error that ends the run."""
    ids = [train_set.parser.img_ids[index] for index in error.target["img_idx"].tolist()]
    path = write_postmortem(folder, training, error.images, error.target, ids)
    return DivergedError(
        f"{error}. Step {training.steps}, images {ids}; losses and gradient norms by module are in {path}. If they are "
        "finite there, lower --loss-scale; else lower --lr, or look at these images."
    )


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
