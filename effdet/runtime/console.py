"""What a command says and how it ends: one line for an error at its door, the parser of small commands."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import sys
import textwrap
from collections.abc import Iterator

from .progress import is_terminal, make_handler

_logger = logging.getLogger(__name__)

INPUT_ERRORS = (ValueError, OSError, RuntimeError)

AS_COMMAND = "EFFDET_AS_COMMAND"
"""Environment variable, set where the command `effdet VERB` was typed and not a script; its processes inherit it."""

_VERBS = {
    "train.py": "train",
    "validate.py": "validate",
    "demo.py": "predict",
    "datacheck": "check",
    "data.formats": "data convert",
    "data.synthetic": "data synthetic",
}


def typed(program: str) -> str:
    """Return what the user types for a script, `train.py`, or a module, `python -m effdet.export`."""
    if not os.environ.get(AS_COMMAND):
        return program
    verb = program.rpartition("effdet.")[2].rpartition("commands.")[2]
    return f"effdet {_VERBS.get(verb, verb)}"


def error_line(program: str, text: object) -> str:
    """Return an error as argparse words one; where standard error is a terminal, its first words are red."""
    start = f"{program}: error:"
    if is_terminal(sys.stderr) and not os.environ.get("NO_COLOR"):
        start = f"\x1b[1;31m{start}\x1b[0m"
    return f"{start} {text}"


@contextlib.contextmanager
def one_line_errors(program: str, kinds: tuple[type[Exception], ...] = INPUT_ERRORS) -> Iterator[None]:
    """End the process with one line and status 1 when the input is at fault; other exceptions keep their traceback.

    Input errors are ValueError, OSError (a file) and RuntimeError raised while a run is set up, so use it around
    the set-up only, or name the `kinds` of errors.
    """
    try:
        yield
    except kinds as error:
        _logger.debug("the error came from here", exc_info=True)
        sys.stdout.flush()
        raise SystemExit(error_line(program, error)) from None


@contextlib.contextmanager
def dead_workers_in_one_line(program: str, then: str = "") -> Iterator[None]:
    """End the process with one line and status 1 when a loader process died; other errors keep their traceback.

    Args:
        program: its name.
        then: how to go on after that.
    """
    try:
        yield
    except RuntimeError as error:
        from .workers import WorkerError  # torch comes with it

        texts = _texts_of(error)
        found = re.search(r"DataLoader worker \(pid\S* ([\d, ]+)\)(?:.*by signal: ([\w ]+))?", texts)
        if isinstance(error, WorkerError):
            raise SystemExit(error_line(program, f"{error}{then}.")) from None
        if found is None and "Pin memory thread exited" not in texts:
            raise
        how = f" ({found[2].strip()})" if found and found[2] else ""
        which = f"a loader process (pid {found[1]}) was ended from outside{how}" if found else "loading ended"
        text = (
            f"{which}, as the system does when memory runs out: use fewer loader processes (-j) or smaller batches"
            f"{then}."
        )
        raise SystemExit(error_line(program, text)) from None


def _texts_of(error: BaseException | None) -> str:
    """Return the texts of an error and of those that led to it, the first cause first, in one line."""
    texts: list[str] = []
    while error is not None:
        texts.insert(0, " ".join(str(error).split()))
        error = error.__cause__ or error.__context__
    return " ".join(texts)


def _folded(command: str) -> str:
    """Indent a command, over several lines where 80 columns are too few, so that the shell still takes it."""
    parts = [command] if len(command) <= 78 else textwrap.wrap(command, 74, break_on_hyphens=False)
    return "  " + " \\\n      ".join(parts)


def make_tool_parser(module: str, description: str, example: str) -> argparse.ArgumentParser:
    """Make the parser of a small command `python -m MODULE`, and send its log lines to the terminal as they are.

    Args:
        module: its dotted name.
        description: one sentence.
        example: arguments of a typical call; several, one a line.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[make_handler(sys.stderr)])
    program = typed(f"python -m {module}")
    examples = "\n".join(_folded(f"{program} {arguments}") for arguments in example.splitlines())
    return argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog=f"Examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_ema_argument(parser: argparse.ArgumentParser) -> None:
    """Add --ema / --no-ema: which of a checkpoint's two sets of weights is taken."""
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the averaged weights or the trained ones (default: averaged if there are any)",
    )
