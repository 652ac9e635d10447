"""`-b auto`: the largest batch that fits an accelerator's memory, found by running training steps.

The search knows nothing of devices: it gets a function that tries a size. `choose_batch_size` puts real steps behind
it, those of a network, an optimizer and an average that are made for the search and thrown away after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from effdet.config.load import replace_settings
from effdet.config.schema import RunConfig
from effdet.data.batches import padded_instances
from effdet.runtime import device as device_layer
from effdet.runtime import distributed
from effdet.runtime import memory as memory_layer

from .build import Placement, Step
from .footprint import build_trial, make_up_batch

_logger = logging.getLogger("effdet.train")

AUTO = "auto"
_MARGIN = 0.9  # batches differ in their objects, and the allocator's memory falls to pieces in a long run
_LARGEST = 4096  # per device; no network here gains from more


def check_device(cfg: RunConfig, device: torch.device) -> None:
    """Refuse -b auto where there is no memory to measure.

    Raises:
        ValueError: the device is the CPU.
    """
    if cfg.run.batch_size == AUTO and device_layer.is_host(device):
        raise ValueError(
            "-b auto measures an accelerator's memory, and this run is on the CPU, which has none of its "
            "own: give -b N (8 is a good start for a CPU)."
        )


def largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """Find about the largest size that fits: by doubling, then by bisection to a sixteenth.

    Args:
        fits: tries a size; if one fits, all smaller ones do.
        most: largest size to try, at least 1.

    Returns:
        A size that was tried and fitted; 0 when not even 1 does.
    """
    good, bad = 0, most + 1
    size = min(2, most)  # batch norm refuses a single image where it makes one cell, so 1 comes last
    while good < bad - 1 and size < bad:
        if not fits(size):
            bad = size
            break
        good, size = size, min(2 * size, most) if size < most else bad
    while bad - good > max(1, good // 16):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def with_margin(fits: Callable[[int], bool], largest: int) -> int:
    """Return a size below the largest, with a margin for what a search does not see, that still fits when tried again.

    Sizes from 16 on are multiples of 8. 0 when none fits any more.
    """
    size = max(1, int(largest * _MARGIN)) if largest else 0
    while size:
        size = size // 8 * 8 if size >= 16 else size
        if fits(size):
            return size
        size = size * 7 // 8
    return 0


def make_probe(run_step: Callable[[int], None], release: Callable[[], None]) -> Callable[[int], bool]:
    """Turn a training step that may run out of memory into a question.

    Args:
        run_step: takes a step with a batch of some size.
        release: gives back the memory that nothing uses.

    Returns:
        A function that tells whether two steps with a batch of a size fit: the optimizer's state comes with the first.
    """

    def fits(size: int) -> bool:
        enough = True
        release()
        try:
            for _ in range(2):
                run_step(size)
        except RuntimeError as error:
            if not memory_layer.is_out_of_memory(error):
                raise
            enough = False  # the memory is released outside, when the error no longer holds on to the step's tensors
        release()
        return enough

    return fits


def make_step(step: Step, place: Placement, slots: int, clip: tuple[float | None, str]) -> Callable[[int], None]:
    """Return a function that takes a training step on a made-up batch of a size.

    Args:
        step: what to train; it is of no use afterwards.
        place: where it is.
        slots: objects in the fullest image.
        clip: as in engine.Training.
    """
    step.bench.train()

    def run_step(size: int) -> None:
        try:
            images, target = make_up_batch(step, place, size, slots)
            with step.precision.autocast():
                output = step.bench(images, target)
            step.precision.backward(output["loss"])
            step.precision.step(step.optimizer, clip)
            if step.ema is not None:
                step.ema.update(step.precision.float_state_dict(step.model))
            device_layer.synchronize(place.device)
        finally:
            step.optimizer.zero_grad()

    return run_step


def choose_batch_size(cfg: RunConfig, place: Placement, parser: Any, num_classes: int) -> RunConfig:
    """Find the batch size of a run and the learning rate that goes with it.

    All processes call it; each tries its own device, and the smallest answer is everybody's.

    Args:
        cfg: of the run.
        place: where it takes place, on an accelerator.
        parser: of the training split.
        num_classes: K.

    Returns:
        The config with both, the batch size over all processes.

    Raises:
        RuntimeError: not even one image fits.
    """
    device, world = place.device, place.world
    most_objects = max((len(parser.get_ann_info(k)["cls"]) for k in range(len(parser.img_ids))), default=0)
    most = max(1, min(_LARGEST, len(parser.img_ids) // world))
    # Alone, as a process that runs out of memory would keep the others waiting.
    with distributed.alone(), torch.random.fork_rng(devices=[]):
        step = build_trial(cfg, place, num_classes)
        reserve = torch.empty(sum(p.numel() for p in step.model.parameters()) if world > 1 else 0, device=device)
        fits = make_probe(
            make_step(step, place, padded_instances(most_objects), (cfg.optim.clip_grad or None, cfg.optim.clip_mode)),
            lambda: memory_layer.release_memory(device),
        )
        largest = largest_that_fits(fits, most)
        size = with_margin(fits, largest) if largest < most else most
        del step, fits, reserve  # `reserve` stood for DistributedDataParallel's copy of the gradients
        memory_layer.release_memory(device)
    size = min(distributed.all_gather_object(size))
    if size == 0:
        raise RuntimeError(
            "-b auto: not even one image fits the memory; give a smaller --model or --image-size, or --amp."
        )
    cfg = set_batch_size(cfg, size * world)
    total = memory_layer.total_memory_bytes(device)
    memory = "" if total is None else f" of {total / 2**30:.1f} GiB"
    limit = ", all there are" if largest >= most and most < _LARGEST else ""
    _logger.info(
        "-b auto: %d images a step on each of %d device(s); %d fit the memory%s of this one%s",
        size,
        world,
        largest,
        memory,
        limit,
    )
    return cfg


def set_batch_size(cfg: RunConfig, batch_size: int) -> RunConfig:
    """Return a config with a batch size, and a rate lowered in proportion if that is less than the rate is for."""
    meant, lr = cfg.optim.lr_batch, cfg.optim.lr
    assert meant is not None  # load_config fills it in for -b auto
    rule = lr * batch_size / meant
    used = rule if batch_size < meant else lr
    if batch_size < meant:
        _logger.info(
            "-b auto: learning rate %.4g for the batch of %d, in proportion to %.4g for %d", rule, batch_size, lr, meant
        )
    else:
        more = "" if batch_size == meant else f"; in proportion to the batch it would be {rule:.4g} (--lr)"
        _logger.info("-b auto: learning rate %.4g as given for a batch of %d%s", lr, meant, more)
    return replace_settings(cfg, optim={"lr": used, "lr_batch": None}, run={"batch_size": batch_size})
