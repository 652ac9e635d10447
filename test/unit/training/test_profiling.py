"""--profile: a trace of some updates with torch's real profiler, and a word where there was too little to trace."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from effdet.training.profiling import FOLDER, SKIPPED, StepProfiler


def train(profiler: StepProfiler, updates: int) -> None:
    weight = torch.ones(8, 8, requires_grad=True)
    for _ in range(updates):
        (weight @ weight).sum().backward()
        profiler.step()


def traced_steps(folder: Path) -> tuple[set[str], set[str]]:
    """Return the markers of steps, and the operators, in the only trace of a folder."""
    (trace,) = folder.glob("*.pt.trace.json")
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    return {name for name in names if name.startswith("ProfilerStep")}, {name for name in names if "aten::" in name}


@pytest.mark.parametrize("updates", [SKIPPED + 3, SKIPPED + 9], ids=["as many as asked for", "a longer run"])
def test_so_many_updates_are_traced(tmp_path, updates):
    profiler = StepProfiler(torch.device("cpu"), tmp_path, 2)
    train(profiler, updates)
    profiler.close()
    steps, operators = traced_steps(tmp_path / FOLDER)
    assert len(steps) == 2
    assert "aten::mm" in operators


def test_a_run_that_ends_within_leaves_what_there_is(tmp_path):
    profiler = StepProfiler(torch.device("cpu"), tmp_path, 50)
    train(profiler, SKIPPED + 4)
    profiler.close()
    assert "aten::mm" in traced_steps(tmp_path / FOLDER)[1]


@pytest.mark.parametrize("updates", [0, 2, SKIPPED + 1])
def test_too_short_a_run_is_told(tmp_path, caplog, updates):
    caplog.set_level(logging.INFO)
    profiler = StepProfiler(torch.device("cpu"), tmp_path, 2)
    train(profiler, updates)
    profiler.close()
    assert f"{updates} updates were done" in caplog.text
