"""The driver of the benchmarks: what it refuses, what it computes from given times. Nothing is timed here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import pairing  # noqa: E402
from traffic import ByteCounter  # noqa: E402


class FakeSide:
    """A side with given outputs and times, which notes the order of the samples in `log`."""

    def __init__(self, name: str, times: list[float], log: list[str], **outputs: list[float]) -> None:
        self.name, self.times, self.log, self.facts, self.is_closed = name, list(times), log, {}, False
        self.arrays = {key: np.array(value) for key, value in outputs.items()}
        self.counted: dict[str, float] = {}

    def outputs(self, folder: Path) -> dict[str, np.ndarray]:
        return self.arrays

    def calibrate(self) -> None:
        self.log.append("calibrate " + self.name)

    def sample(self) -> float:
        self.log.append(self.name)
        return self.times.pop(0)

    def traffic(self) -> dict[str, float]:
        return self.counted

    def close(self) -> None:
        self.is_closed = True


def test_sides_that_agree_are_sampled_in_turns_and_the_ratio_is_peer_over_ours():
    log: list[str] = []
    sides = [
        FakeSide("ours", [1.0, 4.0, 2.0], log, x=[1.0, 2.0]),
        FakeSide("peer", [3.0, 8.0, 10.0], log, x=[1.0, 2.0]),
    ]
    result = pairing.measure(lambda: sides, {"tolerance": 0}, 3)
    assert log == ["calibrate ours", "calibrate peer", "ours", "peer", "peer", "ours", "ours", "peer"]
    assert (result["ours"], result["peer"], result["ratio"]) == (2.0, 8.0, 4.0)
    assert result["pairs"] == [2.0, 5.0] and result["ratio_of_pairs"] == 3.0
    assert result["difference"] == {"x": 0.0}
    assert all(side.is_closed for side in sides)


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        ({"x": [1.0, 2.1]}, "'x' differs by 0.0476"),
        ({"x": [1.0, 2.0, 3.0]}, "shape"),
        ({"y": [1.0, 2.0]}, r"ours gives \['x'\]"),
        ({"x": [1.0, float("nan")]}, "not finite"),
    ],
)
def test_sides_that_disagree_are_not_timed(peer, message):
    log: list[str] = []
    sides = [FakeSide("ours", [1.0], log, x=[1.0, 2.0]), FakeSide("peer", [1.0], log, **peer)]
    with pytest.raises(pairing.Disagreement, match=message):
        pairing.measure(lambda: sides, {"tolerance": 0.01}, 1)
    assert log == [] and all(side.is_closed for side in sides)


def test_tolerances_have_names_and_shares():
    peer = np.zeros((2, 50, 6))
    peer[..., 0] = np.arange(50)
    ours = peer[:, ::-1].copy()  # the order does not matter
    ours[1, :2, 1] = 9
    a = np.array([1.0, 1.0])
    assert pairing.compare({"a": a, "b": ours}, {"a": a, "b": peer}, {"a": 0, "": (1e-3, 0.97)}) == {"a": 0, "b": 0}
    with pytest.raises(pairing.Disagreement, match="'b' differs by 0.184"):
        pairing.compare({"a": a, "b": ours}, {"a": a, "b": peer}, {"a": 0, "": (1e-3, 0.99)})
    ours[..., 5] = 1
    with pytest.raises(pairing.Disagreement, match="'b' differs by inf"):
        pairing.compare({"a": a, "b": ours}, {"a": a, "b": peer}, {"a": 0, "": (1e-3, 0.5)})


def test_without_a_peer_the_figure_is_of_ours_alone():
    side = FakeSide("ours", [3.0, 1.0, 2.0], [], x=[1.0])
    result = pairing.measure(lambda: [side], {"tolerance": 0}, 3)
    assert result["ours"] == 2.0 and "ratio" not in result
    case = {"figure": "f", "device": "cpu", "dtype": "float32", "threads": 1, "batch": 4, "images": 4}
    assert "2.000 s      2.0/s   (no peer)" in pairing.format_figure(case, result)


def test_a_case_that_asks_for_new_processes_gets_them_for_every_sample():
    log: list[str] = []
    started: list[FakeSide] = []

    def start() -> list[FakeSide]:
        started.append(FakeSide("ours", [5.0 + len(started)], log, x=[1.0]))
        return started[-1:]

    result = pairing.measure(start, {"tolerance": 0, "fresh": True}, 3)
    assert result["samples"] == {"ours": [6.0, 7.0, 8.0]} and log == ["ours"] * 3
    assert all(side.is_closed for side in started)


def test_bytes_are_given_as_a_share_of_the_time():
    sides = [FakeSide("ours", [2.0], [], x=[1.0]), FakeSide("peer", [4.0], [], x=[1.0])]
    sides[0].counted = {"bytes_moved": 3e9, "copy_bytes_per_s": 6e9}
    result = pairing.measure(lambda: sides, {"tolerance": 0}, 1)
    assert result["traffic"] == {"ours": {**sides[0].counted, "floor_s": 0.5, "floor_share": 0.25}}
    case = {"figure": "f", "device": "cpu", "dtype": "float32", "threads": 1, "batch": 4}
    assert pairing.format_figure(case, result).splitlines()[1].endswith(":   ours 3 GB in 25% of the time")


def test_what_operators_read_and_write_is_counted():
    x = torch.ones(8, 4, requires_grad=True)  # 128 bytes
    with ByteCounter() as counter:
        y = x.detach().t().reshape(32)  # a copy in another order
        assert counter.moved == 256
        y[:16].mul_(2)  # half of it, in place: read, and written
        assert counter.moved == 256 + 128
        torch.empty(1000).expand(3, 1000).detach()
        assert counter.moved == 256 + 128
        x[:, 0].detach().expand(3, 8).add(1)  # 8 read, 24 written
        assert counter.moved == 256 + 128 + 32 + 96
        (x * x).sum().backward()
    # Forward: two read, one written; the sum reads one and writes a number. Backward: two products with the expanded
    # gradient, a number, and their sum; the number itself is made of ones.
    assert counter.moved == 256 + 128 + 128 + (3 * 128 + 128 + 4) + (4 + 4) + 2 * (4 + 2 * 128) + 3 * 128


@pytest.mark.parametrize(("ratio", "text"), [(4.0, "ours needs 4.00x less"), (0.5, "PEER needs 2.00x less")])
def test_the_line_says_which_side_is_better(ratio, text):
    case = {"figure": "f", "device": "cpu", "dtype": "float32", "threads": 1, "batch": 4}
    result = pairing.summarize({"ours": [0.1], "peer": [0.1 * ratio]})
    assert text in pairing.format_figure(case, result)


@pytest.mark.slow
def test_a_real_script_prints_its_figure(tmp_path, capfd):
    import labels

    options = pairing.make_parser("").parse_args(
        ["--ours-only", "--quick", "--image-size", "128", "--threads", "1", "--json", str(tmp_path / "out")]
    )
    assert pairing.main(labels.__file__, options, labels.make_cases(options)) == 0
    figure = json.loads((tmp_path / "out").read_text())
    assert figure["figure"] == "labels" and figure["image_size"] == 128 and figure["ours"] > 0
    assert len(figure["samples"]["ours"]) == 3 and figure["facts"]["ours"]["versions"]["torch"]
    assert "(no peer)" in capfd.readouterr().out
