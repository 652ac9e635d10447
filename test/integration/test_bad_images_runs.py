"""Runs of train.py and validate.py over data that break on the way, and runs refused before their first step."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from broken_data import copy_set, unprivileged

import train
import validate
from effdet.config.check import NEEDS, inert_settings
from effdet.config.cli import parse_train_args
from effdet.data.synthetic.dataset import make_synthetic_dataset
from effdet.training.run_dir import choose_output_dir

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_synthetic_dataset(tmp_path_factory.mktemp("whole") / "set", num_train=8, num_val=3)


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    return copy_set(whole, tmp_path / "set")


def images(root: Path, split: str = "train") -> list[Path]:
    return sorted((root / f"{split}2017").iterdir())


def argv(root: Path, output: Path, *more: object) -> list[str]:
    fixed = (
        "--root",
        root,
        "--image-size",
        64,
        "-b",
        4,
        "-j",
        0,
        "--device",
        "cpu",
        "--epochs",
        1,
        "--warmup-epochs",
        0,
        "--cooldown-epochs",
        0,
        "--log-interval",
        1,
        "--output",
        output,
    )
    return [str(part) for part in (*fixed, *more)]


def call(script: ModuleType, arguments: list[str], capsys) -> tuple[int, str]:
    """Call a script's main() and put logging back; return exit code and output, whose last line is the error."""
    try:
        code = script.main(arguments)
    except SystemExit as stop:
        code = stop.code
    finally:
        for name in ("effdet", "timm_patches"):
            logger = logging.getLogger(name)
            for handler in logger.handlers[:]:
                logger.removeHandler(handler)
                handler.close()
            logger.propagate = True
            logger.setLevel(logging.NOTSET)
    printed = capsys.readouterr().out
    return (1, f"{printed}{code}") if isinstance(code, str) else (code, printed)


def test_a_run_goes_on_with_bad_images_and_validate_refuses_them(root, tmp_path, capsys):
    images(root)[2].write_bytes(b"")
    images(root, "val")[0].write_bytes(b"not an image")
    code, printed = call(train, argv(root, tmp_path / "out", "--experiment", "run"), capsys)
    assert code == 0
    assert printed.count("1 of 8 training images cannot be read (at most 7 may be, --max-bad-images)") == 1
    assert "000000000003.jpg: cannot be read as an image" in printed
    assert "1 of 3 validation images cannot be read" in printed and ", 1 unreadable image(s)" in printed
    checkpoint = tmp_path / "out/run/last.pth.tar"
    arguments = [
        "--root",
        str(root),
        "--checkpoint",
        str(checkpoint),
        "-b",
        "3",
        "-j",
        "0",
        "--device",
        "cpu",
        "--metrics",
        str(tmp_path / "metrics.json"),
        "--output",
        "",
    ]
    code, printed = call(validate, arguments, capsys)
    assert code == 1 and not (tmp_path / "metrics.json").exists()
    assert re.search(
        r"^validate.py: error: 1 of 3 validation images cannot be read; at most 0 may be "
        r"\(--max-bad-images\): \S+/val2017/\d+.jpg: cannot be read",
        printed.splitlines()[-1],
    )
    code, printed = call(validate, [*arguments, "--max-bad-images", "1"], capsys)
    assert code == 0 and "count as images in which nothing was found" in printed
    assert json.loads((tmp_path / "metrics.json").read_text())["stats"]["AP"] is not None


def test_a_broken_disk_ends_the_run_with_one_line(root, tmp_path, capsys):
    for path in images(root)[1:]:
        path.write_bytes(b"")
    code, printed = call(train, argv(root, tmp_path / "out", "--experiment", "run", "--max-bad-images", 3), capsys)
    last = printed.splitlines()[-1]
    assert code == 1
    assert re.search(r"train.py: error: [4-7] of 8 training images cannot be read; at most 3 may be", last)
    assert re.search(r"00000000000\d.jpg: cannot be read", last) and str(root / "train2017") in last
    assert "Traceback" not in printed
    assert "cannot be read" not in "".join(printed.splitlines()[:-1]), "said once"
    assert (tmp_path / "out/run/log.txt").exists(), "the run had begun: its log stays"


