"""From a command line to one resolved config: defaults <- YAML files <- flags <- `section.field=value`.

The parser is generated from schema.py, so every flag sets exactly one field. omegaconf merges and checks types in
here; what is handed out are plain dataclasses. No defaults, ranges or help texts belong here, they are in schema.py.
"""
import argparse
import dataclasses
import difflib
import os
import re
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from .schema import ConfigError, DemoConfig, RunConfig, ValidateConfig, check_config, flags_of, range_text

__all__ = [
    "ConfigError", "REFUSED", "dump_yaml", "from_plain", "load_config", "parse_demo_args", "parse_train_args",
    "parse_validate_args", "split_over_devices", "to_plain", "workers_per_device",
]
_ConfigT = TypeVar("_ConfigT")

_AMP = "use --amp with --opt-level O1 or O2, and --amp-dtype"
_LAUNCH = "use --device-list 0,1,..., or start the script with torchrun, which passes ranks in the environment"
_NEVER = "the option never had an effect; drop it"
REFUSED: dict[str, str] = {
    "--torchscript": "TorchScript is not used any more: post-processing is plain tensor code; drop it",
    "--torchcompile": "the model runs uncompiled; drop it",
    "--jit-loss": "the loss is plain tensor code; drop it",
    "--no-jit-loss": "the loss is plain tensor code; drop it",
    "--apex-amp": _AMP,
    "--native-amp": _AMP,
    "--pin-mem": "host memory is pinned whenever the device gains from it; drop it",
    "--no-prefetcher": "pictures always travel as uint8 and are normalised on the device; drop it",
    "--bench-labeler": "targets are labelled on the device in every run; drop it",
    "--no-bench-labeler": "targets are labelled on the device in every run; drop it",
    "--no-resume-opt": "use --initial-checkpoint FILE, which takes the weights and nothing else",
    "--mean": "mean and standard deviation come from the model table; drop it",
    "--std": "mean and standard deviation come from the model table; drop it",
    "--dataset": "data is read in COCO format: name it with --root DIR, or --val-images and --val-ann",
    "--split": "name the pictures to evaluate with --val-images and --val-ann",
    "--color-jitter": _NEVER,
    "--aa": _NEVER,
    "--tta": _NEVER,
    "--mixup": _NEVER,
    "--mixup-off-epoch": _NEVER,
    "--eval-metric": "checkpoints are ranked by COCO AP; drop it",
    "--recovery-interval": "use --save-every N, which counts epochs",
    "--save-images": "draw predictions with demo.py",
    "--local_rank": _LAUNCH,
    "--local-rank": _LAUNCH,
    "--rank": _LAUNCH,
    "--world-size": _LAUNCH,
    "--num-gpu": _LAUNCH,
    "--multiprocessing-distributed": _LAUNCH,
    "--gpu": "use --device NAME and --device-list N",
    "--dist-url": "use --addr HOST and --master-port PORT",
    "--dist-backend": "the backend follows from --device; drop it",
    "--dist-group-size": "--sync-bn spans all processes; drop it",
    "--data_path": "the scripts under test/ take it; here use --root DIR",
    "--pth_path": "the scripts under test/ take it; here use --resume, --initial-checkpoint or --checkpoint FILE",
}
"""Flags of effdet's and the original Ascend port's scripts that are gone, with what to do instead."""


# ---- what the schema declares, as a flat table ----

@dataclasses.dataclass(frozen=True)
class _Option:
    """One field of one section; `kinds` are the types it may have, `is_list` whether it holds a list of them."""

    key: str
    item: dataclasses.Field
    kinds: tuple[type, ...]
    is_list: bool
    optional: bool

    @property
    def type_name(self) -> str:
        if self.is_list:
            return {int: "a list of whole numbers", float: "a list of numbers", str: "a list of texts"}[self.kinds[0]]
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        return " or ".join(words[kind] for kind in self.kinds)

    @property
    def default(self) -> Any:
        factory = self.item.default_factory
        return self.item.default if factory is dataclasses.MISSING else factory()


def _flatten_type(hint: Any) -> list[Any]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return [part for one in typing.get_args(hint) for part in _flatten_type(one)] if union else [hint]


def _list_options(root: type) -> dict[str, _Option]:
    """Return every field of a root config under its dotted key."""
    options = {}
    for section, section_type in typing.get_type_hints(root).items():
        hints = typing.get_type_hints(section_type)
        for item in dataclasses.fields(section_type):
            parts = _flatten_type(hints[item.name])
            kinds = [part for part in parts if part is not type(None)]
            is_list = typing.get_origin(kinds[0]) is list
            kinds = list(typing.get_args(kinds[0])) if is_list else kinds
            key = f"{section}.{item.name}"
            options[key] = _Option(key, item, tuple(kinds), is_list, type(None) in parts)
    return options


def _nearest(word: str, known: Sequence[str]) -> str:
    """Return ', did you mean ...?' with the nearest known name; empty when none is near.

    A dotted name is also looked up by its last part, so that `lr` finds `optim.lr`.
    """
    tails = {name.rpartition(".")[2]: name for name in known}
    found = difflib.get_close_matches(word, known, 1)
    if not found or word.rpartition(".")[2] in tails:
        near = difflib.get_close_matches(word.rpartition(".")[2], tails, 1)
        found = [tails[near[0]]] if near else found
    return f", did you mean {found[0]}?" if found else ""


