"""What a run writes, by its readers, across restarts of the run and on full disks."""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from effdet.config.schema import RunConfig, RunSectionConfig
from effdet.report.log import EpochStats, EvalStats, StepStats, setup_logging
from effdet.training.recorder import (
    METRICS_LOG_NAME,
    RunRecorder,
    drop_rows_from,
    read_rows,
    steady_rates,
    trackers_of,
)
from effdet.training.trackers import IDS_NAME, TRACKERS, Trackers, check_trackers

STEP = {
    "epoch": 3,
    "global_step": 22229,
    "step": 50,
    "steps": 7393,
    "loss": 1.25,
    "loss_average": 1.5,
    "class_loss": 0.75,
    "box_loss": 0.01,
    "lr": 0.16,
    "step_s": 0.345,
    "step_average_s": 0.35,
    "img_per_s": 46.375,
    "img_per_s_average": 45.714,
    "data_s": 0.012,
    "data_average_s": 0.013,
    "eta_s": 7384.6,
    "memory_mib": 2048.0,
}
has_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


@pytest.fixture(autouse=True)
def logger():
    """The packages' logger without handlers, given back as it was."""
    loggers = [logging.getLogger(name) for name in ("effdet", "timm_patches")]
    saved = [(logger, logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    for logger in loggers:
        logger.handlers[:] = []
        logger.setLevel(logging.INFO)
    yield loggers[0]
    for logger, level, propagate, handlers in saved:
        for handler in logger.handlers:
            handler.close()
        logger.setLevel(level)
        logger.propagate, logger.handlers[:] = propagate, handlers


def make_recorder(folder: Path, steps: int = 0, tensorboard: bool = False, cfg: RunConfig | None = None) -> RunRecorder:
    cfg = cfg or RunConfig(run=RunSectionConfig(tensorboard=tensorboard))
    training = SimpleNamespace(device=torch.device("cpu"), model=SimpleNamespace(config=None), steps=steps)
    categories = SimpleNamespace(class_names=("ball", "box"))
    loader = SimpleNamespace(
        dataset=SimpleNamespace(parser=SimpleNamespace(category_map=categories)),
        mean=torch.zeros(1, 3, 1, 1),
        std=torch.ones(1, 3, 1, 1),
    )
    recorder = RunRecorder(cfg, folder, training, loader, None, None)
    recorder.report = SimpleNamespace(write=lambda evaluator, rows: None)
    return recorder


def train(recorder: RunRecorder, epochs: range, start: int = 0) -> None:
    """Record epochs of four batches, two batches to an interval; the loss tells the step."""
    for epoch in epochs:
        for step in (2, 4):
            if epoch > epochs.start or step > start:
                recorder.on_interval(
                    StepStats(
                        **STEP
                        | {
                            "epoch": epoch,
                            "global_step": 4 * epoch + step,
                            "step": step,
                            "steps": 4,
                            "loss": float(4 * epoch + step),
                            "step_s": 0.5,
                            "data_s": 0.05,
                        }
                    )
                )
        stats = EpochStats(epoch, 4 * epoch + 4, 0.5, 0.25, 0.01, 0.16, 46.0, 2048.0, 0)
        evaluation = EvalStats(epoch / 10, 1.0, {"AP": epoch / 10, "AP50": math.nan})
        recorder.add_epoch(stats, evaluation if epoch else None)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [([], []), ([7], [7]), ([1, 9], [9]), ([1, 10, 90], [10]), ([1, 10, 20, 30, 500], [10, 20, 30])],
)
def test_throughput_leaves_out_the_start_and_the_end(rates: list[int], expected: list[int]) -> None:
    assert steady_rates(rates) == expected


# ---- metrics.jsonl ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [logging.INFO, logging.CRITICAL])
def test_a_row_for_each_interval_epoch_and_evaluation_whatever_is_logged(tmp_path, capsys, level):
    setup_logging(tmp_path).setLevel(level)
    recorder = make_recorder(tmp_path)
    recorder.begin(0, 0)
    train(recorder, range(2))
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / METRICS_LOG_NAME).open()]
    assert rows == [
        row
        for epoch in range(2)
        for row in [
            *(
                {
                    "kind": "interval",
                    "epoch": epoch,
                    "global_step": 4 * epoch + step,
                    "step": step,
                    "steps": 4,
                    "loss": 4.0 * epoch + step,
                    "class_loss": 0.75,
                    "box_loss": 0.01,
                    "lr": 0.16,
                    "img_per_s": 46.375,
                    "data_share": 0.1,
                    "memory_mib": 2048.0,
                }
                for step in (2, 4)
            ),
            {
                "kind": "epoch",
                "epoch": epoch,
                "global_step": 4 * epoch + 4,
                "loss": 0.5,
                "class_loss": 0.25,
                "box_loss": 0.01,
                "lr": 0.16,
                "img_per_s": 46.0,
                "memory_mib": 2048.0,
                "skipped": 0,
            },
            *([{"kind": "evaluation", "epoch": 1, "global_step": 8, "AP": 0.1, "AP50": None}] if epoch else []),
        ]
    ]
    assert read_rows(tmp_path / METRICS_LOG_NAME) == rows
    assert (
        capsys.readouterr().out.count("Train: ")
        == (tmp_path / "log.txt").read_text().count("Train: ")
        == (4 if level == logging.INFO else 0)
    )


