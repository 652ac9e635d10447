"""`effdet VERB`: each verb is its module's command line, called by what was typed; effdet.train does it from Python."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import effdet
from effdet.cli import VERBS, main
from effdet.config.load import read_yaml

REPO = Path(__file__).resolve().parents[3]


def call(*words: object, cwd: Path | str = REPO) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "effdet", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)


@pytest.fixture
def as_typed(monkeypatch):
    """Keep the mark of the command out of this process's other tests."""
    monkeypatch.delenv("EFFDET_AS_COMMAND", raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())


def test_every_verb_has_a_main():
    for module, text in VERBS.values():
        assert callable(importlib.import_module(module).main) and text


@pytest.mark.parametrize(("words", "status"), [([], 2), (["--help"], 0), (["--version"], 0), (["trian"], 2)])
def test_what_is_no_verb(words, status, capsys):
    assert main(words) == status
    shown = capsys.readouterr()
    if words == ["--version"]:
        assert shown.out.split()[-1] == effdet.__version__
    elif words == ["trian"]:
        assert "did you mean train" in shown.err and not shown.out
    else:
        assert all(verb in shown.out for verb in VERBS)


@pytest.mark.parametrize("verb", ["train", "validate", "predict", "check", "export", "data convert", "data synthetic"])
def test_a_verb_calls_itself_as_it_was_typed(verb, as_typed):
    done = call(*verb.split(), "--no-such-flag=1", "--out=x")
    assert done.returncode == 2 and f"effdet {verb}: error:" in done.stderr
    assert "train.py" not in done.stderr and "python -m" not in done.stderr


def test_presets_are_the_files_of_configs():
    for file in (REPO / "configs").glob("*.yaml"):
        assert read_yaml(file.stem) == read_yaml(file) == read_yaml(f"configs/{file.name}")


def test_a_folder_becomes_coco_jsons(tmp_path, synthetic_images):
    labels = tmp_path / "yolo/labels"
    labels.mkdir(parents=True)
    (tmp_path / "yolo/images").mkdir()
    for number, image in enumerate(synthetic_images):
        (tmp_path / f"yolo/images/{number}.jpg").write_bytes(image.read_bytes())
        (labels / f"{number}.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    (tmp_path / "yolo/data.yaml").write_text("train: images\nnames: [thing]\n")
    done = call("data", "convert", tmp_path / "yolo", "--out", tmp_path / "coco", "--val-split", "0.25")
    assert done.returncode == 0, done.stderr
    made = {part: json.loads((tmp_path / f"coco/{part}.json").read_text()) for part in ("train", "val")}
    assert sorted(len(content["images"]) for content in made.values()) == [2, 6]
    assert {len(content["annotations"]) for content in made.values()} == {2, 6}
    assert f"--val-ann {tmp_path / 'coco/val.json'}" in done.stderr


SETTINGS = {
    "model": "tf_efficientdet_lite0",
    "pretrained_backbone": False,
    "image_size": [64, 64],
    "batch_size": 2,
    "max_steps": 2,
    "workers": 0,
    "device": "cpu",
    "optim.clip_grad": 5,
}


def test_training_from_python_is_the_commands(tmp_path, as_typed):
    from effdet.data.synthetic.dataset import make_synthetic_dataset

    root = make_synthetic_dataset(tmp_path / "data", num_train=6, num_val=2)
    run = effdet.train(root, output=str(tmp_path / "runs"), **SETTINGS)
    assert run.folder.parent == tmp_path / "runs" and run.checkpoint.is_file() and run.checkpoint.parent == run.folder
    assert run.metrics == json.loads((run.folder / "metrics.json").read_text())
    cfg = read_yaml(run.folder / "config.yaml")
    assert cfg["model"]["image_size"] == [64, 64] and cfg["optim"]["clip_grad"] == 5 and cfg["run"]["max_steps"] == 2
    with pytest.raises(ValueError, match="did you mean --batch-size"):
        effdet.train(root, batchsize=2)
    with pytest.raises(ValueError, match="no such directory"):
        effdet.train(tmp_path / "absent", output=str(tmp_path / "runs"))


def test_json_is_all_that_standard_output_has(tmp_path):
    from effdet.data.synthetic.dataset import make_synthetic_dataset

    root = make_synthetic_dataset(tmp_path / "data", num_train=4, num_val=2)
    words = "--model tf_efficientdet_lite0 --no-pretrained-backbone --image-size 64 -b 2 --max-steps 1".split()
    common = ["--root", root, "-j", "0", "--device", "cpu", "--json"]
    trained = call("train", *common, *words, "--output", tmp_path / "runs")
    assert trained.returncode == 0, trained.stderr
    metrics = json.loads(trained.stdout)
    assert Path(metrics["folder"]).parent == tmp_path / "runs" and metrics["run"]["steps"] == 1
    assert "*** Best metric" in trained.stderr
    again = call("validate", *common, "--checkpoint", metrics["run"]["checkpoint"])
    assert json.loads(again.stdout)["stats"] == metrics["stats"]
