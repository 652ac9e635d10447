"""Ties by lot: an operator that may give any of several equal values gives one that the caller cannot count on.

torch promises no order among equal values for top-k, sort without `stable`, and the places of maxima and minima; the
CPU, which computes the values here, takes the first of them in most cases, a device another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# By base name: the position of the dimension among the arguments, and what it is where it is left out.
_DIMENSION = {
    "topk": (2, -1),
    "sort": (1, -1),
    "max": (1, None),
    "min": (1, None),
    "argmax": (1, None),
    "argmin": (1, None),
}
_generator: torch.Generator | None = None


@contextlib.contextmanager
def random_ties(seed: int = 0) -> Iterator[None]:
    """Draw by lot, in this block, which of several equal values is meant."""
    global _generator
    before, _generator = _generator, torch.Generator().manual_seed(seed)
    try:
        yield
    finally:
        _generator = before


def shuffle(base: str, args: list, kwargs: dict[str, Any]) -> tuple[list, Tensor | None]:
    """Return an operator's arguments with its first in another order, and that order; None: as it was.

    Args:
        base: the operator's name without namespace and overload.
        args: its positional arguments, tensors on the CPU.
        kwargs: the others.
    """
    if _generator is None or base not in _DIMENSION or kwargs.get("stable"):
        return args, None
    x = args[0]
    position, otherwise = _DIMENSION[base]
    dim = args[position] if len(args) > position else kwargs.get("dim", otherwise)
    is_place = isinstance(dim, int) and not isinstance(dim, bool) and x.dim() > 0
    if not is_place:  # max() of all values, the larger of two tensors, sort(stable, dim)
        return args, None
    order = torch.randperm(x.shape[dim], generator=_generator)
    return [x.index_select(dim, order), *args[1:]], order


def unshuffle(result: Any, order: Tensor | None) -> Any:
    """Put the indices of an operator's result, which its last tensor has, into the order that was given."""
    if order is not None:
        indices = result if isinstance(result, Tensor) else result[-1]
        indices.copy_(order[indices])  # in place: they may be the operator's `out`
    return result
