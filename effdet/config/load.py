"""One resolved config from its sources: defaults <- YAML files <- flags <- `section.field=value`; and back to YAML.

Also what settings must fulfil together. omegaconf merges and checks types in here; what is handed out are plain frozen
dataclasses. No defaults, ranges or help texts belong here, they are in schema.py; the command line is in cli.py.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from effdet.runtime.cores import core_count

from .effdet_line import is_saved_args, saved_args_to_tree
from .options import ConfigError, Option, list_options, nearest
from .schema import DemoConfig, RunConfig, ValidateConfig

_ConfigT = TypeVar("_ConfigT", bound=RunConfig | ValidateConfig | DemoConfig)

OVERFIT: dict[str, Any] = {
    "model.bn_momentum": 0.1,
    "model.drop_path": 0.0,
    "model.freeze_bn_epochs": 5,
    "loss.label_smoothing": 0.0,
    "optim.opt": "adamw",
    "optim.lr": 0.005,
    "optim.weight_decay": 0.0,
    "optim.grad_accum": 1,
    "sched.sched": "cosine",
    "sched.epochs": 20,
    "sched.warmup_epochs": 1.0,
    "sched.cooldown_epochs": 0,
    "sched.warmup_lr": 0.0,
    "sched.min_lr": 0.0,
    "sched.lr_noise": None,
    "ema.enabled": False,
    "data.val_split": 0.0,
    "run.batch_size": 8,
    "run.log_interval": 10,
    "run.val_interval": 20,
    "run.keep_best": 1,
}
"""What `--overfit N` sets beside `data.limit: N`, over YAML files, below flags: a short run that learns by heart."""


def _convert(option: Option, value: Any) -> Any:
    """Bring a value from YAML or the command line into the field's shape; omegaconf checks the type afterwards."""
    if value is None:
        return None
    if option.is_list:
        items = value if isinstance(value, list) else [value]
        if option.kinds == (str,):
            return items
        return [part for item in items for part in (item.split(",") if isinstance(item, str) else [item]) if part != ""]
    if option.kinds == (bool,) and not isinstance(value, bool | str):
        raise ValueError("only true and false are allowed")
    if option.negatable and isinstance(value, bool):
        return option.bare if value else ""
    if len(option.kinds) == 2:  # a number or a text
        if isinstance(value, bool | list | dict):
            raise ValueError("a single number or text is needed")
        if isinstance(value, float) and option.kinds[0] is int:
            raise ValueError("a whole number is needed")
        try:
            return option.kinds[0](value)
        except ValueError:
            return value
    return value


def _new_tree(root: type) -> Any:
    """Return the defaults of a root config as a writeable omegaconf tree."""
    node = OmegaConf.structured(root)
    for part in (node, *(node[section] for section in node)):  # of a frozen dataclass it makes a read-only node
        OmegaConf.set_readonly(part, False)
    return node


def _apply(node: Any, options: dict[str, Option], key: str, value: Any, source: str) -> None:
    """Set one field of the omegaconf tree, or raise a ConfigError that names the source."""
    option = options.get(key)
    if option is None:
        raise ConfigError(f"{source}: unknown setting {key}{nearest(key, list(options))}")
    try:
        OmegaConf.update(node, key, _convert(option, value))
        OmegaConf.to_container(OmegaConf.select(node, key.partition(".")[0]), resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        if isinstance(error, InterpolationResolutionError):
            raise ConfigError(f"{source}: cannot resolve {value!r}: {str(error).splitlines()[0]}") from error
        allowed = option.type_name + (" or null" if option.optional else "")
        raise ConfigError(f"{source}: got {value!r}, must be {allowed}") from error


_PRESETS = Path(__file__).parents[2] / "configs"


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file, or the preset of that name, into plain types; an empty file gives an empty dict."""
    preset = _PRESETS / f"{path}.yaml"
    if not Path(path).exists() and preset.is_file():
        path = preset
    try:
        node = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    return OmegaConf.to_container(node, resolve=False)


def _apply_tree(node: Any, options: dict[str, Option], tree: dict[str, Any], source: str) -> None:
    """Set every field of a tree {section: {field: value}}."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} must hold sections such as 'optim' with fields below, not {type(tree).__name__}")
    sections = {key.partition(".")[0] for key in options}
    for section, fields in tree.items():
        if section not in sections:
            known = sorted(sections) if isinstance(fields, dict) else list(options)
            raise ConfigError(f"{source}: unknown setting {section}{nearest(str(section), known)}")
        if fields is not None and not isinstance(fields, dict):
            raise ConfigError(f"{source}: {section} is a section, it needs fields below it, got {fields!r}")
        for name, value in (fields or {}).items():
            _apply(node, options, f"{section}.{name}", value, f"{source}: {section}.{name}")


