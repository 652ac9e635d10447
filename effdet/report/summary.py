"""What a run is, on one screen at its start, and what to do next at its end: plain lines of text."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from effdet.checkpoint.manager import LAST_NAME
from effdet.config.schema import RunConfig
from effdet.runtime.console import typed
from timm_patches.same_padding import convert_same_padding

_NAMES_SHOWN = 8
_HASH = re.compile(r", sha256 \w+$")


@torch.no_grad()
def count_macs(model: nn.Module, image_size: Sequence[int]) -> int:
    """Count the multiply-accumulates of a network for one image.

    It runs on a copy on torch's meta device, so the image costs no memory, and the weights are not touched.

    Args:
        model: takes [1, 3, height, width]; on any device.
        image_size: height and width in pixels.
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    convert_same_padding(shadow, "pad")  # extended kernels multiply zeros too
    for module in shadow.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.forward = lambda x: x  # slow on the meta device, and it multiplies no matrices
    dtype = next(shadow.parameters()).dtype
    with FlopCounterMode(display=False) as counter:
        shadow(torch.empty(1, 3, *image_size, device="meta", dtype=dtype))
    return counter.get_total_flops() // 2


def describe_start(
    cfg: RunConfig,
    model: nn.Module,
    train_set: Any,
    val_set: Any,
    device: str,
    world: int,
    channels_last: bool,
    epochs: int,
    steps_per_epoch: int,
    precision: str,
    folder: Path,
    initial_weights: str = "",
) -> tuple[list[str], list[str]]:
    """Return the lines of a run's start: what everybody wants to know, and technical details.

    Args:
        cfg: the resolved settings.
        model: the network.
        train_set: a data set with a `parser`.
        val_set: likewise.
        device: what it is called.
        world: processes.
        channels_last: as chosen for the device.
        epochs: in all, with the cooldown.
        steps_per_epoch: batches.
        precision: as chosen for the device.
        folder: the run's.
        initial_weights: what the run starts from, or once started from.
    """
    config = model.config
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    names = train_set.parser.category_map.names
    more = f", ... {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    optim, sched = cfg.optim, cfg.sched
    update = cfg.run.batch_size * optim.grad_accum
    accumulated = f" x {optim.grad_accum} accumulated" if optim.grad_accum > 1 else ""
    ema = f"EMA {cfg.ema.decay:g}" if cfg.ema.enabled else "no EMA"
    clip = f"clip {optim.clip_mode} {optim.clip_grad:g}" if optim.clip_grad else "no clipping"
    end = f", at most {cfg.run.max_steps} steps" if cfg.run.max_steps else ""
    steps = min(filter(None, (epochs * steps_per_epoch, cfg.run.max_steps)))
    lines = {
        "data": f"training: {_describe_split(train_set)}; validation: {_describe_split(val_set)}",
        "classes": f"{len(names)}: {', '.join(names[:_NAMES_SHOWN])}{more}",
        "model": f"{config.name}, {config.image_size[0]}x{config.image_size[1]} px, {_millions(trained)} parameters"
        f"{f' and {_millions(frozen)} frozen' if frozen else ''}",
        "weights": _HASH.sub("", initial_weights) or "not known",
        "device": f"{device}, {world} process(es), {precision}",
        "length": f"{epochs} epochs of {steps_per_epoch} steps with {cfg.run.batch_size} images{end}: {steps} steps, "
        f"evaluated every {cfg.run.val_interval} epochs and at the end",
        "output": str(folder),
    }
    details = {
        "weights": initial_weights or "not known",
        "work": f"{_gmacs(model)} GMACs an image, channels-{'last' if channels_last else 'first'}",
        "batch": f"{cfg.run.batch_size}{accumulated} over all devices",
        "lr": f"{optim.lr:g} for {update} images an update ({optim.lr / update:.3g} each), {sched.sched}, "
        f"{sched.warmup_epochs:g} epochs of warm-up from {sched.warmup_lr:g}",
        "optimizer": f"{optim.opt}, weight decay {optim.weight_decay:g}, {clip}, {ema}",
    }
    shown, technical = ([f"  {name:<10} {text}" for name, text in table.items()] for table in (lines, details))
    return shown, technical


def _gmacs(model: nn.Module) -> str:
    try:
        return f"{count_macs(model, model.config.image_size) / 1e9:.2f}"
    except Exception:  # a layer that torch cannot run without memory: a figure for the eye is no reason to end a run
        return "n/a"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def _describe_split(dataset: Any) -> str:
    report = getattr(dataset.parser, "report", None)
    boxes = "" if report is None else f", {report.num_boxes} boxes"
    return f"{len(dataset)} images{boxes}"


def next_commands(cfg: RunConfig, folder: Path, checkpoint: Path, image: Path | None) -> list[str]:
    """Return command lines that work as they are: evaluate, predict, train on.

    Args:
        cfg: the run's settings.
        folder: the run's.
        checkpoint: the best one.
        image: one to predict.
    """
    data, run, amp = cfg.data, cfg.run, cfg.amp
    where = [] if run.device == "auto" else ["--device", run.device]
    validate = ["--checkpoint", str(checkpoint), "-b", str(run.batch_size), *where]
    for flag, value in (("--root", data.root), ("--val-images", data.val_images), ("--val-ann", data.val_ann)):
        validate += [flag, value] if value else []
    validate += [] if data.workers is None else ["-j", str(data.workers)]
    if cfg.dist.device_list:
        validate += ["--device-list", ",".join(map(str, cfg.dist.device_list))]
    if amp.enabled:
        validate += ["--amp", "--opt-level", amp.opt_level, "--amp-dtype", amp.dtype]
    demo = [str(image), "--checkpoint", str(checkpoint), *where]
    longer = ["--max-steps", str(2 * run.max_steps)] if run.max_steps else ["--epochs", str(2 * cfg.sched.epochs)]
    resume = ["-c", str(folder / "config.yaml"), "--resume", str(folder / LAST_NAME), *longer]
    lines = {"validate.py": validate, "demo.py": demo, "train.py": resume}
    scripts = {script: typed(script) if typed(script) != script else f"python {script}" for script in lines}
    return [f"{scripts[script]} {shlex.join(words)}" for script, words in lines.items() if "None" not in words]
