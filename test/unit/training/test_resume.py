"""Where a run goes on: the position within an epoch under other settings, the newest folder, what does not fit."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from effdet.checkpoint.manager import CheckpointError
from effdet.config.cli import parse_train_args
from effdet.training import resume as run_state
from effdet.training.run_dir import newest_run_folder

CPU = torch.device("cpu")


def broken_off(batches: int = 6, trained: bool = False, ranks: int = 1) -> dict:
    """A recovery checkpoint of epoch 3, at global batch size 8 with accumulation over 2."""
    return {
        "epoch": 2,
        "step": 100,
        "ranks": [{"totals": [12.0 + rank, 6.0, 3.0]} for rank in range(ranks)],
        "progress": {"batches": batches, "batch_size": 8, "grad_accum": 2, "images": 80, "trained": trained},
    }


def test_a_complete_epoch_leads_to_the_next():
    assert run_state.read_position({"epoch": 4}, 8, 80, 1) == run_state.Position(5)
    assert run_state.read_position({}, 8, 80, 1) == run_state.Position(0)


def test_the_same_settings_give_the_same_place():
    position = run_state.read_position(broken_off(5), 8, 80, 2)  # 5: the last group of an epoch may be smaller
    assert position == run_state.Position(3, 5, [12.0, 6.0, 3.0])
    assert run_state.read_position(broken_off(10, trained=True), 16, 80, 1).batches == 10, "only an evaluation is left"


@pytest.mark.parametrize(
    ("batch_size", "grad_accum", "batches"), [(16, 1, 3), (4, 1, 12), (4, 5, 10), (32, 1, 1), (80, 1, 0)]
)
def test_other_batches_go_on_before_the_images_already_seen(batch_size, grad_accum, batches, caplog):
    position = run_state.read_position(broken_off(6), batch_size, 80, grad_accum)
    assert (position.epoch, position.batches) == (3, batches)
    assert position.batches * batch_size <= 6 * 8 and position.batches % grad_accum == 0
    if batches:
        assert position.totals[0] / batches == pytest.approx(12.0 / 6), "the mean loss stays"
    assert "batch size or accumulation changed" in caplog.text


def test_another_data_set_starts_the_epoch_anew(caplog):
    assert run_state.read_position(broken_off(), 8, 81, 2) == run_state.Position(3)
    assert "had 80 images, now it has 81" in caplog.text


def test_another_number_of_processes_keeps_the_mean_loss_and_is_said(caplog):
    payload = broken_off(ranks=2)
    assert run_state.read_position(payload, 8, 80, 2).totals == [12.5, 6.0, 3.0]
    torch.manual_seed(1)
    first = torch.rand(1)
    torch.manual_seed(1)
    run_state.restore_rank(payload, CPU, {})
    assert torch.rand(1) != first, "the random numbers of the first step do not come again"
    assert "written by 2 process(es), this run has 1" in caplog.text


def test_random_numbers_and_statistics_of_a_process_come_back():
    norm = nn.BatchNorm2d(2)
    norm(torch.randn(4, 2, 3, 3))
    state = run_state.capture_rank(CPU, torch.tensor([0.1, 0.2, 0.3]), {"model": norm})
    assert torch.equal(torch.tensor(state["totals"]), torch.tensor([0.1, 0.2, 0.3]))
    before, drawn = norm.running_mean.clone(), (random.random(), torch.rand(1))
    norm(torch.randn(4, 2, 3, 3))
    run_state.restore_rank({"ranks": [state]}, CPU, {"model": norm})
    assert torch.equal(norm.running_mean, before) and norm.num_batches_tracked == 1
    assert (random.random(), torch.rand(1)) == drawn


def test_the_newest_run_folder_is_found_also_before_its_first_checkpoint(tmp_path: Path):
    assert newest_run_folder(tmp_path / "absent") is None
    for age, name in enumerate(("stray", "young", "old")):
        (tmp_path / name).mkdir()
        if name != "stray":
            (tmp_path / name / ("config.yaml" if name == "young" else "last.pth.tar")).touch()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    assert newest_run_folder(tmp_path) == tmp_path / "young"


def test_another_model_or_size_is_refused_with_both_sides():
    payload = {"arch": "tf_efficientdet_d1", "image_size": [64, 96]}
    with pytest.raises(CheckpointError, match="of tf_efficientdet_d1, but this run trains tf_efficientdet_d0"):
        run_state.check_fits(payload, "a.pth", "tf_efficientdet_d0", [64, 96])
    with pytest.raises(CheckpointError, match="at 64x96, but this run trains at 96x64: resume with --image-size 64 96"):
        run_state.check_fits(payload, "a.pth", "tf_efficientdet_d1", [96, 64])
    run_state.check_fits({}, "other trainers' files say neither", "tf_efficientdet_d1", [96, 64])


def test_anchors_are_kept_of_a_checkpoint_that_names_them():
    cfg = parse_train_args(["--root", "x"])
    kept = run_state.keep_anchors(cfg, {"config": {"model": {"anchor_scale": 3.0, "aspect_ratios": [1.0, 2.0]}}})
    assert (kept.model.anchor_scale, kept.model.aspect_ratios) == (3.0, [1.0, 2.0])
    assert run_state.keep_anchors(cfg, {"arch": "tf_efficientdet_d0"}) == cfg  # of effdet 0.4.1
