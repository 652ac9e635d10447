"""Category ids of a dataset <-> class indices of a model.

`category_id` is COCO's number for a class: any integers, with gaps. `class_idx` is the model's: 0..C-1. This file
holds the map between the two and the rule that picks it. What the annotations look like is `annotations.py`'s
business, not this file's.
"""

import itertools
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

_logger = logging.getLogger(__name__)


def _short(values: Iterable, limit: int = 12) -> str:
    values = list(values)
    more = f", ... ({len(values)} in all)" if len(values) > limit else ""
    return ", ".join(str(v) for v in values[:limit]) + more


@dataclass(frozen=True)
class CategoryMap:
    """Map category ids to class indices and back.

    Args:
        ids: the category ids in ascending order, without repeats.
        names: one name for each id.
        num_classes: size of the class axis. Equals len(ids) for a dense map (the k-th id is class k); an id-indexed
            map (class_idx = id - 1, the numbering of the published 90-class COCO weights) may have classes without a
            category.
        id_indexed: which of the two kinds it is.
        indices: for a dense map of classes in another order than that of the ids: the class index of each id.

    Raises:
        ValueError: the fields do not fit together.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    num_classes: int
    id_indexed: bool = False
    indices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(int(i) for i in self.ids))
        object.__setattr__(self, "names", tuple(str(n) for n in self.names))
        object.__setattr__(self, "num_classes", int(self.num_classes))
        object.__setattr__(self, "id_indexed", bool(self.id_indexed))
        if not self.ids:
            raise ValueError("a category map needs at least one category, got none")
        if list(self.ids) != sorted(set(self.ids)):
            raise ValueError(f"category ids must be ascending without repeats, got {_short(self.ids)}")
        if len(self.ids) != len(self.names):
            raise ValueError(f"{len(self.ids)} category ids but {len(self.names)} names: give one name for each id")
        if self.id_indexed and (self.ids[0] < 1 or self.ids[-1] > self.num_classes):
            raise ValueError(
                f"an id-indexed map with {self.num_classes} classes holds ids 1..{self.num_classes}, "
                f"got {self.ids[0]}..{self.ids[-1]}"
            )
        if not self.id_indexed and self.num_classes != len(self.ids):
            raise ValueError(
                f"a dense map has one class for each id: {len(self.ids)} ids but num_classes={self.num_classes}"
            )

        if self.indices is not None:
            object.__setattr__(self, "indices", tuple(int(k) for k in self.indices))
            if self.id_indexed or sorted(self.indices) != list(range(len(self.ids))):
                raise ValueError(f"the class indices of a dense map are 0..{len(self.ids) - 1}, got {self.indices}")

    @classmethod
    def from_categories(cls, categories: Iterable[Mapping[str, Any]], num_classes: int | None = None) -> "CategoryMap":
        """Make a map from the `categories` list of a COCO json: dense, or id-indexed when `num_classes` is given."""
        rows = sorted((int(c["id"]), str(c.get("name", c["id"]))) for c in categories)
        ids, names = tuple(i for i, _ in rows), tuple(n for _, n in rows)
        return cls(ids, names, len(ids) if num_classes is None else num_classes, id_indexed=num_classes is not None)

    @cached_property
    def idx_to_id(self) -> np.ndarray:
        """int64 [C]: the category id of each class index; idx + 1 for a class without a category (id-indexed map)."""
        if self.id_indexed:
            return np.arange(1, self.num_classes + 1)
        ids = np.array(self.ids, dtype=np.int64)
        return ids if self.indices is None else ids[np.argsort(self.indices)]

    @cached_property
    def id_to_idx(self) -> dict[int, int]:
        """The class index of each category id. A dict, because ids may be huge; `to_idx` does whole arrays."""
        if self.id_indexed:
            return {i: i - 1 for i in self.ids}
        return dict(zip(self.ids, self.indices or range(len(self.ids)), strict=True))

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """One name for each class index; 'id N' where an id-indexed map has no category N."""
        known = {self.id_to_idx[i]: name for i, name in zip(self.ids, self.names, strict=True)}
        return tuple(known.get(k, f"id {k + 1}") for k in range(self.num_classes))

    def to_idx(self, category_ids: np.ndarray) -> np.ndarray:
        """Turn category ids [n] into class indices, int64 [n]; -1 for an id that is not in the map."""
        category_ids = np.asarray(category_ids, dtype=np.int64)
        known = np.array(self.ids, dtype=np.int64)
        at = np.minimum(np.searchsorted(known, category_ids), len(known) - 1)
        index = at if self.indices is None else np.array(self.indices)[at]
        return np.where(known[at] == category_ids, category_ids - 1 if self.id_indexed else index, -1).astype(np.int64)

    def to_dict(self) -> dict[str, Any]:
        """Give the map as plain types, for a checkpoint."""
        return {
            "ids": list(self.ids),
            "names": list(self.names),
            "num_classes": self.num_classes,
            "id_indexed": self.id_indexed,
            **({} if self.indices is None else {"indices": list(self.indices)}),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "CategoryMap":
        """Rebuild a map from `to_dict`'s result.

        Raises:
            ValueError: a part is missing, or the parts do not fit together.
        """
        missing = [k for k in ("ids", "names", "num_classes") if k not in state]
        if missing:
            raise ValueError(f"not a stored category map: {missing} missing, keys are {sorted(state)}")
        return cls(
            tuple(state["ids"]),
            tuple(state["names"]),
            state["num_classes"],
            state.get("id_indexed", False),
            state.get("indices"),
        )

    def __str__(self) -> str:
        kind = "id-indexed" if self.id_indexed else "dense" if self.indices is None else "by name"
        return f"{self.num_classes} classes, {kind}, category ids {_short(self.ids)}"


def find_shared_names(categories: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names that several categories have, letter case and white space aside, each with its ids."""
    groups: dict[str, list[tuple[str, Any]]] = {}
    for category in categories:
        name = str(category["name"])
        groups.setdefault(" ".join(name.casefold().split()), []).append((name, category["id"]))
    return [
        f"{' = '.join(map(repr, dict(group)))} of {', '.join(str(i) for _, i in group)}"
        for group in groups.values()
        if len(group) > 1
    ]


