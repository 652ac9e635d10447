"""The recipe of a run: what is looked at, what fits the memory, what a continued run keeps, and fitted anchors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from effdet.config.cli import parse_train_args
from effdet.config.load import replace_settings, to_plain
from effdet.data.build import build_dataset
from effdet.data.synthetic.dataset import make_synthetic_dataset
from effdet.datacheck.anchor_reach import find_reached, letterbox_boxes
from effdet.factory import resolve_model_config
from effdet.runtime import memory
from effdet.training.build import Placement
from effdet.training.footprint import bytes_per_image, explain_out_of_memory, images_that_fit
from effdet.training.recipe import apply_recipe, find_facts, fit_to_data, keep_recipe
from effdet.training.trainer import is_tired

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_synthetic_dataset(tmp_path_factory.mktemp("data"), num_train=45, num_val=4)


def parser_of(*argv):
    return lambda base: parse_train_args(argv, base=base)


def chosen(*argv):
    parse = parser_of(*argv)
    return *apply_recipe(parse({}), CPU, parse), parse


def test_the_data_are_looked_at(root):
    facts, classes = find_facts(parse_train_args(["--root", str(root)]), CPU, parser_of("--root", str(root)))
    sizes = [
        (i["height"], i["width"])
        for i in build_dataset(parse_train_args(["--root", str(root)]).data, "train").parser.img_infos
    ]
    assert facts.images == 45 and classes == 6 and facts.is_cpu
    assert facts.image_hw[0] == sorted(h for h, _ in sizes)[22]


def test_a_recipe_lies_below_what_is_given(root):
    cfg, recipe, _ = chosen("--root", str(root), "--epochs", "2", "--recipe", "scratch")
    assert recipe.name == cfg.run.recipe == "scratch"
    assert (cfg.sched.epochs, cfg.optim.opt, cfg.run.batch_size) == (2, "adamw", 2)
    assert chosen("--root", str(root), "--lr", "0.1")[:2] == (
        parse_train_args(["--root", str(root), "--lr", "0.1"]),
        None,
    )


def test_the_batch_fits_the_memory_unless_it_is_given(root, monkeypatch):
    cfg, *_ = chosen("--root", str(root), "--recipe", "scratch")
    each = bytes_per_image(cfg, Placement(CPU, 1, 0, True), 6)
    monkeypatch.setattr(memory, "available_memory_bytes", lambda device: int(1.3 * each))
    cfg, recipe, parse = chosen("--root", str(root), "--recipe", "scratch")
    assert cfg.run.batch_size == recipe.settings["run.batch_size"] == 1
    assert chosen("--root", str(root), "--recipe", "scratch", "-b", "3")[0].run.batch_size == 3


def test_a_continued_run_keeps_its_recipe_as_it_was(root):
    cfg, recipe, parse = chosen("--root", str(root), "--recipe", "scratch", "--epochs", "9")
    was = replace_settings(cfg, optim={"lr": 0.5}, sched={"epochs": 4})
    now = keep_recipe(cfg, recipe, parse, {"config": to_plain(was)})
    assert (now.optim.lr, now.sched.epochs) == (0.5, 9)  # --epochs is given anew
    other = replace_settings(was, run={"recipe": "finetune"}, model={"freeze_stages": 2})
    now = keep_recipe(cfg, recipe, parse, {"config": to_plain(other)})
    assert (now.run.recipe, now.model.freeze_stages, now.sched.epochs) == ("finetune", 2, 9)
    for none in ("coco", "auto"):  # a run without a recipe goes on without
        without = to_plain(replace_settings(was, run={"recipe": none}))
        assert keep_recipe(cfg, recipe, parse, {"config": without}) == parse({})
    assert keep_recipe(cfg, recipe, parse, {}) == cfg


def test_fitted_anchors_reach_more_boxes(root):
    cfg = parse_train_args(["--root", str(root), "--image-size", "192", "--lr", "0.1"])
    parser = build_dataset(cfg.data, "train").parser
    table = parser.box_table()
    sizes = [[parser.img_infos[k]["width"], parser.img_infos[k]["height"]] for k in table["img_idx"]]
    import numpy as np

    def share(cfg):
        boxes = letterbox_boxes(table["bbox"], np.array(sizes), cfg.model.image_size)
        return find_reached(boxes, resolve_model_config(cfg.model)).mean()

    fitted = fit_to_data(cfg, parser)
    assert share(fitted) > share(cfg) + 0.02
    given = replace_settings(cfg, model={"anchor_scale": 7.0})
    assert fit_to_data(given, parser) == given


# ---- memory ----


def test_the_estimate_follows_size_and_frozen_parts():
    place = Placement(CPU, 1, 0, True)

    def estimate(*flags):
        return bytes_per_image(parse_train_args(["--lr", "0.1", *flags]), place, 3)

    small = estimate("--image-size", "256")
    assert estimate("--image-size", "512") == pytest.approx(4 * small, rel=1e-6)
    assert estimate("--image-size", "256", "--freeze-stages", "4") < 0.7 * small
    assert estimate("--image-size", "256", "--freeze-backbone") < 0.35 * small
    # four images at 512 px took 516 MiB each, as the process's resident set says
    assert estimate("--image-size", "512") == pytest.approx(516 * 2**20, rel=0.3)


def test_the_estimate_leaves_random_numbers_alone():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    bytes_per_image(parse_train_args(["--lr", "0.1", "--image-size", "128"]), Placement(CPU, 1, 0, True), 3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_fits_and_what_the_error_says(monkeypatch):
    cfg, place = parse_train_args(["--lr", "0.1", "--image-size", "256"]), Placement(CPU, 2, 0, True)
    each = bytes_per_image(cfg, place, 3)
    monkeypatch.setattr(memory, "available_memory_bytes", lambda device: 10 * each)
    assert images_that_fit(cfg, place, 3) == 8
    assert "-b 16)" in str(explain_out_of_memory(cfg, place, 3, 64, None))
    assert "-b 10)" in str(explain_out_of_memory(cfg, place, 3, 64, 5))
    assert "-b 6)" in str(explain_out_of_memory(cfg, place, 3, 4, None))  # never what has just failed
    monkeypatch.setattr(memory, "available_memory_bytes", lambda device: None)
    assert images_that_fit(cfg, place, 3) is None


@pytest.mark.parametrize(
    "error, is_memory",
    [
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_which_errors_are_about_memory(error, is_memory):
    assert memory.is_out_of_memory(error) == is_memory


def test_torchs_own_error_of_the_cpu_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert memory.is_out_of_memory(caught.value)


# ---- early stopping ----


@pytest.mark.parametrize(
    "patience, interval, best, epoch, tired",
    [(0, 1, 0, 99, False), (3, 1, 4, 6, False), (3, 1, 4, 7, True), (2, 5, 4, 9, False), (2, 5, 4, 14, True)],
)
def test_patience_counts_evaluations_since_the_best(patience, interval, best, epoch, tired):
    settings = SimpleNamespace(run=SimpleNamespace(patience=patience, val_interval=interval))
    run = SimpleNamespace(cfg=settings, manager=SimpleNamespace(best=(0.5, best)))
    assert is_tired(run, epoch) == tired
    run.manager.best = (None, None)
    assert not is_tired(run, epoch)
