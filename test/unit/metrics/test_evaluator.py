"""The evaluator against published numbers, a hand-worked example, and everything users feed it that is not COCO."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from effdet.checkpoint.io import write_json
from effdet.evaluator import (
    ClassMetrics,
    CocoEvaluator,
    Evaluator,
    PascalEvaluator,
    TfmEvaluator,
    create_evaluator,
)
from effdet.metrics import coco as coco_metrics

NAMES = [
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR1",
    "AR10",
    "AR100",
    "AR_small",
    "AR_medium",
    "AR_large",
]
PAIRS = ["coco_2299_ignore", "coco_val2014_100", "coco_val2014_100_nocrowd", "voc100"]


def make_truth(boxes, category_ids=(1, 2), image_ids=(1, 2), **fields) -> dict:
    """Return a COCO json of (image id, category id, x, y, w, h) boxes."""
    return {
        "images": [{"id": i, "width": 640, "height": 480} for i in image_ids],
        "categories": [{"id": i, "name": f"kind {i}"} for i in category_ids],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0} | fields
            for n, (i, c, x, y, w, h) in enumerate(boxes, start=1)
        ],
    }


def make_dataset(truth: dict, **attributes) -> SimpleNamespace:
    """Return what the evaluator needs of a data set; keyword arguments replace attributes of its parser."""
    ids = sorted(c["id"] for c in truth["categories"])
    parser = {
        "img_ids": [i["id"] for i in truth["images"]],
        "coco_dict": lambda: truth,
        "category_map": SimpleNamespace(idx_to_id=np.array(ids, dtype=np.int64)),
    }
    return SimpleNamespace(parser=SimpleNamespace(**parser | attributes))


def xyxy(x, y, w, h, score, cls):
    return [x, y, x + w, y + h, score, cls]


def strict_evaluator(dataset, **options) -> CocoEvaluator:
    """Return an evaluator as validate.py makes it."""
    return CocoEvaluator(dataset, all_images=True, min_score=0.0, **options)


def add(evaluator: Evaluator, image_index: int, *rows) -> None:
    """Add one image's rows with two rows of padding."""
    evaluator.add_predictions(
        torch.tensor([*rows, *[[0.0] * 6] * 2]).reshape(1, -1, 6), {"img_idx": torch.tensor([image_index])}
    )


TWO_BOXES = [(1, 1, 10, 10, 100, 100), (2, 2, 50, 60, 40, 30)]


def perfect(truth: dict, **options) -> CocoEvaluator:
    """Return an evaluator that was given every annotation of the json as a prediction."""
    ids = sorted(c["id"] for c in truth["categories"])
    evaluator = strict_evaluator(make_dataset(truth), **options)
    for index, image in enumerate(truth["images"]):
        add(
            evaluator,
            index,
            *[
                xyxy(*a["bbox"], 0.9, ids.index(a["category_id"]) + 1)
                for a in truth["annotations"]
                if a["image_id"] == image["id"]
            ],
        )
    return evaluator


# ---- published numbers -----------------------------------------------------------------------------------------------


def batches_of(pair, yxyx: bool, size: int = 16):
    """Yield a pair's detections as the model's output would come: padded batches with shuffled images."""
    truth, detections = pair
    cls_of = {c: k + 1 for k, c in enumerate(sorted(c["id"] for c in truth["categories"]))}
    by_image: dict = {}
    for row in detections:
        by_image.setdefault(row["image_id"], []).append(xyxy(*row["bbox"], row["score"], cls_of[row["category_id"]]))
    order = torch.randperm(len(truth["images"]), generator=torch.Generator().manual_seed(0))
    for chosen in order.split(size):
        out = torch.zeros(len(chosen), 50, 6)
        for b, index in enumerate(chosen.tolist()):
            rows = by_image.get(truth["images"][index]["id"], [])
            out[b, : len(rows)] = torch.tensor(rows).reshape(-1, 6)
        yield out[:, :, [1, 0, 3, 2, 4, 5]] if yxyx else out, {"img_idx": chosen}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request, shared_data):
    folder = shared_data / "evalpairs" / request.param
    read = [json.loads((folder / name).read_text()) for name in ("gt.json", "dt.json", "expected.json")]
    return SimpleNamespace(name=request.param, truth=read[0], detections=read[1], expected=read[2])


