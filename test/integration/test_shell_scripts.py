"""The shell scripts of test/ and run_train.sh, run as users run them, in a copy of the repository's tree.

Each script really trains or evaluates here, small: 64 px, a dozen images, a step or two. What the scripts ask for in
full size is checked on their command lines, with a Python that only writes them down. `Checkout` takes the device and
the environment, so the same runs can be made on another device.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from effdet.config.cli import parse_train_args, parse_validate_args
from effdet.data.synthetic.dataset import make_synthetic_dataset

REPO = Path(__file__).resolve().parents[2]
SCRIPTS = (
    "train_performance_1p.sh",
    "train_performance_8p.sh",
    "train_full_8p_0-120.sh",
    "train_full_8p_121-300.sh",
    "train_eval_8p.sh",
    "train_finetune_1p.sh",
)
NUM_TRAIN, NUM_VAL = 16, 4
RULE = "------------------ Final result ------------------"


@dataclass
class Checkout:
    """A copy of the scripts in a tree of its own, so that runs do not meet in test/output, and what they run with."""

    root: Path
    data: Path
    device: str = "cpu"
    environment: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def make(cls, folder: Path, **settings) -> Checkout:
        root = folder / "check out"  # a path with a space
        (root / "test").mkdir(parents=True)
        for source in [*REPO.glob("test/*.sh"), REPO / "test/report.py"]:
            shutil.copy(source, root / "test")
        shutil.copy(REPO / "run_train.sh", root)
        for name in ("train.py", "validate.py", "effdet", "timm_patches", "configs"):
            (root / name).symlink_to(REPO / name)
        data = make_synthetic_dataset(root / "data sets" / "tiny", num_train=NUM_TRAIN, num_val=NUM_VAL)
        return cls(root, data, **settings)

    def small(self, batch: int = 4, steps: int = 0, devices: str = "0") -> list[str]:
        """Flags that make a training small; float32 on the CPU, whose float16 is slow."""
        flags = [
            "--device",
            self.device,
            "--image-size",
            "64",
            "-b",
            str(batch),
            "-j",
            "0",
            "--log-interval",
            "1",
            "--device-list",
            devices,
        ]
        flags += ["--no-amp", "--loss-scale", "dynamic"] if self.device == "cpu" else []
        return flags + (["--max-steps", str(steps)] if steps else [])

    def run(
        self, script: str, *arguments: object, cwd: Path | None = None, python: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a script of the tree, named from its root; `environment` is added to that of this process."""
        inherited = {name: value for name, value in os.environ.items() if name != "ASCEND_DEVICE_ID"}
        return subprocess.run(
            ["bash", str(self.root / script), *map(str, arguments)],
            cwd=cwd or self.root,
            text=True,
            timeout=600,
            capture_output=True,
            env=inherited
            | {"OMP_NUM_THREADS": "1", "PYTHON": str(python or sys.executable)}
            | dict(self.environment)
            | environment,
        )

    def write_python(self, name: str, body: str) -> Path:
        """Write a shell script that stands in for the interpreter."""
        path = self.root / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
        return path

    @property
    def output(self) -> Path:
        return self.root / "test" / "output"

    @property
    def models(self) -> Path:
        return self.root / "output" / "train"


@dataclass
class Result:
    """What a successful run printed and left, after the check that all of it agrees."""

    case: dict[str, str]
    facts: dict
    losses: list[str]


def intervals(path: Path) -> list[dict]:
    rows = map(json.loads, path.read_text().splitlines())
    return [row for row in rows if row["kind"] == "interval"]


