"""Count what the device was asked to do, and raise where a test forbids it.

Lives here: the counters, the strict mode, and charging an operator with what the runtime did for it.
A wait is the host standing still until the device is done: reading a value, an operator whose output size depends on
values, and also a copy to the device from memory that is not pinned or not marked non-blocking.
Everything is charged to the operator the program called, under its dispatcher name ('aten::nonzero'); what that
operator's kernel calls in turn is its cost. Waits outside operators (torch.npu.synchronize, an event's synchronize) are
charged to OUTSIDE when a block of `count_waits` or `strict` ends.
Limit: only the thread that opened a block has its waits outside operators counted.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from npu_sim import chips, runtime

OUTSIDE = "(outside operators)"
_COPIES = {"aclnnInplaceCopy"}  # making a tensor contiguous is what these are asked for


class Meters:
    """Counters by operator name.

    Attributes:
        calls: how often the program called it.
        waits: how often it made the host wait.
        copies_to_host: copies from the device to the host.
        float64: float64 tensors it was given, returned, or passed on to CANN.
        mismatches: by text, where torch_npu's shape or dtype of a result differs from the CPU's.
        dtypes: the dtypes of the NPU tensors it was given, such as 'float32'.
        max_dims: the largest number of dimensions of those tensors.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.copies_to_host: Counter[str] = Counter()
        self.float64: Counter[str] = Counter()
        self.mismatches: Counter[str] = Counter()
        self.dtypes: defaultdict[str, set[str]] = defaultdict(set)
        self.max_dims: Counter[str] = Counter()

    def reset(self) -> None:
        """Set every counter to zero."""
        for counter in vars(self).values():
            counter.clear()

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return everything as plain types, for JSON."""
        plain = {name: dict(value) for name, value in vars(self).items()}
        plain["dtypes"] = {name: sorted(value) for name, value in self.dtypes.items()}
        return plain


meters = Meters()
_active = [meters]  # the process's meters and those of the open blocks
_forbidden = {"float64": False, "waits": False, "copies": False}
_thread = threading.local()  # .charged: waits of this thread charged to operators, to tell those outside apart


@contextlib.contextmanager
def strict(float64: bool = True, waits: bool = True, copies: bool = True) -> Iterator[Meters]:
    """Raise a RuntimeError in this block, naming the operator.

    Args:
        float64: when a float64 tensor reaches the device.
        waits: when the host waits; outside operators this is found at the end of the block.
        copies: when something is copied from the device to the host.
    """
    before, start = dict(_forbidden), _waits_outside()
    _forbidden.update(float64=float64, waits=waits, copies=copies)
    try:
        yield meters
    finally:
        _forbidden.update(before)
    if waits and _waits_outside() > start:
        raise RuntimeError("the host waits for the NPU outside operators: torch.npu.synchronize() or the like")


@contextlib.contextmanager
def count_waits() -> Iterator[Meters]:
    """Yield fresh meters that count what happens in this block only."""
    block, start = Meters(), _waits_outside()
    _active.append(block)
    try:
        yield block
    finally:
        _active.remove(block)
        if _waits_outside() > start:
            block.waits[OUTSIDE] += _waits_outside() - start


class Launches(Counter[str]):
    """How often the device was given an operator or collective, by CANN's name ('aclnnAdd', 'PadV3', 'HcclAllReduce').

    Attributes:
        copied: bytes that CANN copies to make tensors contiguous before an operator, by its name; of operators that
            are themselves copies, none.
        concerns: launches that CANN's sources or pages speak against on this chip, by text (chips.py).
    """

    def __init__(self) -> None:
        super().__init__()
        self.copied: Counter[str] = Counter()
        self.concerns: Counter[str] = Counter()


@contextlib.contextmanager
def count_launches() -> Iterator[Launches]:
    """Yield a counter that is filled when this block ends. Launches of all threads count."""
    counted, before = Launches(), runtime.launches()
    try:
        yield counted
    finally:
        rows = []
        for (name, dtypes), (total, copied) in runtime.launches().items():
            old_total, old_copied = before.get((name, dtypes), (0, 0))
            if total > old_total:
                counted[name] += total - old_total
                rows.append((name, dtypes, total - old_total))
            if copied > old_copied and name not in _COPIES:
                counted.copied[name] += copied - old_copied
        counted.concerns.update(chips.concerns(os.environ["NPU_SIM_SOC"], rows))


def _waits_outside() -> int:
    return runtime.counts().waits - getattr(_thread, "charged", 0)


def note_call(name: str, tensors: list) -> None:
    """Count a call with the NPU tensors it was given."""
    for meter in _active:
        meter.calls[name] += 1
        for tensor in tensors:
            meter.dtypes[name].add(str(tensor.dtype).removeprefix("torch."))
            meter.max_dims[name] = max(meter.max_dims[name], tensor.dim())


def note_mismatch(text: str) -> None:
    """Count a result of torch_npu that differs in shape or dtype from the CPU's."""
    for meter in _active:
        meter.mismatches[text] += 1


def charge(name: str, before: runtime.Counts, float64: int = 0) -> None:
    """Charge an operator with what the runtime did since `before`; raise what `strict` forbids.

    Args:
        name: the operator.
        before: the runtime's counters when it was called.
        float64: float64 tensors among its arguments and results; CANN does not see those that are only copied.
    """
    now = runtime.counts()
    copies, waits = now.copies_to_host - before.copies_to_host, now.waits - before.waits
    float64 = max(float64, now.float64 - before.float64)
    _thread.charged = getattr(_thread, "charged", 0) + waits
    for meter in _active:
        for counter, count in ((meter.copies_to_host, copies), (meter.waits, waits), (meter.float64, float64)):
            if count:
                counter[name] += count
    if float64 and _forbidden["float64"]:
        raise RuntimeError(f"{name} has float64 tensors on the NPU")
    if waits and _forbidden["waits"]:
        raise RuntimeError(f"{name} makes the host wait for the NPU")
    if copies and _forbidden["copies"]:
        raise RuntimeError(f"{name} copies from the NPU to the host")
