"""--overfit N: which images, without augmentation, and what is concluded from what was measured."""

from __future__ import annotations

import dataclasses
import logging
import re

import numpy as np
import pytest
import torch

import train
from effdet.config.cli import parse_train_args
from effdet.config.load import OVERFIT
from effdet.data.build import build_dataset, build_loader
from effdet.data.synthetic.dataset import make_synthetic_dataset
from effdet.evaluator import CocoEvaluator
from effdet.factory import resolve_model_config
from effdet.training.overfit import OverfitStats, choose_images, count_boxes, diagnose

LEARNT = OverfitStats(
    ap=0.97,
    ap50=1.0,
    losses=[2.0, 0.8, 0.2, 0.05],
    eval_loss=0.06,
    steps=200,
    skipped=0,
    lr=0.005,
    boxes=40,
    unreached=0,
    missed=0,
    missed_unreached=0,
    wrong_class=0,
    conflicts=0,
    beyond_limit=0,
    max_det=100,
)


def causes(**changes) -> list[str]:
    return diagnose(dataclasses.replace(LEARNT, **{"ap": 0.4, "ap50": 0.6, **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"skipped": 60}, "60 of 200 updates were skipped for inf or NaN in the gradients: lower --lr (0.005)"),
        ({"losses": [2.0, float("nan")]}, "0 of 200 updates were skipped for inf or NaN"),
        (
            {"losses": [2.0, 1.9, 1.8, 1.7]},
            "from 2 to 1.7 (least 1.7) in 200 steps, slowly but steadily: --lr 0.005 is likely too small, try 0.05",
        ),
        ({"losses": [2.0, 0.9, 2.5, 1.5]}, "up and down: --lr 0.005 is likely too large, try 0.0005"),
        ({"losses": [2.0, 90.0, 9.0, 3.0]}, "up and down: --lr 0.005 is likely too large, try 0.0005"),
        (
            {"losses": [702.0, 549.0, 57.0], "eval_loss": 1e21},
            "up and down: --lr 0.005 is likely too large, try 0.0005",
        ),
        (
            {"eval_loss": 2.5},
            "the loss is 0.05 in training but 2.5 in evaluation, on the same images: the running batch",
        ),
        ({"eval_loss": 2.5, "ema_share": 0.4}, "the averaged (EMA) weights are still 40 % initial weights"),
        (
            {"wrong_class": 10, "confused": ["cat as dog (10)"]},
            "10 of 40 boxes are found with another class (cat as dog (10)): look at the labels",
        ),
        ({"wrong_class": 10, "conflicts": 3}, "look at the labels; 3 pairs of nearly equal boxes in one image have"),
        (
            {"unreached": 9, "missed": 8, "missed_unreached": 7},
            "9 of 40 boxes overlap no anchor with IoU 0.5, and 7 of",
        ),
        ({"missed": 8}, "8 of 40 boxes are missed although an anchor reaches them"),
        ({"beyond_limit": 20}, "20 boxes are beyond the 100 that are predicted in an image"),
        ({"frozen": ["--freeze-backbone"]}, "--freeze-backbone keep the network from learning"),
        ({"ap50": 0.99}, "the objects are found (AP50 0.99), their boxes are not tight yet"),
        ({}, "nothing that was measured explains it (the loss went from 2 to 0.05)"),
    ],
)
def test_each_fact_has_its_cause(changes, words):
    found = causes(**changes)
    assert len(found) == 1 + (changes.get("losses", [0])[-1] != changes.get("losses", [0])[-1])  # a NaN also is no fall
    assert words in found[0]


def test_what_was_learnt_has_no_cause_and_several_facts_have_several():
    assert diagnose(LEARNT) == []
    found = causes(unreached=9, missed=8, missed_unreached=7, eval_loss=1.0, wrong_class=5)
    assert len(found) == 3
    assert "the loss is" in found[0] and "another class" in found[1] and "no anchor" in found[2]


# ---- the images ----


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_synthetic_dataset(tmp_path_factory.mktemp("data") / "set", num_train=12, num_val=1)


def config(data, *more: str):
    return parse_train_args(["--root", str(data), "--image-size", "64", "-j", "0", "--device", "cpu", *more])


def test_the_first_images_are_repeated_in_whole_batches(data):
    cfg = config(data, "--overfit", "3", "-b", "4")
    whole = build_dataset(config(data).data, "train")
    train_set, val_set = choose_images(build_dataset(cfg.data, "train"), cfg)
    ids = val_set.parser.img_ids
    assert ids == whole.parser.img_ids[:3]
    assert all((val_set.parser.get_ann_info(k)["cls"] > 0).any() for k in range(3))
    assert len(train_set) == 40  # ten batches
    assert {train_set.parser.img_ids.count(img_id) for img_id in ids} <= {13, 14}
    at = whole.parser.img_ids.index(ids[1])
    for small, k in ((val_set, 1), (train_set, train_set.parser.img_ids.index(ids[1]))):
        assert small.parser.img_infos[k] == whole.parser.img_infos[at]
        np.testing.assert_array_equal(small.parser.get_ann_info(k)["bbox"], whole.parser.get_ann_info(at)["bbox"])
        assert small[k][0].tobytes() == whole[at][0].tobytes()
    many = config(data, "--overfit", "11", "-b", "2")
    assert len(choose_images(build_dataset(many.data, "train"), many)[0]) == 56  # five passes, more than ten batches
    with pytest.raises(ValueError, match="--overfit 12 needs as many images with boxes, but the training split has"):
        choose_images(whole, config(data, "--overfit", "12"))  # one of the twelve is empty


