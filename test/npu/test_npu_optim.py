"""The fused SGD of the NPU against torch.optim.SGD, its guards, and checkpoints that move between the two."""

from __future__ import annotations

import copy
import gc
import warnings

import npu_sim
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch_npu.optim import NpuFusedSGD
from worker import Net

from effdet.training.amp import Precision
from effdet.training.optim import build_optimizer
from timm_patches.optim_factory import create_fused_sgd, create_optimizer, flat_gradients

pytestmark = pytest.mark.usefixtures("exact_products")  # the gradients compared are products

CPU = torch.device("cpu")


def make_images(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(count)]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, images: list[torch.Tensor], clear=None) -> None:
    for batch in images:
        (clear or optimizer.zero_grad)()
        (net(batch.to(next(net.parameters()).device)) - 1).square().mean().backward()
        optimizer.step()


def assert_same(net: nn.Module, twin: nn.Module, **tolerance) -> None:
    for (name, value), other in zip(net.state_dict().items(), twin.state_dict().values(), strict=True):
        assert_close(value.cpu(), other.cpu(), rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("opt", ["fusedmomentum", "fusedsgd"])
def test_ten_steps_equal_torch_sgd(device, opt):
    net, twin = Net().to(device), Net()
    optimizer = build_optimizer(net, opt, lr=0.1, weight_decay=0.01)
    assert isinstance(optimizer, NpuFusedSGD)
    plain = torch.optim.SGD(
        [
            {"params": [twin.conv.weight, twin.head.weight], "weight_decay": 0.01},
            {"params": [*twin.norm.parameters(), twin.head.bias], "weight_decay": 0.0},
        ],
        lr=0.1,
        momentum=0.9,
        nesterov=opt == "fusedsgd",
        foreach=False,
    )
    images = make_images(10)
    for index, batch in enumerate(images):
        for net_, optimizer_ in ((net, optimizer), (twin, plain)):
            for group in optimizer_.param_groups:
                group["lr"] = 0.1 / (1 + index)  # as a schedule does
            train(net_, optimizer_, [batch])
    assert_same(net, twin)


def test_without_momentum(device):
    net, twin = Net().to(device), Net()
    train(net, create_fused_sgd(net.parameters(), 0.1, momentum=0.0, device_type="npu"), make_images(3))
    train(twin, torch.optim.SGD(twin.parameters(), 0.1), make_images(3))
    assert_same(net, twin)


@pytest.mark.parametrize("how", ["optimizer, to None", "module", "parameter by parameter"])
def test_gradients_that_were_set_to_none_are_not_read_again(device, how):
    """torch_npu's own class goes on with the gradients of the step before."""
    net, twin = Net().to(device), Net()
    optimizer = create_fused_sgd(net.parameters(), 0.1, device_type="npu")

    def clear() -> None:
        if how == "optimizer, to None":
            optimizer.zero_grad(set_to_none=True)
        elif how == "module":
            net.zero_grad()
        else:
            for parameter in net.parameters():
                parameter.grad = None

    train(net, optimizer, make_images(4), clear)
    train(twin, torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9), make_images(4))
    assert_same(net, twin)


