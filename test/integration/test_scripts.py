"""train.py, validate.py and demo.py as users run them, on a data set of a dozen images.

One short training in a process of its own serves most tests; the others call the scripts' main() here, which is what a
process does without the seconds of importing torch. Two processes are in test_two_processes.py.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import demo
import effdet.data.synthetic.dataset
import train
import validate
from effdet.config import load
from effdet.config.cli import parse_train_args
from effdet.data.synthetic.dataset import CATEGORY_IDS, make_synthetic_dataset
from effdet.evaluator import CocoEvaluator
from effdet.predict.sources import refuse_replacing, unique_stems
from effdet.training import trainer

REPO = Path(__file__).resolve().parents[2]
NUM_TRAIN, NUM_VAL, BATCH, EPOCHS = 12, 6, 4, 3
STEPS_PER_EPOCH = NUM_TRAIN // BATCH
KEYS = {
    "version",
    "arch",
    "state_dict",
    "state_dict_ema",
    "ema",
    "optimizer",
    "schedule",
    "scaler",
    "ranks",
    "epoch",
    "step",
    "metric",
    "best",
    "config",
    "model_config",
    "category_map",
    "image_size",
    "initial_weights",
    "score_threshold",
}  # checkpoint/manager.py


@dataclass
class Run:
    """A finished training: its folder, its arguments and what it printed."""

    folder: Path
    argv: list[str]
    output: str

    def checkpoint(self, name: str = "last.pth.tar") -> dict:
        return torch.load(self.folder / name, weights_only=True)

    def summary(self) -> list[dict[str, str]]:
        with open(self.folder / "summary.csv", newline="") as file:
            return list(csv.DictReader(file))


def train_argv(data: Path, output: Path, experiment: str, *more: str) -> list[str]:
    return [
        "--root",
        str(data),
        "--image-size",
        "64",
        "-b",
        str(BATCH),
        "-j",
        "0",
        "--device",
        "cpu",
        "--epochs",
        str(EPOCHS),
        "--warmup-epochs",
        "0",
        "--cooldown-epochs",
        "0",
        "--opt",
        "adamw",
        "--lr",
        "0.002",
        "--min-lr",
        "0.0001",
        "--model-ema-decay",
        "0.5",
        "--log-interval",
        "2",
        "--output",
        str(output),
        "--experiment",
        experiment,
        "model.bn_momentum=0.1",
        *more,
    ]


def call(script: ModuleType, *argv: object) -> tuple[int, str]:
    """Call a script's main() as the interpreter would, and put logging back; return exit code and output."""
    printed = io.StringIO()
    if script is validate and "--output" not in argv:
        argv += ("--output", "")  # not into the folder the tests run in
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = script.main([str(part) for part in argv])
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):
                print(code)
                code = 1
        finally:
            for name in ("effdet", "timm_patches"):
                logger = logging.getLogger(name)
                for handler in logger.handlers[:]:
                    logger.removeHandler(handler)
                    handler.close()
                logger.propagate = True
                logger.setLevel(logging.NOTSET)
    return code, printed.getvalue()