def find_empty_classes(category_map: CategoryMap, used_ids: Collection[int]) -> list[str]:
    """Return the categories that are none of `used_ids`, those of boxes: id and name of each."""
    return [f"{i} {name!r}" for i, name in zip(category_map.ids, category_map.names, strict=True) if i not in used_ids]


def effdet_category_map(categories: Iterable[Mapping[str, Any]]) -> CategoryMap:
    """Number classes as effdet 0.4.1 does: the label is the category id.

    An id below 1 makes the map dense, as effdet trained such a class as background; so does one that no float32, which
    carries classes through post-processing, holds exactly.
    """
    dense = CategoryMap.from_categories(categories)
    if dense.ids[0] < 1 or dense.ids[-1] > 2**24 or dense.ids[-1] == dense.num_classes:
        return dense
    return CategoryMap(dense.ids, dense.names, dense.ids[-1], id_indexed=True)


def resolve_category_map(
    categories: Iterable[Mapping[str, Any]],
    num_classes: int | None = None,
    stored: CategoryMap | Mapping[str, Any] | None = None,
    match: str = "name",
    owner: str = "the checkpoint",
) -> CategoryMap:
    """Pick the category map of a run from the json, the class count asked for and the map that is in force already.

    Args:
        categories: the `categories` list of the COCO json.
        num_classes: class count given by the user or by the model; None takes it from the json.
        stored: the map of a checkpoint or of the training split (a `CategoryMap` or its dict), whose classes count.
        match: what tells which class of `stored` a category is: its 'name' or its 'id'.
        owner: whose map `stored` is, for messages.

    Returns:
        The map to use: `stored`, or its classes under the json's ids where the names have others there; without
        `stored` dense when `num_classes` is None or the number of categories, else id-indexed.

    Raises:
        ValueError: the sides contradict each other; the text says both and what to do.
    """
    dense = CategoryMap.from_categories(categories)
    if stored is not None:
        stored = stored if isinstance(stored, CategoryMap) else CategoryMap.from_dict(stored)
        if num_classes is not None and num_classes != stored.num_classes:
            raise ValueError(
                f"num_classes is {num_classes}, but {owner} has {stored.num_classes} classes "
                f"({_short(stored.names)}). Leave num_classes out, or start from the weights with a new head."
            )
        return _match_ids(dense, stored, owner) if match == "id" else _match_names(dense, stored, owner)
    if num_classes is None or num_classes == dense.num_classes:
        return dense
    low, high = dense.ids[0], dense.ids[-1]
    if low >= 1 and num_classes >= high:
        _logger.info(
            "%d classes for %d categories with ids %d..%d: class index = category id - 1, as in published COCO weights",
            num_classes,
            dense.num_classes,
            low,
            high,
        )
        return CategoryMap(dense.ids, dense.names, num_classes, id_indexed=True)
    also = (
        f", or at least {high} to number the classes by category id (as published COCO weights do)" if low >= 1 else ""
    )
    raise ValueError(
        f"num_classes is {num_classes}, but the json has {dense.num_classes} categories with ids {_short(dense.ids)}. "
        f"Leave num_classes out, or set it to {dense.num_classes}{also}."
    )


