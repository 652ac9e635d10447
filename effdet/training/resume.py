"""Which state a run continues from, and what of it belongs to one process: random numbers, position, statistics.

A checkpoint's `ranks` has an entry for each process that took part:

    rng      dict, `checkpoint.rng_state()`, with `device`: the accelerator's generator, where there is one
    kind     str, the kind of device
    totals   list of three floats, sums of the losses of the epoch so far; only in recovery.pth.tar
    buffers  dict, name -> tensor: batch-norm statistics of the trained and the averaged weights, where they differ
             between processes; only in recovery.pth.tar

`progress`, only in recovery.pth.tar, says how far epoch `epoch + 1` has come:

    batches     int, batches done by each process
    batch_size, grad_accum   int, images in a batch over all processes, batches to an update
    images    int, images in the training set
    trained     bool, training of the epoch is complete, its evaluation is not
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effdet.checkpoint.manager import (
    CHECKPOINT_VERSION,
    LAST_NAME,
    RECOVERY_NAME,
    CheckpointError,
    CheckpointManager,
    find_resumable,
    restore_rng_state,
    rng_state,
)
from effdet.checkpoint.state_dict import extract_state_dict
from effdet.config.load import replace_settings, to_plain
from effdet.config.model_spec import ModelSpec
from effdet.config.schema import RunConfig
from effdet.data.coco.categories import CategoryMap
from effdet.runtime import distributed, seeding

from . import effdet_checkpoint
from .engine import Training

_logger = logging.getLogger(__name__)

AUTO = "auto"


@dataclass
class Position:
    """Where a run continues: an epoch, and for one that was broken off how far this process has come in it."""

    epoch: int = 0
    batches: int = 0
    totals: list[float] | None = None
    trained: bool = False  # only the evaluation of the epoch is missing


# ---- which file ------------------------------------------------------------------------------------------------------


def is_restart() -> bool:
    """Tell whether a launcher has started this process again after a failure of the group."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def keep_anchors(cfg: RunConfig, payload: Mapping[str, Any]) -> RunConfig:
    """Return the config with the anchors that a checkpoint was trained with, where it names any."""
    stored = payload.get("config", {}).get("model")
    if stored is None:
        return cfg
    return replace_settings(cfg, model={key: stored[key] for key in ("anchor_scale", "aspect_ratios")})


def find_checkpoint(folder: Path, otherwise: str = "") -> str:
    """Return the checkpoint to continue from, the same on all ranks; `otherwise` where the folder has none.

    Raises:
        CheckpointError: the folder has checkpoints, but none can be resumed (RuntimeError on ranks other than 0).
    """

    def find() -> str:
        path = find_resumable(folder)
        if path is None:
            _logger.info(
                "no checkpoint in %s: %s", folder, f"starting from {otherwise}" if otherwise else "training anew"
            )
        return otherwise if path is None else str(path)

    return distributed.run_on_primary(find)


def check_fits(payload: Mapping[str, Any], source: str, arch: str, image_size: list[int]) -> None:
    """Refuse to continue another model's run, or at another input size; classes are checked with the data.

    Args:
        payload: the loaded checkpoint.
        source: its path, for the message.
        arch: name of the model that this run trains.
        image_size: its input height and width.

    Raises:
        CheckpointError: names both sides.
    """
    stored = payload.get("arch", arch)
    if stored != arch:
        raise CheckpointError(
            f"{source} is a checkpoint of {stored}, but this run trains {arch}: resume with --model {stored}."
        )
    size = list(payload.get("image_size", image_size))
    if size != image_size:
        raise CheckpointError(
            f"{source} was trained at {size[0]}x{size[1]}, but this run trains at {image_size[0]}x{image_size[1]}: "
            f"resume with --image-size {size[0]} {size[1]}, or start a new run with --initial-checkpoint."
        )


# ---- the whole state -------------------------------------------------------------------------------------------------


def collect(
    training: Training, cfg: RunConfig, categories: CategoryMap, ranks: list[dict[str, Any]], initial_weights: str = ""
) -> dict[str, Any]:
    """Return what a checkpoint holds, see checkpoint/manager.py.

    Args:
        training: what is trained.
        cfg: the settings.
        categories: the data's.
        ranks: an entry of each process.
        initial_weights: what the run started from, in a line.
    """
    config = training.model.config
    content = {
        "version": CHECKPOINT_VERSION,
        "arch": config.name,
        "state_dict": training.precision.float_state_dict(training.model),
        "optimizer": training.optimizer.state_dict(),
        "schedule": training.schedule.state_dict(),
        "scaler": training.precision.state_dict(),
        "ranks": ranks,
        "step": training.steps,
        "config": to_plain(cfg),
        "model_config": ModelSpec(config).to_plain(),
        "category_map": categories.to_dict(),
        "initial_weights": initial_weights,
        "image_size": list(config.image_size),
    }
    if training.ema is not None:
        state = training.ema.state_dict()
        content["state_dict_ema"] = state.pop("module")
        content["ema"] = state
    return content


