"""Classes of one json under another's ids: by name, by id, and what becomes of the numbers."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from effdet.commands import validate
from effdet.config.cli import parse_train_args
from effdet.data.coco.categories import CategoryMap, find_empty_classes, find_shared_names, resolve_category_map
from effdet.data.synthetic.dataset import make_synthetic_dataset
from effdet.evaluator import CocoEvaluator
from effdet.training.build import open_data


def rows(**ids) -> list[dict]:
    return [{"id": number, "name": name} for name, number in ids.items()]


CUPS = CategoryMap.from_categories(rows(cup=1, dish=2, fork=5))


# ---- the map ----


@pytest.mark.parametrize(
    "stored", [CUPS, CategoryMap.from_categories(rows(cup=1, dish=2, fork=5), 6), CategoryMap.from_dict(CUPS.to_dict())]
)
def test_a_class_is_where_its_name_is(stored):
    moved = resolve_category_map(rows(dish=1, fork=2, cup=9), stored=stored)
    assert moved.num_classes == stored.num_classes and moved.class_names == stored.class_names
    for name, category_id in {"dish": 1, "fork": 2, "cup": 9}.items():
        index = stored.class_names.index(name)
        assert moved.id_to_idx[category_id] == moved.to_idx([category_id])[0] == index
        assert moved.idx_to_id[index] == category_id
    assert CategoryMap.from_dict(json.loads(json.dumps(moved.to_dict()))) == moved
    assert len(set(moved.idx_to_id.tolist())) == stored.num_classes  # no two classes share an id


def test_classes_that_the_json_lacks_have_ids_of_nothing_in_it():
    top = 2**63 - 1
    moved = resolve_category_map(rows(fork=1, cup=top), stored=CUPS)
    assert (moved.id_to_idx[1], moved.id_to_idx[top]) == (2, 0)
    assert moved.idx_to_id[1] not in (1, top, *CUPS.ids)


def test_the_ids_count_where_one_asks_for_them_or_there_are_no_names():
    assert resolve_category_map(rows(dish=1, cup=2), stored=CUPS, match="id") is CUPS
    nameless = CategoryMap.from_categories([{"id": 1}, {"id": 2}, {"id": 5}])
    assert resolve_category_map([{"id": 2}, {"id": 5}], stored=CUPS) is CUPS
    assert resolve_category_map(rows(dish=1, cup=2), stored=nameless) is nameless


@pytest.mark.parametrize("match", ["name", "id"])
@pytest.mark.parametrize("owner", ["the checkpoint", "the training split"])
def test_other_classes_are_an_error_that_names_them_and_whose_the_others_are(match, owner):
    with pytest.raises(ValueError) as error:
        resolve_category_map(rows(cup=1, knife=7), stored=CUPS, match=match, owner=owner)
    text = str(error.value)
    assert "7" in text.partition("does not know")[2] and owner in text
    assert ("knife" in text) == (match == "name") and ("checkpoint" in text) == (owner == "the checkpoint")
    assert "--match-classes" not in text  # the id is as unknown as the name


def test_another_name_of_a_known_id_can_be_matched_by_id():
    with pytest.raises(ValueError, match="does not know 2 'plate'.*--match-classes id"):
        resolve_category_map(rows(cup=1, plate=2), stored=CUPS)
    assert resolve_category_map(rows(cup=1, plate=2), stored=CUPS, match="id") is CUPS


def test_a_name_of_several_classes_matches_nothing():
    twice = CategoryMap.from_categories([{"id": 1, "name": "cup"}, {"id": 2, "name": "cup"}, {"id": 3, "name": "dish"}])
    same = [{"id": 1, "name": "cup"}, {"id": 2, "name": "cup"}]
    assert resolve_category_map(same, stored=twice) is twice  # as ids and names agree
    with pytest.raises(ValueError, match="'cup' is the name of several"):
        resolve_category_map([{"id": 2, "name": "cup"}, {"id": 4, "name": "cup"}], stored=twice)


def test_equal_names_are_found_in_any_spelling():
    some = [(1, "Tumor"), (2, "cup"), (3, "tumor "), (4, "TUMOR"), (5, "tea  cup"), (6, "Tea cup"), (7, "teacup")]
    assert find_shared_names({"id": i, "name": name} for i, name in some) == [
        "'Tumor' = 'tumor ' = 'TUMOR' of 1, 3, 4",
        "'tea  cup' = 'Tea cup' of 5, 6",
    ]
    assert find_shared_names([{"id": 10, "name": "P"}, {"id": 11, "name": "P"}]) == ["'P' of 10, 11"]
    assert find_shared_names(rows(cup=1, dish=2)) == []


def test_classes_without_boxes():
    assert find_empty_classes(CUPS, {2, 77}) == ["1 'cup'", "5 'fork'"]
    assert find_empty_classes(CUPS, {1, 2, 5}) == []


# ---- a training, and the evaluation of what it leaves ----

NAMES = {"ball": 3, "box": 7, "star": 12}  # ids of the small checkpoint, and not those of the data set


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Return a data set of three classes with three validation jsons: as in training, permuted, with another name."""
    root = make_synthetic_dataset(tmp_path_factory.mktemp("classes") / "set", num_train=4, num_val=4)
    for split in ("train", "val"):
        path = root / "annotations" / f"instances_{split}2017.json"
        coco = json.loads(path.read_text())
        names = {row["id"]: row["name"] for row in coco["categories"]}
        chosen = list(names.values())[:3]
        place = dict(zip(chosen, NAMES, strict=True))  # what the classes look like does not matter here
        coco["annotations"] = [row for row in coco["annotations"] if names[row["category_id"]] in place]
        for to, ids in {
            split: NAMES,
            f"{split}-permuted": {"ball": 12, "box": 3, "star": 7},
            f"{split}-renamed": {"ball": 3, "box": 7, "moon": 12},
        }.items():
            new_ids = dict(zip(chosen, ids.values(), strict=True))
            annotations = [{**row, "category_id": new_ids[names[row["category_id"]]]} for row in coco["annotations"]]
            content = {**coco, "annotations": annotations, "categories": rows(**ids)}
            (root / f"{to}.json").write_text(json.dumps(content))
    return root