def spawn(*argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=REPO,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The number of threads changes the order of sums, and some of these tests compare bits between processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_synthetic_dataset(tmp_path_factory.mktemp("data") / "set", num_train=NUM_TRAIN, num_val=NUM_VAL)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    output = tmp_path_factory.mktemp("output")
    argv = train_argv(data, output, "straight")
    done = spawn("train.py", *argv)
    assert done.returncode == 0, done.stdout
    return Run(output / "straight", argv, done.stdout)


@pytest.mark.slow
def test_a_profile_lies_in_the_runs_folder(data: Path, tmp_path: Path):
    code, printed = call(train, *train_argv(data, tmp_path, "traced", "--profile", "2", "--max-steps", "8"))
    assert code == 0, printed
    (trace,) = (tmp_path / "traced" / "profile").iterdir()
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert sum(str(name).startswith("ProfilerStep") for name in names) == 2
    assert "aten::convolution_backward" in names


def interrupt(place: str, count: int) -> contextlib.AbstractContextManager:
    """Send this process a real signal at a place in the run, at its `count`-th call from now."""
    owner, name = {
        "update": (trainer.EpochState, "after_update"),
        "evaluation": (CocoEvaluator, "add_predictions"),
        "scoring": (CocoEvaluator, "_score"),
        "epoch": (trainer, "finish_epoch"),
    }[place]
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def patched(*args, **kwargs):
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(*args, **kwargs)

    return mock.patch.object(owner, name, patched)


STOPS = {"update": 2, "epoch": 1}  # both in epoch 0; the other places are in the slow test


@pytest.fixture(scope="module")
def resumed(data: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of `run`, stopped within an epoch and after one, and continued."""
    output = tmp_path_factory.mktemp("resumed")
    argv = [*train_argv(data, output, "resumed"), "--resume", "auto"]
    for place, count in STOPS.items():
        with interrupt(place, count):
            code, printed = call(train, *argv)
        assert code == 128 + signal.SIGUSR1, printed
        assert "stopped by SIGUSR1; status 138. Continue with --resume " in printed.splitlines()[-1]
    argv = train_argv(data, output, "") + ["--resume", str(output / "resumed" / "last.pth.tar")]
    code, printed = call(train, *argv)
    assert code == 0, printed
    return Run(output / "resumed", argv, printed)


@pytest.fixture(scope="module")
def val_ann(data: Path) -> Path:
    return data / "annotations" / "instances_val2017.json"


# ---- train.py --------------------------------------------------------------------------------------------------------

TRAIN_LINE = re.compile(
    r"Train: (\d+) \[ *(\d+)/(\d+) \( *(\d+)%\)\]  Loss: ([\d.]+) \(([\d.]+)\)  Class: [\d.]+  Box: [\d.]+  "
    r"Time: [\d.]+s \([\d.]+s\)  FPS: ([\d.]+) \([\d.]+\) img/s  LR: (\S+)  Data: [\d.]+s \([\d.]+s\)  "
    r"ETA: \d+:\d\d:\d\d$",
    re.MULTILINE,
)


@pytest.mark.core
def test_training_logs_a_line_at_each_interval_and_at_the_end_of_an_epoch(run):
    lines = TRAIN_LINE.findall(run.output)
    assert [(int(line[0]), int(line[1]), int(line[2])) for line in lines] == [
        (epoch, step, STEPS_PER_EPOCH) for epoch in range(EPOCHS) for step in (2, 3)
    ]
    assert all(float(line[4]) > 0 and float(line[6]) > 0 for line in lines)
    assert float(lines[0][7]) == pytest.approx(0.002, rel=0.2) and float(lines[-1][7]) < 0.0005, "cosine to --min-lr"
    assert (
        "ETA: 0:00:00"
        in run.output.splitlines()[
            max(number for number, line in enumerate(run.output.splitlines()) if line.startswith("Train:"))
        ]
    )
    for epoch in range(EPOCHS):
        assert run.output.count(f"Eval: {epoch}  AP: ") == 1, "each line comes once"
    log = (run.folder / "log.txt").read_text()
    records = re.split(r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (?=[A-Z]+ )", log)[1:]
    shown = [record[len("WARNING ") :] for record in records if not record.startswith("DEBUG")]
    assert "".join(shown) == run.output, "nothing but the log is printed"


def test_training_ends_with_the_numbers_and_where_everything_is(run):
    average, best, numbers, checkpoint, images, report, *following = run.output.splitlines()[-9:]
    stats = json.loads((run.folder / "metrics.json").read_text())["stats"]
    rows = run.summary()
    metric, epoch = max((float(row["AP"]), -int(row["epoch"])) for row in rows)
    assert float(average.rpartition(" AvgFPS:")[2]) > 0
    assert best == f"*** Best metric: {metric:.5f} (epoch {-epoch})"
    assert numbers.startswith(f"AP {stats['AP']:.4f}  AP50 {stats['AP50']:.4f}  (last epoch")
    assert Path(checkpoint.removeprefix("checkpoint: ")) == run.folder / "model_best.pth.tar"
    assert Path(images.removeprefix("images: ")) == run.folder / "images" / "sheet.jpg"
    assert (run.folder / "model_best.pth.tar").is_file()
    assert report == f"report: {run.folder / 'report.html'}" and (run.folder / "report.html").is_file()
    assert [line.split()[:3] for line in following] == [
        ["next:", "python", script] for script in ("validate.py", "demo.py", "train.py")
    ]
    facts = json.loads((run.folder / "metrics.json").read_text())["run"]
    assert average.endswith(f" AvgFPS:{facts['img_per_s']:.2f}") and 0 < facts.pop("seconds") < 600
    assert facts == {
        "model": "tf_efficientdet_d0",
        "processes": 1,
        "batch_size": BATCH,
        "first_epoch": 0,
        "steps": EPOCHS * STEPS_PER_EPOCH,
        "img_per_s": facts["img_per_s"],
        "best_AP": metric,
        "best_epoch": -epoch,
        "checkpoint": checkpoint.removeprefix("checkpoint: "),
    }


def intervals(folder: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == "interval"]


def test_losses_of_the_log_are_in_a_file(run, resumed):
    lines = TRAIN_LINE.findall(run.output)
    rows = intervals(run.folder)
    assert [(str(row["epoch"]), str(row["step"]), f"{row['loss']:.5f}", f"{row['lr']:.3e}") for row in rows] == [
        (line[0], line[1], line[4], line[7]) for line in lines
    ]
    assert [(row["epoch"], row["step"]) for row in intervals(resumed.folder)] == [
        (row["epoch"], row["step"]) for row in rows
    ]


def test_predictions_are_drawn_beside_the_truth(run, data):
    names = {path.stem for path in (data / "val2017").iterdir()}
    assert {path.stem for path in (run.folder / "images").iterdir()} == names | {"sheet"}
    for name in names:
        with (
            Image.open(data / "val2017" / f"{name}.jpg") as source,
            Image.open(run.folder / "images" / f"{name}.jpg") as drawn,
        ):
            assert drawn.width >= 2 * source.width and drawn.height >= source.height
    with Image.open(run.folder / "images" / "sheet.jpg") as sheet:
        assert len(sheet.convert("L").getcolors(256)) > 100, "something is on it"


def test_summary_has_a_row_for_each_epoch(run):
    rows = run.summary()
    assert [int(row["epoch"]) for row in rows] == list(range(EPOCHS))
    for row in rows:
        assert f"epoch {row['epoch']}: loss {float(row['train_loss']):.5f}, " in run.output
        assert f"Eval: {row['epoch']}  AP: {float(row['AP']):.5f}  AP50: {float(row['AP50']):.5f}" in run.output
        assert int(row["skipped"]) == 0 and float(row["img_per_s"]) > 0
    assert float(rows[-1]["train_loss"]) < 0.9 * float(rows[0]["train_loss"]), "it learns"


def test_saved_config_loads_back_to_the_same_config(run):
    asked = parse_train_args(run.argv)
    assert parse_train_args(["-c", str(run.folder / "config.yaml")]) == asked
    assert load.from_plain(run.checkpoint()["config"]) == asked
    assert asked.optim.lr == 0.002 and asked.model.bn_momentum == 0.1, "else this compares defaults"


def test_checkpoint_holds_what_its_format_says(run):
    payload = run.checkpoint()
    assert set(payload) == KEYS
    assert (payload["arch"], payload["image_size"], payload["epoch"]) == ("tf_efficientdet_d0", [64, 64], EPOCHS - 1)
    assert payload["step"] == payload["schedule"]["updates"] == payload["ema"]["updates"] == EPOCHS * STEPS_PER_EPOCH
    assert payload["category_map"]["ids"] == sorted(CATEGORY_IDS.values())
    assert payload["category_map"]["names"] == sorted(CATEGORY_IDS, key=CATEGORY_IDS.get)
    assert payload["model_config"]["num_classes"] == len(CATEGORY_IDS)
    assert payload["metric"] == float(run.summary()[-1]["AP"])
    written = json.loads((run.folder / "metrics.json").read_text())["score_threshold"]["threshold"]
    recommended = payload["score_threshold"]
    assert (recommended and recommended["all"]) == written
    assert recommended is None or len(recommended["classes"]) == len(CATEGORY_IDS)
    raw, ema = payload["state_dict"], payload["state_dict_ema"]
    assert raw.keys() == ema.keys()
    different = [name for name in raw if raw[name].is_floating_point() and not torch.equal(raw[name], ema[name])]
    assert len(different) > 0.9 * sum(value.is_floating_point() for value in raw.values())


def test_the_best_checkpoint_is_the_epoch_with_the_best_metric(run):
    rows = run.summary()
    best = max(range(EPOCHS), key=lambda epoch: (float(rows[epoch]["AP"]), -epoch))
    payload = run.checkpoint("model_best.pth.tar")
    assert (payload["epoch"], payload["metric"]) == (best, float(rows[best]["AP"]))
    assert {path.name for path in run.folder.glob("checkpoint-*")} == {
        f"checkpoint-{epoch}.pth.tar" for epoch in range(EPOCHS)
    }


def test_resume_continues_the_same_run(run, resumed):
    assert [int(row["epoch"]) for row in resumed.summary()] == [0, 1, 2]
    log = (resumed.folder / "log.txt").read_text()
    assert [line.rpartition("continuing with ")[2] for line in log.splitlines() if " resumed /" in line] == [
        "epoch 0, batch 2",
        "epoch 1",
    ]
    assert "no checkpoint in" in log.splitlines()[0] and log.count("Train: 0 [") == 2, "no step is done twice"
    assert "Train: 0 [" not in resumed.output and not (resumed.folder / "recovery.pth.tar").exists()
    straight, continued = run.checkpoint(), resumed.checkpoint()
    assert continued["best"] == straight["best"] and len(continued["best"]["ranking"]) == EPOCHS
    for key in ("epoch", "step", "schedule"):
        assert continued[key] == straight[key]
    assert continued["ema"] == pytest.approx(straight["ema"])


def assert_same_bits(one: object, other: object, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same_bits(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same_bits(*pair, f"{where}/{number}")
    else:
        assert one == other, where


def trace(folder: Path) -> list[tuple[Any, ...]]:
    """Return every number that a run records and that is no time or memory."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with open(folder / "summary.csv", newline="") as file:
        rows += csv.DictReader(file)
    return [
        tuple(value for key, value in row.items() if key not in ("img_per_s", "data_share", "memory_mib"))
        for row in rows
    ]


def assert_same_run(one: Path, other: Path) -> None:
    first, second = (torch.load(folder / "last.pth.tar", weights_only=True) for folder in (one, other))
    for payload in (first, second):
        del payload["config"]["run"]  # names of folders
    assert_same_bits(first, second)
    assert trace(one) == trace(other) != []


@pytest.mark.core
def test_a_resumed_run_is_bit_for_bit_the_one_that_was_not_stopped(run, resumed):
    assert_same_run(run.folder, resumed.folder)
    before, after = run.checkpoint("checkpoint-0.pth.tar"), run.checkpoint()
    assert any(not torch.equal(before["state_dict"][name], value) for name, value in after["state_dict"].items())
    with pytest.raises(AssertionError, match="/state_dict/"):
        assert_same_bits(before["state_dict"], after["state_dict"], "/state_dict")


def test_images_that_spoil_every_step_end_the_run_with_a_post_mortem(data, tmp_path):
    original, seen = trainer.train_one_epoch, []

    def poisoned(training, loader, *more):
        batches = list(loader)  # of the real loader
        for images, target in batches[1:]:
            images[0, 1, 30:40, 30:40] = float("nan")
            seen.append(target["img_idx"].tolist())
        return original(training, Batches(batches, loader.sampler), *more)

    class Batches(list):
        def __init__(self, batches, sampler) -> None:
            super().__init__(batches)
            self.sampler = sampler

    with mock.patch.object(trainer, "train_one_epoch", poisoned):
        code, output = call(train, *train_argv(data, tmp_path, "bad", "--max-skipped", "2", "--log-interval", "1"))
    assert code == 1 and "Traceback" not in output, output
    assert "2 updates in a row were skipped" in output.splitlines()[-1] and "nonfinite-rank0.pt" in output
    found = torch.load(tmp_path / "bad" / "nonfinite-rank0.pt", weights_only=True)
    ids = [image["id"] for image in json.loads((data / "annotations/instances_train2017.json").read_text())["images"]]
    assert found["step"] == 3 and found["image_ids"] == [str(ids[index]) for index in seen[1]]
    assert not math.isfinite(found["losses"]["loss"]) and torch.isnan(found["images"]).any()
    assert not math.isfinite(found["gradient_norms"]["class_net.predict.conv_pw"])
    assert {"backbone.blocks.0", "fpn.cell.0", "box_net.predict.conv_pw"} <= found["gradient_norms"].keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--amp", "--amp-dtype", "bfloat16"),
        ("--grad-accum", "2", "-b", "2"),
        ("-j", "2", "--reprob", "0.5"),
        ("--amp", "--amp-dtype", "bfloat16", "--opt-level", "O2", "--grad-accum", "2", "-b", "2"),
        ("--opt", "fusedmomentum", "--freeze-bn-epochs", "2"),
        ("--sched", "plateau", "--lr-noise", "0.1", "0.9"),
    ],
    ids=" ".join,
)
def test_exact_resume_in_other_ways_of_training(options, data, tmp_path):
    code, printed = call(train, *train_argv(data, tmp_path, "straight", *options))
    assert code == 0, printed
    for place, count in (("update", 1), ("update", 2), ("update", 3), ("evaluation", 2), ("scoring", 2), ("epoch", 1)):
        name = f"{place}{count}"
        argv = train_argv(data, tmp_path, name, *options, "--resume", "auto")
        with interrupt(place, count):
            code, printed = call(train, *argv)
        assert code == 138, printed
        code, printed = call(train, *argv)
        assert code == 0, printed
        assert_same_run(tmp_path / "straight", tmp_path / name)
        shutil.rmtree(tmp_path / name)


