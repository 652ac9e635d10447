"""The device layer on NPUs: choosing, hiding and describing devices, settings, and errors that say what to do."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effdet.data.synthetic.dataset import make_synthetic_dataset
from effdet.runtime import device as device_layer
from effdet.runtime import memory, seeding
from effdet.training.amp import Precision

REPOSITORY = Path(__file__).resolve().parents[2]
SHOW = """
import logging, sys
logging.basicConfig(level="INFO", format="%(message)s")
from effdet.runtime import device as layer
renumbered = layer.restrict_visible("npu", [int(entry) for entry in sys.argv[1].split(",")])
device = layer.pick_device("npu", int(sys.argv[2]))
layer.set_device(device)
import torch
print(renumbered, device, torch.npu.device_count(), torch.ones(2, device=device).sum().item())
"""


@pytest.fixture
def once(is_910a):
    if is_910a:
        pytest.skip("runs once, as Ascend910B1: nothing in it depends on the chip")


def test_auto_is_the_npu(device):
    assert device_layer.pick_device() == device
    assert device_layer.pick_device("npu:0") == device
    assert device_layer.backend_for(device) == "hccl"
    assert device_layer.describe(device).startswith("npu:0, Ascend910")


def test_a_device_that_is_not_there_is_named(device, monkeypatch):
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    with pytest.raises(RuntimeError, match="npu:5 was asked for, but there are 1: choose an index from 0 to 0"):
        device_layer.pick_device("npu", 5)
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,7")  # as a device list with a number too many leaves it
    with pytest.raises(RuntimeError, match=r"npu:1 .* there are 1 \(ASCEND_RT_VISIBLE_DEVICES=0,7\)"):
        device_layer.pick_device("npu", 1)


@pytest.mark.parametrize(
    ("listed", "visible", "shown"),
    [([3, 1], "", "1,3"), ([2], "", "2"), ([1, 0], "4,6,7", "4,6"), ([2, 0], "4,6,7", "4,7")],
)
def test_a_device_list_becomes_sorted_visible_devices(monkeypatch, caplog, listed, visible, shown):
    monkeypatch.setattr(device_layer, "_users_visible_devices", None)
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", visible)
    caplog.set_level(logging.INFO, "effdet.runtime.device")
    for _ in range(2):  # a second run in the same process starts from the user's list again
        assert device_layer.restrict_visible("npu", listed) is True
        assert os.environ["ASCEND_RT_VISIBLE_DEVICES"] == shown
    said = f"devices [{shown.replace(',', ', ')}] are npu:0 to npu:{len(listed) - 1}"
    assert said in caplog.text


def test_a_process_sees_the_listed_devices_only(run_simulated, once):
    done = run_simulated(["-c", SHOW, "2,0", "1"], devices=8, env={"ASCEND_RT_VISIBLE_DEVICES": "4,6,7"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-4:] == ["True", "npu:1", "2", "2.0"]


def test_wrong_device_lists_are_refused(monkeypatch):
    monkeypatch.setattr(device_layer, "_users_visible_devices", "4,6")
    with pytest.raises(ValueError, match="names a device twice"):
        device_layer.restrict_visible("npu", [1, 1])
    with pytest.raises(ValueError, match=r"asks for \[2\], but ASCEND_RT_VISIBLE_DEVICES shows 2 devices: .* 0 to 1"):
        device_layer.restrict_visible("npu", [0, 2])
    before = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    assert device_layer.restrict_visible("cpu", [0, 1]) is False
    assert os.environ.get("ASCEND_RT_VISIBLE_DEVICES") == before


def test_time_limits_are_set_where_the_user_set_none(device, monkeypatch):
    monkeypatch.delenv("HCCL_CONNECT_TIMEOUT", raising=False)
    monkeypatch.delenv("HCCL_EVENT_TIMEOUT", raising=False)
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "3600")
    device_layer.prepare_collectives(device)
    assert os.environ["HCCL_EXEC_TIMEOUT"] == "3600" and int(os.environ["HCCL_CONNECT_TIMEOUT"]) >= 300
    assert int(os.environ["HCCL_EVENT_TIMEOUT"]) > 3600
    assert 6800 % 68 == 0 and device_layer._HCCL_TIMEOUTS_S["HCCL_EXEC_TIMEOUT"] == 6800  # what 910A rounds to


def test_settings_are_made_and_said(device, monkeypatch):
    lines = "\n".join(device_layer.tune(device))
    assert "jit_compile=False" in lines and "allow_internal_format=False" in lines
    assert torch.npu.is_jit_compile_false()
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "0")
    assert "the task queue is off" in device_layer.tune(device)[-1]
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    assert "TASK_QUEUE_ENABLE=2" in device_layer.tune(device)[-1]


def test_float32_is_full_only_where_the_run_is_in_float32(device, is_910a):
    """HF32 is torch_npu's default for convolutions; on the first generation there is none."""
    if is_910a:
        assert "compute in float16" in "".join(device_layer.tune(device))
        return
    for keys, conv, matmul in (
        ({"full_precision": True}, False, False),
        ({"full_precision": False}, True, False),
        ({"full_precision": True, "hf32": True}, True, True),
        ({"full_precision": False, "hf32": False}, False, False),
    ):
        device_layer.tune(device, **keys)
        assert (torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32) == (conv, matmul), keys


