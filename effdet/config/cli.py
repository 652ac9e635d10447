"""The command lines of the scripts.

The parser is generated from schema.py, so every flag sets exactly one field. What becomes of older scripts' flags and
lines is in effdet_flags.py and effdet_line.py.
"""

import argparse
import logging
import os
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from effdet.runtime.console import error_line, typed

from . import effdet_line
from .effdet_flags import REFUSED
from .foreign_flags import FOREIGN
from .load import load_config, read_yaml
from .options import ConfigError, Option, list_options, nearest
from .schema import DemoConfig, RunConfig, ValidateConfig

_logger = logging.getLogger(__name__)

_FIRST = (  # what --help shows, in this order, as far as a script has it; --help-all has the rest
    "data.root",
    "model.name",
    "run.checkpoint",
    "sched.epochs",
    "run.batch_size",
    "model.image_size",
    "run.device",
    "run.output",
    "run.results",
    "run.score_thr",
    "run.recursive",
    "run.resume",
    "run.check",
    "run.images",
)

_ConfigT = TypeVar("_ConfigT", bound=RunConfig | ValidateConfig | DemoConfig)


class _Record(argparse.Action):
    """Remember every spelling and value given for a field, so that contradictions can be told from repetitions."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if self.nargs == 0:
            values = self.const[option_string]
        given = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, [*given, (option_string, values)])


class _FewHelp(argparse.Action):
    """Show what most people need, and exit."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        parser.few().print_help()
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """Report an error in one line, without the usage of a hundred flags."""

    raises = False
    """Whether an error is raised, for a caller in Python."""

    few: "Callable[[], _Parser]"
    """Make the parser whose help is short."""

    def error(self, message: str) -> NoReturn:
        if self.raises:
            raise ConfigError(message)
        self.exit(2, error_line(self.prog, f"{message} (--help-all lists everything)\n"))


def default_text(option: Option) -> str:
    """Return the default of a field in the words of the help."""
    default = option.default
    if default is None:
        return option.none
    if isinstance(default, list):
        return ",".join(map(str, default)) or "none"
    return {True: "on", False: "off"}[default] if isinstance(default, bool) else str(default) or "none"


def value_text(option: Option) -> str:
    """Return the placeholder of a field's value; empty for a flag that takes none."""
    if option.kinds == (bool,):
        return ""
    words = "|".join(word or "''" for word in option.choices)
    return option.metavar or words or {int: "N", float: "X", str: "NAME"}[option.kinds[0]]


def _off(flags: Sequence[str]) -> list[str]:
    return ["--no-" + flag[2:] for flag in flags if flag.startswith("--")]


def _help_text(option: Option) -> str:
    limits = "" if option.choices else option.range_text
    return f"{option.text}{f' [{limits}]' if limits else ''} (default: {default_text(option)})".replace("%", "%%")


def _build_parser(root: type, prog: str, about: str, positional: str, everything: bool = True) -> _Parser:
    """Generate the parser of one script: a group per section, a flag per field; `about` heads and ends the help.

    Not `everything`, there is one group, of the flags that most people need.
    """
    what, _, examples = about.strip().partition("\n\n")
    parser = _Parser(
        prog=prog,
        description=textwrap.fill(what, 78),
        epilog=examples,
        allow_abbrev=False,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"{prog} [-c FILE] [--flag value ...] [section.field=value ...]{positional}",
    )
    parser.few = lambda: _build_parser(root, prog, about, positional, everything=False)
    shown = parser.add_argument_group("options" if everything else "what most people need")
    shown.add_argument("-h", "--help", action=_FewHelp, help="show what most people need, and exit")
    shown.add_argument("--help-all", action="help", help="show every option, and exit")
    shown.add_argument(
        "-c",
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file with the settings that differ from the defaults, or the name of a preset, such as own_data; "
        "give it again for more files, the later one wins",
    )
    groups: dict[str, Any] = {}
    plain: dict[str, list[str]] = {}
    options = list_options(root)
    if not everything:
        options = {key: options[key] for key in _FIRST if key in options}
    for key, option in options.items():
        section = key.partition(".")[0]
        if not everything:
            groups[section] = shown
        elif section not in groups:
            section_type = typing.get_type_hints(root)[section]
            groups[section] = parser.add_argument_group(section, textwrap.fill(section_type.__doc__, 76))
        flags = option.spellings
        if positional and key == "run.images":
            parser.description = f"{parser.description}\n" + textwrap.fill(f"The arguments: {option.text}.", 78)
            continue
        if not flags:
            plain.setdefault(section, []).append(f"{key}: {_help_text(option)}")
            continue
        common = {"dest": key, "default": None, "action": _Record, "help": _help_text(option)}
        if option.kinds == (bool,):
            values = dict.fromkeys(flags, True) | {off: False for off in _off(flags)}
            groups[section].add_argument(*values, nargs=0, const=values, **common)
        else:
            extra = {"nargs": "?", "const": option.bare} if option.bare else {}
            groups[section].add_argument(*flags, metavar=value_text(option), **extra, **common)
            if option.negatable:
                nothing: dict[str, Any] = dict.fromkeys(_off(flags), "")
                common["help"] = "without it"
                groups[section].add_argument(*nothing, nargs=0, const=nothing, **common)
    for section, lines in plain.items():
        wrapped = [textwrap.fill(line, 76, initial_indent="  ", subsequent_indent="    ") for line in lines]
        wrapped.insert(0, "\nWithout a flag, only in YAML or as section.field=value:")
        groups[section].description += "\n".join(wrapped)
    return parser


