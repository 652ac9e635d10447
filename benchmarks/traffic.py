"""The floor that memory sets to some work: the bytes its kernels move, and how fast the device copies bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# They return memory that nobody has written yet.
UNWRITTEN = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class ByteCounter(TorchDispatchMode):
    """Counts, as `moved`, the bytes of all tensors that operators read and write while the mode is on.

    Each operator counts once with what it is given and what it returns: what stays in a cache between two operators is
    counted all the same, and so is all of a tensor of which an operator reads a part. Views move nothing.
    What torch.compile has fused is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, returned = tree_leaves((args, kwargs)), tree_leaves(result)
        is_view = not func._schema.is_mutable and bool(addresses(given) & addresses(returned))
        if not is_view and func.overloadpacket.__name__ not in UNWRITTEN:
            self.moved += sum(map(count_bytes, given + returned))
        return result


def addresses(values: list) -> set[int]:
    """Return where the memory of the tensors among these values lies."""
    return {value.untyped_storage().data_ptr() for value in values if isinstance(value, Tensor) and value.numel()}


def count_bytes(value: Any) -> int:
    """Return the bytes of a tensor's elements, those that it repeats (stride 0) once; 0 for anything else."""
    if not isinstance(value, Tensor) or value.numel() == 0:
        return 0
    count = value.element_size()
    for size, stride in zip(value.shape, value.stride(), strict=True):
        count *= size if stride else 1
    return count


def copy_speed(device: torch.device, synchronize: Callable[[], Any], size: int = 2**28) -> float:
    """Return the bytes a second that a copy of `size` bytes reads and writes, the best of ten."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    seconds = []
    for _ in range(10):
        synchronize()
        started = time.perf_counter()
        target.copy_(source)
        synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size / min(seconds)
