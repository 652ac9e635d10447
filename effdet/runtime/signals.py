"""Hear the signals that ask a run to end, so that it can end at a point where nothing is lost.

Lives here: the handlers, and what a signal means at the moment it comes. When a run looks, how several processes agree
and what is saved is the business of those who call `requested`.

The first SIGTERM, SIGINT, SIGUSR1 or SIGHUP (a terminal that closes) is remembered; the run ends itself with status
128 + the signal's number. A second signal kills the process at once; a shell reports the same status for it. The end of
the launcher that started this process counts as SIGTERM: killed, it can send none, and its processes would keep the
devices.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

_logger = logging.getLogger(__name__)

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
# A terminal and a launcher, or a scheduler and its daemon, often send the same signal both: that is one request.
_SAME_REQUEST_S = 0.5

_requested = 0
_requested_at = 0.0
_raises = False
_pid = 0
_launcher = 0  # the process that watches over this one, where it is torchrun or ours


class StopRequested(BaseException):
    """The run ends here because a signal asked for it.

    Not an Exception, so that no handler of errors on the way takes it for one.

    Args:
        signum: the signal's number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)  # the argument alone, so that it can be sent to another process
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """The status for the process to end with."""
        return 128 + self.signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}"


def _handle(signum: int, _frame: Any) -> None:
    global _requested, _requested_at
    if os.getpid() != _pid:
        return  # a forked child that has not changed its handlers: its parent decides
    now = time.monotonic()
    if _requested and now - _requested_at > _SAME_REQUEST_S:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(_pid, signum)
    if not _requested:
        _requested, _requested_at = signum, now
        if _raises:
            raise StopRequested(signum)


def heard() -> list[signal.Signals]:
    """Return the signals that ask this process to stop; nohup's way of surviving a terminal is left as it is."""
    return [number for number in SIGNALS if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN]


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Within the block, remember signals instead of ending; without effect outside the main thread."""
    global _requested, _pid, _launcher
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _requested, _pid = 0, os.getpid()
    _launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0
    before = {number: signal.signal(number, _handle) for number in heard()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _requested = _launcher = 0


def requested() -> int:
    """Return the number of the signal that asked this process to stop, 0 for none."""
    if _launcher and not _requested and os.getppid() != _launcher:
        _logger.warning("the launcher (process %d) is gone, so this process ends, too", _launcher)
        _handle(signal.SIGTERM, None)
    return _requested


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within the block, the first signal raises StopRequested at once: for long work that may be thrown away.

    Raises:
        StopRequested: also at the start, when the signal has come before.
    """
    global _raises
    before, _raises = _raises, True
    try:
        if _requested:
            raise StopRequested(_requested)
        yield
    finally:
        _raises = before


def ignore_in_worker(_worker_id: int = 0) -> None:
    """Leave signals to the parent; a loader's `worker_init_fn`.

    Schedulers signal every process of a job. A loading process that ended by itself would take away the batches that
    the last step before the stop needs. Workers end with their parent in any case.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
