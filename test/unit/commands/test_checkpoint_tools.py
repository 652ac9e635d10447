"""Averaging and cleaning checkpoints: the numbers, and what stays in the file."""

from __future__ import annotations

import hashlib

import pytest
import torch

import effdet
from effdet.checkpoint.download import sha256
from effdet.checkpoint.manager import CheckpointError, load_checkpoint_file, save_checkpoint
from effdet.commands import average as averaging
from effdet.commands import clean as cleaning

DESCRIPTION = {
    "version": 1,
    "arch": "pocket",
    "image_size": [64, 64],
    "model_config": {"name": "pocket"},
    "category_map": {"ids": [3], "names": ["ball"], "num_classes": 1, "id_indexed": False},
}


def write(path, value, ema=None, metric=None, **changed) -> str:
    payload = {
        **DESCRIPTION,
        "optimizer": {"state": {}},
        "epoch": 3,
        "metric": metric,
        "state_dict": {"w": torch.tensor([value, 1.0]), "n": torch.tensor(int(value))},
        **changed,
    }
    if ema is not None:
        payload["state_dict_ema"] = {"w": torch.tensor([ema, 1.0]), "n": torch.tensor(int(ema))}
    save_checkpoint(path, payload)
    return str(path)


def test_the_average_is_weighted_and_describes_its_model(tmp_path):
    files = [write(tmp_path / "a.pth", 1.0), write(tmp_path / "b.pth", 4.0)]
    averaging.main([*files, "--out", str(tmp_path / "equal.pth")])
    averaging.main([*files, "--weights", "2", "1", "--out", str(tmp_path / "weighted.pth")])
    equal, weighted = (load_checkpoint_file(tmp_path / f"{name}.pth") for name in ("equal", "weighted"))
    torch.testing.assert_close(equal["state_dict"]["w"], torch.tensor([2.5, 1.0]))
    torch.testing.assert_close(weighted["state_dict"]["w"], torch.tensor([2.0, 1.0]))
    assert equal["state_dict"]["w"].dtype == torch.float32 and equal["state_dict"]["n"].item() == 1
    assert {key: weighted[key] for key in DESCRIPTION} == DESCRIPTION
    assert set(weighted) == {*DESCRIPTION, "state_dict", "averaged_from", "averaging_weights"}


@pytest.mark.parametrize(("flags", "expected"), [([], 15.0), (["--ema"], 15.0), (["--no-ema"], 1.5)])
def test_averaged_weights_are_taken_where_they_are(tmp_path, flags, expected):
    files = [write(tmp_path / "a.pth", 1.0, 10.0), write(tmp_path / "b.pth", 2.0, 20.0)]
    averaging.main([*files, *flags, "--out", str(tmp_path / "c.pth")])
    assert load_checkpoint_file(tmp_path / "c.pth")["state_dict"]["w"][0].item() == expected


def test_the_best_are_chosen_by_their_metric(tmp_path):
    files = [write(tmp_path / f"{n}.pth", float(n), metric=metric) for n, metric in enumerate((0.1, 0.3, 0.2))]
    averaging.main([*files, "--best", "2", "--out", str(tmp_path / "c.pth")])
    content = load_checkpoint_file(tmp_path / "c.pth")
    assert content["averaged_from"] == [files[1], files[2]] and content["state_dict"]["w"][0].item() == 1.5
    files.append(write(tmp_path / "unranked.pth", 1.0))
    with pytest.raises(SystemExit, match="unranked.pth holds no metric"):
        averaging.main([*files, "--best", "2", "--out", str(tmp_path / "c.pth")])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"state_dict": {"w": torch.zeros(3), "n": torch.tensor(1)}}, "1 tensors differ in name or shape, such as w"),
        ({"state_dict": {"v": torch.zeros(2), "n": torch.tensor(1)}}, "2 tensors differ in name or shape, such as v"),
        ({"category_map": {**DESCRIPTION["category_map"], "names": ["box"]}}, "has another category_map than"),
    ],
)
def test_different_models_are_not_averaged(tmp_path, changed, message):
    files = [write(tmp_path / "a.pth", 1.0), write(tmp_path / "b.pth", 1.0, **changed)]
    with pytest.raises(CheckpointError, match=message):
        averaging.average_checkpoints(files)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, float("nan")]])
def test_weights_must_fit_the_files(tmp_path, weights):
    with pytest.raises(ValueError, match="2 checkpoints with the weights"):
        averaging.average_checkpoints([write(tmp_path / name, 1.0) for name in ("a.pth", "b.pth")], weights)


def test_a_cleaned_checkpoint_predicts_the_same_and_is_smaller(small_checkpoint, synthetic_images, tmp_path):
    cleaning.main([str(small_checkpoint), "--out", str(tmp_path / "clean.pth")])
    content = load_checkpoint_file(tmp_path / "clean.pth")
    assert set(content) == {"version", "arch", "model_config", "category_map", "image_size", "state_dict"}
    assert (tmp_path / "clean.pth").stat().st_size < 0.6 * small_checkpoint.stat().st_size
    found, expected = (
        effdet.load(path, device="cpu").predict(synthetic_images[0])[0]
        for path in (tmp_path / "clean.pth", small_checkpoint)
    )
    assert found.boxes_xyxy.tobytes() == expected.boxes_xyxy.tobytes() and found.names == expected.names


def test_a_plain_state_dict_with_its_hash_in_the_name(tmp_path):
    cleaning.main(
        [write(tmp_path / "a.pth", 1.0, 10.0), "--out", str(tmp_path / "b.pth"), "--weights-only", "--hash", "--no-ema"]
    )
    (path,) = tmp_path.glob("b-*.pth")
    assert path.name == f"b-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth" and sha256(path)[:8] in path.name
    content = load_checkpoint_file(path)
    assert set(content) == {"w", "n"} and content["w"][0].item() == 1.0


def test_the_checkpoint_itself_is_not_replaced(tmp_path):
    path = write(tmp_path / "a.pth", 1.0)
    with pytest.raises(SystemExit, match="is the checkpoint itself"):
        cleaning.main([path, "--out", path])
    assert "optimizer" in load_checkpoint_file(path)