def options(data: Path, *more: str, train: str = "train", val: str = "val") -> list[str]:
    named = ["--val-images", str(data / "val2017"), "--val-ann", str(data / f"{val}.json"), *more]
    if train:
        named += ["--train-images", str(data / "train2017"), "--train-ann", str(data / f"{train}.json")]
    return named


def opened(data: Path, *more: str, stored: CategoryMap | None = None, **jsons: str):
    return open_data(parse_train_args([*options(data, *more, **jsons), "--lr", "0.1"]), stored and stored.to_dict())


def targets_of(dataset) -> list[list]:
    return [sorted((*box.tolist(), int(c)) for box, c in zip(t["bbox"], t["cls"], strict=True)) for _, t in dataset]


def scores_of(dataset) -> dict[str, float]:
    """Return the scores of predictions made from the targets: some missed, some of the next class."""
    parser, evaluator = dataset.parser, CocoEvaluator(dataset, all_images=True)
    for index in range(len(dataset)):
        target = parser.get_ann_info(index)
        kept = target["cls"] > 0
        boxes, classes = target["bbox"][kept][:, [1, 0, 3, 2]], target["cls"][kept].astype(float)
        scores = 1 / (1 + np.arange(len(boxes)))
        classes[3::4] = classes[3::4] % 3 + 1
        found = np.column_stack([boxes, scores, classes])[: max(1, len(boxes) - 1)]
        evaluator.add_predictions(torch.from_numpy(found)[None].float(), {"img_idx": torch.tensor([index])})
    evaluator.evaluate()
    by_name = {row.name: row.AP for row in evaluator.per_class()}
    return {**evaluator.stats, **by_name}


