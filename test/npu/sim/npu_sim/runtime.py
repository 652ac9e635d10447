"""The fake CANN runtime as Python sees it: its counters and its overflow flag (cann/runtime.c)."""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import NamedTuple


class Counts(NamedTuple):
    """What the runtime did for the calling thread so far; the order is that of sim_counter in cann/sim.h."""

    copies_to_host: int
    waits: int
    float64: int


_library: ctypes.CDLL | None = None


def connect(library: ctypes.CDLL) -> None:
    """Use this loaded libascendcl from now on."""
    global _library
    library.sim_counted.restype = library.sim_launch_count.restype = ctypes.c_long
    library.sim_launch_name.restype = ctypes.c_char_p
    library.sim_saturates.restype = library.sim_overflow.restype = ctypes.c_bool
    library.sim_set_overflow.argtypes = (ctypes.c_int, ctypes.c_bool)
    _library = library


def counts() -> Counts:
    """Read the counters."""
    if _library is None:
        raise RuntimeError("The simulated NPU is not loaded: call npu_sim.load() first.")
    return Counts(*(_library.sim_counted(index) for index in range(len(Counts._fields))))


def launches() -> Counter[str]:
    """Return how often each operator ('aclnnAdd', 'PadV3') and collective ('HcclAllReduce') was given to the device.

    Of all threads of the process: a backward pass runs on one of its own.
    """
    counted: Counter[str] = Counter()
    while (name := _library.sim_launch_name(len(counted))) is not None:
        counted[name.decode()] = _library.sim_launch_count(len(counted))
    return counted


def saturates() -> bool:
    """Tell whether the device saturates instead of producing inf and NaN; known once torch_npu has started it."""
    return _library.sim_saturates()


def set_overflow(device: int) -> None:
    """Raise the device's overflow flag."""
    _library.sim_set_overflow(device, True)


def overflow(device: int | None = None) -> bool:
    """Read the overflow flag of a device, by default of this thread's current one."""
    return _library.sim_overflow(_library.sim_current_device() if device is None else device)


def physical_device() -> int:
    """Return the number the current device has on the host, whatever ASCEND_RT_VISIBLE_DEVICES makes of it."""
    return _library.sim_physical_device()
