"""What must be set before torch is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from effdet.runtime.cores import core_count, cpu_quota
from effdet.runtime.progress import be_plain
from effdet.runtime.ranks import take_ranks

# How often a waiting thread looks before it sleeps. Those that look for long take the core from the one they wait for,
# where something else runs on the machine; those that sleep at once wake too late where nothing does. Measured with
# benchmarks/busy_machine.py.
WAITING = {"GOMP_SPINCOUNT": "10000"}


def prepare_environment(program: str = "", device_list: Sequence[int] = (), plain: bool = False) -> None:
    """Set what torch reads when it is imported, unless the user has set it.

    Args:
        program: name of a program that may be one of several processes: their ranks are taken over from a scheduler.
            Empty for one that works alone.
        device_list: the devices for which it will start processes by itself.
        plain: whether a terminal is to get plain lines.

    Raises:
        ValueError: a scheduler has started several processes and says too little; the text tells what to type.
    """
    be_plain(plain)
    # torch would load torch_npu by itself and fail where CANN is not sourced; runtime/device.py loads it when an NPU is
    # asked for, with an error that says what to do.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    if "OMP_WAIT_POLICY" not in os.environ:  # which it would overrule
        for name, value in WAITING.items():
            os.environ.setdefault(name, value)
    line = take_ranks(os.environ) if program else ""
    if line:
        sys.stderr.write(f"{program}: {line}\n")
    # torch takes all cores that it sees, in each of the processes and whatever a container's limit is.
    processes = len(device_list) if not line else int(os.environ["LOCAL_WORLD_SIZE"])
    if processes > 1 or cpu_quota() is not None:
        each = os.environ.get("SLURM_CPUS_PER_TASK", "") if line else ""
        threads = int(each) if each.isdigit() else core_count() // max(1, processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