def both_tables(truth: dict, rows: list, img_ids=None, max_det: int = 100):
    """Return what pycocotools and hotcoco fill in for the same boxes."""
    index = coco_metrics.index_ground_truth(truth)
    arguments = index, rows, set(index.getImgIds()) if img_ids is None else img_ids, (1, 10, max_det)
    return coco_metrics._fill_by_pycocotools(*arguments), coco_metrics._fill_by_hotcoco(*arguments)


def random_case(seed: int) -> tuple[dict, list]:
    """Return a truth and result rows with crowd regions, areas unlike the boxes', equal scores and empty images."""
    rng = np.random.default_rng(seed)
    truth = make_truth([], category_ids=(3, 90, 7), image_ids=(5, 1, 2**33, 8, 2, 4))
    rows = []
    for image in truth["images"]:
        boxes = [
            [round(v, 2) for v in (*rng.uniform(0, 300, 2), *np.exp(rng.uniform(1, 5.5, 2)))]
            for _ in range(rng.integers(0, 12) if rng.random() < 0.8 else 0)
        ]
        truth["annotations"] += [
            {
                "id": 0,
                "image_id": image["id"],
                "category_id": int(rng.choice([3, 90, 7])),
                "bbox": box,
                "area": box[2] * box[3] * rng.choice([0.6, 1.0]),
                "iscrowd": int(rng.random() < 0.15),
            }
            for box in boxes
        ]
        for _ in range(rng.integers(0, 150) if rng.random() < 0.8 else 0):
            near = boxes[rng.integers(len(boxes))] if boxes else [50, 60, 70, 80]
            box = [round(abs(v + e), 3) for v, e in zip(near, rng.normal(0, rng.choice([0, 3, 30]), 4), strict=True)]
            score = rng.choice([0.1, 0.5, 0.9]) if seed % 2 else np.float32(rng.random())
            rows.append(
                {
                    "image_id": image["id"],
                    "category_id": int(rng.choice([3, 90, 7])),
                    "bbox": box,
                    "score": float(score),
                }
            )
    rows += [{k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.5} for a in truth["annotations"][::4]]
    return truth, rows


@pytest.mark.parametrize("seed", range(20))
def test_hotcoco_fills_the_tables_as_pycocotools_does(seed):
    pytest.importorskip("hotcoco")
    truth, rows = random_case(seed)
    chosen = {5, 2**33, 8, 4} if seed % 3 == 0 else None
    expected, got = both_tables(truth, rows, chosen, 200 if seed % 4 == 0 else 100)
    assert (expected.precision > 0).any()
    assert np.array_equal(expected.precision, got.precision) and np.array_equal(expected.recall, got.recall)


def test_hotcoco_fills_the_tables_of_real_pairs_as_pycocotools_does(pair):
    pytest.importorskip("hotcoco")
    expected, got = both_tables(pair.truth, pair.detections)
    assert np.array_equal(expected.precision, got.precision) and np.array_equal(expected.recall, got.recall)


def test_without_hotcoco_the_numbers_are_the_same_and_the_log_says_so(caplog, monkeypatch):
    truth, rows = random_case(1)
    index = coco_metrics.index_ground_truth(truth)
    scores = []
    for library in [coco_metrics.hotcoco, None]:
        monkeypatch.setattr(coco_metrics, "hotcoco", library)
        with caplog.at_level(logging.INFO):
            caplog.clear()
            scores.append(coco_metrics.score_rows(index, rows, set(index.getImgIds()), 100))
        assert f"matched by {'hotcoco' if library else 'pycocotools'}" in caplog.text
    assert scores[0] == scores[1] and scores[0].stats["AP"] > 0