@pytest.mark.parametrize("case", ["no data", "more workers than images", "no class count"])
def test_a_refused_run_leaves_no_folder(case, root, tmp_path, capsys):
    more, words = {
        "no data": (["--root", "/nowhere", "--lr", 0.01], "/nowhere: no such directory"),
        "more workers than images": (["-j", 9], "9 loader processes (-j) for 8 training images"),
        "no class count": (["--num-classes", 4, "--lr", 0.01], "num_classes is 4"),
    }[case]
    (tmp_path / "out").mkdir()
    code, printed = call(train, argv(root, tmp_path / "out", *more), capsys)
    assert code == 1 and words in printed.splitlines()[-1] and not list((tmp_path / "out").iterdir())
    (tmp_path / "out/run").mkdir()
    (tmp_path / "out/run/notes.txt").write_text("mine")
    call(train, argv(root, tmp_path / "out", "--experiment", "run", *more), capsys)
    assert (tmp_path / "out/run/notes.txt").exists() and (tmp_path / "out/run/log.txt").exists()


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for output, reason in ((tmp_path / "file/out", "Not a directory"), ("/proc/out", "No such file")):
        with pytest.raises(ValueError, match=rf"folder {output}\S* cannot be written \({reason}.*another --output"):
            choose_output_dir(parse_train_args(["--root", "x", "--output", str(output)]), False)
    with unprivileged(), pytest.raises(ValueError, match="cannot be written .Permission denied"):
        choose_output_dir(parse_train_args(["--root", "x", "--output", "/"]), False)


INERT = {
    "data.remode": ["--remode", "rand"],
    "data.recount": ["--recount", "2"],
    "ema.decay": ["--no-model-ema", "--model-ema-decay", "0.5"],
    "ema.warmup": ["--no-model-ema", "--no-model-ema-warmup"],
    "optim.clip_mode": ["--clip-grad", "0", "--clip-mode", "value"],
    "sched.warmup_lr": ["--warmup-epochs", "0", "--warmup-lr", "0.1"],
    "sched.lr_noise_pct": ["--lr-noise-pct", "0.1"],
    "sched.lr_noise_std": ["--lr-noise-std", "0.1"],
    "sched.lr_cycle_mul": ["--sched", "step", "--lr-cycle-mul", "2"],
    "sched.lr_cycle_limit": ["--sched", "step", "--lr-cycle-limit", "2"],
    "sched.decay_epochs": ["--decay-epochs", "3"],
    "sched.decay_milestones": ["sched.decay_milestones=3"],
    "sched.decay_rate": ["--decay-rate", "0.5"],
    "sched.patience_epochs": ["--patience-epochs", "3"],
    "model.pretrained_backbone": ["--pretrained", "x", "--pretrained-backbone"],
    "dist.master_port": ["--master-port", "5000"],
    "dist.max_restarts": ["--max-restarts", "2"],
    "dist.dist_bn": ["--sync-bn", "--dist-bn", "broadcast"],
}


@pytest.mark.parametrize("key", INERT)
def test_settings_without_effect_are_named(key):
    (line,) = inert_settings(parse_train_args(["--root", "x", *INERT[key]]))
    assert line.startswith(key) and "has no effect" in line


def test_settings_with_an_effect_are_not():
    assert set(INERT) == {key for keys, _, _ in NEEDS for key in keys}, "every rule is tried"
    for line in (
        [],
        ["--sched", "step", "--decay-epochs", "3", "--decay-rate", "0.5"],
        ["--reprob", "0.5", "--remode", "rand"],
        ["--device-list", "0,1", "--max-restarts", "2"],
    ):
        assert not list(inert_settings(parse_train_args(["--root", "x", *line])))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["one bad image", "a broken disk"])
def test_two_processes_with_two_loading_processes_each_go_on_or_end_together(what, root, tmp_path):
    broken = images(root)[:1] if what == "one bad image" else images(root)[1:]
    for path in broken:
        path.write_bytes(b"")
    done = subprocess.run(
        [
            sys.executable,
            "train.py",
            *argv(
                root,
                tmp_path / "out",
                "--experiment",
                "run",
                "-j",
                4,
                "--device-list",
                "0,1",
                "--max-bad-images",
                3,
                "--epochs",
                3,
            ),
        ],
        cwd=REPO,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if what == "one bad image":
        assert done.returncode == 0, done.stdout
        assert done.stdout.count("training images cannot be read") == 1, "named once, whichever process meets it when"
        assert done.stdout.count("1 unreadable image(s)") == 3, "every epoch knows, on both processes"
        assert torch.load(tmp_path / "out/run/last.pth.tar", weights_only=True)["epoch"] == 2
    else:
        assert done.returncode == 1, done.stdout
        assert re.search(r"train.py: error: [4-7] of 8 training images cannot be read", done.stdout)
        assert "Traceback" not in done.stdout and not (tmp_path / "out/run/last.pth.tar").exists()