def test_the_trap_is_there_without_the_guard(device):
    """When this fails, torch_npu has mended it and the guard can go."""
    parameter = nn.Parameter(torch.ones(3, device=device))
    optimizer = NpuFusedSGD([parameter], lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (parameter * 1.0).sum().backward()
        optimizer.step()
        parameter.grad = None
        (parameter * 100.0).sum().backward()
        optimizer.step()
    assert_close(parameter.detach().cpu(), torch.full((3,), -1.0))  # 1 - 1 - 1 and not 1 - 1 - 100


def test_a_parameter_without_gradient_at_first_is_not_left_out(device):
    used, late = (nn.Parameter(torch.ones(3, device=device)) for _ in range(2))
    optimizer = create_fused_sgd([used, late], 0.5, momentum=0.0, device_type="npu")
    used.sum().backward()
    optimizer.step()
    assert_close(late.detach().cpu(), torch.ones(3))
    optimizer.zero_grad()
    (used + 2 * late).sum().backward()
    optimizer.step()
    assert_close(used.detach().cpu(), torch.zeros(3))
    assert_close(late.detach().cpu(), torch.zeros(3))


def test_weights_outlive_their_optimizer(device):
    net = Net().to(device)
    optimizer = create_fused_sgd(net.parameters(), 0.1, device_type="npu")
    train(net, optimizer, make_images(2))
    before = [parameter.detach().cpu() for parameter in net.parameters()]
    del optimizer
    gc.collect()
    junk = [torch.full((sum(value.numel() for value in before),), 7.0, device=device) for _ in range(4)]
    for parameter, value in zip(net.parameters(), before, strict=True):
        assert torch.equal(parameter.detach().cpu(), value) and junk


def test_frozen_parameters_stay_and_cannot_be_thawed_silently(device):
    net = Net().to(device)
    net.conv.requires_grad_(False)
    before = net.conv.weight.detach().cpu()
    optimizer = create_fused_sgd(net.parameters(), 0.1, weight_decay=0.1, device_type="npu")
    train(net, optimizer, make_images(2))
    assert torch.equal(net.conv.weight.detach().cpu(), before)
    net.conv.requires_grad_(True)
    with pytest.raises(RuntimeError, match="1 parameter.s. became trainable after .*Build a new optimizer"):
        train(net, optimizer, make_images(1))


def test_a_model_that_moves_after_the_first_step_is_noticed(device):
    net = Net().to(device)
    optimizer = create_fused_sgd(net.parameters(), 0.1, device_type="npu")
    train(net, optimizer, make_images(1))
    net.head.weight.data = net.head.weight.data.clone()
    with pytest.raises(RuntimeError, match="moved after NpuFusedSGD's first step"):
        train(net, optimizer, make_images(1))


def test_what_it_cannot_train_is_refused(device):
    with pytest.raises(TypeError, match="float32 and float16 parameters, got torch.bfloat16"):
        create_fused_sgd([nn.Parameter(torch.ones(2, dtype=torch.bfloat16, device=device))], 0.1, device_type="npu")
    transposed = nn.Parameter(torch.ones(2, 3, device=device).t())
    with pytest.raises(ValueError, match="contiguous parameters.*channels-last"):
        create_fused_sgd([transposed], 0.1, device_type="npu")


@pytest.mark.parametrize("how", ["in one bucket", "some of them", "added to"])
def test_gradients_may_be_anywhere(device, how):
    """In DistributedDataParallel's buckets, replaced by the caller, or the optimizer's own, as in accumulation."""
    net, twin = Net().to(device), Net()
    optimizer = create_fused_sgd(net.parameters(), 0.1, device_type="npu")
    plain = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    for batch in make_images(4):
        for model, its in ((net, optimizer), (twin, plain)):
            its.zero_grad()
            for part in batch.to(next(model.parameters()).device).split(2):
                (model(part) - 1).square().mean().backward()
                if how == "added to":
                    flat_gradients(its)  # moves them
            parameters = list(model.parameters())
            if how == "in one bucket":
                bucket = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])
                for parameter, part in zip(parameters, bucket.split([p.numel() for p in parameters]), strict=True):
                    parameter.grad = part.view(parameter.shape)
            elif how == "some of them":
                flat_gradients(its)
                parameters[0].grad, parameters[1].grad = parameters[0].grad * 2, None
            its.step()
    assert_same(net, twin)


