"""One resolved config from its sources: defaults <- YAML files <- flags <- `section.field=value`; and back to YAML.

What settings must fulfil is in check.py. omegaconf merges and checks types in here; what is handed out are plain frozen
dataclasses. No defaults, ranges or help texts belong here, they are in schema.py; the command line is in cli.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from effdet.runtime.cores import core_count

from .check import check_config
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
    "optim.lr": 0.01,
    "optim.weight_decay": 0.0,
    "optim.grad_accum": 1,
    "sched.sched": "cosine",
    "sched.epochs": 14,
    "sched.warmup_epochs": 1.0,
    "sched.cooldown_epochs": 0,
    "sched.warmup_lr": 0.0,
    "sched.min_lr": 0.0,
    "sched.lr_noise": None,
    "ema.enabled": False,
    "data.val_split": 0.0,
    "run.batch_size": 8,
    "run.log_interval": 10,
    "run.val_interval": 14,
    "run.keep_best": 1,
}
"""What `--overfit N` sets beside `data.limit: N`, over YAML files, below flags: a short run that learns by heart."""


def _convert(option: Option, value: Any) -> Any:
    """Bring a value from YAML or the command line into the field's shape; omegaconf checks the type afterwards."""
    if value is None:
        return None
    if option.is_list:
        items = value if isinstance(value, list) else [value]
        if option.kinds == (str,) and not option.choices:  # texts of the user's own may hold commas
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


_PRESETS = Path(__file__).parent / "presets"  # the checkout's configs/, by a link; in a wheel a folder of its own


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file, or the preset of that name, into plain types; an empty file gives an empty dict."""
    preset = _PRESETS / f"{str(path).removeprefix('configs/').removesuffix('.yaml')}.yaml"
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
