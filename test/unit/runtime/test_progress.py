"""What a terminal shows, and that files and pipes see none of it."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from effdet.config.cli import parse_train_args
from effdet.report import log
from effdet.runtime import progress
from effdet.runtime.console import one_line_errors
from effdet.runtime.progress import IN_LINES, ON_TERMINAL, bar, track

STYLE = re.compile(r"\x1b\[[\d;]*m")


def screen(text: str) -> list[str]:
    """Return the lines as a terminal shows them after all it was sent, without colours."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[\d*[AK]|[\r\n]|[^\x1b\r\n]+", STYLE.sub("", text)):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\r":
            column = 0
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1])
        elif part == "\x1b[2K":
            lines[row] = ""
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    assert "\x1b" not in "".join(lines), "a code that this emulator does not know"
    assert not any(lines[row + 1 :]), "something is left below the cursor"
    return [line.rstrip() for line in lines[: row + 1]]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        return screen(self.getvalue())


pytestmark = pytest.mark.usefixtures("restored_loggers")


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    """A terminal of 100 columns."""
    stream = Terminal()
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    for name in (progress.PLAIN, "NO_COLOR", "COLORTERM", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return stream


def setup_logging(stream: io.StringIO, folder: Path | None = None, rank: int = 0) -> logging.Logger:
    with contextlib.redirect_stdout(stream):
        return log.setup_logging(folder, rank)


@pytest.fixture
def clock(monkeypatch, terminal) -> list[float]:
    """Seconds, as the bar sees them."""
    from effdet.runtime import terminal as module

    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_bar_below_the_records_and_nothing_of_it_in_the_file(terminal, tmp_path):
    logger = setup_logging(terminal, tmp_path)
    logger.info("hello")
    with bar("Epoch 3", 100, "img", 8) as move:
        move(0)
        assert re.fullmatch(r"Epoch 3 ━+ 0/100", terminal.screen()[1])
        logger.info("Train: 3 [  50/100]", extra=IN_LINES)
        move(2, loss=1.25)
        assert len(terminal.screen()) == 2 and re.search(r" 2/100  loss 1.25\b", terminal.screen()[1])
        logger.warning("careful")
        assert terminal.screen()[1] == "warning: careful" and "2/100" in terminal.screen()[2], "the bar moves down"
    logger.info("a table", extra=ON_TERMINAL)
    assert terminal.screen() == ["hello", "warning: careful", "a table", ""], "the bar is gone"
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(None, 2)[2] for line in lines] == [
        "INFO    hello",
        "INFO    Train: 3 [  50/100]",
        "WARNING careful",
    ]


def test_time_left_and_rate_come_with_the_second_step(terminal, clock):
    """Steps of 2 s and 8 images: the first, which is slow, does not count."""
    setup_logging(terminal)

    def shown(move: progress.Move, done: int, at: float, **fields: int) -> str:
        clock[0] = at
        move(done, **fields)
        return terminal.screen()[-1]

    with bar("Epoch 0", 12, "img", 8) as move:
        assert "ETA" not in shown(move, 0, 100)
        assert "ETA" not in shown(move, 1, 130)
        line = shown(move, 2, 132)
        assert line.endswith("2/12  ETA 0:00:20  4 img/s")
        assert shown(move, 7, 142, left=305).endswith("7/12  ETA 0:10:10  4 img/s"), "to the end of the run"
    with bar("Epoch 1", 12, "img", 8, step_s=2.0) as move:
        assert shown(move, 0, 150, left=300).endswith("0/12  ETA 0:10:00  4 img/s"), "as the steps before"


def test_bytes_and_unknown_totals(terminal, clock):
    setup_logging(terminal)
    with bar("weights.pth", 8_000_000, "B") as move:
        for done in (0, 1_000_000, 2_000_000):
            clock[0] += 1
            move(done)
        assert terminal.screen()[-1].endswith("2.0 MB/8.0 MB  ETA 0:00:06  1.0 MB/s")
    with bar("weights.pth", None, "B") as move:
        move(0)
        clock[0] += 1
        move(1_000_000)
        assert terminal.screen()[-1].endswith(" 1.0 MB")


@pytest.mark.parametrize(
    ("width", "fields"),
    [
        (100, "7/12  loss 1.234  ETA 2:46:40  4 img/s"),
        (54, "7/12  loss 1.234  ETA 2:46:40"),
        (38, "7/12  loss 1.234"),
        (24, "7/12"),
    ],
)
def test_a_narrow_terminal_keeps_the_important_fields(terminal, monkeypatch, clock, width, fields):
    monkeypatch.setenv("COLUMNS", str(width))
    setup_logging(terminal)
    with bar("Epoch 0", 12, "img", 8) as move:
        for done in (0, 1, 2, 7):
            clock[0] = 100 + 2 * done
            move(done, left=5000, loss=1.234)
        line = terminal.screen()[-1]
    drawn, rest = re.fullmatch(r"Epoch 0 ([━╸╺]+) (.*)", line).groups()
    assert rest == fields and len(line) <= width and len(drawn) >= 8


def test_the_bar_is_drawn_a_few_times_a_second_at_most(terminal, clock):
    setup_logging(terminal)
    with bar("Work", 100) as move:
        for done in range(100):
            clock[0] += 0.03
            move(done)
    assert 10 <= terminal.getvalue().count("Work") <= 25, "3 seconds"


def test_an_inner_bar_takes_the_place_of_the_outer_one(terminal):
    setup_logging(terminal)
    with bar("Outer", 5) as outer:
        outer(1)
        with bar("Inner", 3) as inner:
            inner(2)
            outer(2)
            assert len(terminal.screen()) == 1 and terminal.screen()[0].startswith("Inner")
        outer(3)
    assert terminal.screen() == [""]


