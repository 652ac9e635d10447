"""What one setting is: how schema.py declares it, and what a declaration says, as a flat table of Options.

No setting by name, no file access and no argument parsing belongs here.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """Tell the user which setting is wrong, what was got and what is allowed."""


def setting(
    default: Any,
    text: str,
    *,
    flags: str | None = None,
    none: str = "from the model table",
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    bare: str | None = None,
    negatable: bool = False,
    metavar: str | None = None,
) -> Any:
    """Declare one field of a section.

    Args:
        default: value when nobody sets the field; a list is copied for every instance.
        text: help text: what it is, with its unit; default and range are appended by cli.py.
        flags: spellings on the command line; None: `--` and the field's name; empty: no flag, only YAML and
            `section.field=value`.
        none: what the value None stands for, shown as the default in the help.
        low: inclusive lower bound; all bounds hold for each element of a list.
        high: inclusive upper bound.
        above: exclusive lower bound.
        below: exclusive upper bound.
        choices: the allowed words.
        bare: value meant by the flag without an argument, and by true in YAML; None: the flag needs its argument.
        negatable: `--no-FLAG`, and false in YAML, set the empty text; for texts that have a `bare` value.
        metavar: placeholder of the value in the help.
    """
    meta = {
        "text": text,
        "flags": flags,
        "none": none,
        "low": low,
        "high": high,
        "above": above,
        "below": below,
        "choices": choices,
        "bare": bare,
        "negatable": negatable,
        "metavar": metavar,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of one section; `kinds` are the types it may have, `is_list` whether it holds a list of them."""

    key: str
    item: dataclasses.Field
    kinds: tuple[type, ...]
    is_list: bool
    optional: bool

    def __getattr__(self, name: str) -> Any:
        """What `setting` was told: `text`, `low`, `choices`, ..."""
        try:
            return self.item.metadata[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def spellings(self) -> tuple[str, ...]:
        """The spellings on the command line, the one for messages first; empty: it has no flag."""
        words = ("--" + self.item.name.replace("_", "-"),) if self.flags is None else self.flags.split()
        return tuple(sorted(words, key=lambda word: not word.startswith("--")))

    @property
    def title(self) -> str:
        """The name for messages: `section.field (--flag)`."""
        return self.key + (f" ({self.spellings[0]})" if self.spellings else "")

    @property
    def type_name(self) -> str:
        """The allowed types in words, for messages."""
        if self.is_list:
            return {int: "a list of whole numbers", float: "a list of numbers", str: "a list of texts"}[self.kinds[0]]
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        return " or ".join(words[kind] for kind in self.kinds)

    @property
    def default(self) -> Any:
        """The value when nobody sets the field; a list is a new one each time."""
        factory = self.item.default_factory
        return self.item.default if factory is dataclasses.MISSING else factory()

    @property
    def range_text(self) -> str:
        """The allowed values in words; empty when the type is the only limit."""
        words = ", ".join(repr(word) for word in self.choices)
        if words and self.low is None:
            return "one of " + words
        bounds = [(">=", self.low), (">", self.above), ("<=", self.high), ("<", self.below)]
        text = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
        return f"{text} or {words}" if words else text

    def get(self, cfg: Any) -> Any:
        """Return the field's value in a config."""
        section, name = self.key.split(".")
        return getattr(getattr(cfg, section), name)

    def allows(self, value: Any) -> bool:
        """Return True when a value, each element of a list, lies within the bounds and choices; None always does."""
        if isinstance(value, list):
            return all(self.allows(one) for one in value)
        if value is None or self.choices and isinstance(value, str):
            return value is None or value in self.choices
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return not (
            self.low is not None
            and value < self.low
            or self.high is not None
            and value > self.high
            or self.above is not None
            and value <= self.above
            or self.below is not None
            and value >= self.below
        )


def flatten_type(hint: Any) -> list[Any]:
    """Return the members of a union of types, however nested; any other hint alone."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return [part for one in typing.get_args(hint) for part in flatten_type(one)] if union else [hint]


def list_options(root: type) -> dict[str, Option]:
    """Return every field of a root config under its dotted key."""
    options = {}
    for section, section_type in typing.get_type_hints(root).items():
        hints = typing.get_type_hints(section_type)
        for item in dataclasses.fields(section_type):
            parts = flatten_type(hints[item.name])
            kinds = [part for part in parts if part is not type(None)]
            is_list = typing.get_origin(kinds[0]) is list
            kinds = list(typing.get_args(kinds[0])) if is_list else kinds
            key = f"{section}.{item.name}"
            options[key] = Option(key, item, tuple(kinds), is_list, type(None) in parts)
    return options


def similar_names(word: str, known: Iterable[str]) -> list[str]:
    """Return the known names that `word` is likely a slip of, the likeliest first; none where none is near.

    What counts is the last part of a dotted name, so that `lr` finds `optim.lr`, and no leading dashes, which all flags
    have in common. A whole word of a name finds it too: `batch` is near `batch-size`. The same section comes first.
    """
    tail = _tail(word)
    near = []
    for name in known:
        likeness = difflib.SequenceMatcher(None, _tail(name), tail).ratio()
        if likeness >= _LIKENESS or tail in _tail(name).split("_"):
            near.append((name.rpartition(".")[0] == word.rpartition(".")[0], likeness, name))
    return [name for _, _, name in sorted(near, key=lambda found: found[:2], reverse=True)]


_LIKENESS = 0.75  # difflib's ratio: one letter wrong in four is a slip, more is another word


def _tail(name: str) -> str:
    return name.rpartition(".")[2].lstrip("-").replace("-", "_").lower()


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ', did you mean ...?' with the nearest known name; empty when none is near (`similar_names`)."""
    return "".join(f", did you mean {name}?" for name in similar_names(word, known)[:1])