def test_a_run_continued_in_a_new_folder_names_a_checkpoint_that_exists(run, data, tmp_path):
    payload = run.checkpoint("checkpoint-1.pth.tar")
    payload["best"] = {**payload["best"], "best": [1.0, 0]}  # a metric that will not be bettered
    torch.save(payload, tmp_path / "perfect.pth.tar")
    code, output = call(
        train,
        *train_argv(data, tmp_path, "new"),
        "--resume",
        tmp_path / "perfect.pth.tar",
        "--max-steps",
        2 * STEPS_PER_EPOCH + 1,
        "--val-skip",
        NUM_VAL,
    )
    assert code == 0, output
    assert "*** Best metric: 1.00000 (epoch 0)" in output
    path = re.findall(r"^checkpoint: (.*)$", output, re.MULTILINE)[-1]
    assert Path(path) == tmp_path / "new" / "last.pth.tar" and Path(path).is_file()


def test_accumulating_gradients_keeps_the_updates_and_the_learning_rate(run, data, tmp_path):
    """Two batches of 2 for one update are not one batch of 4: batch norm sees 2 images, so the losses differ."""
    argv = [
        *train_argv(data, tmp_path, "halves", "--grad-accum", "2", "--val-skip", str(NUM_VAL)),
        "-b",
        "2",
        "--max-steps",
        str(2 * STEPS_PER_EPOCH),
    ]
    code, output = call(train, *argv)
    assert code == 0, output
    halves = Run(tmp_path / "halves", argv, output)
    payload, whole = halves.checkpoint(), run.checkpoint("checkpoint-0.pth.tar")
    assert (payload["step"], whole["step"]) == (2 * STEPS_PER_EPOCH, STEPS_PER_EPOCH)
    assert payload["schedule"]["updates"] == whole["schedule"]["updates"] == STEPS_PER_EPOCH
    assert payload["ema"]["updates"] == whole["ema"]["updates"]
    assert payload["optimizer"]["param_groups"][0]["lr"] == whole["optimizer"]["param_groups"][0]["lr"] < 0.002
    assert float(halves.summary()[0]["lr"]) == float(run.summary()[0]["lr"])