_NUMBER = re.compile(r"[-+]?[\d.][\d.eE+,-]*")


def _prepare_argv(argv: Sequence[str], options: dict[str, Option]) -> list[str]:
    """Make each flag and its values one token, so that no flag swallows an override or an image behind it.

    `--lr-noise 0.4 0.9 optim.lr=1` becomes `--lr-noise=0.4,0.9 optim.lr=1`; a bare `--pretrained` gets its value.
    """
    lists = {flag for option in options.values() if option.is_list for flag in option.spellings}
    bare = {flag: option.bare for option in options.values() if option.bare for flag in option.spellings}
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


def _split_override(token: str, options: dict[str, Option]) -> tuple[str, str] | None:
    """Return key and value of `section.field=value`; None when the token does not name a section of the config."""
    key, equals, value = token.partition("=")
    sections = {option.partition(".")[0] for option in options}
    is_override = equals and key.partition(".")[0] in sections and re.fullmatch(r"\w+(\.\w+)+", key)
    return (key, value) if is_override else None


def _flag_values(namespace: argparse.Namespace, options: dict[str, Option]) -> dict[str, tuple[str, Any]]:
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


_WEIGHTS_FLAGS = ("--resume", "--initial-checkpoint", "--pretrained")


def _refuse_trainings(flags: Sequence[str]) -> None:
    """Raise for flags that only train.py has, in a line of another script: say of all of them what to do.

    Such a line is that of the original Ascend port's eval_npu.py, which took every flag of its training.
    """
    options = list_options(RunConfig).values()
    known = {word for option in options for word in (*option.spellings, *_off(option.spellings))}
    of_training = [flag for flag in dict.fromkeys(flags) if flag in known]
    weights = [flag for flag in of_training if flag in _WEIGHTS_FLAGS]
    others = [flag for flag in of_training if flag not in _WEIGHTS_FLAGS]
    advice = [f"instead of {' and '.join(weights)} use --checkpoint FILE"] if weights else []
    if others:
        verb, them = ("has", "it") if len(others) == 1 else ("have", "them")
        advice.append(f"{', '.join(others)} {verb} no effect here, leave {them} out")
    if advice:
        raise ConfigError(f"nothing is trained here: {'; '.join(advice)}")


def _refuse_unknown(extras: list[str], parser: _Parser, root: type) -> None:
    """Raise for flags nobody knows, with the successor of a gone one or the nearest valid name."""
    words = [token.partition("=")[0] for token in extras]
    flags = [flag for flag in words if flag.startswith("-") and flag != "-" and not _NUMBER.fullmatch(flag)]
    if root is not RunConfig:
        _refuse_trainings(flags)
    for flag in flags:
        if flag in REFUSED:
            raise ConfigError(f"{flag} is gone: {REFUSED[flag]}")
        if (name := flag.replace("_", "-")) in FOREIGN:
            raise ConfigError(f"{flag} is another trainer's: {FOREIGN[name]}")
        known = [spelling for action in parser._actions for spelling in action.option_strings]
        raise ConfigError(f"unknown flag {flag}{nearest(flag, known)}")


