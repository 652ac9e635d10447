"""Recorded steps: when a record is made, replayed, made anew or left aside. Recording itself needs a GPU."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from effdet.config.cli import parse_train_args
from effdet.graphed import GraphedLosses
from effdet.runtime import device as device_layer
from effdet.training.trainer import check_graph


class Recorder:
    """Does what a GPU's recording does to a network: some steps to warm up, then a module with the same results."""

    def __init__(self):
        self.records = self.replays = 0

    def __call__(self, module, samples):
        self.records += 1
        for _ in range(3):
            module(*samples)

        def replay(*tensors):
            self.replays += 1
            return module(*tensors)
        return replay


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(device_layer, "record_graph", recorder)
    return recorder


def make_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.0)).train()


def losses_of(network):
    def losses(x, targets, factor):
        total = (network(x).sum((1, 2, 3)) * factor).sum()
        return total, total * targets[0].sum(), total * targets[1].sum()
    return losses


def arguments(batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn((batch, 3, 8, 8), generator=generator), [torch.ones(2), torch.full((3,), 2.0)],
            torch.tensor(0.5))


def test_a_record_is_made_once_and_gives_the_same_losses_gradients_and_statistics(recorder):
    network, plain = make_network(), make_network()
    graphed = GraphedLosses(network, losses_of(network))
    for seed in range(3):
        ours, expected = graphed(*arguments(seed=seed)), losses_of(plain)(*arguments(seed=seed))
        assert [float(loss) for loss in ours] == [float(loss) for loss in expected]
        for losses, module in ((ours, network), (expected, plain)):
            module.zero_grad()
            losses[0].backward()
        assert torch.equal(network[0].weight.grad, plain[0].weight.grad)
        # Without putting them back, warming up would have moved them.
        assert torch.equal(network[1].running_mean, plain[1].running_mean)
        assert network[1].num_batches_tracked == seed + 1
    assert (recorder.records, recorder.replays) == (1, 3)


def test_another_shape_goes_the_usual_way(recorder):
    network = make_network()
    graphed = GraphedLosses(network, losses_of(network))
    graphed(*arguments())
    plain = copy.deepcopy(network)
    assert torch.equal(graphed(*arguments(batch=3))[0], losses_of(plain)(*arguments(batch=3))[0])
    graphed(*arguments())
    assert (recorder.records, recorder.replays) == (1, 2)


def test_freezing_a_norm_layer_makes_a_new_record(recorder):
    network = make_network()
    graphed = GraphedLosses(network, losses_of(network))
    graphed(*arguments())
    network[1].eval()
    before = network[1].running_mean.clone()
    graphed(*arguments(seed=1))
    graphed(*arguments(seed=2))
    assert torch.equal(network[1].running_mean, before)
    assert (recorder.records, recorder.replays) == (2, 3)


def test_where_recording_fails_it_is_said_once_and_training_goes_on(monkeypatch, caplog):
    def fail(module, samples):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
    monkeypatch.setattr(device_layer, "record_graph", fail)
    network = make_network()
    plain = copy.deepcopy(network)
    graphed = GraphedLosses(network, losses_of(network))
    for _ in range(2):
        assert torch.equal(graphed(*arguments())[0], losses_of(plain)(*arguments())[0])
    assert [record.message for record in caplog.records] == [
        "the kernels of a step could not be recorded, they are started one by one: operation not permitted when stream "
        "is capturing"]


@pytest.mark.parametrize(("flags", "words"), [
    ([], "the device is cpu"), (["--compile"], "--compile is given"), (["--grad-accum", "2"], "--grad-accum is given")])
def test_where_it_cannot_work_is_refused_at_the_start(flags, words):
    config = parse_train_args(["--root", "data", "--graph", *flags])
    with pytest.raises(ValueError, match=words):
        check_graph(config, torch.device("cpu"))


def test_kernels_in_triton_are_refused_without_a_gpu_or_the_package(monkeypatch):
    with pytest.raises(ValueError, match="the device is cpu"):
        device_layer.check_triton(torch.device("cpu"))
    monkeypatch.setattr(device_layer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package triton"):
        device_layer.check_triton(torch.device("cuda"))
