"""Exported files give the boxes that PyTorch gives, on real images, and say what they are."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from effdet import export as export_module
from effdet.bench import DetBenchPredict
from effdet.config.model_config import stored_model_spec
from effdet.config.schema import DemoModelConfig
from effdet.data.transforms import transforms_coco_eval
from effdet.export import export, main
from effdet.ops.boxes import pairwise_iou
from effdet.predict.load import load_detector

needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
FACTS = {
    "model": "pocket",
    "input": "images",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "num_classes": 3,
    "class_names": ["ball", "box", "star"],
    "category_ids": [3, 7, 12],
    "category_map": {"ids": [3, 7, 12], "names": ["ball", "box", "star"], "num_classes": 3, "id_indexed": False},
    "score_threshold": None,
}


def facts_of(path: Path) -> dict:
    """Return what a file says about itself, but for the model's configuration, which must build that model."""
    facts = metadata_of(path)
    spec = stored_model_spec(facts.pop("model_config"))
    assert spec.name == "pocket" and spec.num_classes == 3 and tuple(spec.image_size) == (128, 128)
    return facts


@pytest.fixture(scope="module")
def images(synthetic_images) -> torch.Tensor:
    transform = transforms_coco_eval(128)
    return torch.stack([transform(Image.open(path).convert("RGB"), {})[0] for path in synthetic_images[:4]])


@pytest.fixture(scope="module")
def bench(small_checkpoint) -> DetBenchPredict:
    return DetBenchPredict(load_detector(small_checkpoint, DemoModelConfig()).model).eval()


def run_onnx(path, images) -> list[np.ndarray]:
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(
        None, {"images": images.numpy()}
    )


def metadata_of(path) -> dict:
    import onnx

    return json.loads({entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}["effdet"])


def assert_same_detections(rows: np.ndarray, expected: torch.Tensor) -> None:
    """Equal scores in order; where scores are not tied, equal classes and boxes."""
    expected = expected.numpy()
    assert rows.shape == expected.shape and rows.shape[1:] == (100, 6)
    np.testing.assert_allclose(rows[..., 4], expected[..., 4], atol=1e-4)
    assert (expected[..., 4] > 0).all()
    for own, other in zip(rows, expected, strict=True):
        apart = np.ones(100, dtype=bool)
        gaps = np.diff(other[:, 4]) > -1e-4
        apart[:-1] &= ~gaps
        apart[1:] &= ~gaps
        assert apart.sum() > 10
        np.testing.assert_array_equal(own[apart, 5], other[apart, 5])
        np.testing.assert_allclose(own[apart, :4], other[apart, :4], rtol=1e-3, atol=0.02)


def assert_close_heads(outputs, bench, images) -> None:
    with torch.no_grad():
        expected = [level for head in bench.head_outputs(images) for level in head]
    assert len(outputs) == 10
    for own, other in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(np.asarray(own), other.numpy(), rtol=1e-3, atol=1e-3)


@needs_onnx
def test_onnx_with_nms_and_an_open_batch_gives_pytorchs_detections(small_checkpoint, bench, images, tmp_path):
    path = tmp_path / "made" / "detector.onnx"
    main([str(small_checkpoint), "--outputs", "detections", "--batch", "dynamic", "--out", str(path)])
    assert facts_of(path) == FACTS | {"outputs": ["detections"], "input_shape": ["batch", 3, 128, 128]}
    for batch in (images, images[:1]):
        with torch.no_grad():
            expected = bench(batch)
        (rows,) = run_onnx(path, batch)
        assert_same_detections(rows, expected)
    import onnx

    model = onnx.load(str(path))
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 15)}
    for first in rows[0, :20]:  # no box is left that overlaps a better one of its class
        same = rows[0][(rows[0, :, 5] == first[5]) & (rows[0, :, 4] < first[4]) & (rows[0, :, 4] > 0)]
        assert (pairwise_iou(torch.tensor(first[None, :4]), torch.tensor(same[:, :4])) <= 0.5 + 1e-4).all()


@needs_onnx
@pytest.mark.slow
def test_onnx_raw_heads_with_a_fixed_batch(small_checkpoint, bench, images, tmp_path):
    path = tmp_path / "raw.onnx"
    main([str(small_checkpoint), "--batch", "2", "--opset", "13", "--out", str(path)])
    names = [f"{head}_p{level}" for head in ("class", "box") for level in range(3, 8)]
    assert facts_of(path) == FACTS | {"outputs": names, "input_shape": [2, 3, 128, 128]}
    assert_close_heads(run_onnx(path, images[:2]), bench, images[:2])
    with pytest.raises(Exception, match="(?i)invalid dimension|got: 4 expected: 2"):
        run_onnx(path, images)


