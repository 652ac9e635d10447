"""A training in a real terminal: what stays on its screen, and what does not; with --plain, what a pipe gets."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from real_process import train_argv

from effdet.data.synthetic.dataset import make_synthetic_dataset

EPOCHS, STEPS = 2, 2  # steps an epoch
TABLE = "AR_large   IoU 0.50:0.95"  # the last of its 12 lines


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_synthetic_dataset(tmp_path_factory.mktemp("data") / "set", num_train=8, num_val=4)


def train(in_terminal: Callable[..., tuple[int, str]], data: Path, output: Path, *more: str) -> tuple[str, str]:
    status, text = in_terminal("train.py", *train_argv(data, output, "--epochs", EPOCHS, *more))
    assert status == 0, text
    return text, (output / "run" / "log.txt").read_text()


@pytest.mark.slow
def test_a_terminal_sees_bars_and_each_number_once(in_terminal, data, tmp_path):
    text, log = train(in_terminal, data, tmp_path)
    drawn = re.sub(r"\x1b\[[\d;]*m", "", text)
    for epoch in range(EPOCHS):
        assert re.search(rf"Epoch {epoch} \S+ 1/{STEPS}  loss [\d.]+", drawn)
    assert re.search(rf"Epoch 1 \S+ 0/{STEPS}  ETA 0:\S+  \S+ img/s", drawn), "known from the first epoch"
    assert "Evaluating " in drawn
    assert (drawn.count("Train: "), drawn.count(TABLE), drawn.count("*** Best metric: ")) == (0, 1, 1)
    assert drawn.count("Eval: ") == EPOCHS, "one line between"
    assert drawn.rstrip().splitlines()[-1].startswith("next: ") and not re.search(r"setting: |\w\(\w+=", drawn)
    assert (log.count("Train: "), log.count(TABLE), log.count("*** Best metric: ")) == (
        EPOCHS * STEPS,
        EPOCHS,
        EPOCHS + 1,
    )
    assert "\x1b" not in log and " DEBUG   setting: " in log


@pytest.mark.slow
def test_plain_is_what_a_pipe_gets(in_terminal, data, tmp_path):
    text, _ = train(in_terminal, data, tmp_path, "--plain")
    assert "\x1b" not in text
    assert (text.count("Train: "), text.count(TABLE), text.count("*** Best metric: ")) == (
        EPOCHS * STEPS,
        EPOCHS,
        EPOCHS + 1,
    )