@pytest.mark.parametrize("yxyx", [False, True])
def test_published_numbers(pair, yxyx):
    """All twelve numbers to 1e-9: the pairs' boxes have at most three decimals, which float32 and back keeps."""
    evaluator = create_evaluator("coco", make_dataset(pair.truth), pred_yxyx=yxyx)
    for output, target in batches_of((pair.truth, pair.detections), yxyx):
        evaluator.add_predictions(output, target)
    ap = evaluator.evaluate()
    for expected in (pair.expected["pycocotools_here"], pair.expected.get("published_full", {}).get("stats")):
        for name, value in zip(NAMES, expected.values() if expected else [], strict=bool(expected)):
            value = math.nan if value == -1 else value
            assert evaluator.stats[name] == pytest.approx(value, abs=1e-9, nan_ok=True), name
    assert ap == evaluator.stats["AP"] and type(ap) is float
    assert list(evaluator.stats) == NAMES
    if "per_class_AP50" in pair.expected:
        assert {line.name: round(line.AP50, 4) for line in evaluator.per_class()} == pair.expected["per_class_AP50"]


def test_saved_results_are_plain_coco_results(pair, tmp_path):
    """pycocotools by itself, given the saved file, finds the very number that we report."""
    evaluator = strict_evaluator(make_dataset(pair.truth))
    for output, target in batches_of((pair.truth, pair.detections), False):
        evaluator.add_predictions(output, target)
    ap = evaluator.evaluate(tmp_path / "results" / "dt.json")
    rows = json.loads((tmp_path / "results" / "dt.json").read_text())
    assert len(rows) == len(pair.detections)
    assert set(rows[0]) == {"image_id", "category_id", "bbox", "score"}
    key = lambda row: (row["image_id"], row["category_id"], row["score"], row["bbox"])  # noqa: E731
    for ours, theirs in zip(sorted(rows, key=key), sorted(pair.detections, key=key), strict=True):
        assert (ours["image_id"], ours["category_id"]) == (theirs["image_id"], theirs["category_id"])
        assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=5.1e-4)
        assert np.float32(ours["score"]) == np.float32(theirs["score"])
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = pair.truth
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(rows), "bbox")
        run.evaluate(), run.accumulate(), run.summarize()
    assert run.stats[0] == ap


def test_by_hand():
    """Two objects; a false positive scores highest: precision 1/2 for the 51 recall levels 0 to .50, then 0."""
    evaluator = strict_evaluator(make_dataset(make_truth([(1, 1, 0, 0, 100, 100), (2, 1, 0, 0, 100, 100)], (1,))))
    add(evaluator, 0, xyxy(300, 300, 50, 50, 0.9, 1), xyxy(0, 0, 100, 80, 0.8, 1))  # IoU .80
    add(evaluator, 1)
    # .80 counts at the seven thresholds .50, .55, ... .80
    assert evaluator.evaluate() == pytest.approx(0.7 * 51 * 0.5 / 101)
    assert evaluator.stats["AP50"] == pytest.approx(51 * 0.5 / 101)
    assert evaluator.stats["AP75"] == evaluator.stats["AP50"]
    assert evaluator.stats["AR1"] == 0.0 and evaluator.stats["AR10"] == pytest.approx(0.7 * 0.5)
    assert math.isnan(evaluator.stats["AP_small"])
    (line,) = evaluator.per_class()
    assert line == ClassMetrics(1, "kind 1", evaluator.stats["AP"], evaluator.stats["AP50"], 2)


