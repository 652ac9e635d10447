"""Thin layer over torch.distributed: who am I, reduce, gather, broadcast.

Every function does nothing (or the obvious) when there is one process, so that callers need no `if distributed`.
Python objects and CPU tensors always travel over gloo, whatever moves the gradients: a rank that waits for a minute of
evaluation on rank 0 then waits on a socket, not inside an accelerator collective with its own, shorter, time-out.

What must not live here: choosing a device or a backend (device.py), starting processes (launch.py), wrapping a model
for data-parallel training.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import logging
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from . import signals
from .sync_batchnorm import SyncBatchNorm, convert_sync_batchnorm

__all__ = [
    "LateMax",
    "SyncBatchNorm",
    "all_gather_object",
    "all_reduce_mean",
    "all_reduce_sum",
    "alone",
    "average_",
    "barrier",
    "broadcast_object",
    "convert_sync_batchnorm",
    "distribute_bn",
    "gather_object",
    "init_process_group",
    "is_distributed",
    "is_launched",
    "is_primary",
    "local_rank",
    "local_world_size",
    "rank",
    "run_on_primary",
    "shutdown",
    "world_size",
]

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")

# Long enough for rank 0 to evaluate a large data set or to build a cache while the others wait.
DEFAULT_TIMEOUT_S = 7200.0

# The gloo group beside an accelerator backend, with the world it was made for (a new world needs a new one).
_host_group: tuple[Any, Any] | None = None
_left_group: Any = None  # see shutdown


_is_alone = False


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's number in the running group, 0 without one."""
    return dist.get_rank() if _is_initialized() else 0


def world_size() -> int:
    """Return the number of processes in the running group, 1 without one."""
    return dist.get_world_size() if _is_initialized() and not _is_alone else 1


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Work as if there were no other processes: nothing in it waits for one, whatever happens to the others."""
    global _is_alone
    _is_alone = True
    try:
        yield
    finally:
        _is_alone = False


def local_rank() -> int:
    """Return this process's number on its machine: `LOCAL_RANK` as the launcher sets it, else the global rank.

    Unlike `rank()` it is right before the group runs, because the device is chosen by it.
    """
    return int(os.environ.get("LOCAL_RANK", rank()))


def local_world_size() -> int:
    """Return how many processes of the run are on this machine: `LOCAL_WORLD_SIZE` as the launcher sets it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_distributed() -> bool:
    """Tell whether a group of more than one process is running."""
    return world_size() > 1


def is_primary() -> bool:
    """Tell whether this process is rank 0 (true without a group)."""
    return rank() == 0