def _match_names(json_map: CategoryMap, stored: CategoryMap, owner: str) -> CategoryMap:
    """Return `stored`, or its classes by the ids that their names have in the json.

    Categories that are called by their ids, as all are where a json gives no names, are matched by them.
    """
    theirs = dict(zip(stored.ids, stored.names, strict=True))
    if all(theirs.get(i) == name for i, name in zip(json_map.ids, json_map.names, strict=True)):
        return stored
    if _is_nameless(json_map) or _is_nameless(stored):
        return _match_ids(json_map, stored, owner)
    names = [f"{i} {name!r}" for i, name in zip(json_map.ids, json_map.names, strict=True)]
    unknown = [
        f"{i} {name!r}" for i, name in zip(json_map.ids, json_map.names, strict=True) if name not in theirs.values()
    ]
    if unknown:
        by_id = ", rename the classes"
        if theirs.keys() >= set(json_map.ids):
            by_id += ", or, where the ids mean the same under other names, match them by --match-classes id"
        raise ValueError(
            f"the json has the classes {_short(names)}, {owner} has {_short(f'{i} {n!r}' for i, n in theirs.items())}: "
            f"it does not know {_short(unknown)}. {_remedy(owner)}{by_id}."
        )
    shared = sorted(name for name in set(json_map.names) if json_map.names.count(name) + stored.names.count(name) > 2)
    if shared:
        raise ValueError(
            f"the json and {owner} number their classes differently, and {_short(map(repr, shared))} is the name of "
            "several: give each class a name of its own, or match by --match-classes id where the ids mean the same."
        )
    index = {name: stored.id_to_idx[i] for i, name in theirs.items()}
    ids = {index[name]: i for i, name in zip(json_map.ids, json_map.names, strict=True)}
    free = itertools.filterfalse({*json_map.ids, *stored.ids}.__contains__, itertools.count(1))
    for k in range(stored.num_classes):  # classes that the json lacks get ids that nothing in it has
        if k not in ids:
            ids[k] = next(free)
    moved = [
        f"{i} {name!r} is {stored.idx_to_id[index[name]]} in {owner}"
        for i, name in zip(json_map.ids, json_map.names, strict=True)
        if stored.idx_to_id[index[name]] != i
    ]
    _logger.warning("classes matched by name, as their ids differ: %s", _short(moved))
    order = sorted(ids, key=ids.__getitem__)
    return CategoryMap(
        tuple(ids[k] for k in order),
        tuple(stored.class_names[k] for k in order),
        stored.num_classes,
        indices=tuple(order),
    )


def _is_nameless(category_map: CategoryMap) -> bool:
    return all(name == str(i) for i, name in zip(category_map.ids, category_map.names, strict=True))


def _remedy(owner: str) -> str:
    if "checkpoint" in owner:
        return "Use the json it was trained for, or start from the weights with a new head"
    return "Add the classes to it"


def _match_ids(json_map: CategoryMap, stored: CategoryMap, owner: str) -> CategoryMap:
    unknown = sorted(set(json_map.ids) - set(stored.ids))
    if unknown:
        raise ValueError(
            f"the json has category ids {_short(json_map.ids)}, {owner} has {_short(stored.ids)}: it does not know "
            f"{_short(unknown)}. {_remedy(owner)}, or renumber the categories."
        )
    theirs = dict(zip(stored.ids, stored.names, strict=True))
    renamed = [
        f"{i}: {n!r} in the json, {theirs[i]!r} in {owner}"
        for i, n in zip(json_map.ids, json_map.names, strict=True)
        if n != theirs[i]
    ]
    if renamed:
        _logger.warning("classes matched by id, as their names differ: %s", _short(renamed))
    return stored
