"""How much memory a training step takes, estimated from a small one: for a warning at the door, and after an error."""

from __future__ import annotations

import contextlib
import dataclasses
import logging

import torch
from torch import Tensor

from effdet.config.load import replace_settings
from effdet.config.schema import RunConfig
from effdet.factory import resolve_model_config
from effdet.runtime import device as device_layer
from effdet.runtime import distributed, memory

from .build import Placement, Step, build_step

_logger = logging.getLogger("effdet.train")

_SIDE_PX, _IMAGES = 128, 2
_OVER_KEPT = 1.2  # a step's peak over what autograd keeps for backward: gradients of activations, temporary tensors
_USABLE = 0.85  # of the memory there is


def build_trial(cfg: RunConfig, place: Placement, num_classes: int) -> Step:
    """Build a step to try memory with, for this process alone; nothing is said, as the run builds all of it itself."""
    logging.disable(logging.INFO)
    try:
        cfg = replace_settings(cfg, run={"compile": False})
        return build_step(cfg, dataclasses.replace(place, world=1), num_classes, {})
    finally:
        logging.disable(logging.NOTSET)


def make_up_batch(step: Step, place: Placement, size: int, slots: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """Return images and targets for a step, of a size and with so many objects in the fullest image."""
    layout = torch.channels_last if place.channels_last else torch.contiguous_format
    images = torch.zeros(size, 3, *step.model.config.image_size, device=place.device).to(memory_format=layout)
    boxes = torch.tensor([0.0, 0.0, 32.0, 32.0], device=place.device).expand(size, slots, 4).contiguous()
    return images, {"bbox": boxes, "cls": torch.ones(size, slots, dtype=torch.int64, device=place.device)}


@torch.random.fork_rng(devices=[])  # initial weights and drop path leave the run's random numbers alone
def bytes_per_image(cfg: RunConfig, place: Placement, num_classes: int) -> int:
    """Estimate what one image adds to a step: what autograd keeps of a small batch, in proportion to the pixels."""
    small = {
        "image_size": [_SIDE_PX, _SIDE_PX],
        "pretrained": "",
        "initial_checkpoint": "",
        "pretrained_backbone": "",
    }
    height, width = resolve_model_config(cfg.model).image_size
    step = build_trial(replace_settings(cfg, model=small, ema={"enabled": False}), place, num_classes)
    own = {parameter.untyped_storage().data_ptr() for parameter in step.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    step.bench.train()
    images, target = make_up_batch(step, place, _IMAGES)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), step.precision.autocast():
        loss = step.bench(images, target)
    total = sum(kept.values())
    del loss
    return int(_OVER_KEPT * total / _IMAGES * height * width / _SIDE_PX**2)


def images_that_fit(cfg: RunConfig, place: Placement, num_classes: int) -> int | None:
    """Return about how many images a step of this process can have; None where the memory is unknown."""
    free = memory.available_memory_bytes(place.device)
    if free is None:
        return None
    if device_layer.is_host(place.device):
        free //= distributed.local_world_size()  # the machine's, for all of its processes
    return int(_USABLE * free / bytes_per_image(cfg, place, num_classes))


def warn_of_size(cfg: RunConfig, place: Placement, num_classes: int, batch_size: int) -> int | None:
    """Log a warning where a step is likely to need more memory than there is; return `images_that_fit`."""
    fits = images_that_fit(cfg, place, num_classes)
    if fits is not None and batch_size > fits:
        _logger.warning(
            "setting: %d images a step are likely to need more memory than there is; about %d fit (-b, --image-size)",
            batch_size,
            max(1, fits),
        )
    return fits


class OutOfMemory(RuntimeError):
    """The device's memory is used up; the text says with what, and what is likely to fit."""


def explain_out_of_memory(
    cfg: RunConfig, place: Placement, num_classes: int, batch_size: int, fits: int | None
) -> OutOfMemory:
    """Return the error that ends a run which found no memory, with a size that is likely to fit.

    `fits` is what was found at the door, None where nobody looked.
    """
    height, width = resolve_model_config(cfg.model).image_size
    if fits is None:
        memory.release_memory(place.device)
        with contextlib.suppress(RuntimeError):  # not even the small step
            fits = images_that_fit(cfg, place, num_classes)
    fits = max(1, min(fits or batch_size // 2, batch_size - 1))
    return OutOfMemory(
        f"out of memory on {place.device} with {batch_size} images a step of {cfg.model.name} at {height} x {width}: "
        f"about {fits} are likely to fit (-b {fits * place.world}); a smaller --image-size needs less too. "
        "What the run has saved is there."
    )
