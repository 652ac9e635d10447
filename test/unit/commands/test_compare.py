"""`effdet compare` on folders as train.py leaves them, their detections made by hand."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from effdet.checkpoint.manager import BEST_NAME, save_checkpoint
from effdet.commands.compare import main
from effdet.config.cli import parse_train_args
from effdet.config.load import dump_yaml
from effdet.data.dataset_factory import open_coco
from effdet.data.synthetic.dataset import make_synthetic_dataset
from effdet.evaluator import CocoEvaluator
from effdet.metrics.coco import hotcoco
from effdet.training.run import DETECTIONS_NAME

needs_hotcoco = pytest.mark.skipif(hotcoco is None, reason="hotcoco is not installed")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_synthetic_dataset(tmp_path_factory.mktemp("data") / "set", num_train=2, num_val=12)


def make_run(folder: Path, data: Path, every: int, *flags: str) -> float:
    """Write the folder of a run whose best epoch found every n-th object, and return its AP."""
    dataset = open_coco(data, "val")
    evaluator = CocoEvaluator(dataset, all_images=True)
    for index in range(len(dataset)):
        truth = dataset.parser.get_ann_info(index)
        rows = [
            [*box[[1, 0, 3, 2]], 0.9 - 0.01 * n, label]
            for n, (box, label) in enumerate(zip(truth["bbox"], truth["cls"], strict=True))
            if (n + index) % every == 0
        ]
        evaluator.add_predictions(
            torch.tensor(np.array(rows or [[0.0] * 6]), dtype=torch.float32)[None], {"img_idx": [index]}
        )
    ap = evaluator.evaluate()
    folder.mkdir()
    cfg = parse_train_args(["--root", str(data), "--experiment", folder.name, *flags])
    (folder / "config.yaml").write_text(dump_yaml(cfg))
    rows = [{"kind": "epoch", "epoch": k, "global_step": k, "loss": 2.0 - k, "lr": 0.1} for k in range(2)]
    rows += [
        {"kind": "evaluation", "epoch": k, "global_step": k, "AP": value, "AP50": value}
        for k, value in ((0, ap), (1, ap / 2))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / DETECTIONS_NAME).write_text(json.dumps(evaluator.scored_rows()))
    evaluator.write_metrics(folder / "metrics.json", {"seconds": 12.0, "first_epoch": 0})
    save_checkpoint(folder / BEST_NAME, {"state_dict": {}, "category_map": dataset.parser.category_map.to_dict()})
    return ap


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> tuple[list[Path], list[float]]:
    folder = tmp_path_factory.mktemp("runs")
    folders = [folder / "half", folder / "all"]
    flags = (["--lr", "0.02"], ["--lr", "0.1", "--hflip", "0"])
    return folders, [make_run(path, data, 2 - k, *flags[k]) for k, path in enumerate(folders)]


def compare(caplog, *words: object) -> str:
    caplog.set_level(logging.INFO)
    caplog.clear()
    main([str(word) for word in words])
    return "\n".join(record.getMessage() for record in caplog.records if record.name == "effdet.compare")


def line_of(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.strip().startswith(name)]
    return re.split(r"\s{2,}", line.strip())


@needs_hotcoco
def test_results_intervals_and_the_settings_that_differ(runs, caplog, tmp_path):
    folders, aps = runs
    page = tmp_path / "compare.html"
    text = compare(caplog, *folders, "--html", page, "--bootstrap", 20)
    assert line_of(text, "best AP") == ["best AP", f"{aps[0]:.4f}", f"{aps[1]:.4f}"] and 0.2 < aps[0] < 0.8
    assert line_of(text, "epoch ")[1:] == ["0", "0"] and line_of(text, "epochs done")[1:] == ["2", "2"]
    assert line_of(text, "seconds")[1:] == ["12", "12"]
    halves = [float(cell.removeprefix("+- ")) for cell in line_of(text, "95 % interval")[1:]]
    assert 0 < halves[0] < 0.3 and halves[1] == 0, "what finds everything does so on any images"
    _, none, gain = line_of(text, "more than the first")
    assert none == "-" and gain == f"{aps[1] - aps[0]:+.4f} +- {halves[0]:.4f}"
    assert line_of(text, "optim.lr") == ["optim.lr", "0.02", "0.1"]
    assert line_of(text, "data.hflip") == ["data.hflip", "0.5", "0"]
    assert "run.experiment" not in text and "optim.opt " not in text
    assert compare(caplog, *folders, "--bootstrap", 20) in text, "the draws are seeded"
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.S)
    shown = json.loads(data)
    assert shown["names"] == ["half", "all"] and shown["runs"][1]["evaluations"]["AP"] == pytest.approx(
        [aps[1], aps[1] / 2]
    )
    assert ["optim.lr", "0.02", "0.1"] in shown["settings"]


def test_without_detections_or_data_there_is_no_interval_and_the_reason(runs, data, caplog, tmp_path):
    make_run(tmp_path / "bare", data, 1)
    (tmp_path / "bare" / DETECTIONS_NAME).unlink()
    make_run(tmp_path / "other", data, 1)
    (tmp_path / "other" / DETECTIONS_NAME).write_text((runs[0][0] / DETECTIONS_NAME).read_text())
    text = compare(caplog, tmp_path / "bare", tmp_path / "other", "--bootstrap", 2)
    assert line_of(text, "95 % interval")[1:] == ["-", "-"]
    assert f"bare: no interval, it has no {DETECTIONS_NAME}" in text and "other: no interval" in text
    assert compare(caplog, tmp_path / "bare", tmp_path / "other", "--bootstrap", 0).count("no interval") == 0


@pytest.mark.parametrize(
    ("words", "pieces"),
    [
        (["half"], ["two different runs"]),
        (["half", "half/."], ["two different runs"]),
        (["half", "nowhere"], ["nowhere is not a folder"]),
        (["half", "half/config.yaml"], ["is not a folder: give its folder", "half"]),
        (["half", "."], ["is no run's folder", "config.yaml", "all, half"]),
        (["half", "all", "--bootstrap", "-1"], ["--bootstrap is -1"]),
    ],
)
def test_what_is_no_run_is_refused(runs, words, pieces, monkeypatch):
    monkeypatch.chdir(runs[0][0].parent)
    with pytest.raises(SystemExit) as end:
        main(words)
    assert all(piece in str(end.value) for piece in pieces), end.value
