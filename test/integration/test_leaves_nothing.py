"""A process that a signal ends leaves no temporary file and no process; outputs are tried before the work."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from real_process import Process, train_argv, wait_until_gone

from effdet.data.synthetic.dataset import make_synthetic_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_synthetic_dataset(tmp_path_factory.mktemp("data") / "set", num_train=8, num_val=24)


def end_by(process: Process, signum: int, temporary: Path, folders: int) -> None:
    """Send a signal as soon as so many temporary folders are there, and check what is left."""
    end = time.monotonic() + 120
    while len(list(temporary.iterdir())) < folders:
        assert time.monotonic() < end and process.process.poll() is None, process.output()
        time.sleep(0.01)
    family = process.family()
    process.process.send_signal(signum)
    assert process.wait() == 128 + signum, process.output()
    assert not wait_until_gone(family)
    assert list(temporary.iterdir()) == []
    assert "Traceback" not in process.output()


@pytest.mark.slow  # the evaluation may be over before the signal where the machine is loaded
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_validate(name, data, small_checkpoint, tmp_path):
    (tmp_path / "t").mkdir()
    content = json.loads((data / "annotations/instances_val2017.json").read_text())
    content["categories"] = [{"id": number, "name": name} for number, name in ((3, "ball"), (7, "box"), (12, "star"))]
    content["annotations"] = [one for one in content["annotations"] if one["category_id"] in (3, 7, 12)]
    (tmp_path / "val.json").write_text(json.dumps(content))
    argv = ["validate.py", "--val-images", data / "val2017", "--val-ann", tmp_path / "val.json"]
    argv += ["--checkpoint", small_checkpoint, "-b", 1, "-j", 1, "--device", "cpu", "--output", tmp_path / "out"]
    process = Process([str(part) for part in argv], tmp_path / "log.txt", environment={"TMPDIR": str(tmp_path / "t")})
    try:
        end_by(process, getattr(signal, name), tmp_path / "t", 1)
        assert not (tmp_path / "out/metrics.json").exists()
    finally:
        process.end()


@pytest.mark.parametrize("devices", ["0", "0,1"])
def test_train(devices, data, tmp_path):
    """Signalled when the loader's folder is made, so while the run is prepared; with a launcher it is there before."""
    (tmp_path / "t").mkdir()
    argv = train_argv(data, tmp_path / "runs", "-j", 2, "--device-list", devices)
    process = Process(["train.py", *argv], tmp_path / "log.txt", environment={"TMPDIR": str(tmp_path / "t")})
    try:
        end_by(process, signal.SIGHUP, tmp_path / "t", 1 if devices == "0" else 3)
    finally:
        process.end()


def test_a_refused_run_closes_its_files(data, tmp_path):
    argv = train_argv(data, tmp_path / "runs", "-b", 1)
    process = Process(["-W", "default::ResourceWarning", "train.py", *argv], tmp_path / "log.txt")
    assert process.wait() == 1 and "ResourceWarning" not in process.output()
    assert "batch norms" in process.output().splitlines()[-1]


@pytest.mark.parametrize("flag", ["--results", "--metrics", "--output"])
def test_what_validate_cannot_write_is_refused_before_the_work(flag, tmp_path):
    (tmp_path / "file").write_text("mine")
    argv = ["validate.py", "--root", "/nowhere", "--checkpoint", "/nowhere", flag, str(tmp_path / "file/below")]
    process = Process(argv, tmp_path / "log.txt")
    assert process.wait() == 1
    (line,) = process.output().splitlines()
    assert flag in line and str(tmp_path / "file/below") in line and (tmp_path / "file").read_text() == "mine"
