"""Ascend chips: loading torch_npu, which generation a chip is, and torch_npu's settings for it.

Asked by device.py, which is the door to all kinds of devices; by checkpoint/io.py about files of old NPUs. **Nothing
here was run on hardware:** sources are those of torch_npu, op-plugin and CANN, named where a choice rests on them;
docs/ascend.md has more of it.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
from typing import Any

import torch

_logger = logging.getLogger(__name__)

# Source: torch_npu, csrc/core/npu/NpuVariables.cpp. Ascend910B without a digit is a bin of the first generation, as are
# the names with Pro and Premium; A2 starts with Ascend910B1.
_GENERATIONS = (
    ("910", re.compile(r"Ascend910(Premium|Pro)?[AB]?")),
    ("A2", re.compile(r"Ascend910B\d.*")),
    ("A3", re.compile(r"Ascend910_93.*")),
    ("950", re.compile(r"Ascend(950|910_95).*")),
)
_NMS_KERNEL = "BatchMultiClassNonMaxSuppression"  # what npu_batch_nms launches

_REMARKS = {
    "910": "CANN's pages call some of the aclnn operators of a training step (convolution, gather, scatter among them) "
    "unsupported on this chip, and its sources have them: if one fails, --npu-defaults leaves torch_npu's own "
    "compile mode",
    "950": "CANN's pages of aclnnSoftplus and aclnnGather, which a training step calls, do not list this chip",
    "": "this chip is none of those that this program is written for: Atlas A2 training products (Ascend910B1 to B4) "
    "and the first Ascend 910",
}


def npu_module() -> Any:
    """Import torch_npu and return its device module, or raise a RuntimeError that says what to install or source."""
    wanted = torch.__version__.partition("+")[0]
    try:
        installed = importlib.metadata.version("torch_npu")
    except importlib.metadata.PackageNotFoundError as error:
        raise RuntimeError(
            f"Device 'npu' needs the package torch_npu in the version of torch ({wanted}), which is not installed. "
            "Install it with: pip install -r requirements-npu.txt"
        ) from error
    if installed.split(".")[:2] != wanted.split(".")[:2]:
        raise RuntimeError(
            f"torch_npu {installed} is installed beside torch {wanted}: the first two numbers must be equal. Install "
            f"the pair that fits your CANN, for example: pip install torch=={wanted} torch_npu=={wanted}"
        )
    try:
        import torch_npu  # noqa: F401  (registers the 'npu' device with torch)
    except (ImportError, OSError, RuntimeError) as error:
        if "cannot open shared object" in str(error):
            raise RuntimeError(
                f"torch_npu {installed} does not find CANN: {error}. Source CANN's environment in this shell first, "
                "for example: source /usr/local/Ascend/ascend-toolkit/set_env.sh, or since CANN 8.5 "
                "/usr/local/Ascend/cann/set_env.sh (test/set_npu_env.sh looks for it)."
            ) from error
        raise RuntimeError(
            f"torch_npu {installed} is installed but does not load: {error}. Check that its version fits torch "
            f"({torch.__version__}), Python and CANN; docs/ascend.md lists which go together."
        ) from error
    return torch.npu


def generation(name: str) -> str:
    """Return the generation of a chip.

    Args:
        name: as the driver gives it, such as Ascend910B3.

    Returns:
        '910' for the first Ascend 910 in all its bins, 'A2', 'A3', '950', or '' for any other chip.
    """
    return next((key for key, pattern in _GENERATIONS if pattern.fullmatch(name)), "")


def has_half_cube(name: str) -> bool:
    """Tell whether a chip computes float32 convolutions in float16, whatever is asked for.

    Source: ops-nn, aclnn_convolution.cpp, UpdateOutputDtype: Ascend910 and 310P have float16 convolutions only.
    """
    return generation(name) == "910" or name.startswith("Ascend310P")


def tune(name: str, hf32: bool | None, full_precision: bool, keep_defaults: bool) -> list[str]:
    """Choose torch_npu's process-wide settings and say which; see `device.tune`, whose arguments these are.

    Args:
        name: the chip's.
        hf32: whether float32 convolutions are shortened to HF32; None: unless full precision was asked for.
        full_precision: the run is in float32.
        keep_defaults: leave the compile mode as torch_npu has it.
    """
    kind = generation(name)
    if kind in _REMARKS:
        _logger.warning("%s: %s. Nothing was run on it", name, _REMARKS[kind])
    module = npu_module()
    # Also with torch_npu's other defaults: it refuses operators on lists of tensors in private formats.
    module.config.allow_internal_format = False
    lines = [
        "allow_internal_format=False: tensors are kept as NCHW, so that the fused optimizer's flat memory is that of "
        "the weights; a kernel that wants another format converts for itself",
    ]
    if keep_defaults:
        lines.append("the compile mode is torch_npu's own (--npu-defaults)")
    else:
        module.set_compile_mode(jit_compile=False)
        lines.append("jit_compile=False: ready-made kernels instead of compiling each shape at its first use")
    return [*lines, *_choose_float32(module, name, hf32, full_precision), _task_queue()]


def _choose_float32(module: Any, name: str, hf32: bool | None, full_precision: bool) -> list[str]:
    """Say how float32 convolutions are computed, and choose it where the chip has a choice."""
    if has_half_cube(name):
        if hf32:
            _logger.warning("--hf32 has no effect on %s, whose float32 convolutions compute in float16", name)
        return ["float32 convolutions compute in float16 on this chip (ops-nn, aclnn_convolution.cpp)"]
    wanted = not full_precision if hf32 is None else hf32
    module.conv.allow_hf32 = wanted
    if hf32 is not None:
        module.matmul.allow_hf32 = wanted  # otherwise torch_npu's own: off
    return [f"HF32, a shortened float32, in float32 convolutions: {'on' if wanted else 'off'} (--hf32, --no-hf32)"]


def _task_queue() -> str:
    if os.environ.get("ASCEND_LAUNCH_BLOCKING") == "1" or os.environ.get("TASK_QUEUE_ENABLE") == "0":
        return (
            "the task queue is off (ASCEND_LAUNCH_BLOCKING or TASK_QUEUE_ENABLE): good for finding the "
            "operator that fails, slow for training"
        )
    return (
        f"TASK_QUEUE_ENABLE={os.environ.get('TASK_QUEUE_ENABLE', '1')}: operators are launched from a thread of "
        "their own; 2 prepares them there, too (docs/ascend.md, Speed)"
    )


def batch_nms(name: str) -> Any:
    """Return torch_npu's npu_batch_nms.

    Args:
        name: the chip's.

    Raises:
        ValueError: torch_npu's documentation does not list the chip for the operator.
    """
    if generation(name) != "910":
        raise ValueError(
            f"NMS 'npu' is torch_npu's npu_batch_nms, which is documented for the first Ascend 910 and not for {name}: "
            "leave --nms out."
        )
    import torch_npu

    _logger.warning(
        "torch_npu's documentation calls npu_batch_nms deprecated, to be removed, and its precision not guaranteed: "
        "without --nms npu the detections are exact"
    )
    # There is no ready-made kernel of it, so it must be compiled where all others must not (the port did so, too).
    npu_module().set_option({"NPU_FUZZY_COMPILE_BLACKLIST": _NMS_KERNEL})
    return torch_npu.npu_batch_nms


def old_tensor_globals() -> list[tuple[Any, str]]:
    """Return what files of an Ascend NPU from before torch_npu 2.1 need to load anywhere: (function, its name there).

    Their tensors are in the file as on a host, and are rebuilt there: the function that the name stands for would need
    torch_npu and a device.
    """
    names = ("torch_npu.utils.storage._rebuild_npu_tensor", "torch._utils._rebuild_npu_tensor")  # from 1.8 on; 1.5
    return [(_rebuild_old_npu_tensor, name) for name in names]


def _rebuild_old_npu_tensor(
    storage: Any, offset: int, size: Any, stride: Any, requires_grad: bool, hooks: Any, _format: Any = None
) -> torch.Tensor:
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)
