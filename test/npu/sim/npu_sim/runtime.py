"""The fake CANN runtime as Python sees it: its counters and its overflow flag (cann/runtime.c)."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple


class Counts(NamedTuple):
    """What the runtime did for the calling thread so far; the order is that of sim_counter in cann/sim.h."""

    copies_to_host: int
    waits: int
    float64: int


_library: ctypes.CDLL | None = None
# aclDataType, as far as tensors of torch have one. Source: acl_base.h in the torch_npu wheel.
_DTYPES = {
    0: "float32",
    1: "float16",
    2: "int8",
    3: "int32",
    4: "uint8",
    6: "int16",
    9: "int64",
    11: "float64",
    12: "bool",
    27: "bfloat16",
}


def connect(library: ctypes.CDLL) -> None:
    """Use this loaded libascendcl from now on."""
    global _library
    for function in (library.sim_counted, library.sim_launch_count, library.sim_launch_copied):
        function.restype = ctypes.c_long
    library.sim_launch_name.restype = ctypes.c_char_p
    library.sim_saturates.restype = library.sim_overflow.restype = ctypes.c_bool
    library.sim_set_overflow.argtypes = (ctypes.c_int, ctypes.c_bool)
    library.sim_is_lazy.restype = ctypes.c_bool
    library.sim_queue_python.argtypes = (ctypes.c_void_p, ctypes.c_long)
    library.sim_run_stream.argtypes = (ctypes.c_void_p,)
    library.sim_set_lazy.argtypes = (ctypes.c_bool, ctypes.c_uint, ctypes.c_void_p)
    _library = library


def counts() -> Counts:
    """Read the counters."""
    if _library is None:
        raise RuntimeError("The simulated NPU is not loaded: call npu_sim.load() first.")
    return Counts(*(_library.sim_counted(index) for index in range(len(Counts._fields))))


def launches() -> dict[tuple[str, tuple[str, ...]], tuple[int, int]]:
    """Return what was given to the device so far: (name, dtypes of its tensors) -> (launches, bytes copied first).

    Names are CANN's: 'aclnnAdd', 'PadV3' of the older kind, 'HcclAllReduce'; the bytes are those copied to make tensors
    contiguous. Of all threads of the process: a backward pass runs on one of its own.
    """
    rows, index = {}, 0
    while (row := _library.sim_launch_name(index)) is not None:
        name, _, types = row.decode().partition(" ")
        key = name, tuple(_DTYPES.get(int(number), number) for number in types.split(",") if number)
        rows[key] = _library.sim_launch_count(index), _library.sim_launch_copied(index)
        index += 1
    return rows


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


def is_lazy() -> bool:
    """Tell whether operators wait in the queues of their streams."""
    return _library.sim_is_lazy()


def set_lazy(on: bool, seed: int, run: Any) -> None:
    """Empty all queues, then put operators into them or no longer; `run` is called with what queue_python was given."""
    _library.sim_set_lazy(on, seed, ctypes.cast(run, ctypes.c_void_p))


def queue_python(stream: int, number: int) -> None:
    """Put a call of `run` into the queue of the stream at this address."""
    _library.sim_queue_python(stream, number)


def run_stream(stream: int) -> None:
    """Empty the queue of the stream at this address, and what it waits for."""
    _library.sim_run_stream(stream)
