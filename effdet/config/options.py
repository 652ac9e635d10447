"""What the schema declares, as a flat table: one Option for each field of a run config."""
import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of one section; `kinds` are the types it may have, `is_list` whether it holds a list of them."""

    key: str
    item: dataclasses.Field
    kinds: tuple[type, ...]
    is_list: bool
    optional: bool

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


def nearest(word: str, known: Sequence[str]) -> str:
    """Return ', did you mean ...?' with the nearest known name; empty when none is near.

    A dotted name is also looked up by its last part, so that `lr` finds `optim.lr`.
    """
    tails = {name.rpartition(".")[2]: name for name in known}
    found = difflib.get_close_matches(word, known, 1)
    if not found or word.rpartition(".")[2] in tails:
        near = difflib.get_close_matches(word.rpartition(".")[2], tails, 1)
        found = [tails[near[0]]] if near else found
    return f", did you mean {found[0]}?" if found else ""