def test_batch_norm_statistics_stand_still_in_the_last_epochs(data, tmp_path):
    argv = train_argv(data, tmp_path, "fixed", "--freeze-bn-epochs", "2", "--val-skip", str(NUM_VAL))
    code, output = call(train, *argv, "--save-every", "1")
    assert code == 0, output
    assert output.count("batch-norm statistics fixed from here on") == 1
    first, second, last = (
        torch.load(tmp_path / "fixed" / f"checkpoint-{epoch}.pth.tar", weights_only=True) for epoch in range(EPOCHS)
    )
    statistics = [name for name in first["state_dict"] if name.endswith(("running_mean", "running_var"))]
    for name in statistics:  # those that the first epoch ended with, in the average too
        for payload in (second, last):
            for kind in ("state_dict", "state_dict_ema"):
                assert torch.equal(payload[kind][name], first["state_dict"][name]), (name, kind)
    assert any(not torch.equal(first["state_dict_ema"][name], first["state_dict"][name]) for name in statistics)
    weights = [name for name in first["state_dict"] if name.endswith("bn1.weight")]
    assert weights and all(not torch.equal(first["state_dict"][name], last["state_dict"][name]) for name in weights)


def test_half_precision_weights_without_an_average_are_drawn_too(data, tmp_path):
    argv = train_argv(
        data,
        tmp_path,
        "half",
        "--amp",
        "--opt-level",
        "O2",
        "--amp-dtype",
        "bfloat16",
        "--no-model-ema",
        "--max-steps",
        "1",
        "--val-skip",
        str(NUM_VAL),
    )
    code, output = call(train, *argv)
    assert code == 0, output
    assert "(trained weights)" in output and "mixed precision O2 in bfloat16" in output
    assert (tmp_path / "half" / "images" / "sheet.jpg").is_file()
    payload = torch.load(tmp_path / "half" / "last.pth.tar", weights_only=True)
    assert set(payload) == KEYS - {"state_dict_ema", "ema"}
    assert {value.dtype for value in payload["state_dict"].values()} == {torch.float32, torch.int64}


# ---- validate.py -----------------------------------------------------------------------------------------------------