def test_the_state_dict_is_that_of_torch_sgd(device):
    net, twin = Net().to(device), Net()
    optimizer = create_fused_sgd(net.parameters(), 0.1, weight_decay=0.01, device_type="npu")
    plain = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    train(net, optimizer, make_images(2))
    train(twin, plain, make_images(2))
    mine, theirs = optimizer.state_dict(), plain.state_dict()
    assert set(theirs["param_groups"][0]) - {"lr"} <= set(mine["param_groups"][0])
    assert {key: value for key, value in mine["param_groups"][0].items() if key != "params"} == {
        key: value for key, value in theirs["param_groups"][0].items() if key != "params"
    }
    for key, state in theirs["state"].items():
        assert mine["state"][key].keys() == state.keys()
        assert_close(mine["state"][key]["momentum_buffer"].cpu(), state["momentum_buffer"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", ["npu", "cpu"])
@pytest.mark.parametrize("steps_before_loading", [0, 2])
def test_a_checkpoint_moves_between_devices(device, first, steps_before_loading):
    devices = {"npu": device, "cpu": CPU}
    second = "cpu" if first == "npu" else "npu"
    reference = Net()
    train(reference, torch.optim.SGD(reference.parameters(), 0.1, momentum=0.9), make_images(6))

    net = Net().to(devices[first])
    optimizer = create_optimizer(net.parameters(), "fusedmomentum", 0.1)
    train(net, optimizer, make_images(6)[:3])
    weights = {key: value.cpu() for key, value in net.state_dict().items()}
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["momentum_buffer"] = entry["momentum_buffer"].cpu()

    net = Net().to(devices[second])
    optimizer = create_optimizer(net.parameters(), "fusedmomentum", 0.1)
    train(net, optimizer, make_images(steps_before_loading))  # what is loaded replaces all of this
    net.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(net, optimizer, make_images(6)[3:])
    assert_same(net, reference)


def test_gradients_are_one_tensor_and_clipping_is_that_of_the_cpu(device):
    weights = []
    torch.full((2,), 60000.0, dtype=torch.float16, device=device).mul_(2)  # an overflow of somebody else's
    for where in (CPU, device):
        net = Net().to(where)
        precision = Precision(where, enabled=False)
        optimizer = build_optimizer(net, "fusedmomentum", lr=0.1)
        for batch in make_images(3):
            optimizer.zero_grad()
            precision.backward((net(batch.to(where)) - 1).square().mean() * 50)
            norm = precision.step(optimizer, (0.5, "norm"))
        weights.append((net, norm.item()))
        flat = flat_gradients(optimizer)
        if where == CPU:
            assert flat is None
        else:
            assert [tensor.numel() for tensor in flat] == [sum(p.numel() for p in net.parameters())]
    assert weights[0][1] > 0.5  # it clipped
    assert weights[1][1] == pytest.approx(weights[0][1], rel=1e-4)
    assert_same(weights[1][0], weights[0][0])


@pytest.mark.parametrize("opt", ["fusedmomentum", "momentum", "sgd", "adamw"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_skipped_step_changes_nothing_and_waits_for_nothing(device, opt, steps_before):
    net = Net().to(device)
    optimizer = create_optimizer(net.parameters(), opt, 0.1, weight_decay=0.1)
    train(net, optimizer, make_images(steps_before or 1))
    if not steps_before:  # the very first step is skipped: state was made, but is that of no step
        net = Net().to(device)
        optimizer = create_optimizer(net.parameters(), opt, 0.1, weight_decay=0.1)
        net(make_images(1)[0].to(device)).sum().backward()
        with torch.no_grad():
            optimizer._collect()
            optimizer._maybe_init_combined_states()
    before = {name: value.detach().cpu() for name, value in net.named_parameters()}
    state = [{key: value.cpu() for key, value in optimizer.state[p].items()} for p in net.parameters()]
    for parameter in net.parameters():
        parameter.grad.fill_(float("nan"))
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones((), device=device)
    with npu_sim.strict(), npu_sim.count_waits() as meters:
        optimizer.step()
    assert not meters.waits and meters.calls.total() > 3
    del optimizer.grad_scale, optimizer.found_inf
    for name, value in net.named_parameters():
        assert torch.equal(value.detach().cpu(), before[name]), name
    for parameter, values in zip(net.parameters(), state, strict=True):
        assert values
        for key, value in values.items():
            assert torch.equal(optimizer.state[parameter][key].cpu(), value), key


def test_an_update_is_a_handful_of_kernels(device):
    counts = []
    for fused in (True, False):
        net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(50))).to(device)
        optimizer = (
            create_fused_sgd(net.parameters(), 0.1, weight_decay=0.1, device_type="npu")
            if fused
            else torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.1, foreach=False)
        )
        for _ in range(2):
            optimizer.zero_grad()
            net(torch.ones(1, 4, device=device)).sum().backward()
            with npu_sim.count_waits() as meters:
                optimizer.step()
        counts.append(meters.calls.total())
    assert counts[0] < 10 and counts[1] >= 300, counts


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_adamw_is_that_of_torch_and_its_checkpoints_go_both_ways(device, eps):
    """Three steps on one side, then three on the other, from the other's checkpoint."""
    reference = Net()
    plain = torch.optim.AdamW(reference.parameters(), 0.01, weight_decay=0.1, eps=eps)
    train(reference, plain, make_images(6))
    for first, second in ((device, CPU), (CPU, device)):
        net = Net().to(first)
        optimizer = create_optimizer(net.parameters(), "adamw", 0.01, weight_decay=0.1, eps=eps)
        train(net, optimizer, make_images(6)[:3])
        weights = {key: value.cpu() for key, value in net.state_dict().items()}
        state = copy.deepcopy(optimizer.state_dict())
        assert set(plain.state_dict()["param_groups"][0]) == set(state["param_groups"][0])
        for entry in state["state"].values():
            assert set(entry) == {"step", "exp_avg", "exp_avg_sq"} and float(entry["step"]) == 3
            entry.update({name: value.cpu() for name, value in entry.items()})
        net = Net().to(second)
        optimizer = create_optimizer(net.parameters(), "adamw", 0.01, weight_decay=0.1, eps=eps)
        train(net, optimizer, make_images(2))  # what is loaded replaces all of this
        net.load_state_dict(weights)
        optimizer.load_state_dict(state)
        train(net, optimizer, make_images(6)[3:])
        for (name, value), other in zip(net.named_parameters(), reference.parameters(), strict=True):
            assert_close(value.cpu(), other, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("opt", ["adamw", "lookahead_fusedmomentum", "momentum", "sgd"])
def test_other_optimizers_train_as_on_the_cpu(device, opt):
    net, twin = Net().to(device), Net()
    for model in (net, twin):
        train(model, create_optimizer(model.parameters(), opt, 0.01), make_images(7))
    for (name, value), other in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert_close(value.cpu(), other, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
