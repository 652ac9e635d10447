"""A simulated Ascend NPU: the real torch_npu wheel over stand-ins for the CANN libraries.

Lives here: the interface. `load()` makes torch.npu available in this process; `strict`, `count_waits`, `meters` and
`count_launches` say what the device was asked to do. How it works and what it cannot tell: README.md in this folder's
parent.
Importing this package imports neither torch nor torch_npu.
"""

from __future__ import annotations

import contextlib
import os
import sys

from npu_sim import build, runtime
from npu_sim.build import missing
from npu_sim.meters import Launches, Meters, count_launches, count_waits, meters, strict

__all__ = [
    "SOCS",
    "Launches",
    "Meters",
    "count_launches",
    "count_waits",
    "from_environment",
    "install",
    "lazy",
    "load",
    "load_libraries",
    "loaded",
    "meters",
    "missing",
    "random_ties",
    "strict",
]

SOCS = ("Ascend910A", "Ascend910B1", "Ascend910_9391", "Ascend950")  # one of each of torch_npu's code paths
MOST_DEVICES = 16  # ranks of a communicator, see cann/hccl.c
_settings: tuple[int, str] | None = None
_installed = False


def load(devices: int = 1, soc: str = "Ascend910B1") -> None:
    """Make the simulated NPU available in this process and import torch and torch_npu.

    Args:
        devices: number of devices.
        soc: chip name, such as Ascend910A or Ascend910B1; torch_npu chooses its kernels by it.

    Raises:
        RuntimeError: something is missing, torch_npu is already imported, or other settings are loaded already.
    """
    if _settings is None and "torch_npu" in sys.modules:
        raise RuntimeError("torch_npu is already imported: load the simulated NPU before it.")
    load_libraries(devices, soc)
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # torch would import torch_npu before the values are installed
    import torch  # noqa: F401
    import torch_npu  # noqa: F401

    install()


def lazy(seed: int = 0) -> contextlib.AbstractContextManager[None]:
    """Compute nothing in this block before the host waits for it; see queues.py."""
    from npu_sim import queues

    return queues.lazy(seed)


def random_ties(seed: int = 0) -> contextlib.AbstractContextManager[None]:
    """Draw by lot which of several equal values top-k, sort and the places of maxima mean; see ties.py."""
    from npu_sim import ties

    return ties.random_ties(seed)


def loaded() -> tuple[int, str] | None:
    """Return the number of devices and the chip this process simulates, None while it does not."""
    return _settings


def from_environment() -> tuple[int, str]:
    """Return the number of devices and the chip wanted by NPU_SIM_DEVICES (1) and NPU_SIM_SOC (Ascend910B1)."""
    devices = os.environ.get("NPU_SIM_DEVICES", "1")
    if not devices.isdecimal() or not 0 <= int(devices) <= MOST_DEVICES:
        raise RuntimeError(f"NPU_SIM_DEVICES is {devices!r}: give a number of devices, at most {MOST_DEVICES}.")
    return int(devices), os.environ.get("NPU_SIM_SOC", "Ascend910B1")


def load_libraries(devices: int = 1, soc: str = "Ascend910B1") -> None:
    """Load the stand-ins for the CANN libraries; must come before torch_npu is imported."""
    global _settings
    if soc not in SOCS:
        raise RuntimeError(f"Unknown chip {soc!r}: the simulated NPU knows {', '.join(SOCS)} (NPU_SIM_SOC).")
    if _settings is not None:
        if _settings != (devices, soc):
            raise RuntimeError(
                f"The simulated NPU is loaded as {_settings[0]} x {_settings[1]} in this process; "
                f"{devices} x {soc} needs a process of its own."
            )
        return
    if missing():
        raise RuntimeError(missing())
    os.environ.update(
        TASK_QUEUE_ENABLE="0",  # kernels run on the calling thread, so that their waits and errors have an owner
        TORCH_NPU_FALLBACK_CPU_DISABLE="1",  # an operator without NPU kernel raises instead of running on the CPU
        NPU_SIM_DEVICES=str(devices),
        NPU_SIM_SOC=soc,
    )
    runtime.connect(build.load_libraries()["ascendcl"])
    _settings = devices, soc


def install() -> None:
    """Fill in the values; needs torch_npu imported."""
    global _installed
    if not _installed:
        from npu_sim import kernels

        kernels.install()
        _installed = True