def evaluate(tmp_path: Path, data: Path, checkpoint: Path, *more: object) -> tuple[float, str]:
    """Run validate.py; return the AP of its metrics file and what it printed."""
    code, output = call(
        validate,
        "--root",
        data,
        "--checkpoint",
        checkpoint,
        "-b",
        4,
        "-j",
        0,
        "--device",
        "cpu",
        "--metrics",
        tmp_path / "metrics.json",
        *more,
    )
    assert code == 0, output
    return json.loads((tmp_path / "metrics.json").read_text())["stats"]["AP"], output


def coco_ap(ann: Path, results: Path, img_ids: list[int] | None = None) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(ann))
        score = COCOeval(truth, truth.loadRes(str(results)), "bbox")
        if img_ids is not None:
            score.params.imgIds = img_ids
        score.evaluate()
        score.accumulate()
        score.summarize()
    return float(score.stats[0])


def test_what_a_run_says_to_do_next_works(run, data, tmp_path):
    commands = [
        shlex.split(line.removeprefix("next: python ")) for line in run.output.splitlines() if line.startswith("next: ")
    ]
    code, output = call(validate, *commands[0][1:], "--output", tmp_path / "v", "--speed")
    assert code == 0, output
    numbers = json.loads((tmp_path / "v" / "metrics.json").read_text())
    best = json.loads((run.folder / "metrics.json").read_text())["run"]["best_AP"]
    assert numbers["stats"]["AP"] == best
    assert 0 < numbers["run"]["post_processing_ms"] < numbers["run"]["model_ms"]
    assert re.search(r"^speed: [\d.]+ ms model \+ [\d.]+ ms post-processing an image", output, re.MULTILINE)
    with open(tmp_path / "v" / "per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["AP"]) for row in rows] == [
        (row["name"], "" if row["AP"] is None else str(row["AP"])) for row in numbers["per_class"]
    ]
    assert {"AP75", "AP_small", "AP_medium", "AP_large", "count"} < set(rows[0])
    assert (tmp_path / "v" / "report.html").stat().st_size > 20_000
    code, output = call(demo, *commands[1][1:], "--output", tmp_path / "d")
    assert code == 0 and list((tmp_path / "d").glob("*.jpg")) + list((tmp_path / "d").glob("*.png")), output
    asked = parse_train_args(commands[2][1:])
    assert asked.run.resume == str(run.folder / "last.pth.tar") and asked.sched.epochs == 2 * EPOCHS
    assert asked.optim.lr == 0.002 and asked.run.batch_size == BATCH
    code, output = call(validate, "--root", data, "--checkpoint", "x", "--speed", "--tta-flip")
    assert code == 1 and "--speed measures one pass: leave --tta-flip" in output


def test_metrics_of_a_run_are_in_one_file_once(run, resumed):
    for each in (run, resumed):
        rows = [json.loads(line) for line in (each.folder / "metrics.jsonl").read_text().splitlines()]
        assert [(row["epoch"], row["step"]) for row in rows if row["kind"] == "interval"] == [
            (epoch, step) for epoch in range(EPOCHS) for step in (2, 3)
        ]
        assert [row["AP"] for row in rows if row["kind"] == "evaluation"] == [
            float(row["AP"]) for row in each.summary()
        ]
        assert [row["global_step"] for row in rows if row["kind"] == "epoch"] == [3, 6, 9]
        assert all(row["memory_mib"] > 100 and 0 <= row["data_share"] <= 1 for row in rows if row["kind"] == "interval")
        with Image.open(each.folder / "train_batch.jpg") as image:
            assert image.width > 4 * 64, "four images side by side"
        data = json.loads(
            re.search(r'type="application/json">(.*?)</script>', (each.folder / "report.html").read_text(), re.DOTALL)[
                1
            ]
        )
        assert data["evaluations"]["AP"] == pytest.approx([float(row["AP"]) for row in each.summary()], rel=1e-5)
        assert data["batch"] and data["data"]["sets"][0]["images"] == NUM_TRAIN


@pytest.mark.core
def test_validate_reproduces_the_metric_of_the_training_log(run, data, tmp_path):
    ap, output = evaluate(tmp_path, data, run.folder / "last.pth.tar")
    assert ap == run.checkpoint()["metric"] > 0
    facts = json.loads((tmp_path / "metrics.json").read_text())["run"]
    assert NUM_VAL / facts["img_per_s"] <= facts["seconds"] < 600, "prediction takes a part of the time"
    assert (facts["model"], facts["processes"], facts["batch_size"], facts["checkpoint"]) == (
        "tf_efficientdet_d0",
        1,
        4,
        str(run.folder / "last.pth.tar"),
    )
    assert output.splitlines()[-1] == f"AP {ap:.5f}  AP50 {float(run.summary()[-1]['AP50']):.5f}"
    assert f"Eval: 2  AP: {ap:.5f}" in run.output and output.count("\nAR_large ") == 1
    assert "64x64, EMA weights" in output and "6 images" in output


def test_validate_takes_the_trained_weights_on_request(run, data, tmp_path):
    ap, output = evaluate(tmp_path, data, run.folder / "last.pth.tar", "--no-use-ema")
    assert "trained weights of" in output
    assert ap != run.checkpoint()["metric"]
    payload = run.checkpoint()
    del payload["state_dict_ema"], payload["ema"]
    torch.save(payload, tmp_path / "trained.pth.tar")
    assert evaluate(tmp_path, data, tmp_path / "trained.pth.tar")[0] == ap


