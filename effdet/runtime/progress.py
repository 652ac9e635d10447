"""Bars that fill as work goes on, for whoever does the work: a terminal shows them, files, pipes and notebooks do not.

Lives here: what a bar is told, and who sees which log record. How it looks is in terminal.py, which is imported where
there is a terminal alone. A log record with `extra=IN_LINES` is for files and pipes, where no bar says the same; one
with `extra=ON_TERMINAL` is for terminals.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TextIO, TypeVar

if TYPE_CHECKING:
    from .terminal import TerminalHandler

_T = TypeVar("_T")

PLAIN = "EFFDET_PLAIN"
"""Environment variable: if set, a terminal gets plain lines, as a pipe does; --plain sets it."""

_NOTEBOOK = "JPY_PARENT_PID"  # Jupyter sets it for its kernels, and what they start inherits it

IN_LINES, ON_TERMINAL = {"terminal": False}, {"terminal": True}


class Move(Protocol):
    """Fill a bar up to a number of steps done."""

    def __call__(self, done: int, left: int | None = None, loss: float | None = None) -> None:
        """Show it, a few times a second at most.

        Args:
            done: steps.
            left: steps to the end of it all, where that lies beyond this bar; the time left is that to there.
            loss: to show from now on; None: as it is.
        """


def is_terminal(stream: Any) -> bool:
    """Tell whether a stream is a terminal that moves its cursor, and the package that draws on it is there."""
    shows = getattr(stream, "isatty", lambda: False)() and os.environ.get("TERM") != "dumb"
    # A notebook runs `!command` in a terminal of its own, and puts what was meant for the cursor into the cell.
    plain = os.environ.get(PLAIN) or _NOTEBOOK in os.environ
    return bool(shows) and not plain and importlib.util.find_spec("rich") is not None


def be_plain(wanted: bool) -> None:
    """Have terminals get plain lines where that is wanted, of this process and of those that it starts."""
    if wanted:
        os.environ[PLAIN] = "1"


def make_handler(stream: TextIO) -> logging.Handler:
    """Make the log handler of a stream: with colours and bars for a terminal, else of plain lines."""
    if is_terminal(stream):
        return _make_terminal_handler(stream)
    return keep_lines(logging.StreamHandler(stream))  # it flushes after each record


def _make_terminal_handler(stream: TextIO) -> TerminalHandler:
    from .terminal import TerminalHandler  # rich takes a tenth of a second

    return TerminalHandler(stream)


def keep_lines(handler: logging.Handler) -> logging.Handler:
    """Return a handler that leaves out what is for terminals."""
    handler.addFilter(lambda record: not getattr(record, "terminal", False))
    return handler


def current() -> TerminalHandler | None:
    """Return the handler with the bar, None where nobody would see one."""
    handlers = logging.getLogger("effdet").handlers + logging.getLogger().handlers
    return next((handler for handler in handlers if hasattr(handler, "begin_bar")), None)


def watch(stream: TextIO) -> None:
    """Have a terminal show bars and warnings before the log is set up; it prints no other lines until then."""
    logger = logging.getLogger("effdet")
    if current() is None and is_terminal(stream):
        handler = make_handler(stream)
        handler.setLevel(logging.WARNING)
        logger.addHandler(handler)


@contextlib.contextmanager
def bar(
    what: str,
    total: int | None,
    unit: str = "",
    each: int = 1,
    step_s: float | None = None,
    otherwise: TextIO | None = None,
) -> Iterator[Move]:
    """Show on the terminal's last line, where there is a terminal, how far the block has come; take it away at the end.

    Args:
        what: its name.
        total: steps in all; None: not known.
        unit: of the rate, such as 'img'; 'B' counts bytes.
        each: units a step.
        step_s: seconds a step is likely to take, until that is known.
        otherwise: a stream whose terminal shows the bar where no log goes to one, as in a program that is not ours.
    """
    handler = current()
    if handler is None and otherwise is not None and is_terminal(otherwise):
        handler = _make_terminal_handler(otherwise)
    if handler is None:
        yield lambda done, left=None, loss=None: None
        return
    with handler.begin_bar(what, total, unit, each, step_s) as move:
        yield move


def track(items: Iterable[_T], what: str, total: int, unit: str = "") -> Iterator[_T]:
    """Yield the items, and show a bar of how many are done."""
    with bar(what, total, unit) as move:
        for done, item in enumerate(items):
            move(done)
            yield item
