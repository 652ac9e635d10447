"""Notice that a group of processes stands still, and say which of them the others wait for.

A rank that hangs leaves the others in a collective that gives up after hours, with no word on who was missing. Here
each process has a thread that tells the others, over the group's store, how far its process has come. When no process
has come further for a time limit, the error names those that are behind or no longer answer, and the processes are
killed, so that a launcher sees a failure and can start them again.

The main thread only notes where it is (`tick`): no communication and no wait.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from . import distributed

_logger = logging.getLogger(__name__)

_place: list[Any] = [0, 0, "starting"]  # step, phase within it, and in words; replaced as a whole


def tick(step: int, phase: int, text: str) -> None:
    """Note where this process is.

    Args:
        step: batches done.
        phase: place within a step; larger is later.
        text: the same in words.
    """
    global _place
    _place = [step, phase, text]


def tick_within(text: str, phase: int = 2) -> None:
    """Note a place in what follows the last step."""
    tick(_place[0], phase, text)


class Heartbeat(threading.Thread):
    """Tell the other ranks where this one is and watch where they are.

    Args:
        store: shared by the ranks; any torch.distributed store.
        rank, world: this process and their number.
        limit_s: seconds without progress anywhere that mean a hang.
        on_hang: called once with the text of the error; the default kills the process.
        place: returns this rank's place; the default is what `tick` noted.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world: int,
        limit_s: float,
        on_hang: Callable[[str], None] | None = None,
        place: Callable[[], list[Any]] | None = None,
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.store, self.rank, self.world, self.limit_s = store, rank, world, limit_s
        self.on_hang = on_hang or self._kill
        self.place = place or (lambda: _place)
        self._ended = threading.Event()
        now = time.monotonic()
        self._heard: dict[int, tuple[str, float]] = {other: ("", now) for other in range(world)}  # last message, since
        self._places: dict[int, list[Any]] = {other: [0, 0, "starting"] for other in range(world)}
        self._progress_at = now

    def end(self) -> None:
        """Stop watching; returns when the thread has ended or soon will."""
        self._ended.set()
        self.join(timeout=1.0)

    def run(self) -> None:
        """Beat and listen until `end` is called; the thread's body."""
        beats = 0
        try:
            while not self._ended.wait(min(self.limit_s / 5, 10.0)):
                beats += 1
                self.store.set(f"beat{self.rank}", json.dumps([beats, *self.place()]))
                self._listen()
                if time.monotonic() - self._progress_at > self.limit_s and not self._ended.is_set():
                    self.on_hang(self.describe())
                    return
        except RuntimeError as error:  # the store is gone: the launcher ends, or the machine that holds it
            if not self._ended.is_set():
                _logger.warning("heartbeat: the group's store does not answer any more (%s)", error)

    def _listen(self) -> None:
        now = time.monotonic()
        for other in range(self.world):
            if not self.store.check([f"beat{other}"]):
                continue
            text = self.store.get(f"beat{other}").decode()
            if text == self._heard[other][0]:
                continue
            self._heard[other] = (text, now)
            place = json.loads(text)[1:]
            if place != self._places[other]:
                self._places[other], self._progress_at = place, now

    def laggards(self) -> list[int]:
        """Return the ranks that the others wait for: those that fell silent, else those that are furthest behind."""
        now = time.monotonic()
        silent = [other for other, (_, since) in self._heard.items() if now - since > self.limit_s / 2]
        if silent:
            return silent
        first = min(place[:2] for place in self._places.values())
        return [other for other, place in self._places.items() if place[:2] == first]

    def describe(self) -> str:
        """Return the error's text."""
        late = self.laggards()
        now = time.monotonic()
        places = "; ".join(
            f"rank {other}: {place[2]}"
            + (
                f" (silent for {now - self._heard[other][1]:.0f} s)"
                if now - self._heard[other][1] > self.limit_s / 2
                else ""
            )
            for other, place in self._places.items()
        )
        who = "no rank is behind" if len(late) == self.world else f"waiting for rank {', '.join(map(str, late))}"
        return (
            f"no process has made progress for {self.limit_s:g} s (--hang-timeout): {who}. {places}. "
            "Stacks of this rank are on standard error."
        )

    def _kill(self, text: str) -> None:
        """Report, from one rank that is not to blame where there is one, and end this process."""
        late = self.laggards()
        healthy = [other for other in range(self.world) if other not in late] or [0]
        if self.rank == healthy[0]:
            _logger.error("%s", text)
        faulthandler.dump_traceback(sys.__stderr__)
        time.sleep(1.0)  # the rank that reports ends last or at the same time as the others
        # The main thread waits in native code, where it hears neither an exception nor a handler of a signal.
        os.kill(os.getpid(), signal.SIGKILL)


def start(limit_s: float) -> Heartbeat | None:
    """Watch the running group; None for one process or without a limit."""
    if limit_s <= 0 or not distributed.is_distributed():
        return None
    store = dist.distributed_c10d._get_default_store()
    watch = Heartbeat(dist.PrefixStore("heartbeat", store), distributed.rank(), distributed.world_size(), limit_s)
    watch.start()
    return watch
