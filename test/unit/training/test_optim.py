"""Parameter groups, the optimizers behind the names, gradient clipping and freezing."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from timm.optim import Lookahead
from torch import nn

from effdet.training.optim import (
    Frozen,
    build_optimizer,
    clip_gradients,
    freeze_backbone,
    freeze_bn,
    freeze_bn_statistics,
    param_groups,
)
from timm_patches.optim_factory import create_fused_sgd, create_optimizer


class Detector(nn.Module):
    """The parts that matter to an optimizer: backbone with norms and dropout, edge weights, a head with bias."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.SiLU())
        self.fpn = nn.Module()
        self.fpn.edge_weights = nn.Parameter(torch.ones(2))
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.backbone(x))
        return self.head(x * self.fpn.edge_weights[0] + x * self.fpn.edge_weights[1])


def make_model(seed: int = 0) -> Detector:
    torch.manual_seed(seed)
    return Detector()


def names_of(model: nn.Module, tensors: list[torch.Tensor]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if any(parameter is tensor for tensor in tensors)}


def test_only_matrices_are_decayed() -> None:
    model = make_model()
    decayed, plain = param_groups(model, 0.25)
    assert decayed["weight_decay"] == 0.25 and plain["weight_decay"] == 0.0
    assert names_of(model, decayed["params"]) == {"backbone.0.weight", "head.weight"}
    assert names_of(model, plain["params"]) == {
        "backbone.1.weight",
        "backbone.1.bias",
        "fpn.edge_weights",
        "norm.weight",
        "norm.bias",
        "head.bias",
    }
    assert len(decayed["params"]) + len(plain["params"]) == 8


def test_edge_weights_and_norms_are_exempt_whatever_their_shape() -> None:
    model = nn.Module()
    model.edge_weights = nn.Parameter(torch.ones(3, 2))
    model.norm = nn.LayerNorm((4, 4))
    model.bias = nn.Parameter(torch.ones(2, 2))
    (group,) = param_groups(model, 0.1)
    assert group["weight_decay"] == 0.0
    assert len(group["params"]) == 4