def check_result(
    checkout: Checkout, done: subprocess.CompletedProcess[str], log: str, case: str, metrics: Path, losses: Path | None
) -> Result:
    """Check printed results, CASE.log, the file of losses and the log against what Python wrote."""
    assert done.returncode == 0, done.stdout + done.stderr
    log_file = checkout.output / log
    folder = log_file.parent
    content = json.loads(metrics.read_text())
    facts = content["run"]
    accuracy = f"{facts.get('best_AP', content['stats']['AP']):.5f}"
    lines = done.stdout.splitlines()
    *log_lines, rule, fps, printed_accuracy, seconds = lines[1 if lines[0].startswith("CANN: ") else 0 :]
    assert log_file.read_text().splitlines() == log_lines
    assert rule == RULE and done.stdout.count(RULE) == 1
    assert fps == f"Final Performance images/sec : {facts['img_per_s']:.2f}"
    assert printed_accuracy == f"Final Train Accuracy : {accuracy}"
    duration = seconds.removeprefix("E2E Training Duration sec : ")
    assert facts["seconds"] <= int(duration) + 1 < 600

    files = {path.name for path in folder.iterdir()}
    expected_losses = []
    if losses is not None:
        expected_losses = [f"{row['loss']:.5f}" for row in intervals(losses) if row["epoch"] >= facts["first_epoch"]]
        assert (folder / f"train_{case}_loss.txt").read_text().splitlines() == expected_losses
        logged = re.findall(r"^Train: .* Loss: (\S+) ", log_file.read_text(), re.MULTILINE)
        assert logged == expected_losses and len(logged) > 0
    evaluated = {"metrics.json", "per_class.csv", "report.html"}
    assert files == {log_file.name, f"{case}.log"} | ({f"train_{case}_loss.txt"} if losses else evaluated)
    values = dict(line.split(" = ") for line in (folder / f"{case}.log").read_text().splitlines())
    assert values == {
        "Network": "EfficientDetD0",
        "RankSize": str(facts["processes"]),
        "BatchSize": str(facts["batch_size"]),
        "DeviceType": platform.machine(),
        "CaseName": case,
        "ActualFPS": f"{facts['img_per_s']:.2f}",
        "TrainingTime": f"{facts['batch_size'] * 1000 / facts['img_per_s']:.2f}",
        "TrainAccuracy": accuracy,
        "ActualLoss": expected_losses[-1] if losses else "n/a",
        "E2ETrainingTime": duration,
    }
    return Result(values, facts, expected_losses)


