"""COCO's box metric: ground truth and result rows in, the 12 numbers and the per-class table out.

What lives here: everything that knows pycocotools or hotcoco, on plain COCO dictionaries in one process. What must not:
tensors, datasets, processes (evaluator.py). Boxes are xywh.

Source: the numbers are those of pycocotools' COCOeval (cocodataset.org/#detection-eval). hotcoco fills the same tables,
bit for bit, in a tenth of the time (the tests compare them); without it pycocotools does the work.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from effdet.runtime.progress import IN_LINES

try:
    import hotcoco
except ImportError:  # no build for this platform
    hotcoco = None
if not hasattr(getattr(hotcoco, "COCO", None), "from_arrays"):  # older than 1.3
    hotcoco = None

__all__ = ["ClassMetrics", "CocoScores", "index_ground_truth", "make_result_rows", "score_rows"]

_logger = logging.getLogger(__name__)

# A thousandth of a pixel: what float32 holds in images of up to 8000 px, and what COCO files are written with.
_BOX_DECIMALS = 3


class _Stat(NamedTuple):
    name: str
    table: str  # field of _Tables
    iou: float | None  # None: mean over .50:.95
    area: str
    limit: int  # index into max_dets


_STATS = (
    _Stat("AP", "precision", None, "all", 2),
    _Stat("AP50", "precision", 0.5, "all", 2),
    _Stat("AP75", "precision", 0.75, "all", 2),
    _Stat("AP_small", "precision", None, "small", 2),
    _Stat("AP_medium", "precision", None, "medium", 2),
    _Stat("AP_large", "precision", None, "large", 2),
    _Stat("AR1", "recall", None, "all", 0),
    _Stat("AR10", "recall", None, "all", 1),
    _Stat("AR100", "recall", None, "all", 2),
    _Stat("AR_small", "recall", None, "small", 2),
    _Stat("AR_medium", "recall", None, "medium", 2),
    _Stat("AR_large", "recall", None, "large", 2),
)


class ClassMetrics(NamedTuple):
    """One line of the per-class table; AP and AP50 are NaN for a class without ground truth."""

    category_id: int
    name: str
    AP: float
    AP50: float
    count: int  # ground-truth boxes that are not crowd regions


class ClassTables(NamedTuple):
    """More of each class, in the order of the per-class table; NaN where there is no ground truth."""

    names: tuple[str, ...]  # of the columns of `ap`
    ap: np.ndarray  # float32 [K, 4]
    precision: np.ndarray  # float32 [3, K, 101]: at IoU .50, at .75 and the mean over .50:.95, at recalls 0, .01 .. 1


def plain_number(value: float) -> float | None:
    """Return what json has for a number: itself, or None where it is undefined (NaN)."""
    return None if math.isnan(value) else float(value)


@dataclass(frozen=True)
class CocoScores:
    """The numbers of one evaluation, in plain types that travel between processes.

    Args:
        stats: the 12 COCO numbers by name; NaN where there is no ground truth (pycocotools says -1).
        per_class: one line per category, by ascending id.
        image_count: images that counted.
        max_dets: the three limits on the best detections per image and class; the last one is 100 or more.
        tables: more of each class.
    """

    stats: dict[str, float]
    per_class: list[ClassMetrics]
    image_count: int
    max_dets: tuple[int, int, int]
    tables: ClassTables | None = field(default=None, compare=False, repr=False)

    def table(self) -> str:
        """Return the 12 numbers as a text table of 12 lines."""
        return "\n".join(
            f"{stat.name:<9}  IoU {'0.50:0.95' if stat.iou is None else f'{stat.iou:.2f}':<9}  area {stat.area:<6}  "
            f"best {self.max_dets[stat.limit]:>3}  {self.stats[stat.name]:6.3f}"
            for stat in _STATS
        )

    def class_rows(self) -> list[dict[str, Any]]:
        """Return the per-class table with all of its columns as json values; undefined numbers are None."""
        rows = [{**row._asdict(), "AP": plain_number(row.AP), "AP50": plain_number(row.AP50)} for row in self.per_class]
        if self.tables is not None:
            for row, values in zip(rows, self.tables.ap, strict=True):
                row.update(zip(self.tables.names, map(plain_number, values.tolist()), strict=True))
        return rows

    def to_json(self) -> dict[str, Any]:
        """Return everything but the curves as json values; undefined numbers are None."""
        return {
            "stats": {name: plain_number(value) for name, value in self.stats.items()},
            "per_class": self.class_rows(),
            "image_count": self.image_count,
            "max_dets": list(self.max_dets),
        }


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Swallow what pycocotools prints; the log has our own text."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _index_coco(images: Sequence[Any], categories: Sequence[Any], annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    coco.dataset = {"images": list(images), "categories": list(categories), "annotations": annotations}
    with _silent():
        coco.createIndex()
    return coco


def index_ground_truth(source: Mapping[str, Any]) -> COCO:
    """Build the pycocotools index of a parsed COCO json, on copies of its annotations.

    Annotations are numbered anew from 1: COCOeval takes the id 0 for "no match" and mixes up annotations that share
    an id, so such a file would score too low. Those without a usable bbox are left out, with their count in the log.

    Args:
        source: the parsed json; missing lists count as empty, a missing area as width times height.

    Returns:
        The index; without images or annotations where the json has none.
    """
    annotations: list[dict[str, Any]] = []
    unusable = []
    for annotation in source.get("annotations", ()):
        box_xywh = annotation.get("bbox") or ()
        if len(box_xywh) != 4 or not all(math.isfinite(v) for v in box_xywh):
            unusable.append(annotation.get("id"))
            continue
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "bbox": list(box_xywh),
                "area": annotation.get("area", box_xywh[2] * box_xywh[3]),
                "iscrowd": int(annotation.get("iscrowd", 0)),
                "difficult": int(annotation.get("difficult", 0)),
            }
        )
    if unusable:
        _logger.warning(
            "%d ground-truth annotations without four finite bbox numbers are left out of the evaluation: ids %s%s",
            len(unusable),
            unusable[:5],
            " ..." if len(unusable) > 5 else "",
        )
    return _index_coco(source.get("images", ()), source.get("categories", ()), annotations)


def make_result_rows(
    images: Mapping[Any, np.ndarray], category_ids: np.ndarray, known_ids: Collection[int]
) -> list[dict[str, Any]]:
    """Turn predictions into COCO result rows of plain Python values.

    Args:
        images: by image id [n, 6]: x_min, y_min, x_max, y_max, score, class from 1.
        category_ids: the category id of each class_idx.
        known_ids: those of the ground truth; predictions of other classes are dropped, with a warning.
    """
    has_category = np.isin(category_ids, list(known_ids))
    rows: list[dict[str, Any]] = []
    dropped: Counter[int] = Counter()
    for image_id, detections in images.items():
        class_idx = detections[:, 5].astype(np.int64) - 1
        keep = (class_idx >= 0) & (class_idx < len(category_ids))
        keep[keep] = has_category[class_idx[keep]]
        dropped.update((class_idx[~keep] + 1).tolist())
        box_xywh = detections[keep, :4].astype(np.float64)
        box_xywh[:, 2:] -= box_xywh[:, :2]
        # The shortest decimal that is the same float32: no tie is made or broken, no digits are invented.
        scores = detections[keep, 4].astype(str).astype(np.float64)
        rows.extend(
            {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
            for category_id, box, score in zip(
                category_ids[class_idx[keep]].tolist(),
                box_xywh.round(_BOX_DECIMALS).tolist(),
                scores.tolist(),
                strict=True,
            )
        )
    if dropped:
        _logger.warning(
            "%d predictions are of classes without a category in the ground truth and were dropped: %s",
            sum(dropped.values()),
            ", ".join(f"class {c}: {n}" for c, n in sorted(dropped.items())),
        )
    return rows


def score_rows(truth: COCO, rows: Sequence[Mapping[str, Any]], img_ids: Collection[Any], max_det: int) -> CocoScores:
    """Compute COCO's numbers for result rows.

    Args:
        truth: from `index_ground_truth`.
        rows: COCO results: image_id, category_id, bbox (xywh), score; may be empty.
        img_ids: the images that count; rows and ground truth of others do not.
        max_det: best detections per image and class that count; below 100 COCO's 100 stays.

    Returns:
        The numbers; all NaN when the images have no ground truth, precision and recall 0 when there are no rows.

    Raises:
        ValueError: a row's image is not in the ground truth.
    """
    strangers = {row["image_id"] for row in rows} - set(truth.getImgIds())
    if strangers:
        raise ValueError(
            f"{len(strangers)} predicted images are not in the ground truth, e.g. image id "
            f"{min(strangers)}: dataset.parser.img_ids must come from the same json"
        )
    limits = (1, 10, max(100, max_det))
    by_hotcoco = can_match_by_hotcoco(truth, rows, img_ids)
    _logger.info("boxes are matched by %s", "hotcoco" if by_hotcoco else "pycocotools", extra=IN_LINES)
    tables = (_fill_by_hotcoco if by_hotcoco else _fill_by_pycocotools)(truth, rows, img_ids, limits)
    counts = Counter(
        a["category_id"] for a in truth.dataset["annotations"] if a["image_id"] in img_ids and not a["iscrowd"]
    )
    return CocoScores(
        _stats_of(tables), _classes_of(truth, tables, counts), len(img_ids), limits, _class_tables(tables)
    )


class _Tables(NamedTuple):
    """COCOeval's results; -1 where there is no ground truth."""

    precision: np.ndarray  # [T, R, K, A, M]: IoU thresholds, recalls, categories by ascending id, areas, limits
    recall: np.ndarray  # [T, K, A, M]


