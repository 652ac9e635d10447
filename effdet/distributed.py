"""Collectives under the names and argument orders of effdet; the work is in runtime/distributed.py.

Without a process group, or in one of a single process, each returns what it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from effdet.runtime.distributed import (
    all_gather_object,
    all_reduce_mean,
    all_reduce_sum,
    broadcast_object,
    gather_object,
    is_distributed,
)
from effdet.runtime.distributed import barrier as synchronize
from effdet.runtime.distributed import is_primary as is_main_process
from effdet.runtime.distributed import local_rank as get_local_rank
from effdet.runtime.distributed import local_world_size as get_local_size
from effdet.runtime.distributed import rank as get_rank
from effdet.runtime.distributed import world_size as get_world_size

__all__ = [
    "all_gather",
    "all_gather_container",
    "gather",
    "gather_container",
    "get_local_rank",
    "get_local_size",
    "get_rank",
    "get_world_size",
    "is_main_process",
    "reduce_dict",
    "shared_random_seed",
    "synchronize",
]


def all_gather(data: Any, group: Any = None) -> list[Any]:
    """Collect one picklable object of every rank on all ranks.

    Args:
        data: the object.
        group: a process group of torch; default is all ranks, over the host.

    Returns:
        The objects in rank order.
    """
    if group is None or not is_distributed():
        return all_gather_object(data)
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, data, group=group)
    return gathered


def gather(data: Any, dst: int = 0, group: Any = None) -> list[Any]:
    """Collect one picklable object of every rank on rank `dst`.

    Args:
        data: the object.
        dst: global rank of the receiver.
        group: as in `all_gather`.

    Returns:
        The objects in rank order on rank `dst`, an empty list on the others.
    """
    if group is None or not is_distributed():
        return gather_object(data, dst) or []
    gathered = [None] * dist.get_world_size(group) if get_rank() == dst else None
    dist.gather_object(data, gathered, dst=dst, group=group)
    return gathered or []


def shared_random_seed() -> int:
    """Return a number below 2**31 drawn by rank 0 from numpy's generator, the same on all ranks."""
    return broadcast_object(int(np.random.randint(2**31)))


@torch.no_grad()
def reduce_dict(input_dict: dict[str, Tensor], average: bool = True) -> dict[str, Tensor]:
    """Average or add up the tensors of a dict over the ranks, in one collective.

    Args:
        input_dict: tensors of one shape, under the same names on every rank.
        average: take the mean instead of the sum.

    Returns:
        A dict of the results, sorted by name, on every rank (effdet: on rank 0). With one process `input_dict` itself.
    """
    if not is_distributed():
        return input_dict
    names = sorted(input_dict)
    reduce = all_reduce_mean if average else all_reduce_sum
    return dict(zip(names, reduce(torch.stack([input_dict[name] for name in names])), strict=True))


def all_gather_container(container: Any, group: Any = None, cat_dim: int = 0) -> Any:
    """Collect the tensors of every rank on all ranks, joined in rank order.

    Args:
        container: a tensor, or a dict, list or tuple of tensors; of the same shapes on every rank.
        group: a process group of torch whose backend takes the tensors' device; default is all ranks.
        cat_dim: the dimension along which they are joined.

    Returns:
        A container of the same kind.
    """

    def collect(tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts, cat_dim)

    return _map_tensors(collect, container) if is_distributed() else container


def gather_container(container: Any, dst: int, group: Any = None, cat_dim: int = 0) -> Any:
    """Collect the tensors of every rank on rank `dst`, joined in rank order.

    Args:
        container: as in `all_gather_container`, like the next ones.
        dst: global rank of the receiver.
        group: see there.
        cat_dim: see there.

    Returns:
        A container of the same kind on rank `dst`; on the others it holds None for each tensor.
    """

    def collect(tensor: Tensor) -> Tensor | None:
        here = get_rank() == dst
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))] if here else None
        dist.gather(tensor.contiguous(), parts, dst=dst, group=group)
        return torch.cat(parts, cat_dim) if here else None

    return _map_tensors(collect, container) if is_distributed() else container


def _map_tensors(function: Callable[[Tensor], Any], container: Any) -> Any:
    if isinstance(container, dict):
        return {key: function(value) for key, value in container.items()}
    if isinstance(container, (list, tuple)):
        return type(container)(function(value) for value in container)
    return function(container)
