"""Which recipe is chosen, and what lies over it."""

from __future__ import annotations

import dataclasses
import math

import pytest

from effdet.config.cli import parse_train_args
from effdet.config.load import dump_yaml, replace_settings
from effdet.config.recipe import FEW_STEPS, SMALL_SET, Facts, choose_recipe, find_given, show_settings, wants_recipe


def facts(images=292, hw=(480.0, 640.0), is_cpu=True, devices=1, model="tf_efficientdet_lite0"):
    return Facts(images, hw, is_cpu, devices, model, "a file" if model else "")


@pytest.mark.parametrize(
    "wanted, images, model, name",
    [
        ("auto", 292, "tf_efficientdet_lite0", "finetune"),
        ("auto", 292, "", "scratch"),
        ("auto", SMALL_SET, "", "scratch"),
        ("auto", SMALL_SET + 1, "tf_efficientdet_lite0", "coco"),
        ("auto", None, "tf_efficientdet_lite0", "coco"),
        ("finetune", 0, "tf_efficientdet_lite0", "finetune"),
        ("scratch", 292, "tf_efficientdet_lite0", "scratch"),
        ("coco", 292, "", "coco"),
    ],
)
def test_the_name(wanted, images, model, name):
    recipe = choose_recipe(wanted, facts(images, model=model))
    assert recipe.name == name
    assert bool(recipe.settings) == (name != "coco")


@pytest.mark.parametrize("images", [0, 3, 292, SMALL_SET])
@pytest.mark.parametrize("is_cpu, devices", [(True, 1), (True, 2), (False, 1), (False, 8)])
@pytest.mark.parametrize("name", ["finetune", "scratch"])
def test_every_recipe_is_a_valid_config(images, is_cpu, devices, name):
    recipe = choose_recipe(name, facts(images, is_cpu=is_cpu, devices=devices))
    cfg = parse_train_args(["--root", "x"], base=recipe.settings)
    assert cfg.run.batch_size % devices == 0
    assert cfg.run.batch_size == devices or images >= FEW_STEPS * cfg.run.batch_size
    assert cfg.model.freeze_bn_epochs < cfg.sched.epochs
    seen = cfg.sched.epochs * images * (math.prod(cfg.model.image_size) / (256 * 320) if is_cpu else 1)
    assert seen >= 6000 or cfg.sched.epochs == 150
    assert cfg == parse_train_args(["--root", "x", *show_settings(recipe.settings).split()])


@pytest.mark.parametrize(
    "hw, scratch, finetune",
    [
        ((480, 640), [256, 320], [384, 512]),
        ((640, 480), [320, 256], [512, 384]),
        ((192, 256), [256, 320], [256, 320]),
        ((99, 99), [256, 256], [256, 256]),
        ((250, 5000), [128, 576], [192, 896]),
    ],
)
def test_the_input_has_the_aspect_of_the_images(hw, scratch, finetune):
    for name, size in (("scratch", scratch), ("finetune", finetune)):
        assert choose_recipe(name, facts(hw=hw)).settings["model.image_size"] == size
        assert "model.image_size" not in choose_recipe(name, facts(hw=hw, is_cpu=False)).settings


def test_what_counts_in_epochs_follows_the_users_number():
    settings = choose_recipe("finetune", dataclasses.replace(facts(), epochs=6)).settings
    assert (settings["sched.epochs"], settings["model.freeze_bn_epochs"], settings["run.val_interval"]) == (6, 1, 1)
    for words, epochs in ((["--epochs", "6"], 6), (["sched.epochs=2"], 2), ([], None)):
        assert (
            find_given(lambda base, words=words: parse_train_args(["--root", "x", *words], base=base), "sched.epochs")
            == epochs
        )


def test_a_larger_input_costs_epochs():
    large, small = (choose_recipe("finetune", facts(hw=hw)).settings for hw in ((480, 640), (192, 256)))
    work = [each["sched.epochs"] * math.prod(each["model.image_size"]) for each in (large, small)]
    assert large["sched.epochs"] < small["sched.epochs"] and work[0] == pytest.approx(work[1], rel=0.1)


def test_what_is_given_wins_and_who_brings_a_recipe_gets_no_other(tmp_path):
    settings = choose_recipe("auto", facts()).settings
    cfg = parse_train_args(["--root", "x", "--epochs", "3", "optim.weight_decay=0.5"], base=settings)
    assert (cfg.sched.epochs, cfg.optim.weight_decay, cfg.optim.opt) == (3, 0.5, "adamw")
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: 0.5}")
    own = [["--lr", "0.32"], ["--opt", "adamw"], ["optim.lr=0.1"], ["--sched", "step"], ["--overfit", "8"]]
    for flags in (*own, ["-c", str(file)]):
        assert not wants_recipe(lambda base, flags=flags: parse_train_args(flags, base=base))
    for flags in (["--epochs", "3"], ["-b", "4"], ["--model", "tf_efficientdet_d1"]):
        assert wants_recipe(lambda base, flags=flags: parse_train_args(flags, base=base))
    cfg = replace_settings(cfg, run={"recipe": "finetune"})
    for word, wanted in (("finetune", True), ("coco", False)):
        assert (
            wants_recipe(lambda base, word=word: parse_train_args(["--lr", "0.1", "--recipe", word], base=base))
            == wanted
        )
    file.write_text(dump_yaml(cfg))
    assert parse_train_args(["-c", str(file)], base={"sched.epochs": 99}) == cfg