def newest_run(checkout: Checkout, ending: str) -> Path:
    return max(checkout.models.glob(f"*-{ending}"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return Checkout.make(tmp_path_factory.mktemp("scripts"), environment={"etp_running_flag": "true"})


@pytest.fixture(scope="module")
def full_run(checkout: Checkout) -> Path:
    """The folder of run_train.sh's models: one epoch of two steps in the first part, one more in the second."""
    shorter = checkout.write_python(
        "shorter",
        f"""
        arguments=()
        while (($#)); do
            arguments+=("$1")
            if [[ $1 == --epochs ]]; then case $2 in 120) arguments+=(1) ;; 300) arguments+=(2) ;; esac; shift; fi
            shift
        done
        exec "{sys.executable}" "${{arguments[@]}}" """,
    )
    done = checkout.run(
        "run_train.sh",
        f"--data_path={checkout.data}",
        "--",
        *checkout.small(8),
        "--cooldown-epochs",
        "0",
        "--warmup-epochs",
        "0",
        python=shorter,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(RULE) == 2
    return checkout.models / "efficientdet_d0_8p"


# ---- every script, really --------------------------------------------------------------------------------------------


def test_one_device_from_inside_the_folder(checkout: Checkout):
    """A second run empties the folder of the first, and nothing else; a path as from the root is found."""
    kept = checkout.output / "0" / "kept.txt"
    old = checkout.output / "1" / "old.txt"
    for path in (kept, old):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    done = checkout.run(
        "test/train_performance_1p.sh",
        "--data_path=./data sets/tiny",
        "--device_id=1",
        "--",
        *checkout.small(steps=3),
        cwd=checkout.root / "test",
    )
    run = newest_run(checkout, "performance_1p-1")
    result = check_result(
        checkout,
        done,
        "1/train_1_1p_perf.log",
        "EfficientDetD0_bs4_1p_perf",
        run / "metrics.json",
        run / "metrics.jsonl",
    )
    assert (result.facts["steps"], len(result.losses), result.facts["processes"]) == (3, 3, 1)
    assert kept.read_text() == "x" and not old.exists()
    assert "Eval: 0  AP: " in done.stdout, "the steps are followed by an evaluation"


@pytest.mark.slow
def test_eight_processes(checkout: Checkout):
    done = checkout.run(
        "test/train_performance_8p.sh",
        f"--data_path={checkout.data}",
        "--",
        "--val-skip",
        NUM_VAL,
        *checkout.small(8, steps=1, devices="0,1,2,3,4,5,6,7"),
        cwd=Path("/"),
    )
    run = newest_run(checkout, "performance_8p")
    result = check_result(
        checkout,
        done,
        "0/train_0_8p_perf.log",
        "EfficientDetD0_bs8_8p_perf",
        run / "metrics.json",
        run / "metrics.jsonl",
    )
    assert result.facts["processes"] == 8 and "8 process(es), batch 8 (1 each)" in done.stdout


def test_the_second_part_continues_the_first_ones_checkpoint(checkout: Checkout, full_run: Path):
    first = (checkout.output / "0" / "train_0_8p_120.log").read_text()
    second = (checkout.output / "1" / "train_0_8p_300.log").read_text()
    assert re.findall(r"^Train: (\d+) \[ +(\d)/2", first, re.MULTILINE) == [("0", "1"), ("0", "2")]
    assert re.findall(r"^Train: (\d+) \[ +(\d)/2", second, re.MULTILINE) == [("1", "1"), ("1", "2")]
    assert f"resumed {full_run}/last.pth.tar: continuing with epoch 1" in second
    losses = [f"{row['loss']:.5f}" for row in intervals(full_run / "metrics.jsonl")]
    texts = [(checkout.output / folder / "train_EfficientDetD0_bs8_1p_mAP_loss.txt").read_text() for folder in "01"]
    assert [text.splitlines() for text in texts] == [losses[:2], losses[2:]] and len(losses) == 4
    payload = torch.load(full_run / "last.pth.tar", weights_only=True)
    assert (payload["epoch"], payload["step"]) == (1, 4)
    for folder in "01":
        case = (checkout.output / folder / "EfficientDetD0_bs8_1p_mAP.log").read_text()
        assert "RankSize = 1\nBatchSize = 8\n" in case and "CaseName = EfficientDetD0_bs8_1p_mAP\n" in case


def test_the_second_part_goes_on_at_epoch_130_of_300(checkout: Checkout, full_run: Path, tmp_path: Path):
    """The first part ends with epoch 129: 120 and 10 of cooldown. Its folder may be another one."""
    payload = torch.load(full_run / "last.pth.tar", weights_only=True)
    payload |= {"epoch": 129, "step": 130 * 2}
    payload["schedule"]["updates"] = 130 * 2
    folder = tmp_path / "else where" / "mine"
    folder.mkdir(parents=True)
    torch.save(payload, folder / "last.pth.tar")
    done = checkout.run(
        "test/train_full_8p_121-300.sh",
        f"--data_path={checkout.data}",
        "--",
        *checkout.small(8, steps=131 * 2),
        f"--output={folder.parent}",
        "--experiment",
        "mine",
        "--lr-noise-std",
        "1e-9",
    )
    result = check_result(
        checkout,
        done,
        "1/train_0_8p_300.log",
        "EfficientDetD0_bs8_1p_mAP",
        folder / "metrics.json",
        folder / "metrics.jsonl",
    )
    assert "continuing with epoch 130" in done.stdout
    assert (result.facts["first_epoch"], len(result.losses)) == (130, 2)
    rows = intervals(folder / "metrics.jsonl")
    assert [(row["epoch"], row["step"]) for row in rows] == [(130, 1), (130, 2)]
    half = 0.5 * (1 + math.cos(math.pi * 130 / 300))  # the port set the rate once an epoch
    assert rows[0]["lr"] == pytest.approx(1e-5 + (0.16 - 1e-5) * half, rel=1e-3)
    assert torch.load(folder / "last.pth.tar", weights_only=True)["epoch"] == 130


def test_evaluation(checkout: Checkout, full_run: Path):
    """The metric is the one that training had."""
    small = [flag for flag in checkout.small(2) if flag not in ("--loss-scale", "dynamic")]
    done = checkout.run(
        "test/train_eval_8p.sh",
        f"--data_path={checkout.data}",
        f"--pth_path={full_run / 'model_best.pth.tar'}",
        "--",
        *small,
    )
    result = check_result(
        checkout,
        done,
        "0/train_0_eval_8p.log",
        "EfficientDetD0_bs2_1p_mAP",
        checkout.output / "0" / "metrics.json",
        None,
    )
    metric = torch.load(full_run / "model_best.pth.tar", weights_only=True)["metric"]
    assert result.case["TrainAccuracy"] == f"{metric:.5f}" and metric > 0
    assert "Train: " not in done.stdout


def test_fine_tuning_starts_from_the_file(checkout: Checkout, full_run: Path):
    """At a learning rate of 0 the weights stay what was loaded: all but the class head, which has another size."""
    pth = full_run / "model_best.pth.tar"
    done = checkout.run(
        "test/train_finetune_1p.sh",
        f"--data_path={checkout.data}",
        f"--pth_path={pth.relative_to(checkout.root)}",
        "--",
        *checkout.small(8, steps=1),
        "--warmup-lr",
        "0",
        "--weight-decay",
        "0",
        ASCEND_DEVICE_ID="2",
    )
    run = newest_run(checkout, "finetune_1p-2")
    check_result(
        checkout,
        done,
        "2/train_2_finetune_1p.log",
        "EfficientDetD0_bs8_1p_mAP",
        run / "metrics.json",
        run / "metrics.jsonl",
    )
    source, tuned = (torch.load(path, weights_only=True) for path in (pth, run / "last.pth.tar"))
    assert tuned["category_map"]["num_classes"] == 91 and tuned["category_map"]["id_indexed"]
    before, after = source["state_dict_ema"], tuned["state_dict"]
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    different = [
        name
        for name in before
        if not name.endswith(statistics)
        and (before[name].shape != after[name].shape or not torch.equal(before[name], after[name]))
    ]
    assert different and all(name.startswith("class_net.predict.") for name in different)
    assert "tensors loaded" in done.stdout


# ---- what the scripts ask for in full size ---------------------------------------------------------------------------


@pytest.fixture
def dry(checkout: Checkout, tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that runs a script with a Python which writes its arguments down and fails with code 3."""
    notes = checkout.write_python("notes", 'printf "%s\\0" "$@" >"$NOTES"\necho "this went wrong" >&2\nexit 3')

    def run(script: str, *arguments: object, **environment: str) -> list[str]:
        done = checkout.run(
            script,
            f"--data_path={checkout.data}",
            *arguments,
            python=notes,
            NOTES=str(tmp_path / "argv"),
            **environment,
        )
        assert done.returncode == 3, done.stderr
        assert "this went wrong" in done.stdout and RULE not in done.stdout
        assert f"{Path(script).name}: error" not in done.stderr and "failed with exit code 3; its log is" in done.stderr
        unbuffered, program, *flags = (tmp_path / "argv").read_text().split("\0")[:-1]
        assert unbuffered == "-u" and Path(program).parent == checkout.root
        return flags

    return run


@pytest.fixture
def pth(checkout: Checkout) -> Path:
    """A file that is there; nobody reads it."""
    path = checkout.root / "some weights.pth"
    path.write_bytes(b"x")
    return path


RECIPES = {  # script -> devices, global batch and workers, loss scale, epochs, steps
    "train_performance_1p.sh": ([0], 16, 16, 300, 900),
    "train_performance_8p.sh": (list(range(8)), 128, 128, 300, 900),
    "train_full_8p_0-120.sh": (list(range(8)), 128, 8, 120, 0),
    "train_full_8p_121-300.sh": (list(range(8)), 128, 128, 300, 0),
    "train_finetune_1p.sh": ([0], 16, 16, 300, 900),
}


@pytest.mark.parametrize("script", RECIPES)
def test_recipe(dry: Callable, checkout: Checkout, pth: Path, tmp_path: Path, script: str):
    devices, batch, scale, epochs, steps = RECIPES[script]
    arguments = [f"--pth_path={pth}"] if "finetune" in script else []
    flags = ["--", "--output", tmp_path]
    if "121" in script:
        resumed = tmp_path / "efficientdet_d0_8p" / "last.pth.tar"
        resumed.parent.mkdir()
        resumed.write_bytes(b"x")
    cfg = parse_train_args(dry(f"test/{script}", *arguments, *flags))
    assert (cfg.dist.device_list, cfg.run.batch_size, cfg.data.workers) == (devices, batch, batch)
    assert (cfg.amp.loss_scale, cfg.sched.epochs, cfg.run.max_steps) == (scale, epochs, steps)
    assert (cfg.model.name, cfg.run.device) == ("tf_efficientdet_d0", "npu")
    assert (cfg.dist.sync_bn, cfg.dist.dist_bn) == (False, "")  # the port's --sync-bn had no effect
    assert (cfg.sched.per_epoch, cfg.ema.warmup) == (True, False)
    assert (cfg.amp.enabled, cfg.amp.opt_level, cfg.amp.dtype) == (True, "O1", "float16")
    assert (cfg.optim.lr, cfg.optim.opt, cfg.optim.momentum, cfg.optim.weight_decay, cfg.optim.clip_grad) == (
        0.16,
        "fusedmomentum",
        0.9,
        4e-5,
        10,
    )
    assert (cfg.sched.sched, cfg.sched.warmup_epochs, cfg.sched.cooldown_epochs, cfg.sched.lr_noise) == (
        "cosine",
        5,
        10,
        [0.4, 0.9],
    )
    assert (cfg.sched.warmup_lr, cfg.sched.min_lr, cfg.sched.lr_noise_pct, cfg.sched.lr_noise_std) == (
        1e-4,
        1e-5,
        0.67,
        1.0,
    )
    assert (cfg.ema.enabled, cfg.ema.decay, cfg.run.seed, cfg.run.log_interval) == (True, 0.9999, 42, 50)
    assert cfg.data.root == str(checkout.data)
    assert cfg.model.pretrained_backbone == ""
    assert cfg.model.pretrained == (str(pth) if "finetune" in script else "")
    assert cfg.model.num_classes == (91 if "finetune" in script else None)
    assert cfg.run.resume == (str(resumed) if "121" in script else "")
    assert re.fullmatch(r"[\d.]+|[\da-f:]+", cfg.dist.addr)


def test_recipe_of_the_evaluation(dry: Callable, checkout: Checkout, pth: Path):
    cfg = parse_validate_args(dry("test/train_eval_8p.sh", f"--pth_path={pth}"))
    assert (cfg.run.checkpoint, cfg.data.root, cfg.run.device) == (str(pth), str(checkout.data), "npu")
    assert (cfg.dist.device_list, cfg.run.batch_size, cfg.data.workers) == (list(range(8)), 128, 128)
    assert (cfg.model.name, cfg.amp.enabled, cfg.amp.opt_level) == ("tf_efficientdet_d0", True, "O1")


def test_flags_behind_the_dashes_win_in_any_spelling(dry: Callable, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("sched:\n  lr_noise: null\nmodel:\n  drop_path: 0.1\n")
    cfg = parse_train_args(
        dry(
            "test/train_performance_8p.sh",
            "--",
            "--batch-size",
            "24",
            "--workers=3",
            "--no-amp",
            "--loss-scale",
            "dynamic",
            "--device",
            "cpu",
            "--max-steps=7",
            "--sync-bn",
            "-c",
            tmp_path / "mine.yaml",
            "--device-list",
            "4,5,6",
            "--root",
            "/other place",
            "optim.lr=0.01",
        )
    )
    assert (cfg.run.batch_size, cfg.data.workers, cfg.amp.enabled, cfg.dist.sync_bn) == (24, 3, False, True)
    assert (cfg.run.device, cfg.run.max_steps, cfg.dist.device_list, cfg.data.root) == (
        "cpu",
        7,
        [4, 5, 6],
        "/other place",
    )
    assert (cfg.sched.lr_noise, cfg.model.drop_path, cfg.optim.lr) == (None, 0.1, 0.01)


def test_device_of_the_option_goes_before_that_of_the_environment(dry: Callable, checkout: Checkout):
    assert parse_train_args(dry("test/train_performance_1p.sh", ASCEND_DEVICE_ID="5")).dist.device_list == [5]
    assert (checkout.output / "5" / "train_5_1p_perf.log").is_file()
    cfg = parse_train_args(dry("test/train_performance_1p.sh", "--device_id=3", ASCEND_DEVICE_ID="5"))
    assert cfg.dist.device_list == [3] and (checkout.output / "3" / "train_3_1p_perf.log").is_file()
    cfg = parse_train_args(dry("test/train_performance_8p.sh", ASCEND_DEVICE_ID="5"))
    assert cfg.dist.device_list == list(range(8)) and (checkout.output / "0" / "train_0_8p_perf.log").is_file()


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def refused(checkout: Checkout, script: str, *arguments: object, **environment: str) -> str:
    """Run a script that must refuse before it changes anything; return its message."""
    marker = checkout.output / "0" / "marker"
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text("here")
    never = checkout.write_python("never", 'echo started >"$0.started"')
    done = checkout.run(script, *arguments, python=never, **environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert RULE not in done.stdout and done.stdout == ""
    assert marker.read_text() == "here" and not Path(f"{never}.started").exists(), "refused too late"
    return done.stderr


@pytest.mark.parametrize("script", [f"test/{name}" for name in SCRIPTS] + ["run_train.sh"])
def test_data_path_is_needed(checkout: Checkout, script: str):
    assert "error: --data_path=DIR is missing" in refused(checkout, script)
    assert "error: --data_path=DIR is missing" in refused(checkout, script, "--data_path=")
    assert "--data_path=/no/where: there is no such folder" in refused(checkout, script, "--data_path=/no/where")


@pytest.mark.parametrize("script", ["test/train_eval_8p.sh", "test/train_finetune_1p.sh"])
def test_pth_path_is_needed(checkout: Checkout, script: str):
    data = f"--data_path={checkout.data}"
    assert "error: --pth_path=FILE is missing" in refused(checkout, script, data)
    assert "no such file" in refused(checkout, script, data, "--pth_path=/no/where.pth")
    assert "no such file" in refused(checkout, script, data, f"--pth_path={checkout.data}")


def test_options_that_a_script_does_not_have(checkout: Checkout):
    data, script = f"--data_path={checkout.data}", "test/train_performance_8p.sh"
    message = refused(checkout, script, data, "--device_id=1")
    assert "unknown option --device_id=1; the options are --data_path=VALUE, and behind --" in message
    assert "unknown option --epochs=3" in refused(checkout, script, data, "--epochs=3")
    assert "cannot read '--data_path'" in refused(checkout, script, "--data_path", checkout.data)
    for number in ("../..", "x", "", "01", "-1"):
        assert f"the device is '{number}'" in refused(
            checkout, "test/train_performance_1p.sh", data, f"--device_id={number}"
        )
    assert "the device is '0,1'" in refused(checkout, "test/train_performance_1p.sh", data, ASCEND_DEVICE_ID="0,1")


def test_checkpoints_are_never_deleted_or_written_over(checkout: Checkout, tmp_path: Path):
    data = f"--data_path={checkout.data}"
    inside = checkout.output / "0" / "keep" / "last.pth.tar"
    inside.parent.mkdir(parents=True, exist_ok=True)
    inside.write_bytes(b"weights")
    held = tmp_path / "held" / "last.pth.tar"
    held.parent.mkdir()
    held.write_bytes(b"weights")
    link = tmp_path / "link.pth"
    link.symlink_to(inside)

    for path in (inside, link):
        assert "lies in" in refused(checkout, "test/train_eval_8p.sh", data, f"--pth_path={path}")
    for flags in (("--resume", inside), (f"--initial-checkpoint={inside}",)):
        assert "lies in" in refused(checkout, "test/train_performance_8p.sh", data, "--", *flags)
    assert "would be deleted by the next run" in refused(
        checkout, "test/train_performance_8p.sh", data, "--", "--output", checkout.output / "0" / "models"
    )
    run = ("--", "--output", tmp_path, "--experiment", "held")
    assert "holds a run already" in refused(checkout, "test/train_full_8p_0-120.sh", data, *run)
    assert "holds a run already" in refused(checkout, "run_train.sh", data, *run)
    assert "holds a run already" in refused(checkout, "test/train_full_8p_121-300.sh", data, *run, "--resume", link)
    for flags in (("run.output=x",), ("--max-steps", "3", "run.experiment=x"), ("--experiment", "")):
        assert "name the run's folder by --output" in refused(
            checkout, "test/train_performance_8p.sh", data, "--", *flags
        )
    for path in (inside, held):
        assert path.read_bytes() == b"weights"


def test_an_interrupted_first_part_can_be_continued(dry: Callable, tmp_path: Path):
    last = tmp_path / "held" / "last.pth.tar"
    last.parent.mkdir()
    last.write_bytes(b"weights")
    flags = dry("test/train_full_8p_0-120.sh", "--", "--output", tmp_path, "--experiment", "held", "--resume", last)
    assert parse_train_args(flags).run.resume == str(last) and last.read_bytes() == b"weights"


def test_the_second_part_needs_the_first(checkout: Checkout, tmp_path: Path):
    message = refused(
        checkout, "test/train_full_8p_121-300.sh", f"--data_path={checkout.data}", "--", "--output", tmp_path
    )
    assert f"there is no checkpoint {tmp_path}/efficientdet_d0_8p/last.pth.tar to resume" in message


def test_a_failed_training_fails_the_script(checkout: Checkout, tmp_path: Path):
    done = checkout.run(
        "test/train_performance_8p.sh",
        f"--data_path={checkout.data}",
        "--",
        *checkout.small(NUM_TRAIN * 2),
        "--output",
        tmp_path,
    )
    assert done.returncode == 1 and RULE not in done.stdout
    log = checkout.output / "0" / "train_0_8p_perf.log"
    cause = f"{NUM_TRAIN} images"
    assert cause in done.stdout and cause in log.read_text()
    assert f"train_performance_8p.sh: the run failed with exit code 1; its log is {log}" in done.stderr
    assert [path.name for path in log.parent.iterdir()] == [log.name]


def test_a_file_that_is_no_checkpoint_fails_the_script(checkout: Checkout, pth: Path):
    done = checkout.run(
        "test/train_eval_8p.sh",
        f"--data_path={checkout.data}",
        f"--pth_path={pth}",
        "--",
        "--device",
        checkout.device,
        "--device-list",
        "0",
    )
    assert done.returncode == 1 and RULE not in done.stdout
    assert "some weights.pth" in done.stdout and "not a checkpoint" in done.stdout
    assert "train_eval_8p.sh: the run failed with exit code 1" in done.stderr


def test_a_failed_first_part_stops_the_full_run(checkout: Checkout, tmp_path: Path):
    fails = checkout.write_python("fails", 'echo run >>"$RUNS"; exit 9')
    done = checkout.run(
        "run_train.sh",
        f"--data_path={checkout.data}",
        "--",
        "--output",
        tmp_path,
        python=fails,
        RUNS=str(tmp_path / "runs"),
    )
    assert done.returncode == 9 and RULE not in done.stdout
    assert (tmp_path / "runs").read_text() == "run\n"


def test_old_results_are_not_taken_for_new_ones(checkout: Checkout, tmp_path: Path):
    """A Python that succeeds and writes nothing, where an earlier run has left its results."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "metrics.json").write_text('{"stats": {"AP": 1.0}, "run": {}}')
    os.utime(folder / "metrics.json", (1, 1))
    lazy = checkout.write_python("lazy", f'case $* in *report.py*) exec "{sys.executable}" "$@" ;; esac')
    done = checkout.run(
        "test/train_performance_1p.sh",
        f"--data_path={checkout.data}",
        "--",
        "--output",
        tmp_path,
        "--experiment",
        "mine",
        python=lazy,
    )
    assert done.returncode == 1 and RULE not in done.stdout
    assert "no results of this run in" in done.stderr


def test_without_a_python(checkout: Checkout):
    done = checkout.run("test/train_performance_1p.sh", f"--data_path={checkout.data}", PYTHON="no-such-python")
    assert done.returncode == 1 and "there is no 'no-such-python'" in done.stderr
