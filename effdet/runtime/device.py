"""The device layer: pick, set, autocast, overflow, synchronise, backend, and what a device is better at.

The only file of the package that names a vendor's device, with ascend.py, which knows the chips of one vendor.
Everything else asks here, so the same lines run on Ascend NPUs (torch_npu), NVIDIA GPUs and CPUs. What is the same for
all of them is in memory.py and seeding.py. No model code and no training logic live here.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import ascend
from .memory import keep_freed_memory

_logger = logging.getLogger(__name__)

DEVICE_TYPES = ("npu", "cuda", "cpu")
_HCCL_TIMEOUTS_S = {"HCCL_CONNECT_TIMEOUT": 1200, "HCCL_EXEC_TIMEOUT": 6800, "HCCL_EVENT_TIMEOUT": 7200}
_users_visible_devices: str | None = None  # ASCEND_RT_VISIBLE_DEVICES before `restrict_visible` changed it
_BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}


def _has_npu() -> bool:
    """Return True when torch_npu loads and sees at least one device; never raises."""
    try:
        return bool(ascend.npu_module().is_available())
    except RuntimeError as error:
        _logger.debug("no NPU: %s", error)
        return False


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
        raise ValueError(
            f"Unknown device '{name}': choose auto, {', '.join(DEVICE_TYPES)}, or one with an index such as cuda:1."
        )
    if kind == "cpu":
        return torch.device("cpu")
    if index is None:
        index = int(number or 0)
    module = ascend.npu_module() if kind == "npu" else torch.cuda
    count = module.device_count() if module.is_available() else 0
    shown = os.environ.get("ASCEND_RT_VISIBLE_DEVICES") if kind == "npu" else None
    shown = f" (ASCEND_RT_VISIBLE_DEVICES={shown})" if shown else ""
    if count == 0:
        raise RuntimeError(
            f"Device '{kind}' was asked for, but torch {torch.__version__} sees none on this machine"
            f"{shown}. Check the driver and the installed torch build, or use --device cpu."
        )
    if index >= count:
        raise RuntimeError(
            f"Device {kind}:{index} was asked for, but there are {count}{shown}: choose an index from 0 to {count - 1}."
        )
    return torch.device(kind, index)


def restrict_visible(kind: str, device_list: Sequence[int]) -> bool:
    """Hide all but the listed devices from this process, where the platform does that by a variable we can order.

    Ascend's runtime reads ASCEND_RT_VISIBLE_DEVICES before its first use, stops at an id that is not larger than the
    one before, and numbers what is left from 0. So ids are sorted; the n-th process of a machine then has device n.

    Args:
        kind: 'auto' or a kind of device, as for `pick_device`.
        device_list: ids as the user counts them: within what the variable already lists, if it is set.

    Returns:
        True when devices are now numbered from 0; False when they keep their numbers.

    Raises:
        ValueError: an id occurs twice, or is not among those visible.
    """
    if len(set(device_list)) < len(device_list):
        raise ValueError(f"The device list {list(device_list)} names a device twice: give each one process.")
    kind = kind.partition(":")[0]
    if kind not in ("npu", "auto") or (kind == "auto" and not _has_npu_package()):
        return False
    # The user's own list: a second run in the same process must not count within the first run's choice.
    global _users_visible_devices
    if _users_visible_devices is None:
        _users_visible_devices = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "")
    visible = [int(entry) for entry in _users_visible_devices.split(",") if entry.strip()]
    absent = [index for index in device_list if visible and index >= len(visible)]
    if absent:
        raise ValueError(
            f"The device list asks for {absent}, but ASCEND_RT_VISIBLE_DEVICES shows {len(visible)} "
            f"devices: choose from 0 to {len(visible) - 1}."
        )
    chosen = sorted(visible[index] if visible else index for index in device_list)
    os.environ["ASCEND_RT_VISIBLE_DEVICES"] = ",".join(map(str, chosen))
    _logger.info(
        "ASCEND_RT_VISIBLE_DEVICES=%s: devices %s are npu:0 to npu:%d in this run",
        os.environ["ASCEND_RT_VISIBLE_DEVICES"],
        chosen,
        len(chosen) - 1,
    )
    return True


def _has_npu_package() -> bool:
    """Tell whether torch_npu is installed, without loading it."""
    return importlib.util.find_spec("torch_npu") is not None


def prepare_collectives(device: torch.device) -> None:
    """Set, where the user has not, time limits under which a slow rank is waited for; call before the process group.

    HCCL's own are 120 s to connect and 1836 s for a collective. The first rank may be minutes late when it makes a
    data set or compiles; the limit of a collective bounds how long a rank can lag, such as one that still reads its
    data. Evaluation itself waits on a socket (distributed.py), not in HCCL.

    Source: hiascend.com, HCCL_CONNECT_TIMEOUT 120..7200; HCCL_EXEC_TIMEOUT on 910A up to 17340 in steps of 68; the
    event time-out must be larger.
    """
    if device.type == "npu":
        for name, seconds in _HCCL_TIMEOUTS_S.items():
            os.environ.setdefault(name, str(seconds))


def set_device(device: torch.device) -> None:
    """Make `device` the current one of its kind; call it before a process group is started."""
    if device.type != "cpu":
        torch.get_device_module(device).set_device(device)


def backend_for(device: torch.device) -> str:
    """Return torch.distributed's backend for a device: hccl, nccl or gloo."""
    return _BACKENDS[device.type]


