"""One line at the bottom of a terminal that is written anew as a run goes on; files and pipes get plain lines.

Lives here: the log handler of standard output and the layout of its line. A log record with an attribute `on_live_line`
is not printed: its numbers are shown by `show` instead. They are

    epoch, step, steps         what is done
    loss, class_loss, box_loss, img_per_s   numbers of the last interval
    data_share                 share of the time spent waiting for data, 0..1
    memory_mib                 peak memory
    eta                        text, time to the end of the run
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

_CLEAR = "\r\x1b[K"
_REDRAW_S = 0.1  # steps come faster than anyone reads
_BAR_LEAST, _BAR_MOST = 8, 20  # columns


def is_terminal(stream: TextIO) -> bool:
    """Tell whether a stream is a terminal that moves its cursor."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class LiveLineHandler(logging.StreamHandler):
    """Print records, and keep the live line below them."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._values: dict[str, Any] = {}  # of the line on the screen; empty when there is none
        self._drawn_at = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record above the live line."""
        if not getattr(record, "on_live_line", False):
            self._write(_CLEAR)
            super().emit(record)
            self._draw()

    def show(self, values: Mapping[str, Any]) -> None:
        """Fill the line anew; all steps done, the next one starts below it."""
        self._values = dict(values)
        self._draw()
        if values["step"] == values["steps"]:
            self.end_line()

    def step(self, **values: Any) -> None:
        """Move the line on between two calls of `show`, ten times a second at most; a new one needs `step`, `steps`."""
        if not self._values and values["step"] >= values["steps"]:
            return  # the line has been ended
        is_new = not self._values
        self._values.update(values)
        if is_new or time.monotonic() - self._drawn_at >= _REDRAW_S:
            self._draw()

    def end_line(self) -> None:
        """Leave the line as it is and go below it."""
        if self._values:
            self._draw()
            self._write("\n")
            self._values = {}

    def drop_line(self) -> None:
        """Take the line away."""
        if self._values:
            self._values = {}
            self._write(_CLEAR)

    def close(self) -> None:
        """Leave the last line standing."""
        self.end_line()
        super().close()

    def _draw(self) -> None:
        if self._values:
            width = shutil.get_terminal_size((100, 24)).columns - 1
            fancy = "utf" in (self.stream.encoding or "").lower()
            self._write(_CLEAR + format_live_line(self._values, width, fancy))
            self._drawn_at = time.monotonic()

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a terminal that was closed does not end the run
            self.stream.write(text)
            self.flush()


def format_live_line(values: Mapping[str, Any], width: int, fancy: bool = True) -> str:
    """Lay the line out; what does not fit is left out, from the least important field on.

    Args:
        values: as in the module's docstring; `what` takes the place of "Epoch N". Numbers may be missing.
        width: columns.
        fancy: whether the terminal shows more than ASCII.
    """
    step, steps = values.get("step", 0), max(1, values.get("steps", 1))
    head = f"{values.get('what') or 'Epoch {}'.format(values.get('epoch', 0))}  "
    fields = [(0, f" {step:>{len(str(steps))}d}/{steps}")]  # (a small number is important, text) from left to right
    if "loss" in values:
        fields.append((3, f"loss {values['loss']:.4g}"))
        fields.append((5, f"class {values['class_loss']:.3g} box {values['box_loss']:.3g}"))
        fields.append((2, f"{values['img_per_s']:.{1 if values['img_per_s'] < 100 else 0}f} img/s"))
        fields.append((4, f"data {100 * values['data_share']:.0f}%"))
        fields.append((6, f"{values['memory_mib'] / 1024:.1f} GiB"))
        fields.append((1, f"ETA {values['eta']}"))

    def room() -> int:
        return width - len(head) - len("  ".join(text for _, text in fields))

    while len(fields) > 1 and room() < _BAR_LEAST:
        fields.remove(max(fields))
    bar_width = max(0, min(_BAR_MOST, room()))
    filled = round(bar_width * min(1.0, step / steps))
    done, left = ("━", "─") if fancy else ("#", "-")
    return (head + done * filled + left * (bar_width - filled) + "  ".join(text for _, text in fields))[:width]


# ---- for those who have no handler at hand ---------------------------------------------------------------------------


def current() -> LiveLineHandler | None:
    """Return the handler with the live line, None where standard output is no terminal."""
    handlers = logging.getLogger("effdet").handlers
    return next((handler for handler in handlers if isinstance(handler, LiveLineHandler)), None)


def step(**values: Any) -> None:
    """Move the line on, where there is one."""
    if (handler := current()) is not None:
        handler.step(**values)


def show(values: Mapping[str, Any]) -> None:
    """Fill the line anew, where there is one."""
    if (handler := current()) is not None:
        handler.show(values)


@contextlib.contextmanager
def ended() -> Iterator[None]:
    """Leave no half-written line behind, however the block ends."""
    try:
        yield
    finally:
        if (handler := current()) is not None:
            handler.end_line()


@contextlib.contextmanager
def progress(what: str, steps: int) -> Iterator[Callable[[int], None]]:
    """Show on a line of its own, where there is one, how far the block has come; take it away at the end.

    Args:
        what: its name.
        steps: in all.

    Yields:
        To be called with the number of steps done.
    """
    handler = current()
    if handler is None:
        yield lambda done: None
        return
    handler.end_line()
    try:
        yield lambda done: handler.step(what=what, step=done, steps=steps)
    finally:
        handler.drop_line()