# ---- ids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [(0, 1), (1, 2), (5, 1000), (7, 90)])
@pytest.mark.parametrize("image_ids", [(1, 2), (0, 20180000001), (np.int64(3), np.int64(4))])
def test_perfect_predictions_with_any_ids(tmp_path, ids, image_ids):
    boxes = [(i, ids[k], *box) for i in image_ids for k, box in enumerate([(1.5, 2.25, 30, 40), (9, 8, 70, 60)])]
    truth = make_truth(boxes, ids, image_ids)
    evaluator = perfect(truth)
    assert evaluator.evaluate(tmp_path / "dt.json") == pytest.approx(1.0)
    rows = json.loads((tmp_path / "dt.json").read_text())
    assert [(r["image_id"], r["category_id"], r["bbox"]) for r in rows] == [(i, c, [*b]) for i, c, *b in boxes]
    assert [(line.category_id, line.AP, line.count) for line in evaluator.per_class()] == [(i, 1.0, 2) for i in ids]


def test_annotation_id_0_and_repeated_ids_count(tmp_path):
    """pycocotools takes the id 0 for no match, and would find only some of these."""
    truth = make_truth([(1, 1, 10, 10, 50, 50), (1, 1, 100, 100, 50, 50), (2, 2, 10, 10, 50, 50)])
    for ids in ([0, 1, 2], [4, 4, 4]):
        for annotation, number in zip(truth["annotations"], ids, strict=True):
            annotation["id"] = number
        assert perfect(truth).evaluate() == pytest.approx(1.0)
    assert [a["id"] for a in truth["annotations"]] == [4, 4, 4]  # the caller's json is left alone
    assert set(truth["annotations"][0]) == {"id", "image_id", "category_id", "bbox", "area", "iscrowd"}


@pytest.mark.parametrize("source", ["coco", "ann_path"])
def test_a_parser_written_for_effdet(tmp_path, source):
    """It has img_ids and perhaps cat_ids only, and the ground truth as a COCO object or a path."""
    truth = make_truth([(1, 9, 10, 10, 50, 50), (2, 4, 5, 5, 20, 20)], (9, 4))
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(truth))
    with contextlib.redirect_stdout(io.StringIO()):
        attribute = {"coco": COCO(path)} if source == "coco" else {"ann_path": path}
    for fields, labels in (
        ({}, (9, 4)),  # effdet's rule: the label is the category id
        ({"cat_ids": [9, 4]}, (9, 4)),
        ({"cat_ids": [9, 4], "cat_id_to_label": {}}, (9, 4)),
        ({"cat_ids": [9, 4], "cat_id_to_label": {9: 1, 4: 2}}, (1, 2)),
    ):
        evaluator = strict_evaluator(SimpleNamespace(parser=SimpleNamespace(img_ids=[1, 2], **fields, **attribute)))
        add(evaluator, 0, xyxy(10, 10, 50, 50, 0.9, labels[0]))
        add(evaluator, 1, xyxy(5, 5, 20, 20, 0.9, labels[1]))
        assert evaluator.evaluate() == pytest.approx(1.0)


def test_classes_without_a_category_are_dropped_and_counted(tmp_path, caplog):
    dataset = make_dataset(make_truth(TWO_BOXES), category_map=SimpleNamespace(idx_to_id=np.arange(1, 91)))
    evaluator = strict_evaluator(dataset)
    add(
        evaluator,
        0,
        xyxy(10, 10, 100, 100, 0.9, 1),
        xyxy(10, 10, 100, 100, 0.95, 12),
        xyxy(1, 1, 5, 5, 0.5, 91),
        xyxy(1, 1, 5, 5, 0.5, 0),
    )
    add(evaluator, 1, xyxy(50, 60, 40, 30, 0.8, 2), xyxy(50, 60, 40, 30, 0.7, 12))
    assert evaluator.evaluate(tmp_path / "dt.json") == pytest.approx(1.0)
    assert {row["category_id"] for row in json.loads((tmp_path / "dt.json").read_text())} == {1, 2}
    assert "4 predictions are of classes without a category" in caplog.text
    assert "class 0: 1, class 12: 2, class 91: 1" in caplog.text


