"""Files of effdet 0.4.1: published weights by their name, its trainer's checkpoints, and the words when offline."""

from __future__ import annotations

import argparse
import json
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import effdet
import validate
from effdet import create_model, get_efficientdet_config
from effdet.checkpoint.manager import load_checkpoint_file
from effdet.commands import clean as clean_checkpoint
from effdet.commands import convert as convert_checkpoint
from effdet.config.model_config import efficientdet_model_param_dict, published_model_name

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "golden"))
from weights import fill  # noqa: E402

NAME = "efficientdet_d0"
PUBLISHED = "efficientdet_d0-f3276ba8.pth"
COCO_LIKE = [{"id": 1, "name": "person"}, {"id": 35, "name": "skis"}]


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return fill(create_model(NAME, pretrained_backbone=False, image_size=(128, 128)))


def as_published(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights as published files hold them: bare, without the batch counters that old torch lacked."""
    return {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}


def categories_file(folder: Path, categories: list[dict]) -> str:
    path = folder / "val.json"
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    return str(path)


def test_each_published_file_name_belongs_to_its_model():
    urls = {name: get_efficientdet_config(name).url for name in efficientdet_model_param_dict}
    published = {name: url.rpartition("/")[2] for name, url in urls.items() if url}
    assert len(published) == 32 and published["tf_efficientdet_d0"] == "tf_efficientdet_d0_34-f153e0cf.pth"
    assert {name: published_model_name(file) for name, file in published.items()} == {name: name for name in published}
    assert published_model_name("") is None and published_model_name("mine.pth") is None


def test_published_weights_become_a_checkpoint_with_names(network, tmp_path):
    torch.save(as_published(network), tmp_path / PUBLISHED)
    out = tmp_path / "d0.pth"
    convert_checkpoint.main(
        [
            str(tmp_path / PUBLISHED),
            "--image-size",
            "128",
            "--out",
            str(out),
            "--ann",
            categories_file(tmp_path, COCO_LIKE),
        ]
    )
    payload = load_checkpoint_file(out)
    assert (payload["arch"], payload["image_size"]) == (NAME, [128, 128])
    assert payload["category_map"] == {
        "ids": [1, 35],
        "names": ["person", "skis"],
        "num_classes": 90,
        "id_indexed": True,
    }
    detector = effdet.load(str(out), device="cpu")
    pixels = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    (found,) = detector.predict(Image.fromarray(pixels))
    (plain,) = effdet.load(str(tmp_path / PUBLISHED), device="cpu", image_size=(128, 128)).predict(pixels)
    assert len(found) > 10 and np.array_equal(found.boxes_xyxy, plain.boxes_xyxy)
    assert np.array_equal(found.category_ids, plain.category_ids)
    assert set(zip(found.category_ids.tolist(), found.names, strict=True)) == {(35, "skis"), (81, "id 81")}


def test_a_checkpoint_of_effdets_trainer_is_converted_and_goes_back(network, tmp_path):
    weights = {f"model.{key}": value for key, value in network.state_dict().items()}
    averaged = {key: value + 1 if value.is_floating_point() else value for key, value in weights.items()}
    torch.save(
        {
            "epoch": 7,
            "arch": NAME,
            "state_dict": weights,
            "state_dict_ema": averaged,
            "version": 2,
            "args": argparse.Namespace(model=NAME, lr=0.1),
            "metric": np.float64(0.3),
        },
        tmp_path / "old.pth.tar",
    )
    convert_checkpoint.main([str(tmp_path / "old.pth.tar"), "--out", str(tmp_path / "new.pth.tar"), "--no-ema"])
    payload = torch.load(tmp_path / "new.pth.tar", weights_only=True)
    assert payload["image_size"] == [512, 512] and "category_map" not in payload
    clean_checkpoint.main([str(tmp_path / "new.pth.tar"), "--weights-only", "--out", str(tmp_path / "back.pth")])
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == list(network.state_dict())
    assert all(torch.equal(value, back[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("file", "flags", "message"),
    [
        ("mine.pth", [], "does not say of which model: give --model NAME"),
        (
            "mine.pth",
            ["--model", "efficientdet_d1"],
            "do not fit the model: .* unknown to the model|missing in the file",
        ),
        ("mine.pth", ["--model", NAME, "--ann", "val.json"], "num_classes is 90, but the json has 2 categories"),
        ("mine.pth", ["--model", NAME, "--ann", "absent.json"], "absent.json does not exist"),
    ],
)
def test_what_cannot_be_converted_is_said_in_one_line(network, tmp_path, monkeypatch, file, flags, message):
    monkeypatch.chdir(tmp_path)
    torch.save(as_published(network), file)
    categories_file(tmp_path, [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}])
    with pytest.raises(SystemExit, match=message) as stop:
        convert_checkpoint.main([file, *flags, "--out", "new.pth"])
    assert "\n" not in str(stop.value) and not Path("new.pth").exists()


def test_pretrained_without_a_network_ends_with_where_to_put_the_file(tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(SystemExit) as stop:
        validate.main(["--root", str(tmp_path), "--model", NAME, "--pretrained", "--device", "cpu"])
    message = str(stop.value)
    assert f"put it at {tmp_path / 'hub' / 'checkpoints' / PUBLISHED}" in message and "--pretrained FILE" in message
    assert "\n" not in message and "Network is unreachable" in message