def describe(device: torch.device) -> str:
    """Return one phrase for the log: the device's name, and for the CPU its number of threads."""
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return f"{device}, {torch.get_device_module(device).get_device_name(device)}"


def use_channels_last(device: torch.device, wanted: bool | None = None) -> bool:
    """Decide whether the model and its images take the channels-last layout.

    Args:
        device: where they are.
        wanted: the user's choice; None takes it where it is faster. Measured for a D0 training step: on a CPU it takes
            about 0.7 times as long. On an H200 in float16 it took 0.73 times as long, without cuDNN's search for the
            fastest kernels, which took half a minute and was left out then.

    Raises:
        ValueError: it is wanted on a device that does not have it.
    """
    if wanted and device.type == "npu":
        raise ValueError("torch_npu does not support the channels-last layout: leave --channels-last out on an NPU.")
    return device.type != "npu" if wanted is None else wanted


def check_compile(device: torch.device) -> None:
    """Raise a ValueError when torch.compile cannot work here, without what writes its kernels."""
    if device.type == "npu":
        _logger.warning(
            "--compile was never run on an NPU: its backend 'inductor' is torch_npu's there, which wants triton-ascend"
        )
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(
            f"--compile needs a C++ compiler on CPUs, and there is no {compiler}: install one, name it in "
            "the variable CXX, or leave --compile out."
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError("--compile needs the package triton on GPUs: install it, or leave --compile out.")


def avoids_pad_operators(device: torch.device) -> bool:
    """Tell whether a layer should pad by itself rather than call a pad operator on its input."""
    return device.type == "npu"


def check_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """Raise a ValueError when the device cannot compute in `dtype`."""
    if dtype == torch.bfloat16 and device.type == "npu" and not ascend.npu_module().is_bf16_supported():
        raise ValueError(
            f"{ascend.npu_module().get_device_name(device)} does not compute in bfloat16: train in float16 "
            "(--amp-dtype float16) or float32."
        )


def autocast(device: torch.device, dtype: torch.dtype = torch.float16, enabled: bool = True) -> torch.autocast:
    """Return the autocast context of a device."""
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


def has_float32_range(device: torch.device) -> bool:
    """Tell whether float32 work keeps the range of float32, so that no loss needs a scale.

    The first Ascend 910 computes float32 convolutions in float16, in which small gradients are lost.
    """
    return device.type != "npu" or not ascend.has_half_cube(_chip(device))


def _chip(device: torch.device) -> str:
    """Return the name of an NPU's chip, such as Ascend910B3."""
    return str(ascend.npu_module().get_device_name(device))


def _saturates(device: torch.device) -> bool:
    """Tell whether arithmetic on the device gives the largest number instead of inf (Ascend 910A and older)."""
    return device.type == "npu" and not ascend.npu_module().utils.is_support_inf_nan()


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


def few_launches_pay(device: torch.device) -> bool:
    """Tell whether the host launches small operators more slowly than the device computes them, so that fewer pay."""
    return device.type == "npu"


def nms_operator(name: str, device: torch.device, max_det: int) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Return a device's own operator for NMS by name: 'npu' is torch_npu's npu_batch_nms, for `max_det` 1..1000.

    Raises:
        ValueError: an unknown name, another device or chip, or too many detections.
    """
    if name != "npu":
        raise ValueError(f"Unknown NMS '{name}': choose one of auto, exact, host, or npu on an Ascend device.")
    if device.type != "npu":
        raise ValueError(f"NMS 'npu' is an operator of Ascend devices, and this run is on {device.type}: use exact.")
    if not 1 <= max_det <= 1000:
        raise ValueError(f"npu_batch_nms keeps 1 to 1000 boxes per image, but max_det is {max_det}: use exact.")
    return ascend.batch_nms(_chip(device))


def batch_norm_stats(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and 1 / sqrt(variance + eps) of each channel of [B, C, ...], both [C]."""
    # CANN's refuses bfloat16 (161002; page of aclnnBatchNormStats, torch_npu 2.13) until its page names A2 and A3.
    return torch.batch_norm_stats(x.float() if x.device.type == "npu" and x.dtype == torch.bfloat16 else x, eps)


def one_hot(device: torch.device) -> Callable[[torch.Tensor, int], torch.Tensor] | None:
    """Return a device's own operator that maps int32 indices and a width to float32 one-hot rows; None without one."""
    if device.type != "npu":
        return None
    import torch_npu

    # The argument called num_classes is the axis; an index out of range gives a row of zeros.
    return lambda indices, width: torch_npu.npu_one_hot(indices, -1, width, 1, 0)


def make_profiler(device: torch.device, folder: Path, steps: int) -> Any:
    """Make the profiler of a kind of device: torch_npu's on NPUs, else torch's, whose methods are the same.

    Args:
        device: where the work runs; the host is traced as well.
        folder: existing folder that receives the trace when it is complete, or when the profiler is stopped.
        steps: calls of its `step` that are traced, behind the first one.
    """
    profiler: Any = torch.profiler
    activities = [profiler.ProfilerActivity.CPU]
    if device.type == "npu":
        ascend.npu_module()
        import torch_npu

        profiler = torch_npu.profiler
        activities = [profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU]
    elif device.type == "cuda":
        activities.append(profiler.ProfilerActivity.CUDA)
    return profiler.profile(
        activities=activities,
        schedule=profiler.schedule(wait=0, warmup=1, active=steps, repeat=1),
        on_trace_ready=profiler.tensorboard_trace_handler(str(folder)),
        record_shapes=True,
    )


def to_device(value: Any, device: torch.device) -> Any:
    """Move a tensor, or the tensors in a mapping or sequence, without waiting where the source memory is pinned."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return type(value)(to_device(item, device) for item in value)
    return value


def synchronize(device: torch.device) -> None:
    """Wait until all work queued on `device` is done."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def is_recorded() -> bool:
    """Return whether a program is being traced or compiled: no value can be read, and a loop is unrolled."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_host(device: torch.device) -> bool:
    """Return whether `device` is the processor that runs Python, and nothing is traced or compiled.

    Reading a value waits for nothing there, and shapes that depend on values are free.
    """
    return device.type == "cpu" and not is_recorded()


def tune(
    device: torch.device, hf32: bool | None = None, full_precision: bool = True, keep_defaults: bool = False
) -> list[str]:
    """Choose process-wide settings that are faster on `device` and keep the results, and say which.

    To be called before the first operator on the device: torch_npu lets some operators choose at their first call.

    Args:
        device: where the process computes.
        hf32: whether an NPU may shorten float32 to HF32 in convolutions and matrix products; None: not in products, and
            in convolutions unless `full_precision`.
        full_precision: the work is in float32, not in mixed precision.
        keep_defaults: leave an NPU's compile mode as torch_npu has it.

    Returns:
        One line for each setting, with its reason; empty when there is nothing to set.
    """
    if device.type == "npu":
        return ascend.tune(_chip(device), hf32, full_precision, keep_defaults)
    lines = keep_freed_memory() if is_host(device) else []
    given = [flag for flag, value in (("--hf32", hf32), ("--npu-defaults", keep_defaults)) if value]
    return [*lines, *(f"{flag} has no effect on {device.type}" for flag in given)]


def make_deterministic(device: torch.device) -> list[str]:
    """Choose algorithms that give the same bits each time, and say what that does not cover.

    Returns:
        Lines for the log.
    """
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    if device.type == "cpu":
        return ["deterministic: the same bits on this machine with the same number of threads"]
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = False
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    if device.type == "npu":
        os.environ.setdefault("HCCL_DETERMINISTIC", "true")
    return [
        f"deterministic: as far as {device.type} has such algorithms (torch warns of operators without one), on "
        "the same kind and number of devices with the same libraries"
    ]