@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (1, 0), (1, 2), (2, 0)])
def test_a_resumed_run_has_each_row_once(tmp_path, epoch, step):
    names = (METRICS_LOG_NAME, "summary.csv")
    recorder = make_recorder(tmp_path)
    recorder.begin(0, 0)
    train(recorder, range(3))
    expected = [(tmp_path / name).read_text() for name in names]
    for name, part in zip(names, ('{"kind": "inter', "7"), strict=True):
        with (tmp_path / name).open("a") as file:
            file.write(part)  # cut off by a crash
    resumed = make_recorder(tmp_path, 4 * epoch + step)
    resumed.begin(epoch, step)
    train(resumed, range(epoch, 3), step)
    assert [(tmp_path / name).read_text() for name in names] == expected


def test_a_broken_last_row_stays_apart_from_the_next(tmp_path):
    path = tmp_path / METRICS_LOG_NAME
    path.write_text('{"kind": "epoch", "epoch": 0}\n{"kind": "ep')
    make_recorder(tmp_path).add_epoch(EpochStats(1, 8, 0.5, 0.25, 0.01, 0.16, 46.0, 2048.0, 0), None)
    assert [row["epoch"] for row in read_rows(path)] == [0, 1]
    drop_rows_from(path, 1)
    assert path.read_text() == '{"kind": "epoch", "epoch": 0}\n'
    assert read_rows(tmp_path / "none") == []


def test_files_that_cannot_be_written_are_said_once_and_end_nothing(tmp_path, capsys):
    """Every write to /dev/full fails as on a full disk; a folder in a file's place fails too.

    summary.csv is not one of those that only inform.
    """
    for name in ("log.txt", METRICS_LOG_NAME):
        (tmp_path / name).symlink_to("/dev/full")
    (tmp_path / "summary.csv").mkdir()
    setup_logging(tmp_path)
    recorder = make_recorder(tmp_path)
    epoch = EpochStats(1, 8, 0.5, 0.25, 0.01, 0.16, 46.0, 2048.0, 0)
    for step in (1, 2):
        recorder.on_interval(StepStats(**STEP | {"step": step}))
    said = capsys.readouterr()
    assert said.out.count("Train: 3") == 2 and "Traceback" not in said.err
    for name in ("log.txt", METRICS_LOG_NAME):
        assert said.out.count(f"{name} cannot be written (") == 1, said.out
    (tmp_path / METRICS_LOG_NAME).unlink()  # there is room again
    with pytest.raises(OSError, match="summary.csv"):
        recorder.add_epoch(epoch, None)
    assert [row["epoch"] for row in read_rows(tmp_path / METRICS_LOG_NAME)] == [1]


@has_tensorboard
def test_tensorboard_reads_each_step_once_after_a_restart(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recorder = make_recorder(tmp_path, tensorboard=True)
    recorder.begin(0, 0)
    train(recorder, range(2))
    recorder.trackers.close()
    resumed = make_recorder(tmp_path, 6, tensorboard=True)  # a checkpoint within epoch 1
    resumed.begin(1, 2)
    train(resumed, range(1, 3), 2)
    resumed.trackers.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(k, k) for k in range(2, 13, 2)]
    assert [event.step for event in events.Scalars("val/AP")] == [8, 12]
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("epoch/")}
    assert tags == {
        f"epoch/{name}" for name in ("loss", "class_loss", "box_loss", "lr", "img_per_s", "memory_mib", "skipped")
    }


def test_tensorboard_asked_for_and_missing_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in TRACKERS:
        with pytest.raises(ValueError, match=f"--log-to {name} needs the package {name}, .* pip install {name}"):
            check_trackers([name])
    check_trackers([])
    both = RunConfig(run=RunSectionConfig(tensorboard=True, log_to=["wandb", "tensorboard"]))
    assert trackers_of(both) == ["wandb", "tensorboard"] and trackers_of(RunConfig()) == []


def test_a_failing_service_is_one_warning_and_the_others_go_on(tmp_path, caplog, monkeypatch):
    class Failing:
        def __init__(self, folder, run_id, settings, done) -> None:
            self.rows, self.fails_at = [], int(settings["run"]["seed"])
            if not self.fails_at:
                raise OSError("no network")

        def log(self, values, step) -> None:
            if step >= self.fails_at:
                raise RuntimeError("gone")
            self.rows.append(step)

        def flush(self) -> None: ...

        def close(self) -> None:
            raise RuntimeError("nobody there")

    monkeypatch.setitem(TRACKERS, "wandb", Failing)
    for fails_at, expected in ((0, []), (5, [2, 4, 4]), (100, [2, 4, 4, 6, 8, 8, 8])):
        caplog.clear()
        folder = tmp_path / str(fails_at)
        folder.mkdir()
        cfg = RunConfig(run=RunSectionConfig(log_to=["wandb"], seed=fails_at))
        recorder = make_recorder(folder, cfg=cfg)
        recorder.begin(0, 0)
        service = recorder.trackers.open.get("wandb")
        train(recorder, range(2))
        assert (service.rows if service else []) == expected
        recorder.trackers.close()
        assert recorder.trackers.open == {}
        warnings = [r for r in caplog.records if r.levelno == logging.WARNING and "--log-to wandb" in r.getMessage()]
        assert len(warnings) == 1
        assert len(read_rows(folder / METRICS_LOG_NAME)) == 7, "the run's own file has everything"