def restore(
    payload: dict[str, Any],
    source: str,
    training: Training,
    manager: CheckpointManager,
    models: Mapping[str, nn.Module],
    cfg: RunConfig,
) -> None:
    """Put a run back to where a checkpoint was written; the model has its weights already.

    Args:
        payload: what the checkpoint holds.
        source: its file, for errors.
        training: takes weights in their precision, optimizer, average, scaler, schedule and counters.
        manager: takes the best metric so far.
        models: those whose statistics differ between processes, see `capture_rank`.
        cfg: the settings of this run.

    Raises:
        ValueError: the checkpoint was written with another optimizer.
        CheckpointError: a state that a generator does not take.
    """
    if effdet_checkpoint.is_effdets(payload):
        payload = effdet_checkpoint.convert(payload, source, training, cfg.optim.opt)
    training.precision.load_float_state_dict(training.model, extract_state_dict(payload, use_ema=False))
    if "optimizer" in payload:
        stored = payload.get("config", {}).get("optim", {}).get("opt", cfg.optim.opt)
        if stored != cfg.optim.opt:  # torch would take its settings over and fail at the first step
            raise ValueError(
                f"{source} was trained with --opt {stored}, but this run has --opt {cfg.optim.opt}: give "
                "the same again, or start anew with --initial-checkpoint."
            )
        try:
            training.optimizer.load_state_dict(payload["optimizer"])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{source} holds the optimizer of another trainer or of other weights ({error}): "
                "start anew with --initial-checkpoint, which takes the weights alone."
            ) from error
    if training.ema is not None and "state_dict_ema" in payload:
        counters = payload.get("ema", {"updates": 0, "share_of_init": 0.0})  # else weights without a trainer's state
        training.ema.load_state_dict({**counters, "module": extract_state_dict(payload, use_ema=True)})
    if "scaler" in payload:
        training.precision.load_state_dict(payload["scaler"])
    training.steps, training.updates = payload.get("step", 0), payload.get("schedule", {}).get("updates", 0)
    if "schedule" in payload:
        training.schedule.load_state_dict(payload["schedule"])
    if "best" in payload:
        manager.load_state_dict(payload["best"])
    restore_rank(payload, training.device, models)


def newest_checkpoint(output_dir: Path) -> Path:
    """Return the file to continue a stopped run from: the one within an epoch, where there is one."""
    newest = next((name for name in (RECOVERY_NAME, LAST_NAME) if (output_dir / name).exists()), LAST_NAME)
    return output_dir / newest


# ---- what belongs to one process -------------------------------------------------------------------------------------


def capture_rank(
    device: torch.device, totals: Tensor | None = None, models: Mapping[str, nn.Module] | None = None
) -> dict[str, Any]:
    """Return this process's entry of `ranks`.

    Args:
        device: whose generator goes in, beside those of the host.
        totals: see the module's docstring.
        models: by a name of one's own: those whose statistics differ between processes.
    """
    state: dict[str, Any] = {"rng": rng_state(), "kind": device.type}
    generator = seeding.rng_state(device)
    if generator is not None:
        state["rng"]["device"] = generator
    if totals is not None:
        state["totals"] = totals.tolist()
    if models:
        state["buffers"] = {
            f"{prefix}.{name}": buffer.detach().cpu().clone()
            for prefix, model in models.items()
            for name, buffer in model.named_buffers()
        }
    return state


def restore_rank(payload: Mapping[str, Any], device: torch.device, models: Mapping[str, nn.Module]) -> None:
    """Put this process's random generators and statistics back, and say what cannot be the same as before.

    Raises:
        CheckpointError: a state that a generator does not take.
    """
    ranks, world = payload.get("ranks"), distributed.world_size()
    if ranks is None:
        return
    if len(ranks) != world:
        _logger.warning(
            "the checkpoint was written by %d process(es), this run has %d: random numbers start anew",
            len(ranks),
            world,
        )
        # Not those with which the run began: they would repeat.
        seeding.seed_everything(torch.initial_seed() + 1_000_003 * (int(payload.get("step", 0)) + 1))
        return
    mine = ranks[distributed.rank()]
    restore_rng_state(mine["rng"])
    if mine.get("kind", device.type) != device.type:
        _logger.warning(
            "the checkpoint was written on %s, this run is on %s: numbers will differ in rounding, and the "
            "device's random numbers start anew",
            mine["kind"],
            device.type,
        )
    else:
        seeding.set_rng_state(mine["rng"].get("device"), device)
    _restore_buffers(mine.get("buffers", {}), models)


@torch.no_grad()
def _restore_buffers(stored: Mapping[str, Tensor], models: Mapping[str, nn.Module]) -> None:
    for prefix, model in models.items():
        for name, buffer in model.named_buffers():
            if f"{prefix}.{name}" in stored:
                buffer.copy_(stored[f"{prefix}.{name}"])


def read_position(payload: Mapping[str, Any], batch_size: int, images: int, grad_accum: int) -> Position:
    """Return where this process goes on.

    With another global batch size the epoch goes on at the last whole update before the images already seen.

    Args:
        payload: the checkpoint.
        batch_size: images in a batch over all processes, now.
        images: images in the training set, now.
        grad_accum: batches to an update, now.
    """
    position = Position(int(payload.get("epoch", -1)) + 1)
    progress = payload.get("progress")
    if progress is None:
        return position
    if progress["images"] != images:
        _logger.warning(
            "the training set had %d images, now it has %d: epoch %d starts anew",
            progress["images"],
            images,
            position.epoch,
        )
        return position
    ranks, before = payload["ranks"], int(progress["batches"])
    same = len(ranks) == distributed.world_size()
    totals = [ranks[distributed.rank()]["totals"]] if same else [rank["totals"] for rank in ranks]
    position.totals = [sum(values) / len(totals) for values in zip(*totals, strict=True)]
    position.batches, position.trained = before, bool(progress["trained"])
    unchanged = (progress["batch_size"], progress["grad_accum"]) == (batch_size, grad_accum)
    if not unchanged and not position.trained:
        position.batches = before * int(progress["batch_size"]) // batch_size // grad_accum * grad_accum
        position.totals = [value * position.batches / max(before, 1) for value in position.totals]
        _logger.warning(
            "batch size or accumulation changed: epoch %d goes on at batch %d", position.epoch, position.batches
        )
    return position
