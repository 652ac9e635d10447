"""The device layer on a machine without accelerators: names, errors, moves, seeds."""

import importlib.util
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from effdet.runtime import device as device_layer
from effdet.runtime import memory, seeding

CPU = torch.device("cpu")
no_accelerator = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def test_cpu_is_picked_by_name_and_has_no_index():
    assert device_layer.pick_device("cpu") == CPU
    assert device_layer.pick_device("cpu", 3) == CPU  # the third CPU process runs on the CPU


@no_accelerator
@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="torch_npu is installed")
def test_auto_falls_back_to_the_cpu():
    assert device_layer.pick_device("auto") == CPU


@pytest.mark.parametrize("name", ["tpu", "cpu:x", "cuda:-1", "", "npu:0:1"])
def test_unknown_names_are_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match="choose auto, npu, cuda, cpu"):
        device_layer.pick_device(name)


@no_accelerator
def test_an_absent_gpu_is_an_error_that_says_what_to_do():
    with pytest.raises(RuntimeError, match="'cuda' was asked for, but .* sees none .* --device cpu"):
        device_layer.pick_device("cuda")


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="torch_npu is installed")
def test_an_absent_npu_package_is_an_error_that_names_it():
    with pytest.raises(RuntimeError, match="needs the package torch_npu .* pip install -r requirements-npu.txt"):
        device_layer.pick_device("npu")


def test_backends():
    assert device_layer.backend_for(CPU) == "gloo"
    assert device_layer.backend_for(torch.device("cuda", 0)) == "nccl"


def test_to_device_keeps_structure_and_values():
    tensor = torch.arange(3)
    moved = device_layer.to_device({"a": [tensor, tensor + 1], "b": "text", "c": (tensor,)}, CPU)
    assert moved["b"] == "text" and isinstance(moved["a"], list) and isinstance(moved["c"], tuple)
    assert torch.equal(moved["a"][1], torch.tensor([1, 2, 3]))


def test_seeding_repeats_all_generators():
    def draw() -> tuple:
        seeding.seed_everything(7)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = draw()
    assert draw() == first and len(set(first)) == 3


def test_a_device_whose_numbers_show_an_overflow_has_no_flag():
    device_layer.clear_overflow_flag(CPU)
    assert device_layer.overflow_flag(CPU) is None


def test_cpu_memory_is_the_process_peak():
    before = memory.peak_memory_bytes(CPU)
    block = torch.ones(64 * 2**20 // 4)
    assert memory.peak_memory_bytes(CPU) >= max(before, block.numel() * 4)


@pytest.mark.parametrize(
    ("name", "strict", "words"),
    [
        ("cpu", True, "the same bits on this machine with the same number of threads"),
        ("cuda", False, "as far as cuda has such algorithms"),
        ("npu", False, "as far as npu has such algorithms"),
    ],
)
def test_what_deterministic_promises_and_what_not_is_said(monkeypatch, name, strict, words):
    calls: list[tuple] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on, *, warn_only: calls.append((on, warn_only)))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    monkeypatch.setattr(device_layer.os, "environ", {})
    device = SimpleNamespace(type=name)  # torch knows no "npu" where torch_npu is not imported
    assert [line for line in device_layer.make_deterministic(device) if words in line]
    assert calls == [(True, not strict)], "an operator without such an algorithm is an error, or a warning"
