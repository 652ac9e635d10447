"""Ranks that watch each other: threads over one store stand for processes; one of them hangs or falls silent."""

from __future__ import annotations

import queue
import time

import torch.distributed as dist

from effdet.runtime.heartbeat import Heartbeat

LIMIT_S = 0.5


def watch(places: list[list], silent: int | None = None) -> list[Heartbeat]:
    """Start a heartbeat for each place but the silent one's, which has spoken once; errors go into `found`."""
    store = dist.HashStore()
    if silent is not None:
        store.set(f"beat{silent}", f'[1, {places[silent][0]}, 0, "{places[silent][2]}"]')
    found: queue.Queue = queue.Queue()
    beats = [
        Heartbeat(store, rank, len(places), LIMIT_S, found.put, lambda rank=rank: places[rank])
        for rank in range(len(places))
        if rank != silent
    ]
    for beat in beats:
        beat.found = found
        beat.start()
    return beats


def end(beats: list[Heartbeat]) -> None:
    for beat in beats:
        beat.end()


def test_the_rank_that_is_behind_is_named():
    beats = watch([[8, 1, "computing step 9"], [8, 0, "waiting for data"], [8, 1, "computing step 9"]])
    text = beats[0].found.get(timeout=10)
    end(beats)
    assert "for 0.5 s (--hang-timeout): waiting for rank 1. " in text
    assert "rank 1: waiting for data" in text and "rank 2: computing step 9" in text and "silent" not in text


def test_a_rank_that_does_not_answer_is_named_before_one_that_is_behind():
    beats = watch([[5, 0, "a"], [9, 0, "b"], [9, 0, "c"]], silent=2)
    text = beats[0].found.get(timeout=10)
    end(beats)
    assert "waiting for rank 2." in text and "rank 2: c (silent for" in text


def test_progress_anywhere_is_progress():
    places = [[1, 0, "a"], [1, 0, "b"]]
    beats = watch(places)
    for step in range(2, 14):  # longer than the limit
        places[1] = [step, 0, "b"]
        time.sleep(0.1)
    assert beats[0].found.empty()
    text = beats[0].found.get(timeout=10)
    end(beats)
    assert "waiting for rank 0." in text
