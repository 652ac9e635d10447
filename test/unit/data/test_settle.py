"""From flags to the files of both parts: what is used as it is, what is made, and that a resumed run has the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from folders import ALL, TOOLS, coco, put_images, put_json

from effdet.config.cli import parse_train_args, parse_validate_args
from effdet.config.schema import DataConfig, EvalDataConfig
from effdet.data.build import build_dataset, split_paths
from effdet.data.coco.report import DatasetError
from effdet.data.settle import settle_data
from effdet.training.build import settle_config
from effdet.training.run_dir import discard_if_refused


def images_of(ann: str | Path) -> list[str]:
    return [row["file_name"] for row in json.loads(Path(ann).read_text())["images"]]


@pytest.fixture
def one_json(tmp_path) -> DataConfig:
    root = TOOLS["one COCO json, one folder of images"](tmp_path / "in")
    return DataConfig(train_images=str(root / "images"), train_ann=str(root / "labels.json"))


def test_what_names_everything_stays_as_it_is(tmp_path):
    root = TOOLS["COCO"](tmp_path / "in")
    data = DataConfig(root=str(root))
    assert settle_data(data, folder=tmp_path / "run")[0] == data and not (tmp_path / "run").exists()
    named = DataConfig(train_images="a", train_ann="b", val_images="c", val_ann="d")
    assert settle_data(named) == (named, [])
    roboflow = DataConfig(root=str(TOOLS["Roboflow: COCO"](tmp_path / "robo")))
    settled, _ = settle_data(roboflow, folder=tmp_path / "run")
    assert settled.val_ann == str(tmp_path / "robo/valid/_annotations.coco.json") and not (tmp_path / "run").exists()
    assert settle_data(settled) == (settled, [])


def test_a_single_json_is_divided_and_training_and_evaluation_agree(one_json, tmp_path):
    settled, lines = settle_data(one_json, folder=tmp_path / "run")
    train, val = images_of(settled.train_ann), images_of(settled.val_ann)
    assert sorted(train + val) == sorted(f"{name}.jpg" for name in ALL) and len(val) == 1
    assert settled.train_images == settled.val_images == one_json.train_images
    assert settled.val_split is None and any("1 of 4 images" in line for line in lines)
    evaluated, _ = settle_data(EvalDataConfig(root=str(tmp_path / "in")), ("val",))
    assert images_of(evaluated.val_ann) == val, "validate.py with the same folder holds out the same images"
    assert images_of(split_paths(one_json, "val")[1]) == val and len(build_dataset(one_json, "train")) == 3


def test_without_a_validation_part_none_is_made_where_that_was_asked_for(one_json):
    data = parse_train_args(
        ["--train-images", one_json.train_images, "--train-ann", one_json.train_ann, "--val-split", "0"]
    ).data
    assert len(build_dataset(data, "train")) == 4
    with pytest.raises(ValueError, match="no validation data.*--val-images"):
        settle_data(data)
    data = parse_train_args(["--root", str(Path(one_json.train_ann).parent), "--overfit", "2"]).data
    assert (data.limit, data.val_split) == (2, 0.0)
    assert images_of(settle_data(data, ("train",))[0].train_ann) == ["one.jpg", "two.jpg"]


def test_a_share_contradicts_a_validation_part_and_replaces_a_test_part(tmp_path):
    root = TOOLS["Roboflow: YOLO"](tmp_path / "in")
    with pytest.raises(ValueError, match="--val-split 0.4: the data have a validation part"):
        settle_data(DataConfig(root=str(root), val_split=0.4))
    (root / "valid").rename(root / "test")
    settled, lines = settle_data(DataConfig(root=str(root)), folder=tmp_path / "a")
    assert images_of(settled.val_ann) == ["four.jpg"] and any("test part serves" in line for line in lines)
    settled, _ = settle_data(DataConfig(root=str(root), val_split=0.4), folder=tmp_path / "b")
    assert len(images_of(settled.val_ann)) == 1 and images_of(settled.val_ann) != ["four.jpg"]


def test_limit_and_classes_cut_both_parts(tmp_path):
    root = TOOLS["COCO"](tmp_path / "in")
    line = ["--root", str(root), "--limit", "2", "--classes", "cup"]
    settled, lines = settle_data(parse_train_args(line).data, folder=tmp_path / "run")
    assert images_of(settled.train_ann) == ["one.jpg", "two.jpg"] and images_of(settled.val_ann) == ["four.jpg"]
    assert build_dataset(settled, "train").parser.cat_names == ["cup"]
    assert (settled.limit, settled.classes, settled.root) == (0, [], str(root))
    assert len(build_dataset(parse_validate_args(line).data, "val")) == 1
    with pytest.raises(DatasetError, match="'cups', did you mean cup"):
        settle_data(DataConfig(root=str(root), classes=["cups"]))


@pytest.mark.parametrize("flags", ["--limit -1", "--val-split 1", "--val-split -0.1", "--overfit 4 --limit 5"])
def test_impossible_values_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_train_args(["--root", "x", *flags.split()])
    assert stop.value.code == 2 and "--" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_parts_although_the_data_have_grown(one_json, tmp_path):
    run = tmp_path / "runs/a"
    cfg = parse_train_args(["--train-images", one_json.train_images, "--train-ann", one_json.train_ann])
    first = settle_config(cfg, run).data
    before = {part: Path(ann).read_text() for part, ann in (("train", first.train_ann), ("val", first.val_ann))}
    assert first.train_ann == str(run / "data/train.json") and cfg.data.train_ann == one_json.train_ann
    more = coco(ALL)
    more["images"] += [{**row, "id": row["id"] + 50, "file_name": f"more/{row['file_name']}"} for row in more["images"]]
    put_images(Path(one_json.train_images) / "more", ALL)
    put_json(Path(one_json.train_ann), more)
    assert settle_config(cfg, run, str(run / "last.pth.tar")).data == first
    elsewhere = settle_config(cfg, tmp_path / "runs/b", str(run / "last.pth.tar")).data
    for data in (first, elsewhere):
        assert {"train": Path(data.train_ann).read_text(), "val": Path(data.val_ann).read_text()} == before
    assert elsewhere.train_ann == str(tmp_path / "runs/b/data/train.json")
    with pytest.raises(ValueError, match="was made with --limit 0, now it is 3"):
        settle_config(parse_train_args([*_named(one_json), "--limit", "3"]), run, str(run / "last.pth.tar"))
    assert len(images_of(settle_config(cfg, run).data.train_ann)) == 7, "a new run in the folder divides anew"


def test_a_refused_run_leaves_nothing_but_what_was_there(one_json, tmp_path):
    for before in (False, True):
        run = tmp_path / f"runs/{before}"
        run.mkdir(parents=True)
        if before:
            (run / "last.pth.tar").touch()
        with pytest.raises(ValueError, match="refused"), discard_if_refused(run):
            settle_config(parse_train_args(_named(one_json)), run)
            raise ValueError("refused")
        assert (run / "data/train.json").exists() == before == run.exists()


def _named(data: DataConfig) -> list[str]:
    return ["--train-images", data.train_images, "--train-ann", data.train_ann]


def test_jsons_of_a_run_are_not_taken_for_the_users(one_json, tmp_path):
    root = Path(one_json.train_ann).parent
    settle_data(DataConfig(root=str(root)), folder=root / "output/train/run/data")
    settled, _ = settle_data(DataConfig(root=str(root)), folder=tmp_path / "again")
    assert len(images_of(settled.train_ann)) == 3


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (DataConfig(), "no data given.*--root DIR.*--train-images DIR --train-ann FILE"),
        (DataConfig(val_images="a", val_ann="b"), "no training data"),
        (EvalDataConfig(), "no data given.*--val-images DIR --val-ann FILE"),
    ],
)
def test_what_is_not_named_is_an_error_with_the_flags(data, words):
    with pytest.raises(ValueError, match=words):
        settle_data(data, ("train", "val") if isinstance(data, DataConfig) else ("val",))