def all_kinds():
    for file_format in ("torchscript", "torch_export", "onnx"):
        for outputs in ("raw", "detections"):
            for batch in (1, None):
                yield file_format, outputs, batch, 18 if file_format == "onnx" else 15


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize(("file_format", "outputs", "batch", "opset"), list(all_kinds()))
def test_every_kind_of_file_gives_pytorchs_numbers(
    small_checkpoint, bench, images, tmp_path, file_format, outputs, batch, opset
):
    detector = load_detector(small_checkpoint, DemoModelConfig())
    path = tmp_path / "file"
    facts = export(detector, path, file_format, outputs, batch, opset)
    images = images if batch is None else images[:1]
    with torch.no_grad():
        if file_format == "onnx":
            found = run_onnx(path, images)
            assert metadata_of(path) == facts
        elif file_format == "torchscript":
            files = {"effdet.json": ""}
            found = torch.jit.load(path, _extra_files=files)(images)
            assert json.loads(files["effdet.json"]) == facts
        else:
            files = {"effdet.json": ""}
            found = torch.export.load(path, extra_files=files).module()(images)
            assert json.loads(files["effdet.json"]) == facts
        if outputs == "raw":
            assert_close_heads(found, bench, images)
        else:
            rows = found if isinstance(found, torch.Tensor) else found[0]
            assert_same_detections(np.asarray(rows), bench(images))


