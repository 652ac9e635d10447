"""metrics.jsonl and TensorBoard's files, by their readers, across restarts of a run."""
from __future__ import annotations

import importlib.util
import json
import logging
from types import SimpleNamespace

import pytest

from effdet.report.log import format_interval_line
from effdet.training.metrics_log import NAME, MetricsLog, check_tensorboard, drop_from, read_rows

LINE = {"steps": 4, "loss_average": 1.5, "class_loss": 0.75, "box_loss": 0.01, "step_s": 0.5, "step_average_s": 0.35,
        "fps": 46.0, "fps_average": 45.0, "lr": 0.16, "data_s": 0.05, "data_average_s": 0.01, "eta_s": 7.0,
        "memory_mib": 2048.0}
has_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None,
                                     reason="tensorboard is not installed")


@pytest.fixture
def logger():
    """The packages' logger without handlers, given back as it was."""
    logger = logging.getLogger("effdet")
    saved, level, logger.handlers = logger.handlers, logger.level, []
    logger.setLevel(logging.INFO)
    yield logger
    logger.handlers = saved
    logger.setLevel(level)


def train(log: MetricsLog, logger: logging.Logger, run: SimpleNamespace, epochs: range, start: int = 0) -> None:
    """Log what epochs of four batches do, two batches to an interval; the loss tells the step."""
    for epoch in epochs:
        for step in (2, 4):
            if epoch > epochs.start or step > start:
                run.steps = 4 * epoch + step
                logger.info(format_interval_line(epoch=epoch, step=step, loss=float(run.steps), **LINE))
        log.add("epoch", epoch, {"loss": 0.5, "skipped": 0})
        log.add("evaluation", epoch, {"AP": epoch / 10, "AP50": float("nan")})


def test_a_line_for_each_interval_epoch_and_evaluation(tmp_path, logger):
    run = SimpleNamespace(steps=0)
    log = MetricsLog(tmp_path, False, lambda: run.steps)
    log.begin(0)
    train(log, logger, run, range(1))
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / NAME).read_text().splitlines()]
    assert rows == [
        {"kind": "interval", "epoch": 0, "global_step": step, "step": step, "steps": 4, "loss": float(step),
         "class_loss": 0.75, "box_loss": 0.01, "lr": 0.16, "img_per_s": 46.0, "data_share": 0.1, "memory_mib": 2048.0}
        for step in (2, 4)] + [
        {"kind": "epoch", "epoch": 0, "global_step": 4, "loss": 0.5, "skipped": 0},
        {"kind": "evaluation", "epoch": 0, "global_step": 4, "AP": 0.0, "AP50": None}]
    assert read_rows(tmp_path / NAME) == rows


@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (1, 0), (1, 2), (2, 0)])
def test_a_resumed_run_has_each_line_once(tmp_path, logger, epoch, step):
    run = SimpleNamespace(steps=0)
    straight = MetricsLog(tmp_path, False, lambda: run.steps)
    straight.begin(0)
    train(straight, logger, run, range(3))
    expected = (tmp_path / NAME).read_text()
    with (tmp_path / NAME).open("a") as file:
        file.write('{"kind": "inter')  # cut off by a crash
    logger.handlers = []
    resumed = MetricsLog(tmp_path, False, lambda: run.steps)
    resumed.begin(epoch, step)
    train(resumed, logger, run, range(epoch, 3), step)
    assert (tmp_path / NAME).read_text() == expected


def test_a_broken_last_line_stays_apart_from_the_next(tmp_path):
    path = tmp_path / NAME
    path.write_text('{"kind": "epoch", "epoch": 0}\n{"kind": "ep')
    MetricsLog(tmp_path, False, lambda: 9).add("epoch", 1, {"loss": 1.0})
    assert [row["epoch"] for row in read_rows(path)] == [0, 1]
    drop_from(path, 1)
    assert path.read_text() == '{"kind": "epoch", "epoch": 0}\n'
    assert read_rows(tmp_path / "none") == []


@has_tensorboard
def test_tensorboard_reads_each_step_once_after_a_restart(tmp_path, logger):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = SimpleNamespace(steps=0)
    log = MetricsLog(tmp_path, True, lambda: run.steps)
    log.begin(0)
    train(log, logger, run, range(2))
    log.writer.close()
    logger.handlers = []
    run.steps = 6  # a checkpoint within epoch 1
    resumed = MetricsLog(tmp_path, True, lambda: run.steps)
    resumed.begin(1, 2)
    train(resumed, logger, run, range(1, 3), 2)
    resumed.writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(k, k) for k in range(2, 13, 2)]
    assert [event.step for event in events.Scalars("val/AP")] == [4, 8, 12]
    assert {"train/lr", "train/img_per_s", "epoch/skipped"} <= set(events.Tags()["scalars"])


def test_tensorboard_asked_for_and_missing_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tensorboard needs the package tensorboard, .* pip install tensorboard"):
        check_tensorboard(True)
    check_tensorboard(False)