# ---- nothing to evaluate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fed", ["nothing", "padding only"])
def test_no_predictions_are_ap_0_with_a_warning(tmp_path, caplog, fed):
    evaluator = strict_evaluator(make_dataset(make_truth(TWO_BOXES)))
    if fed == "padding only":
        add(evaluator, 0)
    assert evaluator.evaluate(tmp_path / "dt.json") == 0.0
    assert "no predictions to evaluate" in caplog.text
    assert evaluator.stats["AP"] == evaluator.stats["AR100"] == 0.0 and math.isnan(evaluator.stats["AP_small"])
    assert json.loads((tmp_path / "dt.json").read_text()) == []
    assert [(line.AP, line.count) for line in evaluator.per_class()] == [(0.0, 1), (0.0, 1)]


CROWD = make_truth(TWO_BOXES, iscrowd=1)


@pytest.mark.parametrize(
    "truth",
    [
        make_truth([]),
        CROWD,
        {"images": [{"id": 1}], "categories": [{"id": 1}]},
        {"images": [], "categories": [{"id": 1}], "annotations": []},
    ],
    ids=["no boxes", "only crowd", "no annotations key", "no images"],
)
def test_ground_truth_without_boxes_is_said_and_undefined(tmp_path, caplog, truth):
    evaluator = strict_evaluator(make_dataset(truth))
    if truth["images"]:
        add(evaluator, 0, xyxy(10, 10, 100, 100, 0.9, 1))
    assert evaluator.evaluate() == 0.0
    assert "has no boxes: nothing can be scored" in caplog.text
    assert list(evaluator.stats) == NAMES and all(math.isnan(v) for v in evaluator.stats.values())
    assert evaluator.summary().count("nan") == 12
    evaluator.write_metrics(tmp_path / "metrics.json")
    written = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert written["stats"] == dict.fromkeys(NAMES)
    assert written["per_class"][0]["AP"] is None


def test_unusable_ground_truth_is_left_out_and_named(caplog):
    truth = make_truth([*TWO_BOXES, (1, 1, 0, 0, math.nan, 5)])
    no_box = {"id": 77, "image_id": 1, "category_id": 1}
    truth["annotations"] += [no_box, no_box | {"id": 78, "bbox": []}]
    del truth["annotations"][0]["area"], truth["annotations"][0]["iscrowd"]
    evaluator = strict_evaluator(make_dataset(truth))
    add(evaluator, 0, xyxy(10, 10, 100, 100, 0.9, 1))
    add(evaluator, 1, xyxy(50, 60, 40, 30, 0.8, 2))
    assert evaluator.evaluate() == pytest.approx(1.0)
    assert "3 ground-truth annotations" in caplog.text and "[3, 77, 78]" in caplog.text


# ---- which images ----------------------------------------------------------------------------------------------------


def test_images_never_predicted_count_as_missed(caplog):
    evaluator = strict_evaluator(make_dataset(make_truth(TWO_BOXES)))
    add(evaluator, 0, xyxy(10, 10, 100, 100, 0.9, 1))
    assert evaluator.evaluate() == pytest.approx(0.5)  # category 1 found, category 2 missed
    assert "1 of 2 images were not predicted" in caplog.text


def test_a_subset_is_evaluated_on_its_own_images(caplog):
    truth = make_truth([(i, 1, 10, 10, 50, 50) for i in (1, 2, 3, 4, 5, 6)], (1,), (1, 2, 3, 4, 5, 6))
    whole = make_dataset(truth)
    skip = SimpleNamespace(dataset=whole, indices=range(0, 6, 2), parser=whole.parser)  # as SkipSubset(dataset, 2)
    nested = torch.utils.data.Subset(skip, [2, 0])  # images 5 and 1, by indices into the whole dataset; has no parser
    named = SimpleNamespace(parser=whole.parser, img_ids=[3])
    for dataset, indices in ((skip, [0, 2, 4]), (nested, [4, 0]), (named, [2])):
        evaluator = strict_evaluator(dataset)
        for index in indices:
            add(evaluator, index, xyxy(10, 10, 50, 50, 0.9, 1))
        assert evaluator.evaluate() == pytest.approx(1.0)
        assert evaluator.per_class()[0].count == len(indices)
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
        add(evaluator, indices[0], xyxy(10, 10, 50, 50, 0.9, 1))
        add(evaluator, 1, xyxy(400, 400, 50, 50, 0.95, 1))  # image 2 is outside: its mistake must not count
        assert evaluator.evaluate() == pytest.approx({3: 34, 2: 51, 1: 101}[len(indices)] / 101)
        caplog.clear()


