"""Memory of a device: copies to the host, how much is in use, giving it back. Names no device."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
from pathlib import Path

import torch

_CGROUP_FILES = (  # limit and usage: version 2, version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to the host in one copy, into page-locked memory, and wait for it; one that is there comes back."""
    if tensor.device.type == "cpu":
        return tensor
    copy = tensor.to("cpu", non_blocking=True)
    torch.get_device_module(tensor.device).current_stream(tensor.device).synchronize()
    return copy


def supports_pinning(device: torch.device) -> bool:
    """Return True when page-locked host memory makes copies to `device` asynchronous."""
    return device.type != "cpu"


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory in bytes: the allocator's on an accelerator, the process's resident set on the CPU."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def total_memory_bytes(device: torch.device) -> int | None:
    """Return the size of an accelerator's memory in bytes; None for the CPU, which has none of its own."""
    return None if device.type == "cpu" else int(torch.get_device_module(device).mem_get_info(device)[1])


def available_memory_bytes(device: torch.device) -> int | None:
    """Return how much memory a process can still take, in bytes; None where nobody tells.

    Of an accelerator what is free and what torch keeps cached; on the CPU what the kernel calls available, and no more
    than the control group of a container has left.
    """
    if device.type != "cpu":
        module = torch.get_device_module(device)
        free, _ = module.mem_get_info(device)
        return int(free + module.memory_reserved(device) - module.memory_allocated(device))
    import resource

    limits = []
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError):
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            limits.append(max(0, address_space - pages * resource.getpagesize()))
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    for limit, usage in _CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
            limits.append(max(0, int(Path(limit).read_text()) - int(Path(usage).read_text())))
    return min(limits, default=None)


def release_memory(device: torch.device) -> None:
    """Give cached memory that nothing uses back to an accelerator; objects in reference cycles are collected first."""
    gc.collect()
    if device.type != "cpu":
        module = torch.get_device_module(device)
        module.synchronize(device)
        module.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that a device's memory is used up.

    Besides torch's own class these are the libraries' errors, which find no workspace: CUBLAS_STATUS_ALLOC_FAILED,
    CUDNN_STATUS_ALLOC_FAILED, of older torch_npu a RuntimeError "NPU out of memory", and on the CPU one of
    "DefaultCPUAllocator: can't allocate memory" (or "not enough memory"), or Python's MemoryError.
    """
    text = str(error).lower()
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or "out of memory" in text
        or "alloc_failed" in text
        or "defaultcpuallocator" in text
    )


def keep_freed_memory() -> list[str]:
    """Let glibc's malloc keep large blocks for the next step.

    By default it gives each back to the kernel, which then zeroes every page again at first touch: a third of the time
    of a training step.

    Returns:
        A line for the log that says so; nothing where malloc is another one.

    Source:
        mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.libc_ver()[0] == "glibc" else None
    if mallopt is None or not (mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1)):
        return []
    return ["malloc keeps freed memory: the kernel need not clear it again for each step"]