def test_results_are_coco_results_with_the_original_ids(run, data, val_ann, tmp_path):
    results = tmp_path / "deep" / "results.json"
    ap, output = evaluate(tmp_path, data, run.folder / "last.pth.tar", "--results", results)
    assert str(results) in output
    rows = json.loads(results.read_text())
    truth = json.loads(val_ann.read_text())
    assert {row["image_id"] for row in rows} == {image["id"] for image in truth["images"]}
    ids = {row["category_id"] for row in rows}
    assert ids <= set(CATEGORY_IDS.values()) and max(ids) > len(CATEGORY_IDS), "ids, not class numbers"
    assert coco_ap(val_ann, results) == pytest.approx(ap, abs=1e-12)


def test_every_second_image_can_be_skipped(run, data, val_ann, tmp_path):
    results = tmp_path / "results.json"
    ap, _ = evaluate(tmp_path, data, run.folder / "last.pth.tar", "--results", results, "--val-skip", 2)
    img_ids = [image["id"] for image in json.loads(val_ann.read_text())["images"]][::2]
    assert {row["image_id"] for row in json.loads(results.read_text())} == set(img_ids)
    assert ap == pytest.approx(coco_ap(val_ann, results, img_ids), abs=1e-12)
    assert ap != run.checkpoint()["metric"]


def test_another_image_size_evaluates(run, data, tmp_path):
    ap, output = evaluate(tmp_path, data, run.folder / "last.pth.tar", "--image-size", 96, 128)
    assert "96x128" in output
    assert 0 <= ap != run.checkpoint()["metric"]


def test_one_of_the_roots_files_can_be_replaced(run, data, val_ann, tmp_path):
    """--val-ann beside --root once had no effect."""
    truth = json.loads(val_ann.read_text())
    keep = {image["id"] for image in truth["images"][:2]}
    truth["images"] = truth["images"][:2]
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in keep]
    (tmp_path / "two.json").write_text(json.dumps(truth))
    _, output = evaluate(
        tmp_path,
        data,
        run.folder / "last.pth.tar",
        "--val-ann",
        tmp_path / "two.json",
        "--results",
        tmp_path / "results.json",
    )
    assert "2 images" in output
    assert {row["image_id"] for row in json.loads((tmp_path / "results.json").read_text())} == keep


# ---- demo.py ---------------------------------------------------------------------------------------------------------

LOW = ("--score-thr", "0.01", "--device", "cpu")


def show(run: Run, output: Path, *argv: object) -> list[dict]:
    """Run demo.py and return its json, after checking that it agrees with what was drawn and printed."""
    code, printed = call(demo, *argv, "--checkpoint", run.folder / "last.pth.tar", "--output", output, *LOW)
    assert code == 0, printed
    entries = json.loads((output / "detections.json").read_text())
    for entry in entries:
        with Image.open(entry["file"]) as source, Image.open(entry["drawn"]) as drawn:
            assert source.size == drawn.size == (entry["width"], entry["height"])
        assert f"{entry['file']}: {len(entry['objects'])} object(s)" in printed
    assert {path.name for path in output.iterdir()} == {"detections.json"} | {Path(e["drawn"]).name for e in entries}
    return entries


def test_demo_takes_a_file_a_folder_and_a_pattern(run, data, tmp_path):
    images = sorted((data / "val2017").iterdir())
    one = show(run, tmp_path / "file", images[2])
    assert [entry["file"] for entry in one] == [str(images[2])]
    folder = show(run, tmp_path / "folder", data / "val2017")
    assert [entry["file"] for entry in folder] == [str(path) for path in images]
    assert {**folder[2], "drawn": ""} == {**one[0], "drawn": ""}
    pattern = show(run, tmp_path / "pattern", data / "val2017" / "*[24].jpg", images[1])
    assert [entry["file"] for entry in pattern] == [str(images[1]), str(images[3])]


@pytest.mark.core
def test_demo_lists_objects_with_names_ids_and_boxes_of_the_image(run, data, tmp_path):
    entries = show(run, tmp_path / "out", data / "val2017")
    objects = [(entry, item) for entry in entries for item in entry["objects"]]
    assert objects
    for entry, item in objects:
        assert item["category_id"] == CATEGORY_IDS[item["name"]]
        assert 0.01 <= item["score"] <= 1
        x, y, width, height = item["bbox"]
        assert min(x, y, width, height) >= 0 and x + width <= entry["width"] + 1e-3
        assert y + height <= entry["height"] + 1e-3
    for entry in entries:
        scores = [item["score"] for item in entry["objects"]]
        assert scores == sorted(scores, reverse=True)


