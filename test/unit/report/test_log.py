"""The log's lines as scripts read them, meters by hand, the csv across restarts."""
from __future__ import annotations

import json
import logging
import re
import subprocess
import sys

import pytest
import torch

from effdet.report.log import (
    AverageMeter,
    CsvLog,
    ThroughputMeter,
    add_run_facts,
    format_best_metric,
    format_duration,
    format_interval_line,
    format_train_avg_fps,
    setup_logging,
)
from effdet.training.metrics_log import MetricsLog, read_rows

LINE = {"epoch": 3, "step": 50, "steps": 7393, "loss": 1.25, "loss_average": 1.5, "class_loss": 0.75, "box_loss": 0.01,
        "step_s": 0.345, "step_average_s": 0.35, "fps": 46.375, "fps_average": 45.714, "lr": 0.16, "data_s": 0.012,
        "data_average_s": 0.013, "eta_s": 7384.6}


@pytest.fixture(autouse=True)
def restore_loggers():
    """Give the loggers back as they were: what is set here is for a whole process."""
    saved = {name: (log := logging.getLogger(name), log.level, log.propagate, log.handlers[:])
             for name in ("effdet", "timm_patches")}
    for logger, *_ in saved.values():
        logger.handlers[:] = []  # what is replaced is closed, and these are to be given back
    yield
    for logger, level, propagate, handlers in saved.values():
        for handler in logger.handlers:
            handler.close()
        logger.setLevel(level)
        logger.propagate, logger.handlers[:] = propagate, handlers


def test_rank_0_writes_each_line_once_to_both_places(tmp_path, capsys) -> None:
    for _ in range(3):
        logger = setup_logging(tmp_path / "run", rank=0)
    logger.info("hello %d", 1)
    logging.getLogger("effdet.training.engine").warning("loud")
    logging.getLogger("timm_patches.x").info("patched")
    logger.debug("not shown")
    assert capsys.readouterr().out == "hello 1\nloud\npatched\n"
    assert (tmp_path / "run" / "log.txt").read_text(encoding="utf-8") == "hello 1\nloud\npatched\n"
    setup_logging(tmp_path / "run", rank=0).info("resumed")
    assert (tmp_path / "run" / "log.txt").read_text(encoding="utf-8").endswith("patched\nresumed\n")


def test_other_ranks_only_warn_and_write_no_file(tmp_path, capsys) -> None:
    logger = setup_logging(tmp_path / "run", rank=3)
    logger.info("quiet")
    logger.warning("careful")
    assert capsys.readouterr().out == "[rank 3] WARNING: careful\n"
    assert not (tmp_path / "run").exists()


def test_lines_reach_a_pipe_before_the_process_ends() -> None:
    code = ("import logging, time; logging.basicConfig(); from effdet.report.log import setup_logging\n"
            "setup_logging(None).info('now'); time.sleep(60)")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "now\n"
        process.kill()
        assert process.stderr.read() == ""  # nothing twice through the root logger


def test_interval_line() -> None:
    assert format_interval_line(**LINE) == (
        "Train: 3 [  50/7393 (  1%)]  Loss: 1.25000 (1.50000)  Class: 0.75000  Box: 0.010000  "
        "Time: 0.345s (0.350s)  FPS: 46.38 (45.71) img/s  LR: 1.600e-01  Data: 0.012s (0.013s)  ETA: 2:03:05")


@pytest.mark.parametrize(("label", "value"), [("Loss", 1.25), ("Time", 0.345), ("FPS", 46.38), ("LR", 0.16),
                                              ("Data", 0.012)])
def test_interval_line_can_be_cut_by_label(label: str, value: float) -> None:
    (found,) = re.findall(rf"{label}: +([0-9.e+-]+)", format_interval_line(**LINE))
    assert float(found) == value


def test_interval_line_of_odd_runs() -> None:
    assert "[   1/1 (100%)]" in format_interval_line(**{**LINE, "step": 1, "steps": 1})
    assert "[ 12345/123456 ( 10%)]" in format_interval_line(**{**LINE, "step": 12345, "steps": 123456})
    assert "Loss: nan (inf)" in format_interval_line(**{**LINE, "loss": float("nan"), "loss_average": float("inf")})


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"),
                                               (86399, "23:59:59"), (183845, "2d 03:04:05"), (-3, "0:00:00")])
def test_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_average_meter_weighs_and_takes_tensors() -> None:
    meter = AverageMeter()
    assert meter.average == 0.0
    meter.update(2.0, 3)
    meter.update(6.0)
    assert (meter.value, meter.average, meter.count) == (6.0, 3.0, 4)
    meter = AverageMeter()
    meter.update(torch.tensor(1.0), 1)
    meter.update(torch.tensor(4.0), 2)
    assert isinstance(meter.average, torch.Tensor) and float(meter.average) == 3.0


@pytest.mark.parametrize(("rates", "expected", "counted"), [
    ([], 0.0, 0), ([7], 7.0, 1), ([1, 9], 9.0, 1), ([1, 10, 90], 10.0, 1), ([1, 10, 20, 30, 500], 20.0, 3)])
def test_throughput_leaves_out_the_start_and_the_end(rates: list[int], expected: float, counted: int) -> None:
    meter = ThroughputMeter(warmup_intervals=1)
    for rate in rates:
        assert meter.add(images=rate * 2, seconds=2.0) == rate
    assert meter.average() == expected and meter.intervals == counted


