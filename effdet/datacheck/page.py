"""The data check's stats as one html file: no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import numpy as np

from effdet.data.images import ImageError, read_image
from effdet.data.transforms import ResizePad
from effdet.report.draw import draw_detections, make_class_colors
from effdet.report.images import encode_jpeg

from .anchor_reach import find_reached, letterbox_boxes
from .stats import DataStats, SplitStats
from .tables import Table, make_tables

_SAMPLES = 12
_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8882}
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:0 auto;padding:1rem}
p,li{overflow-wrap:anywhere}h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}
th,td{padding:.2rem .7rem;text-align:right;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}
.bar{width:40%;min-width:8rem}.bar i{display:block;height:.8rem;background:#3b82c4;border-radius:2px}
li{margin:.3rem 0}.error::marker,.error b{color:#c33}.warning::marker,.warning b{color:#b70}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:.8rem}
figure{margin:0}img{width:100%;height:auto;background:var(--soft)}figcaption{font-size:.8rem;overflow-wrap:anywhere}
"""


def write_html(path: Path, stats: DataStats, config: Any, seed: int = 0) -> None:
    """Write the page, its folder included.

    Args:
        path: the file.
        stats: of the check.
        config: the model config; samples are drawn in its input size.
        seed: of the choice of samples.
    """
    levels = [finding.level for finding in stats.findings]
    parts = [
        f"<h1>Data check</h1><p>{levels.count('error')} errors, {levels.count('warning')} warnings, "
        f"{levels.count('note')} notes.</p><ul>",
        *(f'<li class="{one.level}"><b>{one.level}</b>: {_text(one.text)}</li>' for one in stats.findings),
        "</ul>",
        *map(_table, make_tables(stats, config)),
    ]
    for split in stats.splits:
        parts.append(
            f"<h2>Samples of {_text(split.name)}</h2><div class=samples>{_samples(split, stats, config, seed)}</div>"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-'
        f'width,initial-scale=1"><title>Data check</title><style>{_STYLE}</style>' + "\n".join(parts),
        encoding="utf-8",
        errors="replace",
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _table(table: Table) -> str:
    lines = "".join(f"<p>{_text(line)}</p>" for line in table.lines)
    head = "".join(f"<th>{_text(cell)}" for cell in table.head)
    body = "".join("<tr>" + "".join(map(_cell, row)) for row in table.rows)
    return f"<h2>{_text(table.title)}</h2>{lines}<div class=wide><table><tr>{head}{body}</table></div>"


def _cell(cell: str | float) -> str:
    if isinstance(cell, str):
        return f"<td>{_text(cell)}"
    return f'<td class=bar><i style="width:{100 * cell:.1f}%"></i>'


def _samples(split: SplitStats, stats: DataStats, config: Any, seed: int) -> str:
    """Return images with boxes, drawn at random, as the network's input shows them."""
    arrays, drawn = split.arrays, []
    names = {} if stats.categories is None else dict(zip(stats.categories.ids, stats.categories.names, strict=True))
    colors = make_class_colors(list(names.values()))
    for k in np.random.default_rng(seed).permutation(np.flatnonzero(split.boxes_per_image)):
        info, span = arrays.img_infos[k], slice(arrays.offsets[k], arrays.offsets[k + 1])
        try:
            image = read_image(split.img_dir / info["file_name"], info["width"], info["height"])
        except ImageError:
            continue
        boxes = letterbox_boxes(arrays.boxes_yxyx[span], np.array([image.size], dtype=np.float64), config.image_size)
        labels = [names.get(i, str(i)) for i in arrays.category_ids[span].tolist()]
        shown = ResizePad(config.image_size, fill_color=(127, 127, 127))(image, {})[0]
        drawing = draw_detections(shown, boxes[:, [1, 0, 3, 2]], labels, colors=colors)
        missed = int((~find_reached(boxes, config)).sum())
        drawn.append(
            f'<figure><img alt="" src="{encode_jpeg(drawing, quality=85)}">'
            f"<figcaption>{_text(info['file_name'])}, {len(boxes)} boxes"
            f"{f', {missed} without an anchor' if missed else ''}</figcaption></figure>"
        )
        if len(drawn) == _SAMPLES:
            break
    return "".join(drawn)
