"""Check a resolved config: the range of every field, and fields against each other."""
import dataclasses
import logging
import math
from typing import Any, TypeVar

from .schema import ConfigError, DemoConfig, RunConfig, range_text, spelled

_logger = logging.getLogger(__name__)
_ConfigT = TypeVar("_ConfigT")


def _in_range(value: Any, meta: Any) -> bool:
    """Return True when one value (a list's element or a scalar) lies within the declared bounds and choices."""
    if meta["choices"] and isinstance(value, str):
        return value in meta["choices"]
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return not (meta["low"] is not None and value < meta["low"] or meta["high"] is not None and value > meta["high"]
                or meta["above"] is not None and value <= meta["above"]
                or meta["below"] is not None and value >= meta["below"])


def check_config(cfg: _ConfigT) -> _ConfigT:
    """Check the ranges of every field and the fields against each other; make a single image size square.

    Args:
        cfg: a RunConfig, ValidateConfig or DemoConfig whose types are right (load.py sees to that).

    Returns:
        `cfg` itself.

    Raises:
        ConfigError: a value is out of its range, or two settings contradict each other.
    """
    for section in dataclasses.fields(cfg):
        part = getattr(cfg, section.name)
        for item in dataclasses.fields(part):
            value = getattr(part, item.name)
            values = value if isinstance(value, list) else [] if value is None else [value]
            if not all(_in_range(one, item.metadata) for one in values):
                raise ConfigError(f"{spelled(section.name, item)}: got {value!r}, must be "
                                  f"{range_text(item) or 'a finite number'}")
    for rule in (_check_shapes, _check_eval, _check_train):
        rule(cfg)
    return cfg


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_shapes(cfg: Any) -> None:
    """Check what every script has: the image size."""
    size = cfg.model.image_size
    if size is not None:
        _require(len(size) in (1, 2), f"model.image_size (--image-size): got {size}, must be one value (square) or "
                                      "height and width")
        cfg.model.image_size = list(size) * 2 if len(size) == 1 else list(size)


def _check_eval(cfg: Any) -> None:
    """Check what training and evaluation share: data, precision, devices."""
    if isinstance(cfg, DemoConfig):
        return
    color, devices = cfg.data.fill_color, cfg.dist.device_list
    _require(color == "mean" or color.isdecimal() and int(color) <= 255,
             f"data.fill_color (--fill-color): got {color!r}, must be 'mean' or a whole number 0..255")
    for split in ("train", "val"):
        images, ann = getattr(cfg.data, f"{split}_images", ""), getattr(cfg.data, f"{split}_ann", "")
        _require(bool(cfg.data.root) or bool(images) == bool(ann),
                 f"--{split}-images and --{split}-ann go together: give both, or --root as well")
    _require(len(set(devices)) == len(devices),
             f"dist.device_list (--device-list): got {devices}, a device may be named once")
    _require(cfg.amp.enabled or cfg.amp.opt_level != "O2", "--opt-level O2 needs --amp: give both, or leave O2 out")
    _require(cfg.amp.enabled or cfg.amp.dtype == "float16",
             f"--amp-dtype {cfg.amp.dtype} needs --amp: give both, or leave the type out")


def _check_train(cfg: Any) -> None:
    """Check what only training has: schedule, augmentation, loss scale, starting weights."""
    if not isinstance(cfg, RunConfig):
        return
    data, sched, scale = cfg.data, cfg.sched, cfg.amp.loss_scale
    _require(data.scale_min <= data.scale_max,
             f"data.scale_min ({data.scale_min}) is larger than data.scale_max ({data.scale_max})")
    _require(scale == "dynamic" or not isinstance(scale, str) and math.isfinite(scale) and scale > 0,
             f"amp.loss_scale (--loss-scale): got {scale!r}, must be 'dynamic' or a number above 0")
    half = cfg.amp.enabled and cfg.amp.opt_level != "O0" and cfg.amp.dtype == "float16"
    _require(scale == "dynamic" or half,
             f"--loss-scale {scale} acts in float16 only: give --amp with --opt-level O1 or O2, or leave it out")
    ratios = cfg.model.aspect_ratios
    _require(ratios is None or len(ratios) > 0, "model.aspect_ratios (--aspect-ratios): got none, give at least one")
    noise = sched.lr_noise
    _require(noise is None or len(noise) == 1 or len(noise) == 2 and noise[0] < noise[1],
             f"sched.lr_noise (--lr-noise): got {noise}, must be the fraction of the epochs where the noise starts "
             "and, optionally, a larger one where it ends")
    last = sched.epochs + sched.cooldown_epochs
    _require(sched.start_epoch is None or sched.start_epoch < last,
             f"sched.start_epoch (--start-epoch): got {sched.start_epoch}, but epochs and cooldown end at {last}")
    _require(not (cfg.model.pretrained and cfg.model.initial_checkpoint),
             "--pretrained and --initial-checkpoint both name the weights to start from: give one")
    auto = cfg.run.batch_size == "auto"
    _require(auto or cfg.optim.lr_batch is None, "optim.lr_batch acts with -b auto only: give both, or leave it out")
    _require(not (auto and cfg.run.overfit), "-b auto is for training: give -b N with --overfit")
    _require(not (cfg.run.overfit and (cfg.run.resume or len(cfg.dist.device_list) > 1)),
             "--overfit trains anew on one device: leave out --resume and further devices")
    _require(cfg.run.check or not cfg.run.html, "--html is where --check writes to: give --check as well")