# ---- the command line ----

class _Record(argparse.Action):
    """Remember every spelling and value given for a field, so that contradictions can be told from repetitions."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if self.nargs == 0:
            values = option_string not in self.const
        given = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, [*given, (option_string, values)])


class _Parser(argparse.ArgumentParser):
    """Report an error in one line, without the usage of a hundred flags."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists everything)\n")


def _off_spellings(option: _Option) -> tuple[str, ...]:
    """Return the spellings that switch a boolean off."""
    made = tuple("--no-" + flag[2:] for flag in flags_of(option.item) if flag.startswith("--"))
    return made + option.item.metadata["off"]


def _help_text(option: _Option) -> str:
    meta, default = option.item.metadata, option.default
    if default is None:
        shown = meta["none"]
    elif isinstance(default, list):
        shown = ",".join(map(str, default)) or "none"
    else:
        shown = {True: "on", False: "off"}[default] if isinstance(default, bool) else str(default) or "none"
    limits = "" if meta["choices"] else range_text(option.item)
    return f"{meta['text']}{f' [{limits}]' if limits else ''} (default: {shown})".replace("%", "%%")


def _build_parser(root: type, prog: str, what: str, positional: str) -> _Parser:
    """Generate the parser of one script: a group per section, a flag per field."""
    parser = _Parser(prog=prog, description=what, allow_abbrev=False,
                     usage=f"{prog} [-c FILE.yaml] [--flag value ...] [section.field=value ...]{positional}")
    parser.add_argument("-c", "--config", action="append", default=[], metavar="FILE",
                        help="YAML file with the settings that differ from the defaults; give it again for more files, "
                             "the later one wins")
    groups: dict[str, Any] = {}
    plain: dict[str, list[str]] = {}
    options = _list_options(root)
    for key, option in options.items():
        section = key.partition(".")[0]
        if section not in groups:
            section_type = typing.get_type_hints(root)[section]
            groups[section] = parser.add_argument_group(section, section_type.__doc__)
        flags, meta = list(flags_of(option.item)), option.item.metadata
        if positional and key == "run.images":
            parser.description += f" The arguments: {meta['text']}."
            continue
        if not flags:
            plain.setdefault(section, []).append(f"{key}: {_help_text(option)}")
            continue
        common = {"dest": key, "default": None, "action": _Record, "help": _help_text(option)}
        if option.kinds == (bool,):
            off = _off_spellings(option)
            groups[section].add_argument(*flags, *off, nargs=0, const=off, **common)
        else:
            words = "|".join(word or "''" for word in meta["choices"])
            metavar = words or meta["metavar"] or {int: "N", float: "X", str: "NAME"}[option.kinds[0]]
            extra = {"nargs": "?", "const": meta["bare"]} if meta["bare"] else {}
            groups[section].add_argument(*flags, metavar=metavar, **extra, **common)
    for section, lines in plain.items():
        groups[section].description += " Without a flag, only in YAML or as section.field=value: " + ". ".join(lines)
    return parser


_NUMBER = re.compile(r"[-+]?[\d.][\d.eE+,-]*")


def _prepare_argv(argv: Sequence[str], options: dict[str, _Option]) -> list[str]:
    """Make each flag and its values one token, so that no flag swallows an override or a picture behind it.

    `--lr-noise 0.4 0.9 optim.lr=1` becomes `--lr-noise=0.4,0.9 optim.lr=1`; a bare `--pretrained` gets its value.
    """
    lists = {flag for option in options.values() if option.is_list for flag in flags_of(option.item)}
    bare = {flag: option.item.metadata["bare"] for option in options.values() if option.item.metadata["bare"]
            for flag in flags_of(option.item)}
    ready, rest = [], list(argv)
    while rest:
        token = rest.pop(0)
        if token in lists and rest:
            values = [rest.pop(0)] if not rest[0].startswith("--") else []
            while rest and values and _NUMBER.fullmatch(values[-1]) and _NUMBER.fullmatch(rest[0]):
                values.append(rest.pop(0))
            token = f"{token}={','.join(values)}" if values else token
        elif token in bare and rest and _split_override(rest[0], options):
            token = f"{token}={bare[token]}"
        ready.append(token)
    return ready


def _split_override(token: str, options: dict[str, _Option]) -> tuple[str, str] | None:
    """Return key and value of `section.field=value`; None when the token does not name a section of the config."""
    key, equals, value = token.partition("=")
    sections = {option.partition(".")[0] for option in options}
    is_override = equals and key.partition(".")[0] in sections and re.fullmatch(r"\w+(\.\w+)+", key)
    return (key, value) if is_override else None