def test_a_resumed_run_is_the_same_run_to_a_service(tmp_path, monkeypatch):
    begun = []

    def begin(folder, run_id, settings, done):
        begun.append((run_id, done))
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setitem(TRACKERS, "swanlab", begin)
    (tmp_path / "other").mkdir()
    for folder, done in ((tmp_path, 0), (tmp_path, 8), (tmp_path / "other", 0)):
        Trackers(["swanlab"], folder, {}, done).close()
    (first, _), (again, done), (other, _) = begun
    assert first == again != other and done == 8 and len(first) == 16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_service_that_is_offline_has_the_whole_run_under_one_id(name, tmp_path, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_SAVE_DIR", str(tmp_path / "home"))
    cfg = RunConfig(run=RunSectionConfig(log_to=[name]))
    for steps, epochs, start in ((0, range(2), 0), (6, range(1, 3), 2)):
        recorder = make_recorder(tmp_path, steps, cfg=cfg)
        recorder.begin(epochs.start, start)
        train(recorder, epochs, start)
        assert list(recorder.trackers.open) == [name], "it has not failed"
        recorder.trackers.close()
    run_id = json.loads((tmp_path / IDS_NAME).read_text())[name]
    pattern = f"wandb/offline-run-*-{run_id}/*.wandb" if name == "wandb" else f"swanlab/run-*-{run_id}/*.swanlab"
    files = sorted(tmp_path.glob(pattern))
    assert len(files) == 2, "both starts are of one run"
    assert all(b"train/loss" in file.read_bytes() for file in files)


# ---- summary.csv -----------------------------------------------------------------------------------------------------


def test_summary_has_a_row_for_each_epoch(tmp_path):
    train(make_recorder(tmp_path), range(2))
    with (tmp_path / "summary.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {
        "epoch": "0",
        "train_loss": "0.5",
        "train_class_loss": "0.25",
        "train_box_loss": "0.01",
        "lr": "0.16",
        "img_per_s": "46.0",
        "skipped": "0",
        "AP": "",
        "AP50": "",
    }
    assert (second["epoch"], second["AP"], second["AP50"]) == ("1", "0.1", "")


def test_summary_is_not_made_before_there_is_an_epoch(tmp_path) -> None:
    make_recorder(tmp_path).begin(0, 0)
    assert not (tmp_path / "summary.csv").exists()


def test_a_resumed_run_drops_the_csv_rows_it_will_write_anew(tmp_path) -> None:
    train(make_recorder(tmp_path), range(12))
    make_recorder(tmp_path).begin(10, 0)
    lines = (tmp_path / "summary.csv").read_text(encoding="utf-8").splitlines()
    assert [line.partition(",")[0] for line in lines] == ["epoch", *map(str, range(10))]


# ---- the first batch -------------------------------------------------------------------------------------------------


def test_the_first_batch_is_drawn_once_in_the_life_of_a_run(tmp_path):
    """The image is grey but for what is drawn on it."""
    images = torch.full((2, 3, 64, 64), 128.0)
    boxes_yxyx = torch.tensor([[[8.0, 8.0, 40.0, 50.0]], [[20.0, 4.0, 60.0, 30.0]]])
    target = {"bbox": boxes_yxyx, "cls": torch.tensor([[1], [2]])}
    path = tmp_path / "train_batch.jpg"
    recorder = make_recorder(tmp_path)
    recorder.on_batch(0, 0, 4, images, target)
    assert not path.exists(), "before the run begins nothing is written"
    recorder.begin(0, 0)
    recorder.on_batch(0, 0, 4, images, target)
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    assert np.ptp(pixels, axis=2).max() > 60, "coloured boxes"
    before = path.read_bytes()
    recorder.on_batch(0, 1, 4, images + 50, target)
    resumed = make_recorder(tmp_path)
    resumed.begin(0, 2)
    resumed.on_batch(0, 2, 4, images + 50, target)
    assert path.read_bytes() == before


def test_a_batch_that_cannot_be_drawn_is_one_warning(tmp_path, capsys):
    setup_logging(None)
    recorder = make_recorder(tmp_path)
    recorder.begin(0, 0)
    for step in range(3):
        recorder.on_batch(0, step, 4, torch.zeros(2, 3, 8, 8), {})
    assert capsys.readouterr().out.count("the first training batch could not be drawn (KeyError") == 1
