"""What must be set before torch is imported."""

import os


def prepare_environment() -> None:
    """Set what torch reads when it is imported, unless the user has set it."""
    # torch would load torch_npu by itself and fail where CANN is not sourced; runtime/device.py loads it when an NPU is
    # asked for, with an error that says what to do.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
