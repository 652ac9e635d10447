"""The one screen at a run's start and the commands at its end, and how fast a detector is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from effdet import create_model
from effdet.bench import DetBenchPredict
from effdet.config.cli import parse_demo_args, parse_train_args, parse_validate_args
from effdet.factory import place_model
from effdet.predict import speed
from effdet.report.summary import count_macs, describe_start, next_commands


# Source: table 2 of the EfficientDet paper gives 2.5 and 6.1 billion for D0 and D1.
@pytest.mark.parametrize(("name", "published"), [("tf_efficientdet_d0", 2.5e9), ("tf_efficientdet_d1", 6.1e9)])
def test_multiply_adds_are_those_of_the_paper(name, published):
    model = create_model(name, pretrained_backbone=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    counted = count_macs(model, model.config.image_size)
    assert counted == pytest.approx(published, rel=0.02)
    place_model(model, torch.device("cpu"), "kernel")
    assert count_macs(model, model.config.image_size) == counted, "how padding is done changes nothing"
    state = model.state_dict()
    assert all(torch.equal(state[key], value) and state[key].device.type == "cpu" for key, value in before.items())


def test_multiply_adds_by_hand():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1, stride=2),
        torch.nn.BatchNorm2d(8),
        torch.nn.Conv2d(8, 8, 3, groups=8),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 6 * 6, 5),
    )
    assert count_macs(model, (16, 16)) == 8 * 8 * 8 * 27 + 6 * 6 * 8 * 9 + 288 * 5
    assert model.training, "the network itself is not touched"


def set_of(count: int, boxes: int):
    class Set:
        class parser:
            class category_map:
                names = tuple(f"class{k}" for k in range(10))

            class report:
                num_boxes = boxes

        def __len__(self):
            return count

    return Set()


def test_start_says_what_a_user_checks():
    cfg = parse_train_args(
        [
            "--root",
            "x",
            "-b",
            "64",
            "--grad-accum",
            "4",
            "--lr",
            "0.32",
            "--epochs",
            "20",
            "--max-steps",
            "900",
            "--val-interval",
            "2",
            "--no-model-ema",
        ]
    )
    model = create_model("tf_efficientdet_d0", pretrained_backbone=False, num_classes=10, image_size=(128, 256))
    model.backbone.requires_grad_(False)
    lines, details = describe_start(
        cfg,
        model,
        set_of(1000, 5000),
        set_of(50, 300),
        "cuda:0, a card",
        8,
        True,
        30,
        15,
        "float32",
        Path("out") / "run",
    )
    text = {line.split()[0]: line.strip().split(None, 1)[1] for line in [*details, *lines]}
    frozen = sum(p.numel() for p in model.backbone.parameters()) / 1e6
    free = sum(p.numel() for p in model.parameters()) / 1e6 - frozen
    for key, values in {
        "model": (
            "tf_efficientdet_d0",
            "128x256 px",
            f"{free:.2f} M",
            f"{frozen:.2f} M frozen",
        ),
        "work": (f"{count_macs(model, (128, 256)) / 1e9:.2f} GMACs", "channels-last"),
        "data": ("1000 images, 5000 boxes", "50 images, 300 boxes"),
        "classes": ("10: class0, ", "class7", "2 more"),
        "device": ("cuda:0", "a card", "8 process", "float32"),
        "output": (str(Path("out") / "run"),),
        "batch": ("64 x 4 ",),
        "length": ("30 epochs", "15 steps with 64 images", ": 450 steps", "every 2"),
        "lr": ("0.32 for 256 ", "0.00125", "cosine"),
        "optimizer": ("no EMA", "clip norm 10"),
    }.items():
        assert all(value in text[key] for value in values), text[key]
    assert "class8" not in text["classes"] and all(line.isascii() for line in [*lines, *details])


@pytest.mark.parametrize(
    ("given", "longer"),
    [
        (["--root", "my data", "--epochs", "7"], ("epochs", 14)),
        (
            [
                "--val-images",
                "v",
                "--val-ann",
                "v.json",
                "--train-images",
                "t",
                "--train-ann",
                "t.json",
                "--max-steps",
                "90",
                "--amp",
                "--amp-dtype",
                "bfloat16",
                "--device",
                "cpu",
                "-j",
                "0",
            ],
            ("max_steps", 180),
        ),
    ],
)
def test_the_next_commands_are_understood(given, longer, tmp_path):
    from effdet.config.load import dump_yaml

    cfg = parse_train_args([*given, "-b", "16"])
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_yaml(cfg))
    validate, demo, resume = [
        shlex.split(line)[1:] for line in next_commands(cfg, folder, folder / "model_best.pth.tar", Path("v/a b.jpg"))
    ]
    assert [validate[0], demo[0], resume[0]] == ["validate.py", "demo.py", "train.py"]
    asked = parse_validate_args(validate[1:])
    assert (asked.run.checkpoint, asked.run.batch_size) == (str(folder / "model_best.pth.tar"), 16)
    assert (asked.data.root, asked.data.val_ann, asked.data.workers) == (
        cfg.data.root,
        cfg.data.val_ann,
        cfg.data.workers,
    )
    assert (asked.amp.enabled, asked.amp.dtype, asked.run.device) == (cfg.amp.enabled, cfg.amp.dtype, cfg.run.device)
    assert parse_demo_args(demo[1:]).run.images == ["v/a b.jpg"]
    again = parse_train_args(resume[1:])
    assert again.run.resume == str(folder / "last.pth.tar") and again.data == cfg.data
    assert {"epochs": again.sched.epochs, "max_steps": again.run.max_steps}[longer[0]] == longer[1]


def test_speed_counts_after_the_warm_up_and_for_a_image(monkeypatch):
    """A device that is asked for 8 s and 2 s of work a batch of 4, for more at first; the clock moves as one waits."""
    now, asked, calls = [0.0], [0.0], []

    class Bench:
        def head_outputs(self, images):
            calls.append("model")
            asked[0] += 8.0 if len(calls) > 6 else 100.0
            return [], []

        def post_process(self, cls_outputs, box_outputs, img_scale, img_size):
            calls.append("post")
            asked[0] += 2.0

    def wait(device):
        now[0], asked[0] = now[0] + asked[0], 0.0

    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(speed, "synchronize", wait)
    monkeypatch.setattr(speed, "_BATCHES", 5)
    monkeypatch.setattr(speed, "_LIMIT_S", 1e9)
    measured = speed.measure_speed(Bench(), torch.zeros(4, 3, 8, 8), {})
    assert measured == (2000.0, 500.0, 4, 5) and calls == ["model", "post"] * 8
    assert [float(number) for number in re.findall(r"\d+\.?\d*", str(measured))] == [2000, 500, 0.4, 5, 4]
    calls.clear()
    monkeypatch.setattr(speed, "_LIMIT_S", 1.0)
    assert speed.measure_speed(Bench(), torch.zeros(1, 3, 8, 8), {}).batches == 1


def test_speed_of_a_real_detector(monkeypatch):
    monkeypatch.setattr(speed, "_BATCHES", 2)
    model = create_model("tf_efficientdet_d0", pretrained_backbone=False, image_size=(128, 128))
    bench = DetBenchPredict(model).eval()
    info = {"img_scale": torch.ones(1), "img_size": torch.full((1, 2), 128.0)}
    measured = speed.measure_speed(bench, torch.zeros(1, 3, 128, 128), info)
    assert measured.model_ms > measured.post_ms > 0 and measured.batches == 2