def test_demo_gives_the_same_bits_in_another_process(run, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for path in sorted((data / "val2017").iterdir())[:2]:
        shutil.copy(path, "in")
    argv = ["in", "--checkpoint", run.folder / "last.pth.tar", "--output", "out", *LOW]
    code, printed = call(demo, *argv)
    assert code == 0, printed
    first = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    shutil.rmtree("out")
    done = subprocess.run(
        [sys.executable, str(REPO / "demo.py"), *map(str, argv)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == first
    assert len(first) == 2 + 1
    assert done.stdout == printed


def test_demo_without_arguments_shows_the_newest_checkpoint_on_the_default_data(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = functools.partial(make_synthetic_dataset, num_train=1, num_val=2)
    monkeypatch.setattr(effdet.data.synthetic.dataset, "make_synthetic_dataset", few)
    for name, age_s in (("output/train/old", 100), ("runs/quickstart/new", 0), ("runs/quickstart/older", 50)):
        Path(name).mkdir(parents=True)
        copy = Path(name, "last.pth.tar")
        shutil.copyfile(run.folder / "last.pth.tar", copy)
        os.utime(copy, (1_700_000_000 - age_s,) * 2)
    code, printed = call(demo, *LOW)
    assert code == 0, printed
    assert "runs/quickstart/new/last.pth.tar" in printed
    drawn = {path.name for path in Path("output/demo").iterdir()}
    assert drawn == {"detections.json"} | {f"{path.stem}.png" for path in Path("data/synthetic/val2017").iterdir()}
    assert len(drawn) == 3


def test_demo_without_a_checkpoint_makes_no_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed = call(demo)
    assert code == 1 and "no checkpoint under runs/ or output/" in printed.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_drawings_of_images_with_one_name_do_not_replace_each_other(tmp_path):
    paths = [Path("a/x.jpg"), Path("a/x.png"), Path("b/x.jpg"), Path("a/x_2.jpg")]
    assert unique_stems(paths) == ["x", "x_2", "x_3", "x_2_2"]
    sources = [tmp_path / "y.jpg", tmp_path / "x.jpg", tmp_path / "x.png"]
    refuse_replacing(sources, [tmp_path / "y.png", tmp_path / "z"])
    for target in (tmp_path / "x.png", tmp_path):
        with pytest.raises(ValueError, match="choose another --output"):
            refuse_replacing(sources, [target])


# ---- what can go wrong -----------------------------------------------------------------------------------------------


@dataclass
class Place:
    """What the command lines of the table below refer to."""

    data: Path
    run: Run
    tmp: Path

    @property
    def last(self) -> Path:
        return self.run.folder / "last.pth.tar"

    def train(self, *more: object) -> list[object]:
        return [*train_argv(self.data, self.tmp / "out", "run"), *more]

    def validate(self, *more: object) -> list[object]:
        return ["--root", self.data, "-b", "4", "-j", "0", "--device", "cpu", *more]

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def other_categories(self) -> Path:
        """The data set with a class, and its id, that no checkpoint knows."""
        root = self.tmp / "other"
        for split in ("train2017", "val2017"):
            source = self.data / "annotations" / f"instances_{split}.json"
            self.write(
                f"other/annotations/instances_{split}.json",
                source.read_text()
                .replace('"id":44,', '"id":99,')
                .replace('"category_id":44', '"category_id":99')
                .replace('"triangle"', '"zebra"'),
            )
            (root / split).symlink_to(self.data / split)
        return root

    def of_another_trainer(self) -> Path:
        """A file as effdet's training script writes it."""
        weight = torch.zeros(3, requires_grad=True)
        torch.save(
            {
                "epoch": 7,
                "arch": "tf_efficientdet_d0",
                "state_dict": self.run.checkpoint()["state_dict"],
                "optimizer": torch.optim.SGD([weight], lr=0.1, momentum=0.9).state_dict(),
                "version": 2,
                "args": argparse.Namespace(lr=0.1),
                "metric": np.float64(0.25),
            },
            self.tmp / "other.pth.tar",
        )
        return self.tmp / "other.pth.tar"

    def weights_only(self) -> Path:
        torch.save(self.run.checkpoint()["state_dict"], self.tmp / "weights.pth")
        return self.tmp / "weights.pth"


NO_SUCH = "/nowhere/at/all"
ERRORS: dict[str, tuple[ModuleType, Callable[[Place], list[object]], list[str]]] = {
    "no root": (train, lambda p: ["--device", "cpu"], ["no data", "--root DIR"]),
    "root is missing": (
        train,
        lambda p: ["--root", NO_SUCH, "--device", "cpu", "--output", p.tmp],
        [NO_SUCH, "no such directory"],
    ),
    "root without annotations": (
        train,
        lambda p: ["--root", p.write("coco/train2017/x.txt", "").parents[1], "--output", p.tmp],
        ["instances_train2017.json", "absent", "holds train2017/"],
    ),
    "image size off the stride": (train, lambda p: p.train("--image-size", 500), ["500", "(480, 480)", "(512, 512)"]),
    "model misspelled": (
        train,
        lambda p: p.train("--model", "tf_eficientdet_d0"),
        ["tf_eficientdet_d0", "tf_efficientdet_d0"],
    ),
    "optimizer misspelled": (train, lambda p: p.train("--opt", "adamv"), ["adamv", "adam"]),
    "unknown flag": (train, lambda p: p.train("--epochz", 3), ["--epochz", "did you mean --epoch"]),
    "flag of the past": (train, lambda p: p.train("--save-images"), ["--save-images is gone", "demo.py"]),
    "batch not divisible": (
        train,
        lambda p: p.train("-b", 5, "--device-list", "0,1"),
        ["batch size 5", "2 devices", "4 or 6"],
    ),
    "evaluation batch not divisible": (
        validate,
        lambda p: p.validate("-b", 5, "--device-list", "0,1"),
        ["batch size 5", "2 devices", "4 or 6"],
    ),
    "fewer images than a batch": (train, lambda p: p.train("-b", 16), ["12 images", "16"]),
    "class count against the json": (
        train,
        lambda p: p.train("--num-classes", 3),
        ["num_classes is 3", "6 categories"],
    ),
    "setting unknown in YAML": (
        train,
        lambda p: p.train("-c", p.write("my.yaml", "optim:\n  momentun: 0.8\n")),
        ["my.yaml", "optim.momentun", "did you mean optim.momentum"],
    ),
    "YAML is missing": (train, lambda p: p.train("-c", NO_SUCH), [NO_SUCH, "No such file"]),
    "pretrained file is missing": (train, lambda p: p.train("--pretrained", NO_SUCH), [NO_SUCH, "No checkpoint"]),
    "more workers than images": (train, lambda p: p.train("-j", 13), ["13 loader processes", "12", "at most 12"]),
    "resume at another size": (
        train,
        lambda p: p.train("--image-size", 96, "--resume", p.last),
        ["64x64", "96x96", "--image-size 64 64", "--initial-checkpoint"],
    ),
    "output below a file": (train, lambda p: p.train("--output", p.write("file", "") / "deeper"), ["file/deeper"]),
    "resume without a file": (
        train,
        lambda p: p.train("--resume", p.run.folder / "lost.pth.tar"),
        ["lost.pth.tar", "last.pth.tar"],
    ),
    "resume of a truncated file": (
        train,
        lambda p: p.train("--resume", p.write("cut.pth.tar", p.last.read_bytes()[:100_000])),
        ["cut.pth.tar", "truncated"],
    ),
    "resume of something else": (
        train,
        lambda p: p.train("--resume", p.write("notes.pth", "buy milk")),
        ["notes.pth", "not a checkpoint"],
    ),
    "resume of another model": (
        train,
        lambda p: p.train("--model", "tf_efficientdet_lite0", "--resume", p.last),
        ["tf_efficientdet_d0", "tf_efficientdet_lite0", "--model"],
    ),
    "resume with another optimizer": (
        train,
        lambda p: p.train("--opt", "fusedmomentum", "--resume", p.last),
        ["--opt adamw", "--opt fusedmomentum"],
    ),
    "resume of another trainer's file": (
        train,
        lambda p: p.train("--resume", p.of_another_trainer()),
        ["other.pth.tar", "another trainer", "--initial-checkpoint"],
    ),
    "resume of a finished run": (train, lambda p: p.train("--resume", p.last), ["nothing is left", "3", "--epochs"]),
    "resume of a run of as many steps": (
        train,
        lambda p: p.train("--resume", p.run.folder / "checkpoint-0.pth.tar", "--max-steps", 3),
        ["nothing is left", "3 steps", "--max-steps"],
    ),
    "resume with other categories": (
        train,
        lambda p: p.train("--root", p.other_categories(), "--resume", p.last),
        ["zebra", "does not know"],
    ),
    "weights of other classes": (
        train,
        lambda p: p.train("--root", p.other_categories(), "--num-classes", 99, "--initial-checkpoint", p.last),
        ["class_net", "class count"],
    ),
    "validate without weights": (validate, lambda p: p.validate(), ["no weights", "--checkpoint"]),
    "validate with other categories": (
        validate,
        lambda p: p.validate("--root", p.other_categories(), "--checkpoint", p.last),
        ["zebra", "does not know"],
    ),
    "validate with another class count": (
        validate,
        lambda p: p.validate("--num-classes", 3, "--checkpoint", p.last),
        ["6 classes", "--num-classes 3"],
    ),
    "validate with another model": (
        validate,
        lambda p: p.validate("--model", "tf_efficientdet_d1", "--checkpoint", p.last),
        ["tf_efficientdet_d0", "tf_efficientdet_d1"],
    ),
    "validate weights of an unknown model": (
        validate,
        lambda p: p.validate("--checkpoint", p.weights_only()),
        ["weights.pth", "--model"],
    ),
    "validate without averaged weights": (
        validate,
        lambda p: p.validate("--model", "tf_efficientdet_d0", "--checkpoint", p.weights_only(), "--use-ema"),
        ["EMA"],
    ),
    "validate a folder": (
        validate,
        lambda p: p.validate("--checkpoint", p.run.folder),
        ["is a folder", "model_best.pth.tar"],
    ),
    "demo finds no image": (demo, lambda p: [p.tmp / "*.jpg", "--checkpoint", p.last], ["*.jpg", "no image found"]),
    "demo of a broken image": (
        demo,
        lambda p: [
            p.write("broken.jpg", b"\xff\xd8\xff\xe0 no more"),
            *("--checkpoint", p.last, "--output", p.tmp, "--max-bad-images", 0),
        ],
        ["cannot be read", "--max-bad-images"],
    ),
    "demo would draw over its input": (
        demo,
        lambda p: [Image.new("RGB", (9, 9)).save(p.tmp / "a.png") or p.tmp, "--checkpoint", p.last, "--output", p.tmp],
        ["a.png", "choose another --output"],
    ),
    "demo of a checkpoint that is missing": (
        demo,
        lambda p: [p.data / "val2017", "--checkpoint", NO_SUCH],
        [NO_SUCH, "No checkpoint"],
    ),
}


def check_error(script: str, code: int, output: str, pieces: list[str]) -> None:
    assert code != 0
    assert "Traceback" not in output
    reason = output.splitlines()[-1]
    assert reason.startswith(f"{script}.py: error: ")
    assert [piece for piece in pieces if piece not in reason] == [], reason


@pytest.mark.core
@pytest.mark.parametrize("case", ERRORS)
def test_errors_end_with_one_line_that_says_what_is_wrong(case, data, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, make_argv, pieces = ERRORS[case]
    code, output = call(script, *make_argv(Place(data, run, tmp_path)))
    check_error(script.__name__, code, output, pieces)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that the test needs to be absent")
@pytest.mark.parametrize("script", [train, validate, demo])
def test_a_device_that_is_not_there_is_named(script, data, run, tmp_path):
    argv = {
        train: ["--root", data, "--output", tmp_path],
        validate: ["--root", data, "--checkpoint", run.folder / "last.pth.tar"],
        demo: [data / "val2017", "--checkpoint", run.folder / "last.pth.tar", "--output", tmp_path],
    }[script]
    code, output = call(script, *argv, "--device", "cuda")
    check_error(script.__name__, code, output, ["'cuda'", "--device cpu"])


def test_an_error_ends_the_process_with_a_status_and_a_line(tmp_path):
    done = spawn("train.py", "--root", NO_SUCH, "--device", "cpu", "--output", tmp_path)
    check_error("train", done.returncode, done.stdout, [NO_SUCH])
    assert done.returncode == 1
