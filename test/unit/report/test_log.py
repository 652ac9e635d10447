"""Where the log goes on each rank, and its lines as scripts read them."""

from __future__ import annotations

import datetime
import logging
import math
import re
import subprocess
import sys
from typing import Any

import pytest

from effdet.report.log import StepStats, format_best_metric, format_duration, format_interval_line, setup_logging

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


pytestmark = pytest.mark.usefixtures("restored_loggers")


def test_rank_0_writes_each_line_once_to_both_places(tmp_path, capsys) -> None:
    for _ in range(3):
        logger = setup_logging(tmp_path / "run", rank=0)
    logger.info("hello %d", 1)
    logging.getLogger("effdet.training.engine").warning("loud")
    logging.getLogger("timm_patches.x").info("patched")
    logger.debug("a detail")
    assert capsys.readouterr().out == "hello 1\nloud\npatched\n"
    setup_logging(tmp_path / "run", rank=0).info("resumed")
    lines = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8").splitlines()
    words = [line.split(None, 3) for line in lines]
    assert [tuple(line[2:]) for line in words] == [
        ("INFO", "hello 1"),
        ("WARNING", "loud"),
        ("INFO", "patched"),
        ("DEBUG", "a detail"),
        ("INFO", "resumed"),
    ]
    now = datetime.datetime.now()
    assert all(abs(now - datetime.datetime.fromisoformat(" ".join(line[:2]))).total_seconds() < 60 for line in words)


def test_other_ranks_only_warn_and_write_no_file(tmp_path, capsys) -> None:
    logger = setup_logging(tmp_path / "run", rank=3)
    logger.info("quiet")
    logger.warning("careful")
    assert capsys.readouterr().out == "[rank 3] WARNING: careful\n"
    assert not (tmp_path / "run").exists()


def test_lines_reach_a_pipe_before_the_process_ends() -> None:
    code = (
        "import logging, time; logging.basicConfig(); from effdet.report.log import setup_logging\n"
        "setup_logging(None).info('now'); time.sleep(60)"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "now\n"
        process.kill()
        assert process.stderr.read() == ""  # nothing twice through the root logger


def test_interval_line() -> None:
    assert format_interval_line(StepStats(**STEP)) == (
        "Train: 3 [  50/7393 (  1%)]  Loss: 1.25000 (1.50000)  Class: 0.75000  Box: 0.010000  "
        "Time: 0.345s (0.350s)  FPS: 46.38 (45.71) img/s  LR: 1.600e-01  Data: 0.012s (0.013s)  ETA: 2:03:05"
    )


@pytest.mark.parametrize(
    ("label", "value"), [("Loss", 1.25), ("Time", 0.345), ("FPS", 46.38), ("LR", 0.16), ("Data", 0.012)]
)
def test_interval_line_can_be_cut_by_label(label: str, value: float) -> None:
    (found,) = re.findall(rf"{label}: +([0-9.e+-]+)", format_interval_line(StepStats(**STEP)))
    assert float(found) == value


def test_interval_line_of_odd_runs() -> None:
    def line(**values: Any) -> str:
        return format_interval_line(StepStats(**STEP | values))

    assert "[   1/1 (100%)]" in line(step=1, steps=1)
    assert "[ 12345/123456 ( 10%)]" in line(step=12345, steps=123456)
    assert "Loss: nan (inf)" in line(loss=math.nan, loss_average=math.inf)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00:00"),
        (59.6, "0:01:00"),
        (3661, "1:01:01"),
        (86399, "23:59:59"),
        (183845, "2d 03:04:05"),
        (-3, "0:00:00"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_best_metric_line() -> None:
    assert format_best_metric(0.3346, 250) == "*** Best metric: 0.33460 (epoch 250)"
    assert format_best_metric(0.0, 0) == "*** Best metric: 0.00000 (epoch 0)"
    assert format_best_metric(None, None) == "*** Best metric: n/a (no evaluation)"