@needs_onnx
def test_suppression_alone_against_pytorch_on_awkward_candidates(tmp_path):
    """Ties apart, few candidates of a class, and nearly all suppressed: rows that are left over are zero."""
    import onnx
    from onnx import TensorProto, helper

    from effdet.ops.nms import batched_nms
    from effdet.ops.nms_onnx import append_nms

    torch.manual_seed(0)
    corner = torch.rand(2, 300, 2) * torch.tensor([3.0, 300.0]).view(2, 1, 1)  # image 0: all on one spot
    boxes = torch.cat((corner, corner + 20 + torch.rand(2, 300, 2)), 2)
    scores = torch.rand(2, 300).sort(descending=True).values
    classes = torch.randint(0, 4, (2, 300))
    kinds = {
        "boxes": (TensorProto.FLOAT, [2, 300, 4]),
        "scores": (TensorProto.FLOAT, [2, 300]),
        "classes": (TensorProto.INT64, [2, 300]),
    }
    values = [helper.make_tensor_value_info(name, *kind) for name, kind in kinds.items()]
    ends = [helper.make_tensor_value_info(name, *kind) for name, kind in kinds.items()]
    for value in values:
        value.name = f"in_{value.name}"
    nodes = [helper.make_node("Identity", [f"in_{name}"], [name]) for name in kinds]
    model = helper.make_model(
        helper.make_graph(nodes, "candidates", values, ends), opset_imports=[helper.make_opsetid("", 15)], ir_version=8
    )
    append_nms(model, 4, 100)
    onnx.checker.check_model(model, full_check=True)
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (rows,) = session.run(None, {"in_boxes": boxes.numpy(), "in_scores": scores.numpy(), "in_classes": classes.numpy()})
    index, kept = batched_nms(boxes, scores, classes, 100)
    assert (kept[0] > 0).sum() < 20 and (kept[1] > 0).all()
    for image in range(2):
        count = int((kept[image] > 0).sum())
        chosen = index[image, :count]
        np.testing.assert_array_equal(rows[image, :count, :4], boxes[image, chosen].numpy())
        np.testing.assert_array_equal(rows[image, :count, 4], scores[image, chosen].numpy())
        np.testing.assert_array_equal(rows[image, :count, 5], classes[image, chosen].numpy() + 1)
        assert (rows[image, count:] == 0).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--opset", "12"], r"opset 12 is not in 13\.\.20"),
        (["--outputs", "detections", "--soft-nms"], "soft-NMS is no ONNX operator: export with --no-soft-nms"),
    ],
)
@needs_onnx
def test_what_cannot_be_exported_is_refused(small_checkpoint, tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        main([str(small_checkpoint), "--out", str(tmp_path / "x.onnx"), *flags])


def test_a_file_that_cannot_be_written_is_named_before_the_checkpoint_is_read(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="--out"):
        main([str(tmp_path / "absent.pth"), "--out", str(tmp_path / "file" / "x.onnx")])


@pytest.mark.parametrize(("opset", "missing"), [(15, "onnx"), (18, "onnx and onnxscript")])
def test_missing_packages_are_named(small_checkpoint, tmp_path, monkeypatch, opset, missing):
    monkeypatch.setattr(export_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=f"needs the package {missing}: pip install {missing.replace(' and', '')} "):
        main([str(small_checkpoint), "--opset", str(opset), "--out", str(tmp_path / "x.onnx")])
    assert not (tmp_path / "x.onnx").exists()


def test_a_batch_is_a_number_or_dynamic(small_checkpoint, capsys):
    for wrong in ("0", "many"):
        with pytest.raises(SystemExit):
            main([str(small_checkpoint), "--batch", wrong])
        assert f"'{wrong}' is neither a number from 1 nor 'dynamic'" in capsys.readouterr().err


# ---- CANN's converter ------------------------------------------------------------------------------------------------

STAND_IN = """#!{python}
import json, os, sys
json.dump(sys.argv[1:], open({record!r}, "w"))
options = dict(word[2:].split("=", 1) for word in sys.argv[1:])
print("ATC run {ending}")
if {status} == 0:
    open(options["output"] + ".om", "wb").write(open(options["model"], "rb").read()[:8])
sys.exit({status})
"""


@pytest.fixture
def atc(tmp_path, monkeypatch):
    """Return a function that puts a stand-in for atc on PATH, whose arguments end in the file that it returns."""
    folder, record = tmp_path / "bin", tmp_path / "arguments.json"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(status: int = 0) -> Path:
        program = folder / "atc"
        ending = "success" if status == 0 else "failed, please check E10001"
        program.write_text(STAND_IN.format(python=sys.executable, record=str(record), status=status, ending=ending))
        program.chmod(0o755)
        return record

    return make


@needs_onnx
def test_an_om_file_is_converted_for_its_chip(small_checkpoint, tmp_path, atc):
    record, out = atc(), tmp_path / "made" / "heads.om"
    (tmp_path / "made").mkdir()
    main([str(small_checkpoint), "--format", "om", "--soc", "Ascend310P3", "--batch", "2", "--out", str(out)])
    options = dict(word[2:].split("=", 1) for word in json.loads(record.read_text()))
    source = Path(options.pop("model"))
    assert options.pop("output").startswith(str(out.parent))
    assert options == {
        "framework": "5",
        "input_format": "NCHW",
        "input_shape": "images:2,3,128,128",
        "soc_version": "Ascend310P3",
    }
    assert metadata_of(source)["input_shape"] == [2, 3, 128, 128]
    assert {path.name for path in out.parent.iterdir()} == {"heads.om", source.name}
    assert out.read_bytes() == source.read_bytes()[:8]


@needs_onnx
def test_a_failed_conversion_leaves_no_om_file(small_checkpoint, tmp_path, atc):
    atc(status=7)
    out = tmp_path / "heads.om"
    with pytest.raises(SystemExit, match="atc ended with status 7 .* ATC run failed, please check E10001"):
        main([str(small_checkpoint), "--format", "om", "--soc", "Ascend310P3", "--out", str(out)])
    assert [path.name for path in tmp_path.glob("*heads*")] == ["heads.om.onnx"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", "dynamic"], "an .om file has a fixed batch"),
        (["--opset", "16"], "atc takes the operator sets 11 to 15, got --opset 16"),
        (["--out", "x.onnx"], "ends in .om"),
        ([], "there is no 'atc' on PATH"),
    ],
)
def test_what_atc_cannot_take_is_refused_before_the_export(
    small_checkpoint, tmp_path, monkeypatch, flags, message, request
):
    if flags:
        request.getfixturevalue("atc")()
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(export_module, "export", lambda *arguments: pytest.fail("exported all the same"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main([str(small_checkpoint), "--out", "x.om", "--format", "om", "--soc", "Ascend310P3", *flags])


@pytest.mark.parametrize(
    "flags", [["--format", "om"], ["--soc", "X"], ["--format", "om", "--soc", "X", "--outputs", "detections"]]
)
def test_a_chip_goes_with_om_and_om_with_raw_heads(small_checkpoint, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        main([str(small_checkpoint), *flags])
    assert stop.value.code == 2 and "om" in capsys.readouterr().err
