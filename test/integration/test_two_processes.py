"""Two CPU processes do what one does with the same global batch: the same losses, the same metric, one log.

Loss by loss this holds with synchronised batch norm, without drop path, whose random numbers each process draws for
itself, and without channels-last, where torch's own batch norm on the CPU (the one process's) is off by 1e-4. The
images are not smaller, and the batch is not, because the coarsest level has one cell then: its batch norms would see
too few numbers, and rounding alone would move the loss.
"""

from __future__ import annotations

import csv
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effdet.data.synthetic.dataset import make_synthetic_dataset

REPO = Path(__file__).resolve().parents[2]
NUM_TRAIN, NUM_VAL, BATCH, EPOCHS = 24, 6, 8, 2
STEPS = EPOCHS * NUM_TRAIN // BATCH
# The gradient of an initial network on four small images is huge (norm 360) and repeats to 5e-4 only, as norm layers
# divide by the spread of four nearly equal values. Steps this small lower the loss by a percent and keep 1e-4.
LR = 3e-5


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_synthetic_dataset(tmp_path_factory.mktemp("data") / "set", num_train=NUM_TRAIN, num_val=NUM_VAL)


def train(data: Path, folder: Path, launcher: tuple[object, ...] = (), *more: str) -> str:
    """Train in one process, or as `launcher` and `more` say; return what was printed."""
    done = spawn(
        *launcher,
        "train.py",
        "--root",
        data,
        "--image-size",
        128,
        "-b",
        BATCH,
        "-j",
        0,
        "--device",
        "cpu",
        "--epochs",
        EPOCHS,
        "--sched",
        "constant",
        "--warmup-epochs",
        0,
        "--opt",
        "momentum",
        "--lr",
        LR,
        "--model-ema-decay",
        "0.5",
        "--sync-bn",
        "--no-channels-last",
        "--log-interval",
        1,
        "--output",
        folder.parent,
        "--experiment",
        folder.name,
        "model.drop_path=0.0",
        *more,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("output") / "alone"
    train(data, folder)
    return folder


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def step_losses(folder: Path) -> list[tuple[float, ...]]:
    """Return total, class and box loss of each step from the log."""
    found = re.findall(r"Loss: ([\d.]+) .*Class: ([\d.]+)  Box: ([\d.]+)", (folder / "log.txt").read_text())
    return [tuple(map(float, losses)) for losses in found]


@pytest.mark.parametrize("launcher", ["--device-list", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(launcher, alone, data, tmp_path):
    if launcher == "torchrun":
        printed = train(
            data,
            tmp_path / "pair",
            ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port()),
        )
    else:
        printed = train(data, tmp_path / "pair", (), "--device-list", "0,1")
    assert "2 process(es), batch 8 (4 each)" in printed
    assert printed.count("Train: ") == STEPS and printed.count("*** Best metric:") == EPOCHS + 1, "one process talks"

    mine, theirs = rows_of(tmp_path / "pair"), rows_of(alone)
    assert [row["epoch"] for row in mine] == [row["epoch"] for row in theirs] == ["0", "1"]
    for row, other in zip(mine, theirs, strict=True):
        for key in ("train_loss", "train_class_loss", "train_box_loss", "lr"):
            assert float(row[key]) == pytest.approx(float(other[key]), rel=1e-4), key
    losses = step_losses(tmp_path / "pair")
    assert len(losses) == STEPS
    assert losses == [pytest.approx(step, rel=1e-4, abs=2e-5) for step in step_losses(alone)]
    assert float(mine[1]["train_loss"]) < 0.99 * float(mine[0]["train_loss"]), "it learns, so equality means something"
    one = torch.load(alone / "last.pth.tar", weights_only=True)
    two = torch.load(tmp_path / "pair" / "last.pth.tar", weights_only=True)
    assert two["step"] == one["step"] == STEPS
    momentum = [
        torch.cat([state["momentum_buffer"].flatten() for state in payload["optimizer"]["state"].values()])
        for payload in (one, two)
    ]  # the sum of all gradients, late ones most
    assert (momentum[0] - momentum[1]).norm() < 0.02 * momentum[0].norm()
    for kind in ("state_dict", "state_dict_ema"):
        for name, value in one[kind].items():
            torch.testing.assert_close(two[kind][name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_two_processes_evaluate_as_one(alone, data, tmp_path):
    """Each process predicts one image at a time, as the single one does, so that the arithmetic is the same."""
    metrics, rows = [], []
    for number, more in enumerate((("-b", 1), ("-b", 2, "--device-list", "0,1"))):
        done = spawn(
            "validate.py",
            "--root",
            data,
            "--checkpoint",
            alone / "last.pth.tar",
            "-j",
            0,
            "--device",
            "cpu",
            "--metrics",
            tmp_path / f"{number}.json",
            "--results",
            tmp_path / f"rows{number}.json",
            "--output",
            tmp_path / f"out{number}",
            *more,
        )
        assert done.returncode == 0, done.stdout
        assert done.stdout.count("\nAR_large ") == 1, "the table comes from one process"
        metrics.append(json.loads((tmp_path / f"{number}.json").read_text()))
        rows.append(json.loads((tmp_path / f"rows{number}.json").read_text()))
        assert (tmp_path / f"out{number}" / "report.html").is_file() and done.stdout.count("\nreport: ") == 1
    facts = [content.pop("run") for content in metrics]  # how fast, and on how many processes
    assert [entry["processes"] for entry in facts] == [1, 2]
    assert metrics[0] == metrics[1] and metrics[0]["stats"]["AP50"] > 0
    one, two = ({json.dumps(row) for row in part} for part in rows)
    assert one == two and len(rows[0]) == len(rows[1]) > 0
    assert len({row["image_id"] for row in rows[1]}) == NUM_VAL


def test_an_error_ends_both_processes(tmp_path):
    done = spawn(
        "train.py", "--root", "/nowhere/at/all", "--device", "cpu", "--device-list", "0,1", "--output", tmp_path
    )
    assert done.returncode == 1
    assert done.stdout.count("train.py: error: ") >= 1 and "/nowhere/at/all" in done.stdout
    assert "Traceback" not in done.stdout
    assert "ended with exit code 1; its own output says why" in done.stdout.splitlines()[-1]
