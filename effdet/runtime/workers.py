"""Loading processes that cannot leave their parent waiting: room for what they send, and errors while they send it.

A process that loads puts a batch into a queue; a thread of that queue then copies it into shared memory and hands it
over through a socket. Where that thread fails, Python prints the error and drops the batch, for which the parent waits
for ever.
"""

from __future__ import annotations

import copy
import multiprocessing
import multiprocessing.process
import multiprocessing.queues
import multiprocessing.util
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from torch._utils import ExceptionWrapper

_LONGEST_SOCKET_PATH = 100  # of 107 bytes on Linux and 103 on macOS
_SOCKET_NAME = "/pymp-12345678/listener-12345678"  # what multiprocessing adds to the temporary folder
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")

_REMEDY = (
    "where shared memory is short, give the container more (docker run --shm-size=8g, or --ipc=host), or use fewer "
    "loading processes (-j; 0 needs none) or smaller batches"
)


class WorkerError(RuntimeError):
    """A loading process could not start, or could not hand a batch over; the text says why and what to do."""


class _FailedHandover(ExceptionWrapper):
    """Takes the place of a batch, as torch's wrapper of an error does, and raises the error in the parent.

    Args:
        text: what it says.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def reraise(self) -> NoReturn:
        raise WorkerError(self.text)


class _Queue(multiprocessing.queues.Queue):
    """Sends the error in place of what could not be sent."""

    def _on_queue_feeder_error(self, error: Exception, sent: Any) -> None:  # type: ignore[override]
        reason = " ".join(str(error).split()) or type(error).__name__
        text = f"a loading process could not hand a batch over ({reason}): {_REMEDY}"
        if not (isinstance(sent, tuple) and len(sent) == 2 and not isinstance(sent[1], _FailedHandover)):
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # the parent notices the end
        self.put((sent[0], _FailedHandover(text)))


def make_context() -> Any:
    """Return a multiprocessing context for a torch DataLoader, whose queues send errors instead of dropping batches.

    Also chooses a folder for the sockets, which is removed when this process ends.

    Raises:
        ValueError: this system gives processes no way to work together.
    """
    # Asking for the default would also fix it, against the caller's own set_start_method later.
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    context = copy.copy(multiprocessing.get_context(method))

    def make_queue(maxsize: int = 0) -> _Queue:
        try:
            return _Queue(maxsize, ctx=context)
        except OSError as error:
            raise WorkerError(f"loading processes cannot be started ({error}): {_REMEDY}") from error

    context.Queue = make_queue
    try:
        context.Lock()
    except OSError as error:
        raise ValueError(
            f"loading processes need semaphores in shared memory, and this system gives none ({error}): free or mount "
            "/dev/shm, or load without further processes (0 workers, -j 0)"
        ) from error
    _make_socket_folder()
    return context


def _make_socket_folder() -> None:
    """Make multiprocessing's temporary folder where a socket's whole path is allowed, in this process.

    Made here, it goes with this process; a worker's would stay where the worker is killed.
    """
    if multiprocessing.process.current_process()._config.get("tempdir") is not None:  # type: ignore[attr-defined]
        return
    before = tempfile.tempdir
    try:
        if len(os.fsencode(tempfile.gettempdir() + _SOCKET_NAME)) > _LONGEST_SOCKET_PATH:
            tempfile.tempdir = next((name for name in _SHORT_FOLDERS if os.access(name, os.W_OK)), tempfile.tempdir)
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = before


def check_shared_memory(batches: int, batch_bytes: int, folder: str = "/dev/shm") -> None:
    """Refuse to start where the batches on their way from the loading processes do not fit into shared memory.

    Args:
        batches: made ahead by all processes on this machine, with those that are worked on.
        batch_bytes: of one.
        folder: where shared memory lies; without such a folder nothing is checked.

    Raises:
        ValueError: says how much is free and how much is needed.
    """
    if not Path(folder).is_dir():
        return
    needed, free = batches * batch_bytes, shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} has {free / 2**20:.0f} MiB free, but the loader processes need about "
            f"{-(-needed // 2**20)} MiB for {batches} batches: give the container more (docker run "
            f"--shm-size={-(-needed // 2**30) + 1}g, or --ipc=host), or use fewer loader processes (-j) or a smaller "
            "batch (-b)"
        )
