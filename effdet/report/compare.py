"""Runs side by side: what was set differently, how they did, how sure the differences are; as text and as one page."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from effdet.metrics.bootstrap import Interval

from .html import in_words

_CURVES = ("AP", "AP50")
_OF_THE_PLACE = ("run.output", "run.experiment", "run.resume")  # differ between any two runs, and change no number


@dataclass
class RunRecord:
    """What is known of a run.

    Args:
        name: of its folder.
        settings: value by dotted key.
        rows: of its metrics.jsonl.
        seconds: of its last start; None while it is running.
        continued: it had been started before, so that `seconds` are not all.
        ap: of the best epoch, with its interval; None where it is not to be had.
        gain: over the first run, likewise.
        note: why there is no interval.
    """

    name: str
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    seconds: float | None = None
    continued: bool = False
    ap: Interval | None = None
    gain: Interval | None = None
    note: str = ""
    best: Mapping[str, Any] = field(init=False)  # its best evaluation; empty: none

    def __post_init__(self) -> None:
        scored = [row for row in self.rows if row["kind"] == "evaluation" and row.get("AP") is not None]
        self.best = max(scored, key=lambda row: row["AP"], default={})


def differing_settings(runs: Sequence[RunRecord]) -> list[list[str]]:
    """Return dotted name and value in each run of the settings that are not equal in all."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in _OF_THE_PLACE)
    rows = [[key, *(in_words(run.settings.get(key)) for run in runs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def score_rows(runs: Sequence[RunRecord]) -> list[list[str]]:
    """Return the lines of the table of results, name first."""
    lines = [
        ["best AP", *(_number(run.best.get("AP")) for run in runs)],
        ["  95 % interval", *(f"+- {run.ap.half:.4f}" if run.ap else "-" for run in runs)],
        [
            "  more than the first",
            *(f"{run.gain.value:+.4f} +- {run.gain.half:.4f}" if run.gain else "-" for run in runs),
        ],
        ["AP50 then", *(_number(run.best.get("AP50")) for run in runs)],
        ["epoch", *(str(run.best.get("epoch", "-")) for run in runs)],
        ["epochs done", *(str(len({r["epoch"] for r in run.rows if r["kind"] == "epoch"})) for run in runs)],
        ["seconds", *(_seconds(run) for run in runs)],
    ]
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _seconds(run: RunRecord) -> str:
    return "-" if run.seconds is None else f"{run.seconds:.0f}{' since it was resumed' if run.continued else ''}"


def format_comparison(runs: Sequence[RunRecord]) -> str:
    """Return the comparison as text."""
    settings = differing_settings(runs)
    head = ["", *(run.name for run in runs)]
    blocks = [_align([head, *score_rows(runs)])]
    blocks.append(_align([["settings that differ"], *settings]) if settings else "all settings are equal")
    blocks += [f"{run.name}: no interval, {run.note}" for run in runs if run.note]
    return "\n\n".join(blocks)


def _align(rows: Sequence[Sequence[str]]) -> str:
    count = max(map(len, rows))
    full = [[*row, *[""] * (count - len(row))] for row in rows]
    widths = [max(len(row[k]) for row in full) for k in range(count)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in full
    )


def collect_page(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Return everything the page shows as json values."""
    names = [run.name for run in runs]
    curves = []
    for run in runs:
        evaluations = [row for row in run.rows if row["kind"] == "evaluation"]
        epochs = [row for row in run.rows if row["kind"] == "epoch"]
        curves.append(
            {
                "name": run.name,
                "evaluations": {"x": [row["epoch"] + 1 for row in evaluations]}
                | {key: [row.get(key) for row in evaluations] for key in _CURVES},
                "epochs": {"x": [row["epoch"] + 1 for row in epochs]}
                | {key: [row.get(key) for row in epochs] for key in ("loss", "lr")},
            }
        )
    return {
        "title": f"{len(runs)} runs",
        "subtitle": f"{', '.join(names)}; written {datetime.datetime.now():%Y-%m-%d %H:%M}",
        "tiles": [(run.name, _number(run.best.get("AP"))) for run in runs],
        "names": names,
        "scores": score_rows(runs),
        "settings": differing_settings(runs),
        "notes": [f"{run.name}: no interval, {run.note}" for run in runs if run.note],
        "runs": curves,
    }
