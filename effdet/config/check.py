"""What settings must fulfil, each by itself and together, and which have no effect beside others."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from .options import ConfigError, list_options
from .schema import DemoConfig, RunConfig, ValidateConfig

_ConfigT = TypeVar("_ConfigT", bound=RunConfig | ValidateConfig | DemoConfig)


def check_config(cfg: _ConfigT) -> _ConfigT:
    """Check the ranges of every field and the fields against each other; make a single image size square.

    Args:
        cfg: a RunConfig, ValidateConfig or DemoConfig whose types are right, as `load.load_config` sees to.

    Returns:
        `cfg`, or where its image size was a single one, a new config.

    Raises:
        ConfigError: a value is out of its range, or two settings contradict each other.
    """
    for option in list_options(type(cfg)).values():
        value = option.get(cfg)
        if not option.allows(value):
            raise ConfigError(f"{option.title}: got {value!r}, must be {option.range_text or 'a finite number'}")
    size = cfg.model.image_size
    _require(
        size is None or len(size) in (1, 2),
        f"model.image_size (--image-size): got {size}, must be one value (square) or height and width",
    )
    if hasattr(cfg, "data"):
        _check_eval(cfg)
    if isinstance(cfg, RunConfig):
        _check_train(cfg)
    if size is None or len(size) == 2:
        return cfg
    model: Any = dataclasses.replace(cfg.model, image_size=[*size, *size])
    return dataclasses.replace(cfg, model=model)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_eval(cfg: Any) -> None:
    """Check what training and evaluation share: data, precision, devices."""
    color, devices = cfg.data.fill_color, cfg.dist.device_list
    _require(
        color == "mean" or color.isdecimal() and int(color) <= 255,
        f"data.fill_color (--fill-color): got {color!r}, must be 'mean' or a whole number 0..255",
    )
    for split in ("train", "val"):
        images, ann = getattr(cfg.data, f"{split}_images", ""), getattr(cfg.data, f"{split}_ann", "")
        _require(
            bool(cfg.data.root) or bool(images) == bool(ann),
            f"--{split}-images and --{split}-ann go together: give both, or --root as well",
        )
    _require(
        len(set(devices)) == len(devices),
        f"dist.device_list (--device-list): got {devices}, a device may be named once",
    )
    _require(cfg.amp.enabled or cfg.amp.opt_level != "O2", "--opt-level O2 needs --amp: give both, or leave O2 out")
    _require(
        cfg.amp.enabled or cfg.amp.dtype == "float16",
        f"--amp-dtype {cfg.amp.dtype} needs --amp: give both, or leave the type out",
    )


def _check_train(cfg: RunConfig) -> None:
    """Check what only training has: schedule, augmentation, loss scale, starting weights."""
    data, sched, scale = cfg.data, cfg.sched, cfg.amp.loss_scale
    _require(
        data.scale_min <= data.scale_max,
        f"data.scale_min ({data.scale_min}) is larger than data.scale_max ({data.scale_max})",
    )
    _require(
        scale == "dynamic" or not isinstance(scale, str) and math.isfinite(scale) and scale > 0,
        f"amp.loss_scale (--loss-scale): got {scale!r}, must be 'dynamic' or a number above 0",
    )
    # In float32 some accelerators take a scale, too: the device itself says, once it is known.
    taken = cfg.run.device != "cpu" if cfg.amp.is_full_precision else cfg.amp.dtype == "float16"
    _require(
        scale == "dynamic" or taken,
        f"--loss-scale {scale} acts in float16 only: give --amp with --opt-level O1 or O2, or leave it out",
    )
    ratios = cfg.model.aspect_ratios
    _require(ratios is None or len(ratios) > 0, "model.aspect_ratios (--aspect-ratios): got none, give at least one")
    noise = sched.lr_noise
    _require(
        noise is None or len(noise) == 1 or len(noise) == 2 and noise[0] < noise[1],
        f"sched.lr_noise (--lr-noise): got {noise}, must be the fraction of the epochs where the noise starts "
        "and, optionally, a larger one where it ends",
    )
    last = sched.epochs + sched.cooldown_epochs
    _require(
        sched.start_epoch is None or sched.start_epoch < last,
        f"sched.start_epoch (--start-epoch): got {sched.start_epoch}, but epochs and cooldown end at {last}",
    )
    _require(
        not (cfg.model.pretrained and cfg.model.initial_checkpoint),
        "--pretrained and --initial-checkpoint both name the weights to start from: give one",
    )
    auto = cfg.run.batch_size == "auto"
    _require(auto or cfg.optim.lr_batch is None, "optim.lr_batch acts with -b auto only: give both, or leave it out")
    _require(not (auto and cfg.run.overfit), "-b auto is for training: give -b N with --overfit")
    _require(
        not (cfg.run.overfit and (cfg.run.resume or len(cfg.dist.device_list) > 1)),
        "--overfit trains anew on one device: leave out --resume and further devices",
    )
    _require(
        not cfg.run.overfit or data.limit in (0, cfg.run.overfit),
        f"--overfit {cfg.run.overfit} takes the first {cfg.run.overfit} images: leave out --limit {data.limit}",
    )
    _require(cfg.run.check or not cfg.run.html, "--html is where --check writes to: give --check as well")


_DECAYING = ("step", "multistep", "plateau", "poly")
_CYCLIC = ("cosine", "tanh", "poly")

# (fields, when they act, what that takes in words)
NEEDS: tuple[tuple[tuple[str, ...], Callable[[RunConfig], bool], str], ...] = (
    (("data.remode", "data.recount"), lambda cfg: cfg.data.reprob > 0, "--reprob above 0"),
    (("ema.decay", "ema.warmup"), lambda cfg: cfg.ema.enabled, "--model-ema"),
    (("optim.clip_mode",), lambda cfg: cfg.optim.clip_grad > 0, "--clip-grad above 0"),
    (("sched.warmup_lr",), lambda cfg: cfg.sched.warmup_epochs > 0, "--warmup-epochs above 0"),
    (("sched.lr_noise_pct", "sched.lr_noise_std"), lambda cfg: cfg.sched.lr_noise is not None, "--lr-noise"),
    (
        ("sched.lr_cycle_mul", "sched.lr_cycle_limit"),
        lambda cfg: cfg.sched.sched in _CYCLIC,
        f"--sched {', '.join(_CYCLIC)}",
    ),
    (("sched.decay_epochs",), lambda cfg: cfg.sched.sched == "step", "--sched step"),
    (("sched.decay_milestones",), lambda cfg: cfg.sched.sched == "multistep", "--sched multistep"),
    (("sched.decay_rate",), lambda cfg: cfg.sched.sched in _DECAYING, f"--sched {', '.join(_DECAYING)}"),
    (("sched.patience_epochs",), lambda cfg: cfg.sched.sched == "plateau", "--sched plateau"),
    (
        ("model.pretrained_backbone",),
        lambda cfg: not (cfg.model.pretrained_backbone and (cfg.model.pretrained or cfg.model.initial_checkpoint)),
        "neither --pretrained nor --initial-checkpoint, which replace those weights",
    ),
    (
        ("dist.master_port", "dist.max_restarts"),
        lambda cfg: len(cfg.dist.device_list) > 1,
        "several devices in --device-list",
    ),
    (("dist.dist_bn",), lambda cfg: not cfg.dist.sync_bn, "--sync-bn switched off"),
)


def inert_settings(cfg: RunConfig) -> Iterator[str]:
    """Yield a line for each setting that differs from its default and has no effect together with the others."""
    options = list_options(RunConfig)
    for keys, acts, words in NEEDS:
        for option in (options[key] for key in keys if not acts(cfg)):
            if option.get(cfg) != option.default:
                yield f"{option.title}: {option.get(cfg)} has no effect, it needs {words}"
