"""What a terminal shows, character by character, and that files and pipes see none of it."""

from __future__ import annotations

import io
import logging
import os
import re

import pytest

from effdet.report import log
from effdet.report import progress as live_line
from effdet.report.log import setup_logging
from effdet.report.progress import ended, format_live_line, progress

VALUES = {
    "epoch": 3,
    "step": 310,
    "steps": 7393,
    "loss": 1.2534,
    "class_loss": 0.7512,
    "box_loss": 0.01003,
    "img_per_s": 46.375,
    "data_share": 0.034,
    "memory_mib": 12600,
    "eta": "2:03:05",
}
ON_LINE = {"on_live_line": True}  # for a log record


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """Return the lines as a terminal shows them after all it was sent."""
        lines = [""]
        for part in re.split(r"(\r\x1b\[K|\n)", self.getvalue()):
            if part == "\n":
                lines.append("")
            elif part.startswith("\r"):
                lines[-1] = ""
            else:
                assert "\x1b" not in part and "\r" not in part
                lines[-1] += part
        return lines


@pytest.fixture
def terminal(monkeypatch, tmp_path):
    """A session that logs to a terminal of 100 columns; also to files in tmp_path."""
    saved = {
        name: (
            logging.getLogger(name),
            logging.getLogger(name).handlers[:],
            logging.getLogger(name).propagate,
            logging.getLogger(name).level,
        )
        for name in ("effdet", "timm_patches")
    }
    screen = Terminal()
    monkeypatch.setattr(log.sys, "stdout", screen)
    monkeypatch.setattr(live_line.shutil, "get_terminal_size", lambda *_: os.terminal_size((100, 24)))
    monkeypatch.setenv("TERM", "xterm")
    setup_logging(tmp_path)
    yield screen
    for handler in logging.getLogger("effdet").handlers:
        handler.close()
    for logger, handlers, propagate, level in saved.values():
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.mark.parametrize(
    ("width", "fields"),
    [
        (160, "loss 1.253  class 0.751 box 0.01  46.4 img/s  data 3%  12.3 GiB  ETA 2:03:05"),
        (80, "loss 1.253  46.4 img/s  data 3%  ETA 2:03:05"),
        (66, "loss 1.253  46.4 img/s  ETA 2:03:05"),
        (45, "ETA 2:03:05"),
        (28, ""),
    ],
)
def test_the_least_important_fields_go_first(width, fields):
    line = format_live_line(VALUES, width)
    head, bar, count, rest = re.fullmatch(r"(Epoch 3  )([━─]+)(  310/7393)(.*)", line).groups()
    assert rest.strip() == fields and len(line) <= width
    assert bar.count("━") == round(len(bar) * 310 / 7393)


def test_bar_follows_the_steps_and_plain_terminals_get_ascii():
    bars = [format_live_line({"epoch": 0, "step": step, "steps": 20}, 100, fancy=False) for step in (0, 5, 20)]
    assert [(bar.count("#"), bar.count("-")) for bar in bars] == [(0, 20), (5, 15), (20, 0)]
    assert all(bar.isascii() for bar in bars)
    assert format_live_line({"what": "Evaluating", "step": 3, "steps": 20}, 100).startswith("Evaluating  ━━━─")


def test_one_line_for_an_epoch_and_records_above_it(terminal, tmp_path):
    logger = logging.getLogger("effdet.train")
    logger.info("hello")
    live_line.step(epoch=3, step=1, steps=100)
    assert terminal.screen()[:-1] == ["hello"] and terminal.screen()[-1].endswith("1/100")
    logger.info("Train: 3 [  50/100]", extra=ON_LINE)
    live_line.show({**VALUES, "step": 50, "steps": 100})
    assert len(terminal.screen()) == 2
    assert terminal.screen()[1].endswith(" 50/100  loss 1.253  class 0.751 box 0.01  46.4 img/s  data 3%  ETA 2:03:05")
    logger.warning("careful")
    assert terminal.screen()[1] == "careful" and "50/100" in terminal.screen()[2], "the line moves down"
    logger.info("Train: 3 [ 100/100]", extra=ON_LINE)
    live_line.show({**VALUES, "step": 100, "steps": 100})
    live_line.step(epoch=3, step=100, steps=100)  # as the loop does after each update
    logger.info("Eval: 3  AP: 0.5")
    screen = terminal.screen()
    assert screen[:2] == ["hello", "careful"] and "100/100" in screen[2] and screen[3:] == ["Eval: 3  AP: 0.5", ""]
    text = (tmp_path / "log.txt").read_text()
    assert text.count("Train: 3 [") == 2 and "\x1b" not in text and "━" not in text, "the file has the plain lines"


def test_the_line_moves_ten_times_a_second_at_most(terminal, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(live_line.time, "monotonic", lambda: now[0])
    for step in range(100):
        now[0] += 0.03
        live_line.step(epoch=0, step=step, steps=100)
    assert 24 <= terminal.getvalue().count("Epoch 0") <= 30, "3 seconds"


def test_progress_has_a_line_of_its_own_and_leaves_nothing(terminal):
    live_line.step(epoch=3, step=5, steps=10)
    with pytest.raises(KeyboardInterrupt), progress("Evaluating", 3) as on_batch:
        assert terminal.screen()[0].endswith(" 5/10")
        on_batch(0)
        assert re.fullmatch(r"Evaluating  ─+ 0/3", terminal.screen()[1])
        logging.getLogger("effdet").info("a table")
        assert terminal.screen()[1] == "a table" and terminal.screen()[2].startswith("Evaluating")
        raise KeyboardInterrupt
    assert terminal.screen()[1:] == ["a table", ""]


def test_no_half_line_is_left_when_a_run_breaks_off(terminal):
    with pytest.raises(KeyboardInterrupt), ended():
        live_line.step(epoch=0, step=5, steps=10)
        raise KeyboardInterrupt
    assert terminal.getvalue().endswith("\n") and "5/10" in terminal.screen()[-2]


def test_a_closed_terminal_ends_nothing(terminal):
    live_line.step(epoch=0, step=5, steps=10)
    terminal.close()
    live_line.step(epoch=0, step=6, steps=10)
    with ended():
        pass


def test_other_ranks_have_no_line_and_pipes_no_handler(terminal, monkeypatch, tmp_path):
    setup_logging(tmp_path, rank=1)
    assert live_line.current() is None
    live_line.step(epoch=0, step=5, steps=10)
    live_line.show(VALUES)
    assert terminal.screen() == [""]
    monkeypatch.setattr(log.sys, "stdout", io.StringIO())
    setup_logging(None)
    assert live_line.current() is None
    with progress("Evaluating", 3) as on_batch:
        on_batch(1)
    logging.getLogger("effdet").info("Train: 3", extra=ON_LINE)
    assert log.sys.stdout.getvalue() == "Train: 3\n"
    monkeypatch.setattr(log.sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "dumb")
    setup_logging(None)
    assert live_line.current() is None, "a terminal that cannot go back"