def test_an_image_predicted_twice_counts_once():
    evaluator = strict_evaluator(make_dataset(make_truth(TWO_BOXES)))
    for _ in range(2):
        add(evaluator, 0, xyxy(10, 10, 100, 100, 0.9, 1))
        add(evaluator, 1, xyxy(50, 60, 40, 30, 0.8, 2))
    assert evaluator.evaluate() == pytest.approx(1.0)  # second copies would be false positives


def test_max_det_above_100_moves_the_limit():
    boxes = [(1, 1, 40 * (k % 15), 40 * (k // 15), 30, 30) for k in range(150)]
    truth = make_truth(boxes, (1,), (1,))
    limited, free = perfect(truth), perfect(truth, max_det=300)
    limited.evaluate()
    assert limited.stats["AR100"] == pytest.approx(100 / 150) and limited.stats["AP"] == pytest.approx(67 / 101)
    assert free.evaluate() == pytest.approx(1.0) and free.stats["AR100"] == free.stats["AR_small"] == 1.0
    assert free.stats["AR10"] == limited.stats["AR10"] == pytest.approx(10 / 150)
    assert "best 300" in free.summary() and "best 300" not in limited.summary()
    few = create_evaluator("coco", make_dataset(truth), max_det=20, all_images=True)
    few.evaluate()
    assert "best 100" in few.summary()  # COCO's own limit never shrinks
    limited.max_det = 150  # an attribute too
    add(limited, 0, *[xyxy(*b[2:], 0.9, 1) for b in boxes])
    assert limited.evaluate() == pytest.approx(1.0)


# ---- batches ---------------------------------------------------------------------------------------------------------


class Recorder(torch.Tensor):
    """A tensor that writes down each operation on it, as a stand-in for one whose reading costs a device sync."""

    calls: list[str] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func.__name__)
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out.as_subclass(torch.Tensor) if func.__name__ == "cpu" else out


SYNCS = {
    "cpu",
    "numpy",
    "item",
    "tolist",
    "nonzero",
    "unique",
    "masked_select",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__iter__",
    "__array__",
}


def test_one_copy_to_the_host_per_batch():
    evaluator = strict_evaluator(make_dataset(make_truth(TWO_BOXES)))
    rows = torch.tensor([[xyxy(10, 10, 100, 100, 0.9, 1)], [xyxy(50, 60, 40, 30, 0.8, 2)]])
    Recorder.calls = []
    evaluator.add_predictions(rows.as_subclass(Recorder), {"img_idx": torch.tensor([0, 1]).as_subclass(Recorder)})
    assert [name for name in Recorder.calls if name in SYNCS] == ["cpu"]
    assert evaluator.evaluate() == pytest.approx(1.0)


def test_indices_left_on_the_host_are_not_moved():
    """Detections on another device than the indices: the meta device cannot be read, so only the refusal is seen."""
    evaluator = strict_evaluator(make_dataset(make_truth(TWO_BOXES)))
    with pytest.raises(NotImplementedError, match="meta"):
        evaluator.add_predictions(torch.zeros(1, 2, 6, device="meta"), {"img_idx": [0]})
    evaluator.add_predictions(torch.tensor([[xyxy(10, 10, 100, 100, 0.9, 1)]]), {"img_idx": [0]})
    assert evaluator.evaluate() == pytest.approx(0.5)


def test_padding_is_dropped_and_the_batch_left_alone(tmp_path):
    evaluator = strict_evaluator(make_dataset(make_truth(TWO_BOXES)), pred_yxyx=True)
    batch = torch.zeros(2, 5, 6)
    batch[0, 0] = torch.tensor([10.0, 20.0, 30.0, 50.0, 0.9, 1.0])
    before = batch.clone()
    evaluator.add_predictions(batch, {"img_idx": torch.tensor([1, 0])})
    assert evaluator.img_indices == [1, 0]
    assert np.array_equal(np.stack(evaluator.predictions), batch.numpy())  # as in effdet: as given
    evaluator.save(tmp_path / "dt.json")
    assert json.loads((tmp_path / "dt.json").read_text()) == [
        {"image_id": 2, "category_id": 1, "bbox": [20, 10, 30, 20], "score": 0.9}
    ]
    assert torch.equal(batch, before)
    evaluator.add_predictions(torch.zeros(0, 5, 6), {"img_idx": torch.zeros(0, dtype=torch.int64)})
    assert len(evaluator.predictions) == 2


def test_rows_that_are_not_finite_are_dropped_and_said(caplog):
    evaluator = strict_evaluator(make_dataset(make_truth(TWO_BOXES)))
    good, bad = xyxy(10, 10, 100, 100, 0.9, 1), xyxy(10, 10, 100, 100, math.nan, 1)
    add(evaluator, 0, bad, good, xyxy(math.inf, 0, 1, 1, 0.5, 1))
    add(evaluator, 1, xyxy(50, 60, 40, 30, 0.8, 2))
    assert "2 predicted rows are NaN or infinite" in caplog.text
    assert evaluator.evaluate() == pytest.approx(1.0)


def test_scores_and_boxes_are_written_short(tmp_path):
    evaluator = strict_evaluator(make_dataset(make_truth(TWO_BOXES)))
    add(evaluator, 0, [0.1, 0.2, 10.3, 10.123456, 0.1, 1], [0, 0, 5, 5, 1e-7, 1])
    evaluator.save(tmp_path / "dt.json")
    rows = json.loads((tmp_path / "dt.json").read_text())
    assert rows[0] == {"image_id": 1, "category_id": 1, "bbox": [0.1, 0.2, 10.2, 9.923], "score": 0.1}
    assert rows[1]["score"] == 1e-7
    assert '"bbox": [0.1, 0.2, 10.2, 9.923], "score": 0.1}' in (tmp_path / "dt.json").read_text()


@pytest.mark.parametrize(
    "shape, indices, words",
    [
        ((2, 5, 5), [0, 1], r"shape \[2, 5, 5\]"),
        ((5, 6), [0], r"shape \[5, 6\]"),
        ((2, 5, 6), [0], "1 entries for 2 images"),
        ((1, 5, 6), [2], "has 2, but the dataset's parser has 2 images"),
        ((1, 5, 6), [-1], "spans -1..-1"),
    ],
)
def test_batches_that_do_not_fit_are_refused(shape, indices, words):
    evaluator = strict_evaluator(make_dataset(make_truth(TWO_BOXES)))
    with pytest.raises(ValueError, match=words):
        evaluator.add_predictions(torch.zeros(shape), {"img_idx": torch.tensor(indices)})
    assert evaluator.predictions == []


# ---- life cycle, files, errors ---------------------------------------------------------------------------------------


def test_each_evaluation_starts_anew(tmp_path):
    evaluator = perfect(make_truth(TWO_BOXES))
    assert evaluator.stats == {}
    for read in (evaluator.summary, evaluator.per_class, lambda: evaluator.write_metrics(tmp_path / "m.json")):
        with pytest.raises(RuntimeError, match=r"call evaluate\(\) first"):
            read()
    assert evaluator.evaluate() == pytest.approx(1.0)
    assert evaluator.predictions == [] and evaluator.img_indices == []
    evaluator.save(tmp_path / "after.json")
    assert len(json.loads((tmp_path / "after.json").read_text())) == 2  # what was evaluated last
    add(evaluator, 0, xyxy(10, 10, 100, 100, 0.9, 1))
    evaluator.save(tmp_path / "pending.json")
    assert len(json.loads((tmp_path / "pending.json").read_text())) == 1  # what is being collected
    assert evaluator.stats["AP"] == pytest.approx(1.0)
    assert evaluator.evaluate() == pytest.approx(0.5)
    add(evaluator, 0, xyxy(10, 10, 100, 100, 0.9, 1))
    evaluator.reset()
    assert evaluator.evaluate() == 0.0


def test_summary_and_metrics_file(tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    evaluator = perfect(make_truth(TWO_BOXES))
    evaluator.evaluate()
    assert capsys.readouterr().out == ""  # pycocotools is silenced
    lines = evaluator.summary().splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert lines[1].split() == ["AP50", "IoU", "0.50", "area", "all", "best", "100", "1.000"]
    assert lines[6].split()[-3:] == ["best", "1", "1.000"]
    assert evaluator.summary() in caplog.text
    evaluator.write_metrics(tmp_path / "made" / "metrics.json")
    written = json.loads((tmp_path / "made" / "metrics.json").read_text())
    assert written["stats"]["AP"] == pytest.approx(1.0) and written["stats"]["AP_small"] is None
    for line, c in zip(written["per_class"], (1, 2), strict=True):
        one = pytest.approx(1.0)
        best = {"F1": 1.0, "threshold": 0.45}  # between the score .9 and nothing
        sizes = {"AP_small": None, "AP_medium": one if c == 2 else None, "AP_large": one if c == 1 else None}
        assert (
            line
            == {"category_id": c, "name": f"kind {c}", "AP": one, "AP50": one, "count": 1, "AP75": one} | sizes | best
        )
    assert written["score_threshold"] == {"threshold": 0.45, "precision": 1.0, "recall": 1.0, "F1": 1.0}
    assert written["image_count"] == 2 and written["max_dets"] == [1, 10, 100] and "run" not in written
    evaluator.write_metrics(tmp_path / "made" / "metrics.json", {"img_per_s": 16.5, "best_AP": None})
    again = json.loads((tmp_path / "made" / "metrics.json").read_text())
    assert again == {**written, "run": {"img_per_s": 16.5, "best_AP": None}}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"AP": 0.5})
    with pytest.raises(ValueError):
        write_json(path, {"AP": math.nan})
    assert json.loads(path.read_text()) == {"AP": 0.5}
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_errors_name_what_is_missing():
    with pytest.raises(ValueError, match="list has no `parser`"):
        strict_evaluator([])
    evaluator = strict_evaluator(SimpleNamespace(parser=SimpleNamespace(img_ids=[1], cat_ids=[1])))
    with pytest.raises(ValueError, match="has no ground truth: give it `coco_dict"):
        evaluator.evaluate()
    truth = make_truth(TWO_BOXES)
    evaluator = strict_evaluator(make_dataset(truth, img_ids=[1, 99]))
    add(evaluator, 1, xyxy(1, 1, 9, 9, 0.9, 1))
    with pytest.raises(ValueError, match="not in the ground truth, e.g. image id 99"):
        evaluator.evaluate()
    assert len(evaluator.predictions) == 1  # a failed evaluation loses nothing: they can still be saved


def test_create_evaluator_by_name():
    dataset = make_dataset(make_truth(TWO_BOXES))
    assert type(create_evaluator("coco2017", dataset)) is CocoEvaluator
    made = create_evaluator("COCO", dataset, distributed=True, pred_yxyx=True)
    assert made.distributed and made.pred_yxyx and made.max_det == 100
    assert made.evaluate() == 0.0  # distributed without a process group is one process
    assert type(create_evaluator("kitti", dataset)) is PascalEvaluator  # as in effdet: any other name
    with pytest.raises(ValueError, match="evaluator_cls"):
        TfmEvaluator(dataset, evaluator_cls=dict)
    with pytest.raises(NotImplementedError, match="Evaluator must define evaluate"):
        Evaluator().evaluate()