def in_our_words(prog: str, argv: Sequence[str] | None = None) -> list[str]:
    """Return a command line with what is effdet 0.4.1's put into our words, and say in the log what became of it.

    Args:
        prog: the script's name, as train.py.
        argv: the arguments without it; None: those of the process.

    Returns:
        The arguments to parse, and to pass on to other processes; those given where nothing is effdet's.

    Raises:
        SystemExit: status 2 after one line on standard error, from the first of several processes.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        line = effdet_line.translate(prog, sys.argv[1:] if argv is None else argv, read_yaml)
    except ConfigError as error:
        parser = _Parser(prog=typed(prog))
        parser.error(str(error)) if is_first else parser.exit(2)
    for note in line.notes if is_first else ():
        _logger.warning("%s: %s", typed(prog), note)
    return line.words


def _parse(
    root: type[_ConfigT],
    prog: str,
    about: str,
    argv: Sequence[str] | None,
    images: bool = False,
    base: Mapping[str, Any] | None = None,
) -> _ConfigT:
    """Parse one script's command line; print one line and exit with status 2 when it is wrong."""
    about = about if typed(prog) == prog else about.replace(f"python {prog}", typed(prog))
    parser = _build_parser(root, typed(prog), about, "\n               [IMAGE ...]" if images else "")
    try:
        return _read(parser, root, in_our_words(prog, argv), images, base)
    except ConfigError as error:
        parser.error(str(error))


def _read(
    parser: _Parser, root: type[_ConfigT], words: Sequence[str], images: bool, base: Mapping[str, Any] | None
) -> _ConfigT:
    """Return the config of a command line.

    Raises:
        ConfigError: it is wrong.
    """
    options = list_options(root)
    namespace, extras = parser.parse_known_args(_prepare_argv(words, options))
    _refuse_unknown(extras, parser, root)
    overrides = [_split_override(token, options) for token in extras]
    stray = [token for token, override in zip(extras, overrides, strict=True) if override is None]
    flags = _flag_values(namespace, options)
    if images and stray:
        flags["run.images"] = ("IMAGE", stray)
    elif len(stray) == 1 and "=" not in stray[0] and "data.root" not in flags:
        flags["data.root"] = ("DIR", stray[0])
        _logger.warning("%s: %s is taken for the data folder, as if --root came before it", parser.prog, stray[0])
    elif stray:
        key, equals, _ = stray[0].partition("=")
        if equals and (name := "--" + key.replace("_", "-")) in FOREIGN:
            raise ConfigError(f"{key} is another trainer's: {FOREIGN[name]}")
        hint = nearest(key, list(options)) if equals else ". The data folder is given with --root DIR"
        raise ConfigError(f"unknown setting {key}{hint}" if equals else f"unexpected argument {stray[0]}{hint}")
    return load_config(root, namespace.config, flags, [pair for pair in overrides if pair], base)


def parse_train_args(
    argv: Sequence[str] | None = None, about: str = "", base: Mapping[str, Any] | None = None
) -> RunConfig:
    """Parse the command line of train.py.

    Args:
        argv: the arguments without the program's name; None: those of the process.
        about: text of --help: what the script does, then, after an empty line, examples.
        base: settings of a recipe, which replace defaults; what the command line says wins.

    Returns:
        The resolved and checked config.

    Raises:
        SystemExit: status 2 after one line on standard error when something is wrong; status 0 after --help.
    """
    return _parse(RunConfig, "train.py", about, argv, base=base)


def read_train_args(words: Sequence[str]) -> RunConfig:
    """Return the config of train.py's command line for a caller in Python.

    Raises:
        ConfigError: it is wrong, a kind of ValueError.
    """
    parser = _build_parser(RunConfig, "train", "", "")
    parser.raises = True
    return _read(parser, RunConfig, words, False, None)


def parse_check_args(argv: Sequence[str] | None = None, base: Mapping[str, Any] | None = None) -> RunConfig:
    """Parse the command line of `python -m effdet.datacheck [ROOT]`: train.py's flags; see `parse_train_args`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-") and "=" not in words[0]:
        words.insert(0, "--root")
    return _parse(
        RunConfig,
        "python -m effdet.datacheck",
        "Check a data set before training: ROOT (or "
        "--root ROOT), then the flags that the training will get, as a command line of train.py has them; "
        "those that count here are the data's, --model, --image-size, the anchors', -j and --html.",
        [*words, "--check"],
        base=base,
    )


def parse_validate_args(argv: Sequence[str] | None = None, about: str = "") -> ValidateConfig:
    """Parse the command line of validate.py; see `parse_train_args`."""
    return _parse(ValidateConfig, "validate.py", about, argv)


def parse_demo_args(argv: Sequence[str] | None = None, about: str = "") -> DemoConfig:
    """Parse the command line of demo.py, whose positional arguments become `run.images`; see `parse_train_args`."""
    return _parse(DemoConfig, "demo.py", about, argv, images=True)