def test_torch_npus_own_settings_can_stay(device, monkeypatch):
    made = []
    monkeypatch.setattr(torch.npu, "set_compile_mode", lambda **keys: made.append(keys))
    device_layer.tune(device, keep_defaults=True)
    assert made == []
    device_layer.tune(device)
    assert made == [{"jit_compile": False}]


@pytest.mark.slow
def test_a_run_with_torch_npus_compile_mode_has_the_losses_of_one_without(run_simulated, tmp_path):
    data, losses = make_synthetic_dataset(tmp_path / "data", num_train=4, num_val=2), []
    for name, flags in {"ours": [], "theirs": ["--npu-defaults"]}.items():
        line = (
            f"--root {data} --device npu --experiment {name} --output {tmp_path} --image-size 64 -b 2 -j 0 --epochs 1"
        )
        line += " --cooldown-epochs 0 --amp --loss-scale 128 --opt fusedmomentum --lr .001 --no-pretrained-backbone"
        done = run_simulated(["train.py", *line.split(), *flags], soc="Ascend910A")
        assert done.returncode == 0, done.stderr
        rows = [json.loads(row) for row in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if row["kind"] == "epoch"])
    assert len(losses[0]) == 1 and losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_loss_scale_in_float32_is_for_chips_that_compute_it_in_half(device, is_910a):
    assert device_layer.has_float32_range(device) is not is_910a
    if is_910a:
        assert Precision(device, enabled=False, loss_scale=128.0).loss_scale() == 128.0
    else:
        with pytest.raises(ValueError, match="128 would have no effect: float32"):
            Precision(device, enabled=False, loss_scale=128.0)


def test_compiling_is_let_through_with_a_word(device, caplog):
    device_layer.check_compile(device)
    assert "never run on an NPU" in caplog.text


def test_formats_the_chip_lacks_are_refused(device, is_910a):
    with pytest.raises(ValueError, match="does not support the channels-last layout"):
        device_layer.use_channels_last(device, True)
    assert device_layer.use_channels_last(device) is False
    if is_910a:
        with pytest.raises(ValueError, match="does not compute in bfloat16: train in float16"):
            Precision(device, dtype="bfloat16")
    else:
        assert Precision(device, dtype="bfloat16").dtype == torch.bfloat16


def test_overflow_flag_of_a_chip_that_saturates(device, is_910a):
    device_layer.clear_overflow_flag(device)
    if not is_910a:
        assert device_layer.overflow_flag(device) is None
        return
    assert device_layer.overflow_flag(device).item() == 0.0
    big = torch.full((4,), 60000.0, dtype=torch.float16, device=device) * 2
    assert torch.isfinite(big).all().item()
    assert device_layer.overflow_flag(device).item() == 1.0
    device_layer.clear_overflow_flag(device)
    assert device_layer.overflow_flag(device).item() == 0.0


def test_another_version_is_refused_with_both_named(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.7.1.post2")
    with pytest.raises(RuntimeError, match=r"torch_npu 2.7.1.post2 is installed beside torch 2.13.0.*must be equal"):
        device_layer.pick_device("npu")


def test_without_cann_the_script_says_what_to_source(tmp_path, once):
    """A real process without the simulation: torch_npu is installed, CANN's libraries are not there."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("NPU_SIM", "FAKE_", "TORCH_DEVICE", "PYTHONPATH"))
    }
    argv = [sys.executable, str(REPOSITORY / "train.py"), "--device", "npu"]
    done = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("train.py: error: torch_npu 2.13.0 does not find CANN: lib"), last
    assert "source /usr/local/Ascend/ascend-toolkit/set_env.sh" in last


def test_memory_and_random_state(device):
    seeding.set_rng_state(seeding.rng_state(device), device)  # the simulation draws from the CPU's generator
    block = torch.ones(2**20, device=device)
    assert memory.peak_memory_bytes(device) >= block.numel() * 4
    device_layer.synchronize(device)
    assert memory.supports_pinning(device)