def load_config(
    root: type[_ConfigT],
    files: Sequence[str | Path] = (),
    flags: dict[str, tuple[str, Any]] | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    base: Mapping[str, Any] | None = None,
) -> _ConfigT:
    """Merge defaults, a recipe, YAML files, flags and overrides, in this order, and check the result.

    Args:
        root: RunConfig, ValidateConfig or DemoConfig.
        files: YAML files that hold differences only; a later one wins.
        flags: dotted key -> (spelling shown in messages, value).
        overrides: pairs of dotted key and value in YAML's notation.
        base: dotted key -> value of a recipe.

    Returns:
        A new instance of `root`.

    Raises:
        ConfigError: an unreadable file, an unknown setting, a wrong type, a value out of range, a contradiction.
    """
    options, node = list_options(root), _new_tree(root)
    for key, value in (base or {}).items():
        _apply(node, options, key, value, "recipe")
    for path in files:
        tree = read_yaml(path)
        if root is RunConfig and is_saved_args(tree):
            tree = saved_args_to_tree(tree, str(path))
        _apply_tree(node, options, tree, str(path))
    if "run.overfit" in {*(flags or {}), *(key for key, _ in overrides)}:
        for key, value in OVERFIT.items():
            _apply(node, options, key, value, "--overfit")
    batch_below = OmegaConf.select(node, "run.batch_size")
    for key, (spelling, value) in (flags or {}).items():
        _apply(node, options, key, value, f"argument {spelling}")
    for key, text in overrides:
        option = options.get(key)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        if option is not None and not option.is_list and str in option.kinds:
            keep = value is None and option.optional or option.negatable and isinstance(value, bool)
            value = value if keep else text
        _apply(node, options, key, value, f"{key}={text}")
    if node.run.get("batch_size") == "auto" and node.optim.lr_batch is None:
        node.optim.lr_batch = batch_below if isinstance(batch_below, int) else RunConfig().run.batch_size
    if node.run.get("overfit") and not node.data.limit:
        node.data.limit = node.run.overfit
    cfg: Any = OmegaConf.to_object(node)  # a `root`, as the tree was made of one
    return check_config(cfg)


def replace_settings(cfg: _ConfigT, **sections: dict[str, Any]) -> _ConfigT:
    """Return a copy with other values: `replace_settings(cfg, optim={"lr": 0.1}, run={"batch_size": 8})`."""
    parts = {name: dataclasses.replace(getattr(cfg, name), **values) for name, values in sections.items()}
    return dataclasses.replace(cfg, **parts)


# ---- what settings must fulfil ----


def check_config(cfg: _ConfigT) -> _ConfigT:
    """Check the ranges of every field and the fields against each other; make a single image size square.

    Args:
        cfg: a RunConfig, ValidateConfig or DemoConfig whose types are right, as `load_config` sees to.

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
    return replace_settings(cfg, model={"image_size": [*size, *size]}) if size is not None and len(size) == 1 else cfg


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
    half = cfg.amp.enabled and cfg.amp.opt_level != "O0" and cfg.amp.dtype == "float16"
    _require(
        scale == "dynamic" or half,
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


# ---- to disk and back ----


def to_plain(cfg: Any) -> dict[str, dict[str, Any]]:
    """Return a config as dicts, lists, numbers, texts, booleans and None, fit for a checkpoint."""
    return dataclasses.asdict(cfg)


def from_plain(plain: dict[str, Any]) -> RunConfig:
    """Make a config of train.py from what `to_plain` returned; fields that are missing get their default.

    Raises:
        ConfigError: an unknown setting, a wrong type or a value out of range.
    """
    node = _new_tree(RunConfig)
    _apply_tree(node, list_options(RunConfig), plain, "saved config")
    cfg: Any = OmegaConf.to_object(node)
    return check_config(cfg)


def dump_yaml(cfg: Any) -> str:
    """Return a config as YAML with every field; `-c` loads it back to an equal config."""
    # omegaconf's writer, not yaml's: only it quotes texts such as 1e5 that its own reader takes for numbers
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(cfg)))


# ---- global numbers to numbers per device ----


def split_over_devices(total: int, devices: int, what: str = "batch size", zero_ok: bool = False) -> int:
    """Split a global count evenly.

    Args:
        total: the count over all devices.
        devices: at least 1.
        what: its name in the message.
        zero_ok: allow a total of 0 (as for loader processes).

    Returns:
        The count per device.

    Raises:
        ConfigError: the count cannot be split evenly; the text names the nearest valid ones.
    """
    if devices < 1:
        raise ConfigError(f"the number of devices must be at least 1, got {devices}")
    if total % devices == 0 and (total > 0 or total == 0 and zero_ok):
        return total // devices
    lower = max(total, 0) // devices * devices
    valid = [str(count) for count in (lower, lower + devices) if count > 0 or zero_ok]
    raise ConfigError(
        f"{what} {total} cannot be split evenly over {devices} devices; nearest valid: {' or '.join(valid)}"
    )


def workers_per_device(workers: int | None, devices: int) -> int:
    """Return the loader processes of one device: the even split of a global count.

    Args:
        workers: over all devices; 0: load in the main process; None: up to 4 per device, no more than there are cores.
        devices: at least 1.

    Raises:
        ConfigError: the count cannot be split evenly.
    """
    if workers is None:
        return max(1, min(4, core_count() // devices))
    return split_over_devices(workers, devices, "workers", zero_ok=True)
