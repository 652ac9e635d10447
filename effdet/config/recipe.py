"""Recipes: the settings of a training that suit a data set and a device, by name. Plain numbers, no torch.

A recipe lies over the defaults and below YAML files and flags: what somebody asked for wins. docs/configurations.md has
what the numbers were measured with.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .options import list_options
from .schema import RunConfig

SMALL_SET = 20_000  # training images up to which COCO's recipe, made for 118,000, does not fit
FEW_STEPS = 20  # in an epoch of fewer updates, what counts in epochs (schedule, evaluation, log) is too coarse
_CPU_PIXELS = 256 * 320  # of the network input: what two cores learn from in minutes
_CPU_MOST_PIXELS = 384 * 512  # with weights, where the images have so many: fewer epochs, and still better
_STRIDE = 64  # the sides of an input that is not square are multiples of it
_CPU_BATCH, _BATCH = 4, 8  # images a step and device: of a small set, many small updates teach more than few large ones
_CPU_WORK = 6700 * _CPU_PIXELS  # pixels that a run on CPUs sees: nine to ten minutes on two cores of an EPYC
_CPU_SCRATCH = 1.375  # so many times the images without weights: nothing is frozen then
_IMAGES = 20_000  # that a run on other devices sees


@dataclass(frozen=True)
class Facts:
    """What a recipe is chosen by.

    Attributes:
        images: of the training split; None where there are more than anybody counted.
        image_hw: the median image's height and width, pixels.
        is_cpu: whether the run is on CPUs.
        devices: processes of the run.
        model: model whose ImageNet backbone is at hand; empty: none is.
        weights: where these weights are, for the log.
        has_heads: they are a whole detector's, whose heads know its anchors.
        epochs: the user's own number; None: the recipe chooses.
    """

    images: int | None
    image_hw: tuple[float, float]
    is_cpu: bool
    devices: int = 1
    model: str = ""
    weights: str = ""
    has_heads: bool = False
    epochs: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A name, the reason in a sentence, and settings by dotted key."""

    name: str
    why: str
    settings: dict[str, Any] = field(default_factory=dict)


def show_settings(settings: Mapping[str, Any]) -> str:
    """Return settings by dotted key as a command line takes them."""
    return " ".join(f"{key}={_word(value)}" for key, value in settings.items())


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_word, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


Parse = Callable[[Mapping[str, Any]], RunConfig]
"""Make the config of a command line with other defaults, by dotted key; what is given does not follow them."""

_OWN = {"optim.lr": 0.0123456789, "optim.opt": "nadam", "sched.sched": "tanh"}  # values nobody gives

_NOBODYS = {"model.name": "\0", "sched.epochs": 999_999_937}  # and these neither


def find_given(parse: Parse, key: str) -> Any | None:
    """Return what a command line or its YAML files set, a key of _NOBODYS; None where they leave it open."""
    value = list_options(RunConfig)[key].get(parse({key: _NOBODYS[key]}))
    return None if value == _NOBODYS[key] else value


def wants_recipe(parse: Parse) -> bool:
    """Tell whether a recipe is to be chosen: one is named, or rate, optimizer, schedule and --overfit are not given."""
    cfg = parse(_OWN)
    if cfg.run.recipe != "auto":
        return cfg.run.recipe != "coco"
    return not cfg.run.overfit and all(list_options(RunConfig)[key].get(cfg) == value for key, value in _OWN.items())


def choose_recipe(wanted: str, facts: Facts) -> Recipe:
    """Choose by the number of images and by the weights there are.

    Args:
        wanted: 'auto', or the name of a recipe: 'finetune', 'scratch', 'coco'.
        facts: about data and device.
    """
    name = wanted
    if wanted == "auto":
        is_large = facts.images is None or facts.images > SMALL_SET
        name = "coco" if is_large else "finetune" if facts.model else "scratch"
    count = f"{f'more than {SMALL_SET}' if facts.images is None else facts.images} training images"
    if name == "coco":
        return Recipe(name, f"{count}, as many as COCO's recipe is for" if wanted == "auto" else "asked for")
    start = f"weights from {facts.weights}" if name == "finetune" else "no weights at hand"
    why = f"{count}, {start}" if wanted == "auto" else f"asked for; {count}"
    return Recipe(name, why, {**_small_set(facts), **(_finetune(facts) if name == "finetune" else _scratch(facts))})


def _small_set(facts: Facts) -> dict[str, Any]:
    """Return what both recipes for small sets share."""
    images = max(1, facts.images or 0)
    batch = (_CPU_BATCH if facts.is_cpu else _BATCH) * facts.devices
    while batch > facts.devices and images < FEW_STEPS * batch:
        batch -= facts.devices
    return {
        "model.anchors": "table" if facts.has_heads else "auto",
        "model.drop_path": 0.0,
        "model.bn_momentum": 0.1,
        "data.scale_min": 0.7,
        "data.scale_max": 1.4,
        "optim.opt": "adamw",
        "optim.lr": 0.01,
        "optim.weight_decay": 0.01,
        "sched.warmup_epochs": 1.0,
        "sched.cooldown_epochs": 0,
        "run.batch_size": batch,
        "run.log_interval": min(50, max(1, images // batch // 2)),
    }


def _finetune(facts: Facts) -> dict[str, Any]:
    height, width = facts.image_hw
    size = _input_size(facts, max(_CPU_PIXELS, min(_CPU_MOST_PIXELS, height * width)))
    return {
        "model.name": facts.model or "tf_efficientdet_d0",
        **size,
        "model.freeze_stages": 4,
        "model.freeze_bn": "backbone",
        "optim.backbone_lr": 0.1,
        **_length(facts, _images_to_see(size), at_least=8),
    }


def _scratch(facts: Facts) -> dict[str, Any]:
    size = _input_size(facts, _CPU_PIXELS)
    images = (_CPU_SCRATCH if facts.is_cpu else 2) * _images_to_see(size)
    return {"model.name": "tf_efficientdet_d0", **size, **_length(facts, images, at_least=30)}


def _images_to_see(size: dict[str, Any]) -> int:
    """Return how many images a run sees: on CPUs as many as cost the same, elsewhere a number."""
    return round(_CPU_WORK / math.prod(size["model.image_size"])) if size else _IMAGES


def _length(facts: Facts, images: float, at_least: int) -> dict[str, Any]:
    """Return the settings that follow from the number of epochs: as many as show the network `images` images."""
    epochs = facts.epochs or min(150, max(at_least, math.ceil(images / max(1, facts.images or 0))))
    return {
        "sched.epochs": epochs,
        "model.freeze_bn_epochs": epochs // 4,
        "ema.decay": 0.998,
        "run.val_interval": max(1, round(epochs / 8)),
    }


def _input_size(facts: Facts, pixels: float) -> dict[str, Any]:
    """Return an input of the images' aspect with about so many pixels, for CPUs; elsewhere the model's own."""
    if not facts.is_cpu:
        return {}
    height, width = facts.image_hw
    aspect = min(4.0, max(0.25, width / height))
    sides = [math.sqrt(pixels / aspect), math.sqrt(pixels * aspect)]
    return {"model.image_size": [max(_STRIDE * 2, round(side / _STRIDE) * _STRIDE) for side in sides]}
