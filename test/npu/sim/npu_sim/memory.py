"""See the fake device's memory from the CPU: it is host memory, so a CPU tensor can share it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")
_set_storage = torch.ops.aten.set_.source_Storage_storage_offset


def is_npu(value: Any) -> bool:
    """Tell whether the value is a tensor on the device."""
    return isinstance(value, Tensor) and value.device.type == "npu"


def npu_tensors(value: Any) -> list[Tensor]:
    """Return the NPU tensors in a tensor, list, tuple or dict, however nested."""
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in npu_tensors(item)]
    if isinstance(value, dict):
        return npu_tensors(list(value.values()))
    return [value] if is_npu(value) else []


def alias(tensor: Tensor) -> Tensor:
    """Return a CPU tensor over the same memory, with the same shape and strides."""
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=CPU)
    shared = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), CPU, storage.nbytes())
    empty = torch.empty(0, dtype=tensor.dtype, device=CPU)
    return _set_storage(empty, shared, tensor.storage_offset(), tensor.size(), tensor.stride())


def to_cpu(value: Any, copy: bool = False) -> Any:
    """Turn an operator's argument into what the CPU operator takes; with `copy`, tensors do not share memory."""
    if isinstance(value, Tensor):
        shared = alias(value) if is_npu(value) else value
        return shared.clone(memory_format=torch.contiguous_format) if copy else shared
    if isinstance(value, torch.device):
        return CPU
    if isinstance(value, torch.Generator):
        return None if value.device.type == "npu" else value
    if isinstance(value, (list, tuple)):
        return type(value)(to_cpu(item, copy) for item in value)
    return value
