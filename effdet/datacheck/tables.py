"""The data check's numbers as tables: a terminal and the page (`page.py`) show the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .anchor_reach import SIDE_EDGES_PX
from .stats import DataStats, SplitStats

_MOST_ROWS = 100  # on the terminal
_BAR_WIDTH = 30


class Table(NamedTuple):
    """A table with its heading and what stands above it; a cell is a text, or a share 0..1 that is drawn as a bar."""

    title: str
    lines: tuple[str, ...]
    head: tuple[str, ...]
    rows: list[tuple[str | float, ...]]

    def as_text(self) -> list[str]:
        """Return the lines for a terminal."""
        shown: list[Sequence[str]] = [self.head, *([_in_text(cell) for cell in row] for row in self.rows[:_MOST_ROWS])]
        widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
        texts = list(self.lines)
        for first, *others in shown:
            cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
            texts.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
        if len(self.rows) > _MOST_ROWS:
            texts.append(f"... {len(self.rows) - _MOST_ROWS} more: the html has them all")
        return ["", self.title, *(f"  {text}" for text in texts)]


def _in_text(cell: str | float) -> str:
    return cell if isinstance(cell, str) else ("#" * round(_BAR_WIDTH * cell) or ".").ljust(_BAR_WIDTH)


def make_tables(stats: DataStats, config: Any) -> list[Table]:
    """Return the sizes of each split's boxes, settings of better anchors, and the classes.

    Args:
        stats: of the check.
        config: the model config that they were measured for.
    """
    tables = [_tabulate_split(split, config) for split in stats.splits]
    found = stats.suggestion
    if found is not None and found.better:
        what = (
            f"share of {found.boxes} train boxes that an anchor overlaps with IoU 0.5 or more, and the cost of a step"
        )
        rows: list[tuple[str | float, ...]] = [
            (one.flags or "as it is", f"{100 * one.share:.1f} %", f"{one.cost:.1f} x")
            for one in (found.present, *found.better)
        ]
        tables.append(Table("anchors", (what,), ("setting", "reached", "cost"), rows))
    if stats.categories is not None:
        rows = [
            (name, str(i), *(str(n) for split in stats.splits for n in split.class_counts.get(i, (0, 0))))
            for i, name in zip(stats.categories.ids, stats.categories.names, strict=True)
        ]
        head = ("class", "id", *(f"{split.name} {what}" for split in stats.splits for what in ("boxes", "images")))
        tables.append(Table("classes", (str(stats.categories),), head, rows))
    return tables


def _tabulate_split(split: SplitStats, config: Any) -> Table:
    report, scan, per_image, counts = split.report, split.scan, split.boxes_per_image, split.side_counts
    height, width = config.image_size
    bad = sum(scan.broken.values()) + report.errors.get("missing_image", 0)
    lines = [
        f"{report.num_images} images ({report.num_images_without_boxes} without boxes, {bad} broken or missing), "
        f"{report.num_annotations} annotations, {len(split.sides_px)} boxes"
        + (f" ({per_image.mean():.1f} in an image, at most {per_image.max()})" if len(per_image) else ""),
        f"{len(scan.names)} images decoded in {scan.seconds:.1f} s",
        f"box size (square root of the area) in the {height} x {width} (height x width) input of {config.name}, and "
        "the share that no anchor overlaps with IoU 0.5"
        + (
            f" (tested for {split.tested.sum()} of the boxes, drawn at random):"
            if split.tested.sum() < len(split.sides_px)
            else ":"
        ),
    ]
    rows: list[tuple[str | float, ...]] = []
    for k in np.flatnonzero(counts):
        low, high = SIDE_EDGES_PX[k : k + 2]
        missed = f"{100 * (1 - split.reached[k] / split.tested[k]):.1f} %" if split.tested[k] else ""
        rows.append((f"{low:g}..{high if high < np.inf else ''} px", str(counts[k]), missed, counts[k] / counts.max()))
    title = f"{split.name}: {report.source}, images in {split.img_dir}"
    return Table(title, tuple(lines), ("box size", "boxes", "no anchor", ""), rows)