_IOUS = np.linspace(0.5, 0.95, 10)
_AREAS = ("all", "small", "medium", "large")


def _fill_by_pycocotools(truth: COCO, rows: Sequence[Any], img_ids: Collection[Any], limits: Sequence[int]) -> _Tables:
    boxes = [
        {**row, "id": number, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
        for number, row in enumerate(rows, start=1)
    ]
    run = COCOeval(truth, _index_coco(truth.dataset["images"], truth.dataset["categories"], boxes), "bbox")
    run.params.imgIds = sorted(img_ids)
    run.params.maxDets = list(limits)
    with _silent():
        run.evaluate()
        run.accumulate()
    return _Tables(run.eval["precision"], run.eval["recall"])


def _fill_by_hotcoco(truth: COCO, rows: Sequence[Any], img_ids: Collection[Any], limits: Sequence[int]) -> _Tables:
    run = match_by_hotcoco(truth, rows, img_ids, limits)
    run.accumulate()
    return _Tables(np.asarray(run.eval["precision"]), np.asarray(run.eval["recall"]))


def can_match_by_hotcoco(truth: COCO, rows: Sequence[Any], img_ids: Collection[Any]) -> bool:
    """Tell whether hotcoco is there, and has something to match."""
    return hotcoco is not None and bool(rows) and bool(truth.anns) and bool(img_ids)


def match_by_hotcoco(
    truth: COCO,
    rows: Sequence[Mapping[str, Any]],
    img_ids: Collection[Any],
    limits: Sequence[int] = (1, 10, 100),
    ious: Sequence[float] | None = None,
    all_sizes_together: bool = False,
) -> Any:
    """Match boxes by hotcoco, which takes ids from 0 on only: images and categories are numbered in their order.

    Args:
        truth: see `score_rows`, also for the next ones.
        rows: COCO results.
        img_ids: the images that count.
        limits: best detections per image and class, three.
        ious: thresholds other than COCO's ten.
        all_sizes_together: leave out the tables by object size.

    Returns:
        hotcoco's COCOeval after `evaluate`.
    """
    image_at = {img_id: k for k, img_id in enumerate(sorted(img_ids))}
    category_at = {category_id: k for k, category_id in enumerate(sorted(truth.getCatIds()))}
    # An annotation of a category that is not listed counts in no table.
    annotations = [
        a for a in truth.dataset["annotations"] if a["image_id"] in image_at and a["category_id"] in category_at
    ]
    index = hotcoco.COCO.from_arrays(
        [{"id": k, "width": 0, "height": 0} for k in image_at.values()],
        [{"id": k, "name": str(k)} for k in category_at.values()],
        np.array([image_at[a["image_id"]] for a in annotations], dtype=np.int64),
        np.array([category_at[a["category_id"]] for a in annotations], dtype=np.int64),
        np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4),
        area=np.array([a["area"] for a in annotations], dtype=np.float64),
        iscrowd=np.array([a["iscrowd"] for a in annotations], dtype=np.int64),
    )
    results = np.array(
        [
            (image_at[row["image_id"]], *row["bbox"], row["score"], category_at[row["category_id"]])
            for row in rows
            if row["image_id"] in image_at
        ],
        dtype=np.float64,
    ).reshape(-1, 7)
    run = hotcoco.COCOeval(index, index.load_res(results), "bbox")
    run.params.imgIds = list(image_at.values())
    run.params.maxDets = list(limits)
    if ious is not None:
        run.params.iouThrs = list(ious)
    if all_sizes_together:
        run.params.areaRng, run.params.areaRngLbl = run.params.areaRng[:1], run.params.areaRngLbl[:1]
    run.evaluate()
    return run


