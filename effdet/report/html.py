"""report.html: one self-contained page with everything a run has to show, made anew after each evaluation.

Lives here: which numbers the page shows and where they come from. How they look is page/ (HTML, CSS, JavaScript
that draws the charts); images are drawn by images.py, errors found by errors.py. The page loads
nothing from anywhere.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import logging
import os
import platform
import string
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import torch
from PIL import Image

from effdet.checkpoint.io import replacing
from effdet.config.load import dump_yaml, to_plain
from effdet.data.images import ImageError
from effdet.evaluator import CocoEvaluator
from effdet.metrics.errors import Analysis, analyse
from effdet.metrics.thresholds import GRID, ScoreCurves
from effdet.version import __version__

from .data_stats import SIZE_EDGES_PX, describe_dataset
from .images import BATCH_NAME, draw_errors, draw_suspect

_logger = logging.getLogger(__name__)

NAME = "report.html"
_MOST_POINTS = 600  # of a curve
_MOST_CLASSES = 40  # of the confusion matrix; of more classes those that are mixed up most
_SHOWN_CLASSES = 30
_INTERVAL_CURVES = ("loss", "class_loss", "box_loss", "lr", "img_per_s", "data_share")
_EVALUATION_CURVES = ("AP", "AP50", "AP_small", "AP_medium", "AP_large")


class Report:
    """Make the page of a run or of an evaluation; for rank 0.

    Args:
        path: the file.
        title: heading.
        cfg: the resolved settings.
        model_config: of the network.
        val_set: the evaluated data set.
        train_set: the training set; None for an evaluation alone.
        device: what it is called.
        facts: more pairs of name and text for the first line of numbers, such as the speed.
        initial_weights: what a run started from, in a line.
    """

    def __init__(
        self,
        path: Path,
        title: str,
        cfg: Any,
        model_config: Any,
        val_set: Any,
        train_set: Any = None,
        device: str = "",
        facts: Sequence[tuple[str, str]] = (),
        initial_weights: str = "",
    ) -> None:
        self.path, self.title, self.cfg, self.model_config, self.device = path, title, cfg, model_config, device
        self.val_set, self.train_set, self.facts, self.initial_weights = val_set, train_set, facts, initial_weights
        self._statistics: dict[str, Any] | None = None
        self._failed = False

    def write(self, evaluator: CocoEvaluator, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write the page, atomically. A failure is logged once and ends nothing.

        Args:
            evaluator: after `evaluate`.
            rows: of metrics.jsonl, for the curves; none for an evaluation alone.
        """
        try:
            text = fill_page(self.title, self.collect(evaluator, rows))
            with replacing(self.path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except Exception as error:  # whatever it is: the run is worth more than its report
            if not self._failed:
                _logger.warning(
                    "%s could not be written (%s: %s); the run goes on, and this is said once",
                    self.path,
                    type(error).__name__,
                    error,
                )
                _logger.debug("the error came from here", exc_info=True)
            self._failed = True

    def collect(self, evaluator: CocoEvaluator, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return everything the page shows as json values; arguments as for `write`."""
        scores = evaluator.scores
        if self._statistics is None:
            self._statistics = self._count_data()
        sets, in_training = self._statistics["sets"], self._statistics["in_training"]
        classes = [
            {**row, "train": in_training.get(row["category_id"], 0) if self.train_set is not None else None}
            for row in scores.class_rows()
        ]
        names = [row["name"] for row in classes]
        truth = evaluator.ground_truth
        analysis = analyse(truth, evaluator.scored_predictions, evaluator.class_of_label)
        thresholds = evaluator.score_curves
        for row, best in zip(classes, thresholds.best, strict=False):
            row |= {"F1": best.F1, "threshold": best.threshold}
        size = self.model_config.image_size
        evaluations = [row for row in rows if row["kind"] == "evaluation"]
        return {
            "title": self.title,
            "subtitle": f"{self.model_config.name}, {size[0]}×{size[1]} px, {len(names)} classes; "
            f"written {datetime.datetime.now():%Y-%m-%d %H:%M}",
            "tiles": self._tiles(scores.stats, evaluations),
            "stats": scores.to_json()["stats"],
            "accuracy_note": f"The last evaluation: {scores.image_count} images, {sum(r['count'] for r in classes)} "
            f"objects.",
            "box_loss_weight": self.model_config.box_loss_weight,
            **self._curves(rows, evaluations),
            "classes": classes,
            "thresholds": _thresholds(thresholds),
            "error_types": [one._asdict() for one in evaluator.error_types()],
            "precision": _precision(getattr(scores, "tables", None)),
            "confusion": _confusion(analysis, names),
            "worst": self._worst(analysis, names, truth),
            "worst_note": "Those with the most errors, weighed by the share that errors have in the image. "
            f"Predictions count from a score of {analysis.threshold:g} on; click an image to enlarge.",
            "suspects": self._suspects(analysis, names, truth),
            "batch": _read_image(self.path.with_name(BATCH_NAME)),
            "data": {"sets": sets, "edges": SIZE_EDGES_PX},
            "settings": {"changed": changed_settings(self.cfg), "yaml": dump_yaml(self.cfg)},
            "environment": [
                *([("weights at the start", self.initial_weights)] if self.initial_weights else []),
                *describe_environment(self.device),
            ],
        }

    def _count_data(self) -> dict[str, Any]:
        sets = []
        for name, dataset in (("training", self.train_set), ("validation", self.val_set)):
            if dataset is not None:
                sets.append({"name": name, **describe_dataset(dataset, self.model_config.image_size)})
        boxes = [one.pop("boxes_of") for one in sets]
        return {"sets": sets, "in_training": boxes[0]}

    def _tiles(self, stats: Mapping[str, float], evaluations: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
        tiles = [
            (name.replace("AP_", "AP "), "n/a" if np.isnan(stats[name]) else f"{stats[name]:.3f}")
            for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
            if name in stats
        ]
        best = max((row for row in evaluations if row.get("AP") is not None), key=lambda row: row["AP"], default=None)
        if best is not None:
            tiles.append((f"best AP (epoch {best['epoch']})", f"{best['AP']:.3f}"))
        return [*tiles, *self.facts]

    def _curves(self, rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the curves over epochs done: an epoch's own numbers stand at its end."""
        intervals = [row for row in rows if row["kind"] == "interval"]
        x = [row["epoch"] + row["step"] / max(1, row["steps"]) for row in intervals]
        curves = {"x": _thin(x)} | {key: _thin([row.get(key) for row in intervals]) for key in _INTERVAL_CURVES}
        weight = self.model_config.box_loss_weight
        curves["box_loss"] = [None if value is None else value * weight for value in curves["box_loss"]]
        epochs = [row for row in rows if row["kind"] == "epoch"]
        return {
            "intervals": curves,
            "epochs": {"x": [row["epoch"] + 1 for row in epochs], "skipped": [row.get("skipped") for row in epochs]},
            "evaluations": {"x": [row["epoch"] + 1 for row in evaluations]}
            | {key: [row.get(key) for row in evaluations] for key in _EVALUATION_CURVES},
        }

    def _worst(self, analysis: Analysis, names: Sequence[str], truth: Any) -> list[dict[str, Any]]:
        drawn = []
        for image in analysis.worst:
            with contextlib.suppress(ImageError):  # the loader has said so
                drawn.append(draw_errors(image, *self._file_of(truth.imgs[image.image_id]), names))
        return drawn

    def _suspects(self, analysis: Analysis, names: Sequence[str], truth: Any) -> list[dict[str, Any]]:
        drawn = []
        for suspect in analysis.suspects:
            with contextlib.suppress(ImageError):
                drawn.append(draw_suspect(suspect, *self._file_of(truth.imgs[suspect.image_id]), names))
        return drawn

    def _file_of(self, info: Mapping[str, Any]) -> tuple[Path, int | None, int | None]:
        """Return path, width and height of an image of the validation set."""
        folder = Path(self.val_set.dataset.data_dir if hasattr(self.val_set, "indices") else self.val_set.data_dir)
        return folder / info["file_name"], info.get("width"), info.get("height")


def fill_page(title: str, content: Mapping[str, Any], sections: str = "page.js") -> str:
    """Put everything into a page's template, with its sections' script; numbers without a meaning in json are null."""
    folder = files("effdet").joinpath("report", "page")
    read = {
        name: folder.joinpath(name).read_text(encoding="utf-8")
        for name in ("page.html", "style.css", "charts.js", "parts.js", sections)
    }
    # "<" ends a script element wherever it stands, so none is in the data
    text = json.dumps(_for_json(content), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    escaped = title.replace("&", "&amp;").replace("<", "&lt;")
    return string.Template(read["page.html"]).substitute(
        title=escaped, style=read["style.css"], data=text, script=read["charts.js"] + read["parts.js"] + read[sections]
    )


def _for_json(value: Any) -> Any:
    """Replace NaN and infinite numbers by None, and shorten the others to six digits."""
    if isinstance(value, Mapping):
        return {str(key): _for_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_for_json(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value


def _thin(values: Sequence[float | None]) -> list[float | None]:
    """Return at most _MOST_POINTS means of neighbours; None where nothing is defined."""
    if len(values) <= _MOST_POINTS:
        return list(values)
    given = np.array(values, dtype=float)  # None becomes NaN
    part = np.arange(len(given)) * _MOST_POINTS // len(given)
    count = np.bincount(part, ~np.isnan(given))
    total = np.bincount(part, np.nan_to_num(given))
    return [
        value if number else None
        for value, number in zip((total / np.maximum(count, 1)).tolist(), count.tolist(), strict=True)
    ]


def _precision(tables: Any) -> dict[str, Any] | None:
    """Return the curves of precision over recall: of all classes together, and of each that has objects."""
    if tables is None or np.isnan(tables.precision).all():
        return None
    curves = tables.precision.round(3)  # [3, K, 101]
    defined = ~np.isnan(curves[0]).all(axis=1)
    of = {k: curves[:, k].tolist() for k in np.flatnonzero(defined).tolist()}
    return {"all": curves[:, defined].mean(axis=1).tolist(), "of": of}


def _thresholds(found: ScoreCurves) -> dict[str, Any] | None:
    """Return precision, recall and F1 over the score, of all classes together and of each, with the best thresholds."""
    if np.isnan(found.best[-1].threshold):
        return None
    curves, defined = found.curves.round(4), ~np.isnan([one.F1 for one in found.best[:-1]])
    return {
        "scores": GRID.tolist(),
        "all": curves[-1].tolist(),
        "of": {k: curves[k].tolist() for k in np.flatnonzero(defined).tolist()},
        "best": [one._asdict() for one in found.best],
    }


def _confusion(analysis: Analysis, names: Sequence[str]) -> dict[str, Any] | None:
    counts, total = analysis.confusion, len(names)
    if not counts.any():
        return None
    mixed = counts[:-1, :-1].copy()
    np.fill_diagonal(mixed, 0)
    chosen = np.arange(total)
    if total > _MOST_CLASSES:
        chosen = np.sort(np.argsort(-(mixed.sum(axis=0) + mixed.sum(axis=1)), kind="stable")[:_SHOWN_CLASSES])
    order = np.argsort(-mixed, axis=None, kind="stable")[:12]
    top = [(names[k // total], names[k % total], int(mixed.flat[k])) for k in order.tolist() if mixed.flat[k]]
    shown = "" if len(chosen) == total else f" Shown are the {len(chosen)} of {total} classes that are mixed up most."
    keep = [*chosen.tolist(), total]
    return {
        "labels": [names[k] for k in chosen],
        "rows": counts[np.ix_(keep, keep)].tolist(),
        "top": top,
        "note": f"Matched at IoU 0.5, predictions with a score of {analysis.threshold:g} or more, "
        f"{analysis.images} images.{shown}",
    }


def _read_image(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    with Image.open(path) as image:
        width, height = image.size
    source = "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()
    return {"source": source, "width": width, "height": height}


def changed_settings(cfg: Any) -> list[tuple[str, str, str]]:
    """Return dotted name, value and default of every setting that is not at its default."""
    mine, usual = to_plain(cfg), to_plain(type(cfg)())
    return [
        (f"{section}.{key}", in_words(value), in_words(usual[section][key]))
        for section, part in mine.items()
        for key, value in part.items()
        if value != usual[section][key]
    ]


def in_words(value: Any) -> str:
    """Return a setting's value as tables show it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value in (None, "") else str(value)


def describe_environment(device: str) -> list[tuple[str, str]]:
    """Return pairs of name and text: the command, the device, versions."""
    return [
        ("command", " ".join(sys.argv)),
        ("device", device),
        ("effdet", __version__),
        ("torch", torch.__version__),
        ("timm", timm.__version__),
        ("numpy", np.__version__),
        ("Pillow", PIL.__version__),
        ("Python", platform.python_version()),
        ("system", platform.platform()),
        ("processors", str(os.cpu_count())),
    ]