def is_launched() -> bool:
    """Tell whether a launcher (torchrun or `launch`) started this process: RANK and WORLD_SIZE are set."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def init_process_group(backend: str, device: torch.device | None = None, timeout_s: float = DEFAULT_TIMEOUT_S) -> bool:
    """Join the process group described by the launcher's environment variables.

    Args:
        backend: name of the torch.distributed backend that fits the device, 'gloo' for the CPU.
        device: this process's device; nccl binds to it at once instead of guessing it from the rank.
        timeout_s: seconds a collective may wait for the slowest rank, > 0.

    Returns:
        True when a group runs (also when somebody else had started it), False when nothing was launched.

    Raises:
        ValueError: RANK and WORLD_SIZE are set without MASTER_ADDR or MASTER_PORT.
    """
    if _is_initialized():
        return True
    if not is_launched():
        return False
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"RANK={os.environ['RANK']} and WORLD_SIZE={os.environ['WORLD_SIZE']} are set but {' and '.join(missing)} "
            "not: start the processes with torchrun, or unset RANK and WORLD_SIZE to run one process"
        )
    options: dict[str, Any] = {}
    if backend == "nccl" and device is not None and device.index is not None:
        options["device_id"] = device
    timeout = datetime.timedelta(seconds=timeout_s)
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        options["init_method"] = "env://"
    else:
        # torch 2.13's launcher keeps its store over a restart: a process that is early would read there where those
        # that have died were to be reached. Machines of one group may count differently, so only for one of them.
        store, number, world = next(dist.rendezvous("env://", timeout=timeout))
        options |= {"store": dist.PrefixStore(f"restart{restart}", store), "rank": number, "world_size": world}
    dist.init_process_group(backend, timeout=timeout, **options)
    _get_host_group(timeout_s)
    return True


def shutdown() -> None:
    """Leave the process group; does nothing when there is none.

    The group's object outlives it here. DistributedDataParallel's reducer refers to it too, and where that is the last
    to let go (torch 2.13), it waits for the group's threads while it holds Python's lock, which they may need: the
    process hangs. The reference from Python lets go without the lock.
    """
    global _host_group, _left_group
    _host_group = None
    if _is_initialized():
        _left_group = dist.group.WORLD
        dist.destroy_process_group()


@atexit.register
def _let_go() -> None:
    global _left_group
    _left_group = None


def _get_host_group(timeout_s: float = DEFAULT_TIMEOUT_S) -> Any:
    """Return a group for objects and CPU tensors: the world where that is gloo, else a gloo group beside it.

    Making it is a collective, so it is made by `init_process_group`, or at the first collective of a world that
    somebody else (Lightning, a notebook) has started.
    """
    global _host_group
    world = dist.group.WORLD
    if _host_group is None or _host_group[0] is not world:
        group = world
        if dist.get_backend() != "gloo" and dist.is_gloo_available():
            group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
        _host_group = (world, group)
    return _host_group[1]


def barrier() -> None:
    """Wait until every rank is here."""
    if is_distributed():
        dist.barrier(group=_get_host_group())


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the ranks.

    Args:
        tensor: any shape, same on every rank.

    Returns:
        A new tensor on the same device: integers keep their type, every float is float32 (float64 is not available
        on all accelerators, and half precision overflows in sums).
    """
    total = tensor.detach().to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
    if is_distributed():
        dist.all_reduce(total, group=_get_host_group() if total.device.type == "cpu" else None)
    return total


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Average a tensor over the ranks.

    Args:
        tensor: any shape, same on every rank; integers are averaged as floats.

    Returns:
        A new float32 tensor on the same device.
    """
    return all_reduce_sum(tensor.to(torch.float32)) / world_size()


def average_(tensor: torch.Tensor) -> None:
    """Average a float tensor over the ranks in place, as DistributedDataParallel does: divided first, then summed."""
    if is_distributed():
        tensor.mul_(1.0 / world_size())
        dist.all_reduce(tensor, group=_get_host_group() if tensor.device.type == "cpu" else None)


def broadcast_object(obj: _T) -> _T:
    """Send a picklable object from rank 0 to all ranks; returns it on every rank, whatever `obj` is there."""
    if not is_distributed():
        return obj
    holder = [obj if rank() == 0 else None]
    dist.broadcast_object_list(holder, src=0, group=_get_host_group())
    return holder[0]


def all_gather_object(obj: _T) -> list[_T]:
    """Collect one picklable object of every rank on all ranks; returns them in rank order."""
    if not is_distributed():
        return [obj]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, obj, group=_get_host_group())
    return gathered


def gather_object(obj: _T, dst: int = 0) -> list[_T] | None:
    """Collect one picklable object of every rank on rank `dst`.

    Returns:
        The objects in rank order on rank `dst`, None on the others.
    """
    if not is_distributed():
        return [obj]
    gathered: list[Any] | None = [None] * world_size() if rank() == dst else None
    dist.gather_object(obj, gathered, dst=dst, group=_get_host_group())
    return gathered


def _failure_text(error: BaseException) -> str:
    summary = "".join(traceback.format_exception_only(error)).strip()
    where = "".join(traceback.format_tb(error.__traceback__)[-3:])
    return f"rank 0 failed: {summary}\n{where}".rstrip()


class LateMax:
    """Find the largest of the numbers that the ranks give, without waiting for any of them.

    Each call starts one small reduction over gloo and returns the result of the call before, which has long arrived.
    So every rank learns the same number at the same call. No accelerator takes part.
    """

    def __init__(self) -> None:
        self._pending: tuple[Any, torch.Tensor] | None = None

    def __call__(self, value: int) -> int:
        """Give this rank's number and return the maximum of the previous call; with one process that of this one."""
        if not is_distributed():
            return value
        largest = 0
        if self._pending is not None:
            work, tensor = self._pending
            work.wait()
            largest = tensor.tolist()[0]
        tensor = torch.tensor([value], dtype=torch.int32)
        self._pending = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_get_host_group(), async_op=True), tensor
        return largest


def run_on_primary(fn: Callable[[], _T], interruptible: bool = False) -> _T:
    """Run a function on rank 0 and hand its result, or its failure, to every rank.

    Args:
        fn: called on rank 0 only; its result must be picklable when there are several ranks.
        interruptible: a signal that asks rank 0 to stop breaks it off (signals.py); StopRequested on every rank.

    Returns:
        The result, equal on all ranks (a copy on all but rank 0).

    Raises:
        RuntimeError: on the other ranks, with rank 0's error text; rank 0 raises its own error. A failure therefore
            ends every rank at once instead of leaving the others waiting in a collective.
    """
    scope = signals.interruptible if interruptible else contextlib.nullcontext
    if not is_distributed():
        with scope():
            return fn()
    if not is_primary():
        payload = broadcast_object(None)
        if isinstance(payload, str):
            raise RuntimeError(payload)
        if isinstance(payload, signals.StopRequested):
            raise payload
        return pickle.loads(payload)
    try:
        with scope():
            result = fn()
        payload = pickle.dumps(result)  # here, so that an unpicklable result is a failure of fn and reaches all ranks
    except BaseException as error:  # also SystemExit and KeyboardInterrupt: the others must not wait for them
        broadcast_object(error if isinstance(error, signals.StopRequested) else _failure_text(error))
        raise
    broadcast_object(payload)
    return result


@torch.no_grad()
def distribute_bn(model: torch.nn.Module, mode: str = "reduce") -> None:
    """Make batch-norm running statistics equal on all ranks, in one collective per dtype.

    `num_batches_tracked` is left alone: it is the same everywhere, and averaging an integer would not be.

    Args:
        model: plain or wrapped model, same on every rank; its running_mean and running_var are changed in place.
        mode: 'reduce' takes the mean over the ranks, 'broadcast' takes rank 0's, '' does nothing.

    Raises:
        ValueError: any other mode.
    """
    if mode not in ("reduce", "broadcast", ""):
        raise ValueError(f"distribute_bn mode {mode!r}: must be 'reduce', 'broadcast' or '' (off)")
    if not mode or not is_distributed():
        return
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in ("running_mean", "running_var"):
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_dtype.values():
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        group = _get_host_group() if flat.device.type == "cpu" else None
        if mode == "reduce":
            flat /= world_size()  # before the sum: half precision must not overflow
            dist.all_reduce(flat, group=group)
        else:
            dist.broadcast(flat, src=0, group=group)
        for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))