def test_no_half_bar_is_left_when_work_breaks_off(terminal):
    setup_logging(terminal)
    with pytest.raises(KeyboardInterrupt), bar("Epoch 0", 10) as move:
        move(5)
        raise KeyboardInterrupt
    assert terminal.screen() == [""] and "\x1b[?25l" not in terminal.getvalue(), "the cursor was never hidden"


def test_a_program_that_is_not_ours_sees_downloads_alone(terminal):
    with bar("Reading", 10) as move:
        move(5)
    assert terminal.getvalue() == ""
    with bar("Downloading", 10, "B", otherwise=terminal) as move:
        move(5)
        assert "5 bytes/10 bytes" in terminal.screen()[0]
    assert terminal.screen() == [""] and progress.current() is None


def test_items_are_tracked(terminal):
    setup_logging(terminal)
    assert [(item, terminal.screen()[-1].split()[-1]) for item in track("ab", "Reading", 2)] == [
        ("a", "0/2"),
        ("b", "1/2"),
    ]
    assert terminal.screen() == [""]


def test_a_closed_terminal_ends_nothing(terminal):
    logger = setup_logging(terminal)
    with bar("Epoch 0", 10) as move:
        move(1)
        terminal.close()
        move(2)
        logger.warning("unseen")


def test_letters_that_the_terminal_lacks_are_escaped(terminal):
    terminal.encoding = "ascii"
    setup_logging(terminal).info("Straße %s", "/data/[x]/:smile:")
    with bar("Straße", 10) as move:
        move(5)
        assert terminal.getvalue().isascii() and "━" not in terminal.getvalue()
    assert terminal.screen()[0] == r"Stra\xdfe /data/[x]/:smile:", "and paths are no markup"


@pytest.mark.parametrize("no_color", [False, True])
def test_colours_tell_warnings_errors_and_scores(terminal, monkeypatch, no_color):
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    logger = setup_logging(terminal)
    logger.info("plain words")
    logger.warning("careful")
    logger.error("broken")
    logger.info("Eval: 1  AP: 0.5  AP50: 0.75")
    plain, warning, error, scores, _ = terminal.getvalue().split("\n")
    assert plain == "plain words" and STYLE.sub("", warning) == "warning: careful"
    colours = [set(re.findall(r"\x1b\[(?:1;)?(3\d)m", line)) for line in (warning, error, scores)]
    assert colours == ([set()] * 3 if no_color else [{"33"}, {"31"}, {"32"}])


@pytest.mark.parametrize("why", ["a pipe", "a terminal that cannot go back", "no rich", "--plain", "a notebook"])
def test_elsewhere_lines_are_plain_and_bars_are_silent(terminal, monkeypatch, why):
    stream = terminal if why != "a pipe" else io.StringIO()
    monkeypatch.setenv("TERM", "dumb" if "back" in why else "xterm")
    if why == "--plain":
        monkeypatch.setenv(progress.PLAIN, "")  # to be taken back
        progress.be_plain(parse_train_args(["--root", "x", "--plain"]).run.plain)
    if why == "a notebook":
        monkeypatch.setenv("JPY_PARENT_PID", "1")  # as its kernels have it
    if why == "no rich":
        monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    logger = setup_logging(stream)
    assert progress.current() is None
    with bar("Evaluating", 3) as move:
        move(1)
        logger.warning("careful")
    logger.info("Train: 3", extra=IN_LINES)
    logger.info("a table", extra=ON_TERMINAL)
    assert stream.getvalue() == "careful\nTrain: 3\n"


def test_other_ranks_have_no_bar(terminal, tmp_path):
    setup_logging(terminal, tmp_path, rank=1)
    with bar("Epoch 0", 10) as move:
        move(5)
    assert terminal.getvalue() == ""


def test_bars_before_the_log_is_set_up(terminal):
    progress.watch(terminal)
    logging.getLogger("effdet").setLevel(logging.INFO)
    logging.getLogger("effdet.data").info("not yet")
    with bar("Reading", 10) as move:
        move(5)
        assert len(terminal.screen()) == 1 and "5/10" in terminal.screen()[0]
    progress.watch(terminal)
    assert sum(hasattr(each, "begin_bar") for each in logging.getLogger("effdet").handlers) == 1
    setup_logging(terminal).info("now")
    assert terminal.screen() == ["now", ""]


@pytest.mark.parametrize("colour", [True, False])
def test_the_line_of_an_error_begins_in_red_on_a_terminal(terminal, monkeypatch, colour):
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    with contextlib.redirect_stderr(terminal), pytest.raises(SystemExit) as end, one_line_errors("train.py"):
        raise ValueError("no data")
    assert STYLE.sub("", end.value.code) == "train.py: error: no data"
    assert end.value.code.startswith("\x1b[1;31m") == colour and end.value.code.endswith(" no data")
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises(SystemExit) as end, one_line_errors("train.py"):
        raise ValueError("no data")
    assert end.value.code == "train.py: error: no data"


SCRIPT = """
import logging, time
from effdet.report.log import setup_logging
from effdet.runtime.progress import IN_LINES, bar
logger = setup_logging(None)
with bar("Epoch 0", 4, "img", 2) as move:
    for step in range(4):
        move(step)
        time.sleep(0.02)
    logger.info("Train: 0", extra=IN_LINES)
logger.warning("Eval: 0")
"""


def test_a_real_terminal_and_a_real_pipe(in_terminal):
    piped = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert piped.stdout == "Train: 0\nEval: 0\n" and piped.stderr == ""
    status, text = in_terminal("-c", SCRIPT)
    assert status == 0 and re.search(r"Epoch 0 .* 2/4  ETA \S+  \S+ img/s", STYLE.sub("", text))
    assert screen(text) == ["warning: Eval: 0", ""]
