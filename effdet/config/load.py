"""One resolved config from its sources: defaults <- YAML files <- flags <- `section.field=value`; and back to YAML.

omegaconf merges and checks types in here; what is handed out are plain dataclasses. No defaults, ranges or help texts
belong here, they are in schema.py; the command line is in cli.py.
"""
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from .check import check_config
from .options import Option, list_options, nearest
from .overfit import OVERFIT
from .schema import ConfigError, RunConfig

__all__ = ["dump_yaml", "from_plain", "load_config", "split_over_devices", "to_plain", "workers_per_device"]
_ConfigT = TypeVar("_ConfigT")


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


def _read_yaml(path: str | Path) -> Any:
    """Read a YAML file into plain types; an empty file gives an empty dict."""
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
    root: type[_ConfigT] = RunConfig, files: Sequence[str | Path] = (),
    flags: dict[str, tuple[str, Any]] | None = None, overrides: Sequence[tuple[str, str]] = (),
) -> _ConfigT:
    """Merge defaults, YAML files, flags and overrides, in this order, and check the result.

    Args:
        root: RunConfig, ValidateConfig or DemoConfig.
        files: YAML files that hold differences only; a later one wins.
        flags: dotted key -> (spelling shown in messages, value).
        overrides: pairs of dotted key and value in YAML's notation.

    Returns:
        A new instance of `root`.

    Raises:
        ConfigError: an unreadable file, an unknown setting, a wrong type, a value out of range, a contradiction.
    """
    options = list_options(root)
    node = OmegaConf.structured(root)
    for path in files:
        _apply_tree(node, options, _read_yaml(path), str(path))
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
        keep_text = option is not None and not option.is_list and str in option.kinds
        if keep_text and not (value is None and option.optional):
            value = text
        _apply(node, options, key, value, f"{key}={text}")
    if node.run.get("batch_size") == "auto" and node.optim.lr_batch is None:
        node.optim.lr_batch = batch_below if isinstance(batch_below, int) else RunConfig().run.batch_size
    return check_config(OmegaConf.to_object(node))


# ---- to disk and back ----

def to_plain(cfg: Any) -> dict[str, dict[str, Any]]:
    """Return a config as dicts, lists, numbers, texts, booleans and None, fit for a checkpoint."""
    return dataclasses.asdict(cfg)


def from_plain(plain: dict[str, Any], root: type[_ConfigT] = RunConfig) -> _ConfigT:
    """Make a config from what `to_plain` returned; fields that are missing get their default.

    Raises:
        ConfigError: an unknown setting, a wrong type or a value out of range.
    """
    node = OmegaConf.structured(root)
    _apply_tree(node, list_options(root), plain, "saved config")
    return check_config(OmegaConf.to_object(node))


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
    raise ConfigError(f"{what} {total} cannot be split evenly over {devices} devices; nearest valid: "
                      f"{' or '.join(valid)}")


def workers_per_device(workers: int | None, devices: int) -> int:
    """Return the loader processes of one device: the even split of a global count.

    Args:
        workers: over all devices; 0: load in the main process; None: up to 4 per device, no more than there are cores.
        devices: at least 1.

    Raises:
        ConfigError: the count cannot be split evenly.
    """
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(4, cores // devices))
    return split_over_devices(workers, devices, "workers", zero_ok=True)
