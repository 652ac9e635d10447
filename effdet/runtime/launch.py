"""Start one process for each device, and give each process its device and its place in the group."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import device as device_layer
from . import distributed, signals
from .cores import core_count

_logger = logging.getLogger(__name__)


def needs_launch(device_list: Sequence[int]) -> bool:
    """Tell whether this process should start one process for each of several devices, instead of working itself."""
    return len(device_list) > 1 and not distributed.is_launched()


def start(device_name: str, device_list: Sequence[int]) -> torch.device:
    """Pick this process's device, make it current, and join the process group if there is one.

    Args:
        device_name: 'auto' or a kind of device.
        device_list: device numbers by local rank; empty for the local rank itself.

    Raises:
        ValueError, RuntimeError: no such device, or another number of processes than devices.
    """
    launched = distributed.is_launched()
    local_rank = distributed.local_rank() if launched else 0
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched else 1
    if device_list and launched and len(device_list) != local_world:
        raise ValueError(
            f"--device-list names {len(device_list)} devices, but {local_world} processes were started on "
            "this machine: start as many as there are devices, or leave --device-list out."
        )
    renumbered = bool(device_list) and device_layer.restrict_visible(device_name, device_list)
    if device_list and not renumbered:
        index = device_list[local_rank]
    else:
        index = local_rank if launched or renumbered else None
    if launched and not device_list and "TORCHELASTIC_RUN_ID" not in os.environ:
        # A scheduler may show each process a device of its own, which is then number 0 in each.
        first = device_layer.pick_device(device_name)
        if first.type != "cpu" and torch.get_device_module(first).device_count() == 1:
            index = 0
    device = device_layer.pick_device(device_name, index)
    device_layer.set_device(device)
    device_layer.prepare_collectives(device)
    distributed.init_process_group(device_layer.backend_for(device), device)
    return device


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was only just given up is free
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def _run_at_a_free_port(run: Callable[[Any], None], arguments: Any, attempts: int = 5) -> None:
    """Run torchrun, again at another port where somebody took `arguments.master_port` since it was found free."""
    for left in reversed(range(attempts)):
        try:
            run(arguments)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error) or not left:
                raise
            _logger.warning("port %d was taken by another process just now: trying another", arguments.master_port)
            arguments.master_port = _free_port()
        else:
            return


def launch(
    command: Sequence[str],
    num_processes: int,
    master_addr: str = "127.0.0.1",
    master_port: int | None = None,
    max_restarts: int = 0,
) -> int:
    """Run a command in several processes of this machine under torch.distributed's elastic launcher, and wait.

    Each child runs the same interpreter with the same arguments, and learns its place from the variables that torchrun
    sets (`distributed.is_launched()` is then true). Unless the user has set OMP_NUM_THREADS, the cores are shared out
    evenly. Call it before anything touches an accelerator: the parent only waits.

    Args:
        command: path of a script, or '-m' and the name of a module, then its arguments.
        num_processes: processes to start, >= 1, one a device.
        master_addr: address of this machine where the processes meet.
        master_port: its TCP port; None picks a free one, and so does one that is taken.
        max_restarts: how often all processes are started again after one of them failed.

    Returns:
        0 when all processes succeeded, else a non-zero exit code: the first failed process's own, or 128 + the
        signal's number (shell convention) when a signal ended it or this launcher. The other processes are stopped.

    Raises:
        ValueError: no command, fewer than one process, or called in a process that was launched itself.
        FileNotFoundError: the script does not exist.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes is {num_processes}: must be at least 1, one per device")
    if not command:
        raise ValueError("command is empty: give the path of the script to run, or -m and a module, then its arguments")
    if distributed.is_launched():
        raise ValueError(
            f"this process is rank {os.environ['RANK']} of a launched group already: join it with "
            "init_process_group instead of launching again"
        )
    if command[0] != "-m" and not Path(command[0]).is_file():
        raise FileNotFoundError(f"script to launch not found: {command[0]} (in {Path.cwd()})")
    from torch.distributed import run as torchrun  # heavy, and needed in the launching parent only
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if master_port is not None and not _is_free(master_port):
        taken, master_port = master_port, None
        _logger.warning("port %d is in use on this machine: a free one is taken instead", taken)
    master_port = master_port or _free_port()
    logs = tempfile.TemporaryDirectory(prefix="effdet-launch-")  # torchrun never removes a log folder of its own
    arguments = torchrun.get_args_parser().parse_args(
        [
            f"--log-dir={logs.name}",
            f"--nproc-per-node={num_processes}",
            f"--master-addr={master_addr}",
            f"--max-restarts={max_restarts}",
            f"--signals-to-handle={','.join(['SIGQUIT', *(s.name for s in signals.heard())])}",
            f"--master-port={master_port}",
            *command,
        ]
    )
    here = str(Path(__file__).resolve().parents[2])  # children find the package where this process found it
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, core_count() // num_processes))
    with logs, _environment(OMP_NUM_THREADS=threads, PYTHONPATH=os.pathsep.join(paths)):
        try:
            _run_at_a_free_port(torchrun.run, arguments)
        except ChildFailedError as error:
            failed_rank, failure = error.get_first_failure()
            _logger.error(
                "process of rank %d ended with exit code %d; its own output says why", failed_rank, failure.exitcode
            )
            return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        except SignalException as error:
            _logger.error("stopped by %s", error.sigval.name)
            return 128 + error.sigval.value
    return 0


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
