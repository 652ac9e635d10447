"""What docs/predict.md, export.md, reports.md and augmentation.md show runs as it is written there."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import demo
import train
import validate
from effdet import create_model
from effdet.checkpoint.manager import load_checkpoint_file
from effdet.export import FORMATS, OM
from effdet.training import recorder

DOCS = Path(__file__).resolve().parents[2] / "docs"
SCRIPTS = {"train.py": train, "demo.py": demo, "validate.py": validate}
needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def run_line(line: str) -> None:
    words = shlex.split(line)
    assert words[0] == "python"
    if words[1] == "-m":
        importlib.import_module(words[2]).main(words[3:])
    else:
        assert SCRIPTS[words[1]].main(words[2:]) == 0


@pytest.fixture
def folder(tmp_path, monkeypatch, small_checkpoint, synthetic_images):
    """A folder with what the pages assume to be there."""
    monkeypatch.chdir(tmp_path)
    for name in ("model_best.pth.tar", "checkpoint-1.pth.tar", "checkpoint-2.pth.tar"):
        shutil.copy(small_checkpoint, tmp_path / name)
    for name, source in zip(("a.jpg", "b.jpg"), synthetic_images, strict=False):
        Image.open(source).convert("RGB").save(tmp_path / name)
    (tmp_path / "data" / "val2017").mkdir(parents=True)
    shutil.copy(tmp_path / "a.jpg", tmp_path / "data" / "val2017")
    width, height = Image.open("a.jpg").size
    (tmp_path / "data" / "annotations").mkdir()
    (tmp_path / "data" / "annotations" / "instances_val2017.json").write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "a.jpg", "width": width, "height": height}],
                "annotations": [
                    {"id": 1, "image_id": 1, "category_id": 3, "bbox": [5, 5, 30, 30], "area": 900, "iscrowd": 0}
                ],
                "categories": [{"id": 3, "name": "ball"}, {"id": 7, "name": "box"}, {"id": 12, "name": "star"}],
            }
        )
    )
    return tmp_path


def test_the_python_of_the_prediction_page(folder, capsys):
    names: dict = {}
    for block in blocks("predict.md", "python"):
        exec(block, names)
    assert {"ball", "box", "star"} & set(re.findall(r"'(\w+)'", capsys.readouterr().out))
    assert names["detector"].bench.flip and len(names["detector"].bench.benches) == 2


@pytest.mark.slow
@pytest.mark.parametrize("package", ["sahi", "supervision"])
def test_other_packages_on_the_prediction_page(folder, capsys, package):
    pytest.importorskip(package)
    (block,) = [text for text in blocks("predict.md", "py") if f"import {package}" in text or f"from {package}" in text]
    names: dict = {}
    exec(block, names)
    if package == "sahi":
        found = names["result"].object_prediction_list
        assert found and {one.category.name for one in found} <= {"ball", "box", "star"}
        boxes = [one.bbox.to_xyxy() for one in found]
        width, height = Image.open("a.jpg").size
        assert max(box[2] for box in boxes) > 128 and all(box[2] <= width and box[3] <= height for box in boxes)
    else:
        assert len(names["objects"]) == len(names["found"]) > 0
        assert Image.open("drawn.png").tobytes() != Image.open("a.jpg").tobytes()


def test_the_commands_of_the_prediction_page(folder):
    published = create_model("tf_efficientdet_d0", pretrained_backbone=False).state_dict()  # not the real weights
    for name in ("tf_efficientdet_d0_34-f153e0cf.pth", "weights.pth"):
        torch.save(published, name)
    lines = "".join(blocks("predict.md", "bash")).splitlines()
    for line in lines:
        run_line(line)
    assert len(list((folder / "output" / "demo").glob("?.png"))) == 2
    assert (folder / "found" / "labels" / "a.txt").is_file() and (folder / "found" / "detections.coco.json").is_file()
    assert load_checkpoint_file("average.pth.tar")["averaged_from"] == ["checkpoint-1.pth.tar"]
    assert load_checkpoint_file("detector.pth")["category_map"]["names"] == ["ball", "box", "star"]
    assert len(list(folder.glob("published-*.pth"))) == 1
    assert load_checkpoint_file("d0.pth")["category_map"]["names"] == ["ball", "box", "star"]


def test_the_reports_page(folder):
    (line,) = "".join(blocks("reports.md", "bash")).splitlines()
    run_line(line)
    assert {path.name for path in (folder / "evaluation").iterdir()} == {"metrics.json", "per_class.csv", "report.html"}
    rows = ({"kind": "epoch", "epoch": 3}, {"kind": "evaluation", "epoch": 3, "AP": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names: dict = {}
    exec(blocks("reports.md", "python")[0], names)
    assert names["ap"] == {3: 0.5}
    page = (DOCS / "reports.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)` \| (.*) \|$", page.partition("## metrics.jsonl")[2], re.MULTILINE)
    assert [kind for kind, _ in table] == ["kind", "interval", "epoch", "evaluation"]
    for kind, keys in table[1:]:
        told = re.search(rf"^    {kind} (.*?)(?=^    \w|^$)", recorder.__doc__, re.DOTALL | re.MULTILINE)[1]
        assert set(re.findall(r"`(\w+)`", keys)) <= set(re.findall(r"\w+", told)), kind


@needs_onnx
@pytest.mark.slow
def test_the_export_page(folder, capsys):
    for line in "".join(blocks("export.md", "bash")).splitlines():
        run_line(line)
    made = ["model_best.onnx", "raw.onnx", "dynamic.onnx", "raw.ts.pt", "raw.pt2"]
    assert all((folder / name).stat().st_size > 1e5 for name in made)
    # OpenVINO's is written and read by test/unit/predict/test_engines.py, where the package is installed.
    assert {"".join(Path(name).suffixes) for name in made} == set(FORMATS.values()) - {FORMATS["openvino"]}
    exec(blocks("export.md", "python")[0], {})
    assert re.findall(r"(?:ball|box|star) 0\.\d+ \[", capsys.readouterr().out)
    import onnxruntime

    (given,) = onnxruntime.InferenceSession("raw.onnx", providers=["CPUExecutionProvider"]).get_inputs()
    om, atc = blocks("export.md", "text")
    assert f"--format {OM} --soc " in om
    assert given.name == "images" and given.shape == [1, 3, 128, 128]
    assert f'--model=raw.onnx --output=raw --input_format=NCHW --input_shape="{given.name}:1,3,512,512"' in atc


@pytest.mark.skipif(importlib.util.find_spec("albumentations") is None, reason="albumentations is not installed")
def test_the_augmentation_page(folder, monkeypatch):
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for its newest version
    data = folder / "data"
    content = json.loads((data / "annotations" / "instances_val2017.json").read_text())
    content["images"] = [{**content["images"][0], "id": k, "file_name": f"{k}.jpg"} for k in range(1, 9)]
    (data / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    (data / "train2017").mkdir()
    for info in content["images"]:
        shutil.copy(data / "val2017" / "a.jpg", data / "train2017" / info["file_name"])
    names: dict = {}
    for block in blocks("augmentation.md", "python"):
        if block.startswith("# "):
            (folder / block.splitlines()[0][2:]).write_text(block)
        exec(block, names)
    for line in "".join(blocks("augmentation.md", "bash")).splitlines():
        run_line(line + " --device cpu -j 0")
    sheets = {path.read_bytes() for path in (folder / "output" / "look").glob("*/train_batch.jpg")}
    assert len(sheets) == 4
