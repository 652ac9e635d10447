"""Count what the device was asked to do, and raise where a test forbids it.

Lives here: the counters, the strict mode, and reading the fake runtime's own counts before and after an operator.
Limit: everything is charged to the operator that was called from outside; what its kernel calls in turn is its cost.
Synchronous calls outside operators (torch.npu.synchronize) are counted by the runtime but charged to no operator.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

_COPIES_TO_HOST, _WAITS, _FLOAT64 = 0, 2, 3  # indices of the fake runtime's counters, see cann/fakecann.c


class Meters:
    """Counters by operator name, such as 'aten::nonzero'."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.copies_to_host: Counter[str] = Counter()
        self.float64: Counter[str] = Counter()
        self.mismatches: Counter[str] = Counter()  # what torch_npu allocated differs in shape or dtype from the CPU's
        self.dtypes: defaultdict[str, set[str]] = defaultdict(set)  # of the NPU tensors given to the operator
        self.max_dims: Counter[str] = Counter()  # largest number of dimensions of those

    def reset(self) -> None:
        """Set every counter to zero."""
        for counter in vars(self).values():
            counter.clear()

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return everything as plain types, for JSON."""
        result = {name: dict(value) for name, value in vars(self).items()}
        result["dtypes"] = {name: sorted(value) for name, value in self.dtypes.items()}
        return result


meters = Meters()
_blocks: list[Meters] = []
_forbidden = {"float64": False, "waits": False, "copies": False}
_statistic: Callable[[int], int] | None = None


def connect(runtime: ctypes.CDLL) -> None:
    """Read the fake runtime's counters from now on."""
    global _statistic
    runtime.fake_cann_stat.restype = ctypes.c_long
    _statistic = runtime.fake_cann_stat


def read_runtime() -> tuple[int, int, int]:
    """Return the runtime's counts of copies to the host, waits and float64 tensors so far."""
    return _statistic(_COPIES_TO_HOST), _statistic(_WAITS), _statistic(_FLOAT64)


@contextlib.contextmanager
def strict(float64: bool = True, waits: bool = True, copies: bool = True) -> Iterator[Meters]:
    """Raise in this block, naming the operator, for float64 on the device, waits of the host, copies to the host."""
    before = dict(_forbidden)
    _forbidden.update(float64=float64, waits=waits, copies=copies)
    try:
        yield meters
    finally:
        _forbidden.update(before)


@contextlib.contextmanager
def count_waits() -> Iterator[Meters]:
    """Yield fresh meters that count what happens in this block only."""
    block = Meters()
    _blocks.append(block)
    try:
        yield block
    finally:
        _blocks.remove(block)


def note_call(name: str, tensors: list) -> None:
    """Count a call with the NPU tensors it was given."""
    for meter in (meters, *_blocks):
        meter.calls[name] += 1
        for tensor in tensors:
            meter.dtypes[name].add(str(tensor.dtype).removeprefix("torch."))
            meter.max_dims[name] = max(meter.max_dims[name], tensor.dim())


def note_mismatch(text: str) -> None:
    """Count a difference between what torch_npu allocated and what the CPU computed."""
    for meter in (meters, *_blocks):
        meter.mismatches[text] += 1


def charge(name: str, before: tuple[int, int, int]) -> None:
    """Charge the operator with what the runtime counted since `before`; raise where that is forbidden."""
    copies, waits, float64 = (now - then for now, then in zip(read_runtime(), before, strict=True))
    upload = name in ("aten::_to_copy", "aten::copy_") and not copies
    if upload:  # copying pageable memory to the device makes the host wait too; a wait, but not for a result
        waits = 0
    for meter in (meters, *_blocks):
        for counter, number in ((meter.copies_to_host, copies), (meter.waits, waits), (meter.float64, float64)):
            if number:
                counter[name] += number
    if float64 and _forbidden["float64"]:
        raise RuntimeError(f"{name} gave float64 tensors to the NPU")
    if waits and _forbidden["waits"]:
        raise RuntimeError(f"{name} makes the host wait for the NPU")
    if copies and _forbidden["copies"]:
        raise RuntimeError(f"{name} copies from the NPU to the host")