def _flag_values(namespace: argparse.Namespace, options: dict[str, _Option]) -> dict[str, tuple[str, Any]]:
    """Return key -> (spelling, value) of the flags given; the same spelling again wins, another one must agree."""
    found: dict[str, tuple[str, Any]] = {}
    for key in options:
        last: dict[str, Any] = dict(getattr(namespace, key, None) or [])
        spellings = list(last)
        for one, other in zip(spellings, spellings[1:], strict=False):
            if last[one] != last[other]:
                values = "" if isinstance(last[one], bool) else f" ({last[one]} and {last[other]})"
                raise ConfigError(f"{one} and {other} set the same thing to different values{values}: give one of them")
        if last:
            found[key] = (spellings[-1], last[spellings[-1]])
    return found


def _refuse_unknown(extras: list[str], parser: _Parser) -> None:
    """Raise for flags nobody knows, with the successor of a gone one or the nearest valid name."""
    for token in extras:
        flag = token.partition("=")[0]
        if not flag.startswith("-") or _NUMBER.fullmatch(flag):
            continue
        if flag in REFUSED:
            raise ConfigError(f"{flag} is gone: {REFUSED[flag]}")
        known = [spelling for action in parser._actions for spelling in action.option_strings]
        raise ConfigError(f"unknown flag {flag}{_nearest(flag.replace('_', '-'), known)}")


def _parse(root: type[_ConfigT], prog: str, what: str, argv: Sequence[str] | None, images: bool = False) -> _ConfigT:
    """Parse one script's command line; print one line and exit with status 2 when it is wrong."""
    options = _list_options(root)
    parser = _build_parser(root, prog, what, " [IMAGE|FOLDER|GLOB ...]" if images else "")
    namespace, extras = parser.parse_known_args(_prepare_argv(sys.argv[1:] if argv is None else argv, options))
    try:
        _refuse_unknown(extras, parser)
        overrides = [_split_override(token, options) for token in extras]
        stray = [token for token, override in zip(extras, overrides, strict=True) if override is None]
        flags = _flag_values(namespace, options)
        if images and stray:
            flags["run.images"] = ("IMAGE", stray)
        elif stray:
            key, equals, _ = stray[0].partition("=")
            hint = _nearest(key, list(options)) if equals else ". The data folder is given with --root DIR"
            raise ConfigError(f"unknown setting {key}{hint}" if equals else f"unexpected argument {stray[0]}{hint}")
        return load_config(root, namespace.config, flags, [pair for pair in overrides if pair])
    except ConfigError as error:
        parser.error(str(error))


def parse_train_args(argv: Sequence[str] | None = None) -> RunConfig:
    """Parse the command line of train.py.

    Args:
        argv: the arguments without the program's name; None: those of the process.

    Returns:
        The resolved and checked config.

    Raises:
        SystemExit: status 2 after one line on standard error when something is wrong; status 0 after --help.
    """
    return _parse(RunConfig, "train.py", "Train a detector on data in COCO format.", argv)


def parse_validate_args(argv: Sequence[str] | None = None) -> ValidateConfig:
    """Parse the command line of validate.py; see `parse_train_args`."""
    return _parse(ValidateConfig, "validate.py", "Evaluate a detector on data in COCO format.", argv)


def parse_demo_args(argv: Sequence[str] | None = None) -> DemoConfig:
    """Parse the command line of demo.py, whose positional arguments become `run.images`; see `parse_train_args`."""
    return _parse(DemoConfig, "demo.py", "Draw a detector's boxes into pictures.", argv, images=True)


# ---- merging ----

def _convert(option: _Option, value: Any) -> Any:
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
    if option.kinds == (float, str):
        if isinstance(value, bool | list | dict):
            raise ValueError("a single number or text is needed")
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _apply(node: Any, options: dict[str, _Option], key: str, value: Any, source: str) -> None:
    """Set one field of the omegaconf tree, or raise a ConfigError that names the source."""
    option = options.get(key)
    if option is None:
        raise ConfigError(f"{source}: unknown setting {key}{_nearest(key, list(options))}")
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


def _apply_tree(node: Any, options: dict[str, _Option], tree: dict[str, Any], source: str) -> None:
    """Set every field of a tree {section: {field: value}}."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} must hold sections such as 'optim' with fields below, not {type(tree).__name__}")
    sections = {key.partition(".")[0] for key in options}
    for section, fields in tree.items():
        if section not in sections:
            known = sorted(sections) if isinstance(fields, dict) else list(options)
            raise ConfigError(f"{source}: unknown setting {section}{_nearest(str(section), known)}")
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
    options = _list_options(root)
    node = OmegaConf.structured(root)
    for path in files:
        _apply_tree(node, options, _read_yaml(path), str(path))
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
    _apply_tree(node, _list_options(root), plain, "saved config")
    return check_config(OmegaConf.to_object(node))


def dump_yaml(cfg: Any) -> str:
    """Return a config as YAML with every field; `-c` loads it back to an equal config."""
    # omegaconf's writer, not yaml's: only it quotes texts such as 1e5 that its own reader takes for numbers
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(cfg)))


# ---- global numbers to numbers per device ----

def split_over_devices(total: int, devices: int, what: str = "batch size", zero_ok: bool = False) -> int:
    """Split a global count evenly.

    Args:
        total: the count over all devices. devices: at least 1. what: its name in the message.
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
