"""Exported files as detectors: the boxes and the AP of the checkpoint, through onnxruntime and OpenVINO themselves."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import effdet
from effdet.checkpoint.manager import CheckpointError
from effdet.data.synthetic.dataset import make_synthetic_dataset
from effdet.predict.engines import EngineBench

REPO = Path(__file__).resolve().parents[3]
ONNX = [("onnx", "raw", None), ("onnx", "raw", 2), ("onnx", "detections", 1), ("onnx", "detections", None)]
OPENVINO = [
    pytest.param(
        *case,
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="requirements-extras.txt"),
        ],
    )
    for case in [("openvino", "raw", None), ("openvino", "raw", 2), ("openvino", "detections", 1)]
]


@pytest.fixture(scope="module")
def exported(small_checkpoint, tmp_path_factory):
    from effdet.config.schema import DemoModelConfig
    from effdet.export import FORMATS, export
    from effdet.predict.load import load_detector

    made = {}

    def make(kind: str, outputs: str, batch: int | None) -> str:
        key = (kind, outputs, batch)
        if key not in made:
            path = tmp_path_factory.mktemp("exported") / f"model{FORMATS[kind]}"
            export(load_detector(str(small_checkpoint), DemoModelConfig()), path, kind, outputs, batch)
            made[key] = str(path)
        return made[key]

    return make


def count_equal(found: effdet.Detections, expected: effdet.Detections) -> int:
    """Count the expected objects that were found, each with its class, score and box."""
    one, other = (
        np.column_stack([each.category_ids, each.scores, each.boxes_xyxy / 1000]) for each in (found, expected)
    )
    return int((np.abs(one[:, None] - other).max(-1) < 1e-4).any(0).sum())


@pytest.mark.parametrize(("kind", "outputs", "batch"), ONNX + OPENVINO)
def test_boxes_are_the_checkpoints(exported, small_checkpoint, synthetic_images, kind, outputs, batch):
    images = synthetic_images[:5]
    expected = effdet.load(str(small_checkpoint), device="cpu", batch_size=3).predict(images)
    found = effdet.load(exported(kind, outputs, batch), batch_size=3).predict(images)
    assert sum(map(len, expected)) > 5
    if outputs == "detections":  # suppressed before the boxes are clipped, so those at the border may differ
        pairs = list(zip(found, expected, strict=True))
        assert sum(count_equal(one, other) for one, other in pairs) > 0.75 * sum(map(len, expected))
        return
    for one, other in zip(found, expected, strict=True):
        assert one.names == other.names and one.category_ids.tolist() == other.category_ids.tolist()
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
        np.testing.assert_allclose(one.boxes_xyxy, other.boxes_xyxy, atol=1e-2)
        assert one.size_wh == other.size_wh


def test_rows_of_a_file_with_nms_are_brought_into_the_image():
    rows = torch.tensor([[[10.0, 20, 30, 40, 0.9, 2], [-5, -5, 70, 80, 0.8, 1], [90, 10, 95, 20, 0.7, 1]]])
    found = EngineBench.post_process(None, rows, torch.tensor([2.0]), torch.tensor([[120.0, 100.0]]))
    assert found[0].tolist() == [
        pytest.approx([20, 40, 60, 80, 0.9, 2]),
        pytest.approx([0, 0, 120, 100, 0.8, 1]),
        [0] * 6,  # beside the image
    ]


def test_fewer_objects_and_mirror_images(exported, small_checkpoint, synthetic_images):
    path = exported("onnx", "raw", None)
    assert max(len(one) for one in effdet.load(path, max_det=3).predict(synthetic_images)) == 3
    mirrored = [
        effdet.load(file, device="cpu", flip=True).predict(synthetic_images[:2])
        for file in (path, str(small_checkpoint))
    ]
    for one, other in zip(*mirrored, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


def test_what_a_file_cannot_do_is_said(exported, tmp_path):
    raw, whole = exported("onnx", "raw", None), exported("onnx", "detections", None)
    for settings in ({"scales": [2.0]}, {"flip": True}):
        with pytest.raises(ValueError, match="use the checkpoint"):
            effdet.load(whole, **settings)
    with pytest.raises(CheckpointError, match="128x128 px and no other"):
        effdet.load(raw, image_size=(64, 64))
    with pytest.raises(CheckpointError, match="No file at"):
        effdet.load(str(tmp_path / "none.onnx"))
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x07 no model")
    with pytest.raises(CheckpointError, match="cannot open"):
        effdet.load(str(tmp_path / "broken.onnx"))
    foreign = onnx.load(raw)
    facts = json.loads({prop.key: prop.value for prop in foreign.metadata_props}["effdet"])
    assert facts["model_config"]["name"] == "pocket"
    del foreign.metadata_props[:]
    onnx.save(foreign, str(tmp_path / "foreign.onnx"))
    with pytest.raises(CheckpointError, match="does not say which model"):
        effdet.load(str(tmp_path / "foreign.onnx"))


@pytest.mark.parametrize(("kind", "outputs", "batch"), [ONNX[0], *OPENVINO[:1]])
def test_validate_gives_the_checkpoints_ap(exported, small_checkpoint, tmp_path, kind, outputs, batch):
    root = make_synthetic_dataset(tmp_path / "data", num_train=1, num_val=6)
    results = []
    for file in (str(small_checkpoint), exported(kind, outputs, batch)):
        out = tmp_path / f"{len(results)}.json"
        command = [sys.executable, REPO / "validate.py", "--root", root, "--checkpoint", file, "--metrics", out]
        done = subprocess.run(
            [*map(str, command), "--device", "cpu", "-j", "0", "-b", "3", "--classes", "ball,box,star", "--speed"],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads(out.read_text()))
    first, second = results
    assert second["run"]["model_ms"] > 0
    assert second["AP50"] == pytest.approx(first["AP50"], abs=1e-3)
    assert second["AP"] == pytest.approx(first["AP"], abs=1e-3)
