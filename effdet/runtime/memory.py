"""Memory of a device and the way to it: moving tensors, how much is in use, giving it back. Names no device."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def to_device(value: Any, device: torch.device) -> Any:
    """Move a tensor, or the tensors in a mapping or sequence, without waiting where the source memory is pinned."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return type(value)(to_device(item, device) for item in value)
    return value


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


def release_memory(device: torch.device) -> None:
    """Give cached memory that nothing uses back to an accelerator; objects in reference cycles are collected first."""
    gc.collect()
    if device.type != "cpu":
        module = torch.get_device_module(device)
        module.synchronize(device)
        module.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether an error says that an accelerator's memory is used up.

    Besides torch's own class these are the libraries' errors, which find no workspace: CUBLAS_STATUS_ALLOC_FAILED,
    CUDNN_STATUS_ALLOC_FAILED, and of older torch_npu a RuntimeError "NPU out of memory".
    """
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "alloc_failed" in text


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