def _mean_defined(values: np.ndarray) -> float:
    """Average what COCOeval has filled in (it marks absent classes by -1); NaN when nothing is."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else math.nan


def _stats_of(tables: _Tables) -> dict[str, float]:
    """Average the tables into the 12 numbers; COCOeval's own summarize can do so for a last maximum of 100 only."""
    stats = {}
    for stat in _STATS:
        table = getattr(tables, stat.table)
        if stat.iou is not None:
            table = table[np.isclose(_IOUS, stat.iou)]
        stats[stat.name] = _mean_defined(table[..., _AREAS.index(stat.area), stat.limit])
    return stats


def _classes_of(truth: COCO, tables: _Tables, counts: Mapping[Any, int]) -> list[ClassMetrics]:
    """Read each category's AP off the precision table."""
    precision = tables.precision[..., _AREAS.index("all"), -1]  # [T, R, K]
    at_50 = precision[np.isclose(_IOUS, 0.5)]
    return [
        ClassMetrics(
            k.item() if isinstance(k, np.generic) else k,
            str(truth.cats[k].get("name", k)),
            _mean_defined(precision[:, :, at]),
            _mean_defined(at_50[:, :, at]),
            counts.get(k, 0),
        )
        for at, k in enumerate(sorted(truth.getCatIds()))
    ]


def _class_tables(tables: _Tables) -> ClassTables:
    """Read what a report shows of each category off the precision table."""
    best = tables.precision[..., -1]  # [T, R, K, A]
    at = {iou: best[np.isclose(_IOUS, iou)][0] for iou in (0.5, 0.75)}  # [R, K, A]
    over_ious = best.mean(axis=0)  # a category is absent (-1) at all thresholds or at none
    columns = {"AP75": at[0.75][..., 0].mean(axis=0)}
    columns |= {f"AP_{area}": over_ious[..., k].mean(axis=0) for k, area in enumerate(_AREAS) if area != "all"}
    curves = np.stack([table[..., 0].T for table in (at[0.5], at[0.75], over_ious)])
    ap = np.stack(list(columns.values()), axis=1)
    return ClassTables(
        tuple(columns),
        np.where(ap < 0, np.nan, ap).astype(np.float32),
        np.where(curves < 0, np.nan, curves).astype(np.float32),
    )