def test_the_evaluator_counts_these_images_only(data):
    cfg = config(data, "--overfit", "3", "-b", "4")
    _, val_set = choose_images(build_dataset(cfg.data, "train"), cfg)
    evaluator = CocoEvaluator(val_set, all_images=True)
    loader = build_loader(val_set, cfg.data, resolve_model_config(cfg.model), 4, 0, torch.device("cpu"))
    ((images, target),) = list(loader)
    rows = torch.zeros(3, 30, 6)
    for k, index in enumerate(target["img_idx"].tolist()):
        truth = val_set.parser.get_ann_info(index)
        count = len(truth["cls"])
        rows[k, :count, :4] = torch.from_numpy(truth["bbox"][:, [1, 0, 3, 2]].copy())
        rows[k, :count, 4], rows[k, :count, 5] = 0.9, torch.from_numpy(truth["cls"]).float()
    evaluator.add_predictions(rows, target)
    assert evaluator.evaluate() == pytest.approx(1.0)


def test_boxes_are_counted_by_what_became_of_them(data):
    cfg = config(data, "--overfit", "1", "-b", "1")
    parser = choose_images(build_dataset(cfg.data, "train"), cfg)[1].parser
    boxes = np.array([[0, 0, 200, 200], [0, 0, 199, 200], [10, 10, 14, 14], [100, 100, 160, 160]], dtype=np.float32)
    parser.get_ann_info = lambda index: {"bbox": np.concatenate((boxes, boxes[:1])), "cls": np.array([1, 2, 3, 3, -2])}
    stats = dataclasses.replace(LEARNT, boxes=0, max_det=3)
    xyxy = boxes[:, [1, 0, 3, 2]]
    detections = torch.tensor([[*xyxy[0], 0.9, 1], [*xyxy[3], 0.8, 5], [*xyxy[3], 0.7, 6], [*xyxy[2], 0.1, 3]])
    confused: dict = {}
    count_boxes(stats, confused, parser, 0, detections, resolve_model_config(cfg.model))
    # The second box is in place of the first, but of another class; the third has a low score and no anchor.
    assert (stats.boxes, stats.wrong_class, stats.missed, stats.missed_unreached) == (4, 2, 1, 1)
    assert (stats.unreached, stats.conflicts, stats.beyond_limit) == (2, 1, 1)
    assert confused == {(2, 1): 1, (3, 5): 1}


# ---- the settings ----


def test_settings_come_over_files_and_below_flags(tmp_path):
    text = "optim: {lr: 0.3, momentum: 0.5}\nsched: {epochs: 7}\nmodel: {anchor_scale: 2.5}"
    (tmp_path / "preset.yaml").write_text(text)
    cfg = parse_train_args(f"-c {tmp_path}/preset.yaml --overfit 8 --epochs 9 ema.enabled=true".split())
    assert (cfg.optim.lr, cfg.sched.epochs, cfg.ema.enabled) == (OVERFIT["optim.lr"], 9, True)
    assert (cfg.optim.momentum, cfg.model.anchor_scale, cfg.run.overfit) == (0.5, 2.5, 8)
    assert parse_train_args(["run.overfit=8"]) == parse_train_args(["--overfit", "8"])


@pytest.mark.parametrize("line", ["--overfit 8 --resume auto", "--overfit 8 --device-list 0,1"])
def test_contradictions_are_refused(line, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_train_args(line.split())
    assert stop.value.code == 2 and "--overfit trains anew on one device" in capsys.readouterr().err


# ---- a run ----


def test_a_rate_that_is_too_small_is_told(data, tmp_path, capsys, monkeypatch):
    batches = []
    from effdet.bench import DetBenchTrain

    original = DetBenchTrain.forward

    def spy(self, x, target):
        batches.append((self.training, [x.sum(dtype=torch.float64).item(), len(x)]))
        return original(self, x, target)

    monkeypatch.setattr(DetBenchTrain, "forward", spy)
    try:
        status = train.main(
            [
                "--root",
                str(data),
                "--overfit",
                "2",
                "--image-size",
                "64",
                "-b",
                "2",
                "-j",
                "0",
                "--device",
                "cpu",
                "--epochs",
                "2",
                "--lr",
                "1e-6",
                "model.freeze_bn_epochs=0",
                "--output",
                str(tmp_path),
                "--experiment",
                "run",
            ]
        )
    finally:
        for handler in logging.getLogger("effdet").handlers[:]:
            logging.getLogger("effdet").removeHandler(handler)
            handler.close()
        logging.getLogger("effdet").propagate = True
    lines = capsys.readouterr().out.splitlines()
    assert status == 3
    assert re.match(
        r"overfit: AP 0\.\d+ on the training images, expected 0.9 or more: the training loss went from "
        r".* in 20 steps, slowly but steadily: --lr 1e-06 is likely too small, try 1e-05, .*; status 3$",
        lines[-1],
    )
    assert any(re.match(r"overfit: \d+ boxes: 0 found, 0 with another class only, \d+ missed", line) for line in lines)
    trained = {round(total, 3) for training, (total, count) in batches if training and count == 2}
    evaluated = {round(total, 3) for training, (total, count) in batches if not training and count == 2}
    assert len(trained) == len(evaluated) == 1 and trained == evaluated  # the same two images, without augmentation
