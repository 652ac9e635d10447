"""Training with torch.compile: one graph for each input size, compiled once, with the numbers of the usual way."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from effdet.bench import DetBenchTrain
from effdet.config import get_efficientdet_config
from effdet.efficientdet import EfficientDet
from effdet.runtime import device as device_layer

SIZES = ((128, 128), (128, 160))


@pytest.fixture
def network() -> EfficientDet:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    config = get_efficientdet_config("tf_efficientdet_d0")
    config.update(
        backbone_name="test_efficientnet",
        backbone_args=None,
        image_size=SIZES[0],
        num_classes=3,
        fpn_channels=16,
        fpn_cell_repeats=1,
        box_class_repeats=1,
    )
    return EfficientDet(config, pretrained_backbone=False)


def make_batch(size: tuple[int, int], number: int) -> tuple[torch.Tensor, dict]:
    """Make two images; each batch has another number of real boxes."""
    generator = torch.Generator().manual_seed(number)
    classes = torch.full((2, 4), -1)
    classes[:, : 1 + number % 3] = torch.randint(1, 4, (2, 1 + number % 3), generator=generator)
    corners = torch.rand(2, 4, 2, generator=generator) * 60
    boxes = torch.cat((corners, corners + 30), 2)
    return torch.randn(2, 3, *size, generator=generator), {"bbox": boxes, "cls": classes}


def train(bench: DetBenchTrain, sizes: list[tuple[int, int]]) -> list[float]:
    optimizer = torch.optim.SGD(bench.parameters(), 0.001)
    losses = []
    for number, size in enumerate(sizes):
        output = bench.train()(*make_batch(size, number))
        assert list(output) == ["loss", "class_loss", "box_loss"]
        output["loss"].backward()
        torch.nn.utils.clip_grad_norm_(bench.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output["loss"].detach()))
    return losses


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_two_epochs_of_two_sizes_are_two_graphs_with_equal_numbers(network, backend):
    plain = DetBenchTrain(copy.deepcopy(network), input_sizes=SIZES)
    bench = DetBenchTrain(network, input_sizes=SIZES, compile_backend=backend)
    epoch = [SIZES[0], SIZES[0], SIZES[1], SIZES[0], SIZES[1]]
    losses = train(bench, epoch)
    assert counters["stats"]["unique_graphs"] == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses += train(bench, epoch)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert losses == pytest.approx(train(plain, epoch) + train(plain, epoch), rel=1e-5)
    for (name, ours), theirs in zip(bench.model.state_dict().items(), plain.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_the_guard_above_sees_a_recompilation(network):
    bench = DetBenchTrain(network, compile_backend="eager")
    train(bench, [SIZES[0]])
    bench.loss_fn.delta = 0.5
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(Exception, match="[Rr]ecompil"):
        train(bench, [SIZES[0]])


def test_eval_mode_is_not_compiled(network):
    bench = DetBenchTrain(network, compile_backend="eager")
    images, target = make_batch(SIZES[0], 0)
    with torch.no_grad():
        assert bench.eval()(images, target)["detections"].shape == (2, 100, 6)
    assert not counters["stats"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [("cpu", "there is no no-such-compiler"), ("cuda", "needs the package triton")],
)
def test_what_it_needs_is_checked_at_the_start(kind, words, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(device_layer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=words):
        device_layer.check_compile(SimpleNamespace(type=kind))
