"""distributed.py and sync_batchnorm.py in one process; what needs several is in integration/test_distributed_cpu.py."""

from __future__ import annotations

import socket
import sys

import pytest
import torch
from torch import nn

from effdet.runtime import distributed as d
from effdet.runtime.launch import launch
from effdet.runtime.sync_batchnorm import _global_moments, _SyncNormalize

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def world_of_one(monkeypatch):
    """Run the test inside a real gloo group of one process."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    assert d.init_process_group("gloo", timeout_s=20) is True
    yield
    d.shutdown()
    assert not torch.distributed.is_initialized()


def test_without_a_group_there_is_one_primary_process(monkeypatch):
    assert (d.rank(), d.world_size(), d.local_rank()) == (0, 1, 0)
    assert d.is_primary() and not d.is_distributed() and not d.is_launched()
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert d.local_rank() == 3


def test_init_does_nothing_when_nothing_was_launched(monkeypatch):
    assert d.init_process_group("gloo") is False
    monkeypatch.setenv("RANK", "0")  # some clusters set one of them for their own purposes
    assert d.init_process_group("gloo") is False
    d.shutdown()


def test_init_names_the_missing_variable(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match="RANK=1 and WORLD_SIZE=2 are set but MASTER_PORT not.*torchrun"):
        d.init_process_group("gloo")


def test_a_group_of_one_is_not_distributed(world_of_one):
    assert d.init_process_group("gloo") is True  # already running: joined, not an error
    assert (d.rank(), d.world_size(), d.is_distributed(), d.is_launched()) == (0, 1, False, True)
    norm = nn.BatchNorm2d(3)
    assert d.convert_sync_batchnorm(norm) is norm


def test_collectives_of_one_process_return_their_input():
    d.barrier()
    assert d.broadcast_object("a") == "a"
    assert d.all_gather_object("a") == ["a"] and d.gather_object("a") == ["a"]
    assert d.run_on_primary(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        d.run_on_primary(lambda: 1 / 0)


@pytest.mark.parametrize(
    "given, summed",
    [
        (torch.float64, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.int64, torch.int64),
    ],
)
def test_reductions_return_a_new_tensor_of_a_type_every_device_has(given, summed):
    value = torch.tensor([1, 2], dtype=given)
    total, mean = d.all_reduce_sum(value), d.all_reduce_mean(value)
    assert total.dtype == summed and total.tolist() == [1, 2]
    assert mean.dtype == torch.float32 and mean.tolist() == [1, 2]
    total += 1
    assert value.tolist() == [1, 2]


def test_distribute_bn_refuses_unknown_modes_and_leaves_one_process_alone():
    norm = nn.BatchNorm2d(2)
    with pytest.raises(ValueError, match="'mean': must be 'reduce', 'broadcast' or ''"):
        d.distribute_bn(norm, "mean")
    norm.running_mean += 3
    d.distribute_bn(norm, "reduce")
    assert norm.running_mean.tolist() == [3, 3]


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5), (2, 3, 2, 3)])
def test_sync_normalize_gradient_is_that_of_batch_norm(world_of_one, shape):
    """Numerical differentiation is the twin here: through the moments, the weight and the bias, in float64."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)

    def ours(x, weight, bias):
        mean, square, total = _global_moments(x.detach())
        return _SyncNormalize.apply(x, weight, bias, mean, square / total, total, 1e-5)

    assert torch.autograd.gradcheck(ours, (x, weight, bias))
    expected = nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5)
    torch.testing.assert_close(ours(x, weight, bias), expected)


def test_sync_batch_norm_alone_is_a_plain_batch_norm():
    layer, plain = d.SyncBatchNorm(3), nn.BatchNorm2d(3)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for mode in (True, False):
        torch.testing.assert_close(layer.train(mode)(x), plain.train(mode)(x), rtol=0, atol=0)
    assert list(layer.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(layer.running_var, plain.running_var, rtol=0, atol=0)
    with pytest.raises(ValueError, match="at least 2 dimensions, got 1"):
        layer(torch.zeros(3))


def test_launch_refuses_what_cannot_work(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="num_processes is 0"):
        launch([sys.argv[0]], 0)
    with pytest.raises(ValueError, match="command is empty"):
        launch([], 2)
    with pytest.raises(FileNotFoundError, match="no_such_script.py"):
        launch([str(tmp_path / "no_such_script.py")], 2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="rank 0 of a launched group already"):
        launch([__file__], 2)