def test_throughput_with_a_longer_warm_up() -> None:
    meter = ThroughputMeter(warmup_intervals=2)
    for rate in (1, 2, 30, 50, 900):
        meter.add(rate, 1.0)
    assert meter.average() == 40.0
    assert format_train_avg_fps(meter) == "TrainAvgFPS: mean img/s of 2 intervals AvgFPS:40.00"


def test_best_metric_line() -> None:
    assert format_best_metric(0.3346, 250) == "*** Best metric: 0.33460 (epoch 250)"
    assert format_best_metric(0.0, 0) == "*** Best metric: 0.00000 (epoch 0)"
    assert format_best_metric(None, None) == "*** Best metric: n/a (no evaluation)"


def test_csv_continues_a_file_in_its_own_column_order(tmp_path) -> None:
    path = tmp_path / "run" / "summary.csv"
    CsvLog(path).append({"epoch": 0, "loss": 1.5, "note": "a, b"})
    CsvLog(path).append({"note": "", "loss": 1.25, "epoch": 1})
    assert path.read_text(encoding="utf-8") == 'epoch,loss,note\n0,1.5,"a, b"\n1,1.25,\n'


def test_csv_survives_a_cut_off_row(tmp_path) -> None:
    path = tmp_path / "summary.csv"
    path.write_text("epoch,loss\n0,1.5\n1,1.", encoding="utf-8")
    CsvLog(path).append({"epoch": 1, "loss": 1.25})
    assert path.read_text(encoding="utf-8").splitlines() == ["epoch,loss", "0,1.5", "1,1.", "1,1.25"]
    path.write_text("", encoding="utf-8")
    CsvLog(path).append({"epoch": 1, "loss": 1.25})
    assert path.read_text(encoding="utf-8") == "epoch,loss\n1,1.25\n"


def test_csv_refuses_other_columns_and_keeps_the_file(tmp_path) -> None:
    path = tmp_path / "summary.csv"
    log = CsvLog(path)
    log.append({"epoch": 0, "loss": 1.5})
    for row in ({"epoch": 1}, {"epoch": 1, "loss": 1.0, "map": 0.1}):
        with pytest.raises(ValueError, match="has the columns epoch, loss"):
            log.append(row)
    assert path.read_text(encoding="utf-8") == "epoch,loss\n0,1.5\n"


def test_interval_lines_become_rows_of_losses(tmp_path) -> None:
    logger = setup_logging(tmp_path, rank=0)
    logger.info(format_interval_line(**LINE))
    logger.info("Train: 3 [not a line of an interval]")
    setup_logging(tmp_path, rank=1).warning(format_interval_line(**LINE))  # another rank has no files
    setup_logging(tmp_path, rank=0).info(format_interval_line(**{**LINE, "step": 100, "loss": float("nan")}))
    assert (tmp_path / "losses.csv").read_text(encoding="utf-8").splitlines() == [
        "epoch,step,loss,class_loss,box_loss,lr,img_per_s", "3,50,1.25,0.75,0.01,0.16,46.375",
        "3,100,nan,0.75,0.01,0.16,46.375"]


def test_a_resumed_run_drops_the_rows_it_will_write_anew(tmp_path) -> None:
    log = CsvLog(tmp_path / "losses.csv")
    log.drop_from(0)
    assert not log.path.exists(), "nothing to drop, nothing made"
    for epoch in (8, 9, 10, 11):
        log.append({"epoch": epoch, "loss": epoch / 2})
    with log.path.open("a", encoding="utf-8") as file:
        file.write("7")  # cut off by a crash
    log.drop_from(10)
    assert log.path.read_text(encoding="utf-8") == "epoch,loss\n8,4.0\n9,4.5\n"
    log.drop_from(0)
    assert log.path.read_text(encoding="utf-8") == "epoch,loss\n"
    assert [path.name for path in tmp_path.iterdir()] == ["losses.csv"]


def test_run_facts_join_the_metrics(tmp_path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text('{"stats": {"AP": 0.25}, "run": {"old": 1}}', encoding="utf-8")
    add_run_facts(path, {"img_per_s": 16.5, "best_AP": None})
    assert json.loads(path.read_text()) == {"stats": {"AP": 0.25}, "run": {"img_per_s": 16.5, "best_AP": None}}
    with pytest.raises(ValueError, match="JSON"):
        add_run_facts(path, {"img_per_s": float("nan")})
    assert json.loads(path.read_text())["run"]["img_per_s"] == 16.5, "the file that was there stays"
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]


def test_files_that_cannot_be_written_are_said_once_and_end_nothing(tmp_path, capsys):
    """Every write to /dev/full fails as on a full disk; a folder in a file's place fails too."""
    (tmp_path / "log.txt").symlink_to("/dev/full")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    (tmp_path / "losses.csv").mkdir()
    logger = setup_logging(tmp_path)
    metrics = MetricsLog(tmp_path, False, lambda: 3)
    for step in (1, 2):
        metrics.add("epoch", 0, {"loss": 1.0})
        logger.info(format_interval_line(**LINE | {"epoch": 0, "step": step, "steps": 2}))
    said = capsys.readouterr()
    assert said.out.count("Train: 0") == 2 and "Traceback" not in said.err
    for name in ("log.txt", "losses.csv", "metrics.jsonl"):
        assert said.out.count(f"{name} cannot be written (") == 1, said.out
    (tmp_path / "metrics.jsonl").unlink()  # there is room again
    metrics.add("epoch", 1, {"loss": 0.5})
    assert [row["epoch"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]