def test_frozen_parameters_are_left_out() -> None:
    model = make_model()
    model.backbone.requires_grad_(False)
    optimizer = build_optimizer(model, "momentum", lr=0.1)
    used = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert names_of(model, used) == {"fpn.edge_weights", "norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_masters_take_the_place_of_their_parameters() -> None:
    model = make_model()
    masters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    decayed, _ = param_groups(model, 0.1, masters)
    assert decayed["params"][0] is masters["backbone.0.weight"] and decayed["params"][1] is masters["head.weight"]


def test_nothing_to_train_and_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(make_model().requires_grad_(False), "sgd", lr=0.1)
    with pytest.raises(ValueError, match="lr must be above 0"):
        build_optimizer(make_model(), "sgd", lr=0.0)
    with pytest.raises(ValueError, match="weight_decay must be 0 or more"):
        build_optimizer(make_model(), "sgd", lr=0.1, weight_decay=-1.0)


@pytest.mark.parametrize(
    ("opt", "nesterov"), [("fusedmomentum", False), ("fusedsgd", True), ("momentum", False), ("sgd", True)]
)
def test_sgd_follows_the_formula(opt: str, nesterov: bool) -> None:
    start = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    parameter = nn.Parameter(start.clone())
    optimizer = create_optimizer([{"params": [parameter], "weight_decay": 0.1}], opt, lr=0.5, momentum=0.9)
    weight, velocity = start.clone(), torch.zeros(2, 2)
    for step in range(4):
        grad = torch.tensor([[1.0, 0.5], [-1.0, 2.0]]) * (step + 1)
        parameter.grad = grad.clone()
        optimizer.step()
        pull = grad + 0.1 * weight
        velocity = 0.9 * velocity + pull
        weight = weight - 0.5 * (pull + 0.9 * velocity if nesterov else velocity)
        torch.testing.assert_close(parameter.detach(), weight)


@pytest.mark.parametrize("opt", ["fusedmomentum", "fusedsgd", "momentum", "sgd", "adam", "adamw"])
def test_torch_optimizers_are_fused_and_can_be_told_to_skip(opt: str) -> None:
    optimizer = build_optimizer(make_model(), opt, lr=0.1)
    assert optimizer._step_supports_amp_scaling
    assert all(group["fused"] for group in optimizer.param_groups)


def test_fused_sgd_equals_the_plain_one_on_channels_last_weights() -> None:
    model = make_model().to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    fused = create_fused_sgd(model.parameters(), lr=0.001, momentum=0.9, weight_decay=0.01)
    plain = torch.optim.SGD(twin.parameters(), lr=0.001, momentum=0.9, weight_decay=0.01, foreach=False)
    for _ in range(3):
        x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
        for net, optimizer in ((model, fused), (twin, plain)):
            torch.manual_seed(1)  # dropout
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.fixture
def poisoned_memory():
    """Fill memory that torch allocates and does not write with NaN, so that reading it cannot go unnoticed."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("opt", ["fusedmomentum", "sgd"])
def test_a_skipped_first_step_leaves_no_trace_in_the_momentum(opt: str, poisoned_memory) -> None:
    skipping, fresh = nn.Parameter(torch.ones(64, 64)), nn.Parameter(torch.ones(64, 64))
    first, second = (create_optimizer([parameter], opt, lr=0.1) for parameter in (skipping, fresh))
    skipping.grad = torch.full((64, 64), math.inf)
    first.grad_scale, first.found_inf = None, torch.tensor(1.0)
    first.step()
    del first.grad_scale, first.found_inf
    assert torch.equal(skipping, torch.ones(64, 64))
    for _ in range(2):
        skipping.grad, fresh.grad = torch.full((64, 64), 0.5), torch.full((64, 64), 0.5)
        first.step()
        second.step()
    assert torch.equal(skipping, fresh)


@pytest.mark.parametrize("opt", ["fusedmomentum", "adamw"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_checkpoint_of_an_unfused_optimizer_is_continued_fused(opt: str, steps: int) -> None:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    plain_class = {"fusedmomentum": torch.optim.SGD, "adamw": torch.optim.AdamW}[opt]
    plain = plain_class([weights[0]], lr=0.1, weight_decay=0.0, **({"momentum": 0.9} if opt == "fusedmomentum" else {}))

    def step(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> None:
        weight.grad = torch.tensor([1.0, -2.0, 0.5]) * (1 + weight.detach().abs())
        optimizer.step()

    for _ in range(steps):
        step(plain, weights[0])
    saved = copy.deepcopy(plain.state_dict())  # as read from a file
    for group in saved["param_groups"]:
        del group["fused"], group["foreach"]  # torch_npu's optimizers have no such keys
    weights[1].data.copy_(weights[0])
    fused = create_optimizer([weights[1]], opt, lr=0.1)
    fused.load_state_dict(saved)
    assert all(group["fused"] for group in fused.param_groups)
    before = weights[1].detach().clone()
    weights[1].grad = torch.full((3,), math.nan)
    fused.grad_scale, fused.found_inf = None, torch.tensor(1.0)
    fused.step()
    del fused.grad_scale, fused.found_inf
    assert torch.equal(weights[1], before)
    for _ in range(2):
        step(plain, weights[0])
        step(fused, weights[1])
    torch.testing.assert_close(weights[1], weights[0])


def test_lookahead_moves_half_way_back_every_sixth_step() -> None:
    parameter, plain = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))
    optimizer = create_optimizer([parameter], "lookahead_fusedmomentum", lr=0.1, momentum=0.0)
    twin = create_optimizer([plain], "fusedmomentum", lr=0.1, momentum=0.0)
    assert isinstance(optimizer, Lookahead)
    for _ in range(12):
        optimizer.zero_grad()
        parameter.grad, plain.grad = torch.tensor([1.0]), torch.tensor([1.0])
        optimizer.step()
        twin.step()
    # The slow weight is taken at step 6 (0.4); at step 12 the fast one is at -0.2, and half way back is 0.1.
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.1]))
    torch.testing.assert_close(plain.detach(), torch.tensor([-0.2]))


def test_a_module_is_grouped_by_shape() -> None:
    optimizer = create_optimizer(make_model(), "fusedmomentum", lr=0.1, weight_decay=0.3)
    by_decay = {group["weight_decay"]: len(group["params"]) for group in optimizer.param_groups}
    assert by_decay == {0.0: 6, 0.3: 2}


def test_groups_given_as_generators_are_kept() -> None:
    optimizer = create_optimizer([{"params": make_model().parameters()}], "adamw", lr=0.1)
    assert len(optimizer.param_groups[0]["params"]) == 8


def test_eps_arrives() -> None:
    assert build_optimizer(make_model(), "adamw", lr=0.1, eps=1e-3).param_groups[0]["eps"] == 1e-3


@pytest.mark.parametrize(
    ("opt", "extra", "text"),
    [
        ("fusedmomentu", {}, "fusedmomentum"),
        ("adamww", {}, "adamw"),
        ("lookaheed_adamw", {}, "Unknown optimizer 'lookaheed_adamw'"),
        ("lookahead_adamww", {}, "adamw"),
        ("fusedmomentum", {"eps": 1e-3}, "does not take eps"),
        ("adahessian", {}, "second derivatives"),
        ("fusedadam", {}, "cannot be built here"),
    ],
)
def test_what_cannot_be_built_says_why(opt: str, extra: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        create_optimizer([nn.Parameter(torch.ones(2))], opt, lr=0.1, **extra)


def parameters_with_grads(scale: float = 1.0) -> list[nn.Parameter]:
    torch.manual_seed(3)
    parameters = [nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2, 7))]
    for parameter in parameters[:2]:
        parameter.grad = torch.randn_like(parameter) * scale
    return parameters


def true_norm(parameters: list[nn.Parameter]) -> float:
    return math.sqrt(
        sum(parameter.grad.double().square().sum().item() for parameter in parameters if parameter.grad is not None)
    )


@pytest.mark.parametrize(("limit", "scale"), [(1.0, 10.0), (1e6, 10.0)])
def test_clip_by_norm(limit: float, scale: float) -> None:
    parameters = parameters_with_grads(scale)
    before, norm = [parameter.grad.clone() for parameter in parameters[:2]], true_norm(parameters)
    returned = clip_gradients(parameters, limit, "norm")
    assert isinstance(returned, torch.Tensor) and returned.ndim == 0
    assert float(returned) == pytest.approx(norm, rel=1e-5)
    for parameter, grad in zip(parameters, before, strict=False):
        torch.testing.assert_close(parameter.grad, grad * min(1.0, limit / norm), rtol=1e-5, atol=1e-6)


def test_clip_by_value_reports_what_it_hides() -> None:
    parameters = parameters_with_grads()
    parameters[0].grad[0, 0, 0, 0] = -math.inf
    assert math.isinf(float(clip_gradients(parameters, 0.25, "value")))
    assert parameters[0].grad[0, 0, 0, 0] == -0.25
    assert float(parameters[1].grad.abs().max()) <= 0.25


@pytest.mark.parametrize("scale", [1e-4, 10.0])
def test_clip_adaptively(scale: float) -> None:
    parameters, twin = parameters_with_grads(scale), parameters_with_grads(scale)
    norm = true_norm(parameters)
    assert float(clip_gradients(iter(parameters), 0.02, "agc")) == pytest.approx(norm, rel=1e-5)
    for mine, other in zip(parameters[:2], twin[:2], strict=True):
        for unit in range(len(mine)) if mine.ndim > 1 else [...]:  # a vector is one unit
            limit = 0.02 * max(float(other[unit].detach().norm()), 1e-3)
            expected = other.grad[unit] * min(1.0, limit / max(float(other.grad[unit].norm()), 1e-6))
            torch.testing.assert_close(mine.grad[unit], expected, rtol=1e-5, atol=1e-8)
    assert (true_norm(parameters) < norm * 0.9) == (scale > 1)


def test_clip_nothing_and_refusals() -> None:
    parameters = parameters_with_grads()
    before = parameters[0].grad.clone()
    assert float(clip_gradients(parameters, None)) == pytest.approx(true_norm(parameters), rel=1e-5)
    assert torch.equal(parameters[0].grad, before)
    assert float(clip_gradients([nn.Parameter(torch.ones(2))], 1.0)) == 0.0
    with pytest.raises(ValueError, match="norm, value, agc"):
        clip_gradients(parameters, 1.0, "l1")
    with pytest.raises(ValueError, match="above 0"):
        clip_gradients(parameters, 0.0)


def test_a_frozen_backbone_stays_in_eval_and_learns_nothing() -> None:
    model = make_model()
    assert freeze_backbone(model) == Frozen(parameters=3, norm_layers=1)
    assert freeze_backbone(model) == Frozen(parameters=0, norm_layers=1)  # a second call finds nothing left
    model.train()
    assert model.training and model.norm.training
    assert not any(module.training for module in model.backbone.modules())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.backbone(x), model.backbone(x))  # no dropout
    before = copy.deepcopy(model.backbone.state_dict())
    optimizer = build_optimizer(model, "fusedmomentum", lr=0.1)
    head = model.head.weight.detach().clone()
    model(x).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())
    assert not torch.equal(model.head.weight, head)


def test_freezing_goes_through_a_bench_and_survives_a_copy() -> None:
    bench = nn.Module()
    bench.model = make_model()
    assert freeze_backbone(bench).parameters == 3
    twin = copy.deepcopy(bench).train()
    assert not twin.model.backbone.training and twin.model.norm.training
    assert isinstance(twin.model.backbone, nn.Sequential)
    twin.model.backbone[0].weight.data.zero_()
    assert bench.model.backbone[0].weight.abs().sum() > 0
    with pytest.raises(ValueError, match="no `backbone`"):
        freeze_backbone(nn.Conv2d(1, 1, 1))


def test_frozen_norms_keep_statistics_and_affine_parameters() -> None:
    model = make_model()
    keys = list(model.state_dict())
    assert freeze_bn(model) == Frozen(parameters=4, norm_layers=2)
    assert list(model.state_dict()) == keys and isinstance(model.norm, nn.BatchNorm2d)
    before = copy.deepcopy(model.norm.state_dict())
    model.train()
    assert model.backbone[2].training and not model.norm.training and not model.backbone[1].training
    model(torch.randn(4, 3, 8, 8) + 5).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in model.norm.state_dict().items())
    assert model.norm.weight.grad is None and model.backbone[0].weight.grad is not None


def test_fixed_statistics_leave_the_rest_training() -> None:
    model = make_model()
    with torch.no_grad():
        for _ in range(3):  # statistics unlike those of the next batches
            model(torch.randn(4, 3, 8, 8) * 3 + 1)
    assert freeze_bn_statistics(model) == 2
    statistics = {key: value.clone() for key, value in model.state_dict().items() if "running" in key or "num_b" in key}
    affine = model.norm.weight.detach().clone()
    optimizer = build_optimizer(model, "fusedmomentum", lr=0.1)
    model.train()
    assert model.backbone[2].training, "dropout goes on"
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()
    for key, value in statistics.items():
        assert torch.equal(model.state_dict()[key], value), key
    assert not torch.equal(model.norm.weight, affine), "scale and shift are trained"
    x = torch.randn(1, 4, 3, 3)
    expected = (x - model.norm.running_mean.view(1, 4, 1, 1)) / (model.norm.running_var.view(1, 4, 1, 1) + 1e-5).sqrt()
    expected = expected * model.norm.weight.view(1, 4, 1, 1) + model.norm.bias.view(1, 4, 1, 1)
    torch.testing.assert_close(model.norm(x), expected)


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
@pytest.mark.parametrize("limit", [0.05, 1e6, None])
def test_unscaling_and_clipping_in_one_call_is_one_after_the_other(mode: str, limit: float | None) -> None:
    together, apart = parameters_with_grads(64.0), parameters_with_grads(1.0)
    norm = clip_gradients(together, limit, mode, unscale=torch.tensor(1 / 64))
    expected = clip_gradients(apart, limit, mode)
    torch.testing.assert_close(norm, expected)
    for mine, other in zip(together[:2], apart[:2], strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["norm", "value"])
def test_gradients_in_flat_memory_are_clipped_alike(mode: str) -> None:
    flat, apart = parameters_with_grads(), parameters_with_grads()
    memory = torch.cat([parameter.grad.flatten() for parameter in flat[:2]])
    start = 0
    for parameter in flat[:2]:
        parameter.grad = memory[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    norm = clip_gradients(flat, 0.5, mode, flat_gradients=[memory])
    torch.testing.assert_close(norm, clip_gradients(apart, 0.5, mode))
    for mine, other in zip(flat[:2], apart[:2], strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
