"""What a terminal shows: log records in colours and, below them, one bar. rich draws both.

NO_COLOR in the environment takes the colours away. Nothing runs beside the work: a thread that draws would be copied
with its locks into loader processes.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

_REDRAW_S = 0.2  # steps come faster than anyone reads, and a drawing takes milliseconds
_STYLES = {logging.WARNING: ("warning: ", "yellow"), logging.ERROR: ("error: ", "bold red")}
_SCORES = r"\bAP(50|75)?:? +[\d.]+|\*\*\* Best metric: [\d.]+"
_BAR_LEAST, _BAR_MOST, _NUMBERS = 8, 24, 48  # columns


class TerminalHandler(logging.Handler):
    """Print records, and keep the bar below them."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.console = _Console(
            file=_Stream(stream), force_terminal=True, force_jupyter=False, highlight=False, markup=False, emoji=False
        )
        self._bar: Progress | None = None
        self.addFilter(lambda record: getattr(record, "terminal", True))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record above the bar."""
        try:
            prefix, style = _STYLES.get(record.levelno, ("", ""))
            text = Text(prefix + self.format(record), style)
            if not style:
                text.highlight_regex(_SCORES, "bold green")
            self.console.print(text, soft_wrap=True)
        except Exception:  # as every handler
            self.handleError(record)

    @contextlib.contextmanager
    def begin_bar(
        self, what: str, total: int | None, unit: str, each: int, step_s: float | None
    ) -> Iterator[Callable[..., None]]:
        """Show a bar in place of the one there is; see `progress.bar`."""
        self._end_bar()
        room = self.console.width - len(what) - 2
        columns = (
            TextColumn("{task.description}"),
            BarColumn(max(_BAR_LEAST, min(_BAR_MOST, room - _NUMBERS))),
            _Numbers(room),
        )
        bar = self._bar = Progress(
            *columns,
            console=self.console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,  # loader processes would inherit it
            redirect_stderr=False,
            get_time=time.monotonic,
        )
        task = bar.add_task(what, total=total, unit=unit, each=each, step_s=step_s, left=None, loss=None)
        bar.start()
        drawn_at = 0.0

        def move(done: int, left: int | None = None, loss: float | None = None) -> None:
            nonlocal drawn_at
            now = time.monotonic()
            if done > 2 and now - drawn_at < _REDRAW_S:  # the first steps say how long the others take
                return
            drawn_at = now
            fields = {"left": left} | ({} if loss is None else {"loss": loss})
            bar.update(task, completed=done, refresh=bar is self._bar, **fields)

        try:
            yield move
        finally:
            if bar is self._bar:
                self._end_bar()

    def close(self) -> None:
        """Leave no half-drawn bar behind."""
        self._end_bar()
        super().close()

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _Numbers(ProgressColumn):
    """Count, loss, time left and rate; what does not fit is left out, from the rate on."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room - _BAR_LEAST - 1

    def render(self, task: Task) -> Text:
        done, fields, in_bytes = int(task.completed), task.fields, task.fields["unit"] == "B"
        count = decimal(done) if in_bytes else str(done)
        if task.total is not None:
            count = f"{count}/{decimal(int(task.total)) if in_bytes else int(task.total)}"
        texts = [count]
        if fields["loss"] is not None:
            texts.append(f"loss {fields['loss']:.4g}")
        speed = task.speed or (1 / fields["step_s"] if fields["step_s"] else None)  # steps a second
        if speed:
            left = task.remaining if fields["left"] is None else fields["left"]
            if left is not None:
                texts.append(f"ETA {timedelta(seconds=round(left / speed))}")
            rate = speed * fields["each"]
            texts.append(
                f"{decimal(int(rate))}/s"
                if in_bytes
                else f"{rate:.{0 if rate >= 100 else 3}{'f' if rate >= 100 else 'g'}} {fields['unit']}/s"
            )
        while len(texts) > 1 and len("  ".join(texts)) > self.room:
            texts.pop()
        return Text("  ".join(texts))


class _Console(Console):
    """One that never hides the cursor: a process that is killed could not bring it back."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


class _Stream:
    """A terminal that may be closed while a run goes on, or know fewer letters than a name has."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()
