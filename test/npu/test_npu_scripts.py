"""train.py, validate.py and demo.py on NPUs: one and several devices, and checkpoints that move between devices.

What runs on one device is called in this process; several devices are real processes over the real ProcessGroupHCCL.
They run once, as Ascend910B1: as Ascend910A the scripts run in test_npu_shell.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import demo
import train
import validate
from effdet.data.synthetic.dataset import make_synthetic_dataset

# As in test_two_processes.py: gradients of an initial network are huge, so that small steps keep traces comparable; no
# drop path, whose random numbers each process draws for itself.
COMMON = [
    "--image-size",
    "64",
    "-b",
    "8",
    "-j",
    "0",
    "--sched",
    "constant",
    "--warmup-epochs",
    "0",
    "--cooldown-epochs",
    "0",
    "--lr",
    "3e-5",
    "--model-ema-decay",
    "0.5",
    "--log-interval",
    "1",
    "model.drop_path=0.0",
]

pytestmark = pytest.mark.skipif(os.environ.get("NPU_SIM_SOC") == "Ascend910A", reason="runs once, as Ascend910B1")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_synthetic_dataset(tmp_path_factory.mktemp("data") / "set", num_train=16, num_val=4)


def train_here(data: Path, folder: Path, device: str, epochs: int = 1, *more: str) -> Path:
    # A loading process beside the one that has the NPU, whose batches come through pinned memory.
    more = (*more, "-j", "1") if device == "npu" else (*more, "--no-channels-last")
    argv = [
        "--root",
        str(data),
        *COMMON,
        "--device",
        device,
        "--epochs",
        str(epochs),
        "--output",
        str(folder.parent),
        "--experiment",
        folder.name,
        *more,
    ]
    assert train.main(argv) == 0
    return folder


def losses(folder: Path) -> list[list[float]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [[row[key] for key in ("loss", "class_loss", "box_loss")] for row in rows if row["kind"] == "interval"]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> dict[str, Path]:
    """One epoch on each kind of device."""
    output = tmp_path_factory.mktemp("runs")
    return {device: train_here(data, output / device, device) for device in ("npu", "cpu")}


@pytest.fixture(scope="module")
def two_epochs(data, tmp_path_factory) -> Path:
    """Two epochs without a stop, on the CPU."""
    return train_here(data, tmp_path_factory.mktemp("whole") / "whole", "cpu", 2)


def test_one_device_trains_as_the_cpu(runs):
    mine, theirs = losses(runs["npu"]), losses(runs["cpu"])
    assert len(mine) == 2
    assert mine == [pytest.approx(step, rel=1e-3) for step in theirs]
    text = (runs["npu"] / "log.txt").read_text()
    assert "setting: jit_compile=False" in text and "setting: layers pad by themselves" in text
    assert "on npu:0, Ascend910" in text
    payload = torch.load(runs["npu"] / "last.pth.tar", weights_only=True)
    tensors = [
        *payload["state_dict"].values(),
        *payload["state_dict_ema"].values(),
        *(state["momentum_buffer"] for state in payload["optimizer"]["state"].values()),
    ]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}, "a checkpoint opens without an NPU"
    # Gradients and momentum share one flat tensor on the NPU: it must not be saved once for each parameter.
    sizes = [(runs[device] / "last.pth.tar").stat().st_size for device in ("npu", "cpu")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


@pytest.mark.parametrize(("first", "second"), [("npu", "cpu"), ("cpu", "npu"), ("npu", "npu")])
def test_a_run_goes_on_on_another_device(runs, two_epochs, data, tmp_path, first, second):
    (tmp_path / "part").mkdir()
    checkpoint = tmp_path / "part" / "last.pth.tar"
    checkpoint.write_bytes((runs[first] / "last.pth.tar").read_bytes())
    train_here(data, tmp_path / "on", second, 2, "--resume", str(checkpoint))
    resumed = losses(tmp_path / "on")
    assert resumed[-2:] == [pytest.approx(step, rel=2e-3) for step in losses(two_epochs)[-2:]]
    one, two = (torch.load(folder / "last.pth.tar", weights_only=True) for folder in (two_epochs, tmp_path / "on"))
    assert one["step"] == two["step"] == 4 and two["epoch"] == 1
    momentum = [
        torch.cat([state["momentum_buffer"].flatten() for state in payload["optimizer"]["state"].values()])
        for payload in (one, two)
    ]
    assert (momentum[0] - momentum[1]).norm() < 0.05 * momentum[0].norm()


def test_a_checkpoint_evaluates_alike_everywhere(runs, data, tmp_path):
    for source in ("npu", "cpu"):
        rows = []
        for device in ("npu", "cpu"):
            results = tmp_path / f"{source}-{device}.json"
            assert (
                validate.main(
                    [
                        "--root",
                        str(data),
                        "--checkpoint",
                        str(runs[source] / "last.pth.tar"),
                        "-j",
                        "0",
                        "-b",
                        "4",
                        "--device",
                        device,
                        "--output",
                        "",
                        "--results",
                        str(results),
                    ]
                )
                == 0
            )
            rows.append(json.loads(results.read_text()))
        scores = [sorted((row["score"] for row in part), reverse=True) for part in rows]
        assert len(rows[0]) == len(rows[1]) > 0
        assert scores[0] == pytest.approx(scores[1], rel=1e-3, abs=1e-5)
        assert {row["category_id"] for row in rows[0]} == {row["category_id"] for row in rows[1]}


def test_half_precision_evaluation_runs(runs, data, tmp_path):
    metrics = tmp_path / "metrics.json"
    assert (
        validate.main(
            [
                "--root",
                str(data),
                "--checkpoint",
                str(runs["npu"] / "last.pth.tar"),
                "-j",
                "0",
                "-b",
                "4",
                "--device",
                "npu",
                "--amp",
                "--output",
                "",
                "--metrics",
                str(metrics),
            ]
        )
        == 0
    )
    assert 0 <= json.loads(metrics.read_text())["stats"]["AP50"] <= 1


def test_the_demo_finds_the_same_on_both(runs, data, tmp_path):
    found = []
    for device in ("npu", "cpu"):
        output = tmp_path / device
        assert (
            demo.main(
                [
                    str(data / "val2017"),
                    "--checkpoint",
                    str(runs["cpu"] / "last.pth.tar"),
                    "--device",
                    device,
                    "--score-thr",
                    "0.0",
                    "--output",
                    str(output),
                ]
            )
            == 0
        )
        found.append(json.loads((output / "detections.json").read_text()))
    assert len(found[0]) == len(found[1]) == 4
    for one, other in zip(*found, strict=True):
        assert len(one["objects"]) == len(other["objects"]) == 100
        assert [row["score"] for row in one["objects"]] == pytest.approx(
            [row["score"] for row in other["objects"]], rel=1e-3, abs=1e-5
        )


def test_wrong_requests_end_in_one_line(data, tmp_path, runs):
    for more, text in (
        (["--channels-last"], "does not support the channels-last layout"),
        (["--nms", "fast"], "^2$"),  # at the command line's own door
        (["--nms", "npu"], "not for Ascend910B1"),
        (["--loss-scale", "8", "--no-amp"], "8 would have no effect: float32"),
    ):
        with pytest.raises(SystemExit, match=text):
            train_here(data, tmp_path / "refused", "npu", 1, *more)


def test_two_devices_train_as_one(runs, data, run_simulated, tmp_path):
    folder = tmp_path / "pair"
    done = run_simulated(
        [
            "train.py",
            "--root",
            data,
            *COMMON,
            "--device",
            "npu",
            "--epochs",
            1,
            "--device-list",
            "1,0",
            "--sync-bn",
            "--output",
            tmp_path,
            "--experiment",
            "pair",
        ],
        devices=2,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 process(es), batch 8 (4 each)" in done.stdout + done.stderr
    assert losses(folder) == [pytest.approx(step, rel=1e-4, abs=2e-5) for step in losses(runs["npu"])]
