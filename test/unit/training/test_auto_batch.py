"""-b auto: the search against made-up memories, and the real step behind it on a device with a limit."""

from __future__ import annotations

import contextlib
import logging
import re

import pytest
import torch

import train
from effdet.config.cli import parse_train_args
from effdet.data.synthetic.dataset import make_synthetic_dataset
from effdet.runtime import distributed
from effdet.runtime import memory as memory_layer
from effdet.training import auto_batch
from effdet.training.auto_batch import choose_batch_size, largest_that_fits, make_probe, set_batch_size, with_margin
from effdet.training.build import Placement


class Memory:
    """A made-up memory that holds batches up to `limit`; `leak` of it is lost with each one that did not fit."""

    def __init__(self, limit: int, leak: int = 0) -> None:
        self.limit, self.leak, self.tried = limit, leak, []

    def fits(self, size: int) -> bool:
        self.tried.append(size)
        if size > self.limit:
            self.limit -= self.leak
            return False
        return True


@pytest.mark.parametrize("most", [1, 2, 3, 100, 1000])
def test_the_search_finds_the_largest_to_a_sixteenth(most):
    for limit in (0, 1, 2, 3, 7, 8, 15, 16, 17, 23, 100, 255, 256, 257, 999, 1000):
        memory = Memory(limit)
        found = largest_that_fits(memory.fits, most)
        best = min(limit, most)
        assert found <= best and best - found <= max(1, best // 16) - (best < 32)
        assert found == 0 or found in memory.tried
        assert max(memory.tried) <= most and len(memory.tried) == len(set(memory.tried)) <= 2 + 2 * most.bit_length()


def test_the_margin():
    sizes = {largest: with_margin(Memory(largest).fits, largest) for largest in (0, 1, 2, 5, 15, 20, 100, 256)}
    assert sizes == {0: 0, 1: 1, 2: 1, 5: 4, 15: 13, 20: 16, 100: 88, 256: 224}


def test_a_memory_that_falls_to_pieces_gives_less_but_something_that_fits():
    memory = Memory(200, leak=25)
    largest = largest_that_fits(memory.fits, 4096)
    assert largest > memory.limit * 0.9  # it fitted when it was tried
    memory.limit = 120
    size = with_margin(memory.fits, largest)
    assert size == memory.tried[-1] and 90 <= size <= 120
    memory.limit = 0
    assert with_margin(memory.fits, largest) == 0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("x"),
        RuntimeError("NPU out of memory. Tried to allocate 2 GiB"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_a_probe_takes_two_steps_and_releases_after_a_failure(error):
    calls: list[object] = []

    def step(size):
        calls.append(size)
        if size > 4 or len(calls) > 3:
            raise error

    probe = make_probe(step, lambda: calls.append("release"))
    assert probe(4) and calls == ["release", 4, 4, "release"]
    assert not probe(8) and calls[4:] == ["release", 8, "release"]
    calls[:] = ["x"]
    assert not probe(4) and calls[1:] == ["release", 4, 4, "release"]  # the second step is the one that fails


def test_other_errors_are_not_taken_for_a_full_memory():
    def step(size):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        make_probe(step, lambda: None)(1)


# ---- the learning rate ----


@pytest.mark.parametrize(
    ("line", "lr_batch", "size", "lr"),
    [
        ("-b auto", 256, 64, 0.08),
        ("-b auto", 256, 256, 0.32),
        ("-b auto", 256, 512, 0.32),
        ("-c configs/own_data.yaml -b auto", 8, 4, 0.005),
        ("-c configs/own_data.yaml -b auto", 8, 96, 0.01),
        ("-b auto --lr 0.1 optim.lr_batch=32", 32, 16, 0.05),
    ],
)
def test_the_rate_goes_down_with_the_batch_and_never_up(line, lr_batch, size, lr):
    cfg = parse_train_args(line.split())
    assert cfg.optim.lr_batch == lr_batch
    cfg = set_batch_size(cfg, size)
    assert (cfg.run.batch_size, cfg.optim.lr_batch) == (size, None)
    assert cfg.optim.lr == pytest.approx(lr)


def test_what_auto_says(caplog):
    cfg = parse_train_args(["-b", "auto"])
    with caplog.at_level(logging.INFO, "effdet.train"):
        set_batch_size(cfg, 64)
    (message,) = caplog.messages
    assert re.findall(r"\d+(?:\.\d+)?", message) == ["0.08", "64", "0.32", "256"] and "-b auto" in message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("-b many", "run.batch_size (--batch-size): got 'many', must be >= 1 or 'auto'"),
        ("-b 1.5", "must be >= 1 or 'auto'"),
        ("-b 0", "must be >= 1 or 'auto'"),
        ("optim.lr_batch=8", "optim.lr_batch acts with -b auto only"),
        ("-b auto --overfit 8", "-b auto is for training"),
    ],
)
def test_refusals(line, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_train_args(line.split())
    assert stop.value.code == 2 and words in capsys.readouterr().err


# ---- real steps ----


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_synthetic_dataset(tmp_path_factory.mktemp("data") / "set", num_train=24, num_val=2)


def argv(data, tmp_path, *more):
    return [
        "--root",
        str(data),
        "--image-size",
        "64",
        "-j",
        "0",
        "--device",
        "cpu",
        "--output",
        str(tmp_path),
        "--warmup-epochs",
        "0",
        "--cooldown-epochs",
        "0",
        "--epochs",
        "1",
        "--max-steps",
        "1",
        *more,
    ]


def test_a_cpu_is_refused_before_anything_is_made(data, tmp_path):
    with pytest.raises(SystemExit, match="-b auto measures an accelerator's memory, and this run is on the CPU"):
        train.main(argv(data, tmp_path / "runs", "-b", "auto"))
    assert not (tmp_path / "runs").exists()


@contextlib.contextmanager
def memory_of(images: int, monkeypatch):
    """Make the CPU pass for an accelerator whose memory holds the heads' outputs of so many images."""
    from effdet.bench import DetBenchTrain

    original, sizes = DetBenchTrain.head_outputs, []

    def limited(self, x):
        sizes.append(len(x))
        if len(x) > images:
            raise torch.OutOfMemoryError(f"no room for {len(x)}")
        return original(self, x)

    monkeypatch.setattr(DetBenchTrain, "head_outputs", limited)
    monkeypatch.setattr(auto_batch, "check_device", lambda cfg, device: None)
    monkeypatch.setattr(memory_layer, "total_memory_bytes", lambda device: 2**30)
    yield sizes


@pytest.mark.slow
def test_a_run_with_auto_is_the_run_with_the_number_it_found(data, tmp_path, monkeypatch, capsys):
    with memory_of(6, monkeypatch) as sizes:
        assert (
            train.main(
                argv(
                    data,
                    tmp_path,
                    "-b",
                    "auto",
                    "--experiment",
                    "auto",
                    "--opt",
                    "adamw",
                    "--lr",
                    "0.01",
                    "--amp",
                    "--amp-dtype",
                    "bfloat16",
                )
            )
            == 0
        )
    output = capsys.readouterr().out
    assert "-b auto: 5 images a step on each of 1 device(s); 6 fit the memory of 1.0 GiB of this one" in output
    assert "-b auto: learning rate 0.0001953 for the batch of 5, in proportion to 0.01 for 256" in output
    assert max(sizes) == 8 and sizes.count(6) == 2
    train.main(
        argv(
            data,
            tmp_path,
            "-b",
            "5",
            "--experiment",
            "five",
            "--opt",
            "adamw",
            "--lr",
            str(0.01 * 5 / 256),
            "--amp",
            "--amp-dtype",
            "bfloat16",
        )
    )
    auto, five = (torch.load(tmp_path / name / "last.pth.tar", weights_only=True) for name in ("auto", "five"))
    assert auto["config"]["run"]["batch_size"] == 5 and auto["config"]["optim"]["lr_batch"] is None
    assert auto["step"] == five["step"] == 1
    for key, value in five["state_dict"].items():
        assert torch.equal(auto["state_dict"][key], value), key


def test_a_resumed_run_keeps_batch_and_rate(data, tmp_path, monkeypatch, capsys):
    with memory_of(6, monkeypatch) as sizes:
        train.main(argv(data, tmp_path, "-b", "4", "--experiment", "run", "--lr", "0.001"))
        del sizes[:]
        train.main(
            argv(
                data,
                tmp_path,
                "-b",
                "auto",
                "--resume",
                str(tmp_path / "run" / "last.pth.tar"),
                "--epochs",
                "2",
                "--max-steps",
                "2",
            )
        )
    last = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=True)
    assert (last["config"]["run"]["batch_size"], last["config"]["optim"]["lr"]) == (4, 0.001)
    assert max(sizes) == 4 and "-b auto:" not in capsys.readouterr().out


def test_not_even_one_image(data, tmp_path, monkeypatch):
    with memory_of(0, monkeypatch), pytest.raises(SystemExit, match="not even one image fits the memory"):
        train.main(argv(data, tmp_path, "-b", "auto"))


def test_the_smallest_answer_of_all_processes_counts(data, monkeypatch):
    cfg = parse_train_args(["-b", "auto", "--root", str(data), "--image-size", "64"])
    from effdet.data.build import build_dataset

    train_set = build_dataset(cfg.data, "train")
    place = Placement(torch.device("cpu"), 2, 0, False)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather_object", lambda own: [own, 3])
    with memory_of(5, monkeypatch):
        found = choose_batch_size(cfg, place, train_set.parser, train_set.parser.category_map.num_classes)
    assert found.run.batch_size == 6 and cfg.run.batch_size == "auto"


def test_alone_there_is_one_process(monkeypatch):
    monkeypatch.setattr(distributed, "_is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 4)
    assert distributed.world_size() == 4
    with pytest.raises(ZeroDivisionError), distributed.alone():
        assert distributed.world_size() == 1 and not distributed.is_distributed()
        raise ZeroDivisionError
    assert distributed.world_size() == 4
