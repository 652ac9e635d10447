"""The lazy mode as Python sees it: the values of operators become entries of the fake device's queues (cann/lazy.c).

    with npu_sim.lazy(seed=1): ...

In this block nothing is computed until the host waits for it, and streams go on in an order drawn by lot, so that a
missing wait gives other values: host memory that is read before it is written, or a pinned buffer that is written anew
before it was read. An entry holds addresses, not tensors: memory that is given back and used again is used again.

Limits: one device; random numbers are drawn in the queues' order from the CPU's generator.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from npu_sim import runtime
from npu_sim.memory import alias, is_npu

_pending: dict[int, Callable[[], None]] = {}
_numbers = itertools.count(1)
_errors: list[BaseException] = []


@ctypes.CFUNCTYPE(None, ctypes.c_long)
def _run(number: int) -> None:
    try:
        with torch._C._AutoDispatchBelowAutograd():
            _pending.pop(number)()
    except BaseException as error:  # it has no caller: raised where the host waits next
        _errors.append(error)


@contextlib.contextmanager
def lazy(seed: int = 0) -> Iterator[None]:
    """Compute nothing in this block before the host waits for it.

    Args:
        seed: decides the order in which streams go on.

    Raises:
        what an operator raises when it is computed; at the next wait, or at the end of the block.
    """
    runtime.set_lazy(True, seed, _run)
    try:
        yield
    finally:
        runtime.set_lazy(False, 0, _run)
    raise_errors()


def raise_errors() -> None:
    """Raise the first error of what was computed meanwhile."""
    if _errors:
        error = _errors[0]
        _errors.clear()
        raise error


def queue(stream: int, work: Callable[[], None]) -> None:
    """Put work into a stream's queue."""
    number = next(_numbers)
    _pending[number] = work
    runtime.queue_python(stream, number)


def at_address(value: Any) -> Any:
    """Return an argument as it will be found when it is used: device and pinned memory by address, the rest copied."""
    if isinstance(value, Tensor):
        return alias(value) if is_npu(value) or value.is_pinned() else value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(at_address(item) for item in value)
    return value


def current_stream(device: int) -> int:
    """Return the address of the device's current stream."""
    import torch_npu

    return torch_npu._C._npu_getCurrentRawStreamNoWait(device)