def test_permuted_ids_change_no_target_and_no_score(data, caplog):
    plain, permuted = opened(data), opened(data, val="val-permuted")
    assert permuted.categories == plain.categories
    assert targets_of(permuted.val_set) == targets_of(plain.val_set)
    with caplog.at_level(logging.INFO):
        wanted = scores_of(plain.val_set)
        assert 0.1 < wanted["AP"] < 0.95 and set(NAMES) <= set(wanted)
        assert scores_of(permuted.val_set) == pytest.approx(wanted, nan_ok=True)


def test_a_training_that_goes_on_keeps_its_classes(data):
    stored = opened(data).categories
    moved = opened(data, train="train-permuted", stored=stored)
    assert moved.categories.class_names == stored.class_names
    assert targets_of(moved.train_set) == targets_of(opened(data).train_set)
    assert targets_of(moved.val_set) == targets_of(opened(data).val_set)


def test_it_is_said_once(data, caplog):
    with caplog.at_level(logging.INFO):
        opened(data, val="val-permuted")
    said = [r.getMessage() for r in caplog.records if all(name in r.getMessage() for name in NAMES)]
    assert len(said) == 1 and "checkpoint" not in said[0]


def test_other_names_need_to_be_asked_for(data):
    with pytest.raises(ValueError, match="val-renamed.*'moon'") as error:
        opened(data, val="val-renamed")
    assert "checkpoint" not in str(error.value)
    by_id = opened(data, "--match-classes", "id", val="val-renamed")
    assert targets_of(by_id.val_set) == targets_of(opened(data).val_set)
    swapped = opened(data, "--match-classes", "id", val="val-permuted")
    assert targets_of(swapped.val_set) != targets_of(opened(data).val_set)


def test_a_training_names_classes_without_boxes(data, tmp_path, caplog):
    coco = json.loads((data / "train.json").read_text())
    coco["annotations"] = [row for row in coco["annotations"] if row["category_id"] != 7]
    coco["annotations"] += [{**coco["annotations"][0], "id": 10**6, "category_id": 7, "iscrowd": 1}]
    (tmp_path / "train.json").write_text(json.dumps(coco))
    with caplog.at_level(logging.WARNING):
        opened(data)
        assert not [r for r in caplog.records if "'box'" in r.getMessage()]
        opened(data, "--crowd", "ignore", train=str(tmp_path / "train"))  # a crowd region is no box
    said = [r.getMessage() for r in caplog.records if "'box'" in r.getMessage()]
    assert len(said) == 1 and "'ball'" not in said[0]


def metrics_of(data: Path, checkpoint: Path, out: Path, *more: str, val: str = "val") -> dict:
    argv = ["--checkpoint", str(checkpoint), "-j", "0", "-b", "4", "--device", "cpu", "--output", "", *more]
    assert validate.main([*argv, "--metrics", str(out), *options(data, train="", val=val)]) == 0
    content = json.loads(out.read_text())
    return {"stats": content["stats"], **{row["name"]: row["AP"] for row in content["per_class"]}}


def test_a_checkpoint_is_evaluated_on_a_json_with_other_ids(data, small_checkpoint, tmp_path):
    wanted = metrics_of(data, small_checkpoint, tmp_path / "a.json")
    assert set(NAMES) < set(wanted)
    assert metrics_of(data, small_checkpoint, tmp_path / "b.json", val="val-permuted") == wanted
    by_id = metrics_of(data, small_checkpoint, tmp_path / "c.json", "--match-classes", "id", val="val-permuted")
    assert by_id != wanted
    with pytest.raises(SystemExit, match="'moon'.*--match-classes id"):
        metrics_of(data, small_checkpoint, tmp_path / "d.json", val="val-renamed")
    renamed = metrics_of(data, small_checkpoint, tmp_path / "e.json", "--match-classes", "id", val="val-renamed")
    assert renamed["stats"] == wanted["stats"]
