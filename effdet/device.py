"""The device layer: pick, set, move, autocast, overflow, synchronise, memory, backend, seeds.

The only file of the package that names a vendor's device. Everything else asks here, so the same lines run on
Ascend NPUs (torch_npu), NVIDIA GPUs and CPUs. No model code and no training logic live here.
"""
from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

_logger = logging.getLogger(__name__)

DEVICE_TYPES = ("npu", "cuda", "cpu")
_BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}


def _npu_module() -> Any:
    """Import torch_npu and return its device module, or raise a RuntimeError that says what to install or source."""
    try:
        import torch_npu  # noqa: F401  (registers the 'npu' device with torch)
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"Device 'npu' needs the package torch_npu in the version of torch ({torch.__version__.split('+')[0]}), "
            "which is not installed. Install it with: pip install -r requirements-npu.txt"
        ) from error
    except (ImportError, OSError) as error:
        raise RuntimeError(
            f"torch_npu is installed but does not load: {error}. Source CANN's environment first "
            "(for example: source /usr/local/Ascend/ascend-toolkit/set_env.sh) and check that torch_npu's version "
            f"equals torch's ({torch.__version__})."
        ) from error
    return torch.npu


def _has_npu() -> bool:
    """Return True when torch_npu loads and sees at least one device; never raises."""
    try:
        return bool(_npu_module().is_available())
    except RuntimeError as error:
        _logger.debug("no NPU: %s", error)
        return False


def _module(device: torch.device) -> Any:
    """Return torch's module of an accelerator (torch.cuda, torch.npu), or None for the CPU."""
    if device.type == "cuda":
        return torch.cuda
    if device.type == "npu":
        return _npu_module()
    return None


def pick_device(name: str = "auto", index: int | None = None) -> torch.device:
    """Choose the device to run on and check that it exists.

    Args:
        name: 'auto' (an NPU if there is one, else a GPU, else the CPU), 'npu', 'cuda' or 'cpu', optionally with
            an index as in 'cuda:1'.
        index: device number; the default is the number in `name`, else 0. Ignored for the CPU.

    Returns:
        The device, with an index unless it is the CPU.

    Raises:
        ValueError: the name is none of the above.
        RuntimeError: the device is not there; the text says what to do.
    """
    kind, _, number = str(name).partition(":")
    if kind == "auto":
        kind = "npu" if _has_npu() else "cuda" if torch.cuda.is_available() else "cpu"
    if kind not in DEVICE_TYPES or (number and not number.isdigit()):
        raise ValueError(f"Unknown device '{name}': choose auto, {', '.join(DEVICE_TYPES)}, or one with an index "
                         "such as cuda:1.")
    if kind == "cpu":
        return torch.device("cpu")
    if index is None:
        index = int(number or 0)
    module = _npu_module() if kind == "npu" else torch.cuda
    count = module.device_count() if module.is_available() else 0
    if count == 0:
        raise RuntimeError(f"Device '{kind}' was asked for, but torch {torch.__version__} sees none on this machine. "
                           "Check the driver and the installed torch build, or use --device cpu.")
    if index >= count:
        raise RuntimeError(f"Device {kind}:{index} was asked for, but there are {count}: choose an index from 0 to "
                           f"{count - 1}.")
    return torch.device(kind, index)


def set_device(device: torch.device) -> None:
    """Make `device` the current one of its kind; call it before a process group is started."""
    module = _module(device)
    if module is not None:
        module.set_device(device)


def backend_for(device: torch.device) -> str:
    """Return torch.distributed's backend for a device: hccl, nccl or gloo."""
    return _BACKENDS[device.type]


def describe(device: torch.device) -> str:
    """Return one phrase for the log: the device's name, and for the CPU its number of threads."""
    module = _module(device)
    if module is None:
        return f"cpu, {torch.get_num_threads()} threads"
    return f"{device}, {module.get_device_name(device)}"


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


def prefers_channels_last(device: torch.device) -> bool:
    """Return True where convolutions are faster in the channels-last layout.

    Measured on the CPU only, where a D0 training step at 256 px takes about 0.7 times as long. torch_npu does not
    support the layout.
    """
    return device.type == "cpu"


def autocast(device: torch.device, dtype: torch.dtype = torch.float16, enabled: bool = True) -> torch.autocast:
    """Return the autocast context of a device."""
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


def _saturates(device: torch.device) -> bool:
    """Tell whether arithmetic on the device gives the largest number instead of inf (Ascend 910A and older)."""
    return device.type == "npu" and not _npu_module().utils.is_support_inf_nan()


def overflow_flag(device: torch.device) -> torch.Tensor | None:
    """Read the device's own record of an overflow, without waiting for it.

    Chips that saturate (Ascend 910A) put no inf into a gradient that overflowed; they raise a flag, which covers all
    work since it was cleared. torch.amp.GradScaler neither clears it nor shares it between processes.

    Returns:
        A tensor without dimensions on the device, 1.0 after an overflow and 0.0 otherwise; None for devices whose
        numbers show an overflow themselves.
    """
    if not _saturates(device):
        return None
    import torch_npu
    status = torch_npu.npu_get_float_status(torch.zeros(8, device=device))
    return (status[0] != 0).float()


def clear_overflow_flag(device: torch.device) -> None:
    """Clear what `overflow_flag` reads; a no-op for devices without such a flag."""
    if _saturates(device):
        import torch_npu
        torch_npu.npu_clear_float_status(torch.zeros(8, device=device))


def synchronize(device: torch.device) -> None:
    """Wait until all work queued on `device` is done."""
    module = _module(device)
    if module is not None:
        module.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory in bytes: the allocator's on an accelerator, the process's resident set on the CPU."""
    module = _module(device)
    if module is not None:
        return int(module.max_memory_allocated(device))
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rng_state(device: torch.device) -> torch.Tensor | None:
    """Return the random generator's state of an accelerator as a byte tensor; None for the CPU."""
    module = _module(device)
    return None if module is None else module.get_rng_state(device)


def set_rng_state(state: torch.Tensor | None, device: torch.device) -> None:
    """Set the random generator's state of an accelerator; a no-op for None or the CPU."""
    module = _module(device)
    if module is not None and state is not None:
        module.set_rng_state(state.cpu(), device)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def tune(device: torch.device, image_size_is_fixed: bool = True) -> list[str]:
    """Choose process-wide settings that are faster on `device` and keep the results, and say which.

    Returns:
        One line for each setting, with its reason; empty when there is nothing to set.
    """
    if device.type == "cuda" and image_size_is_fixed:
        torch.backends.cudnn.benchmark = True
        return ["cudnn.benchmark=True: shapes are fixed, the fastest kernel is searched once"]
    return []
