"""Number formats: dtypes of what is stored, overflow, clipping, masters, and agreement with float32 training."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from effdet.runtime import device as device_layer
from effdet.training.amp import Precision
from effdet.training.ema import ModelEma
from effdet.training.optim import build_optimizer

CPU = torch.device("cpu")
HALVES = [("O1", torch.float16), ("O1", torch.bfloat16), ("O2", torch.float16), ("O2", torch.bfloat16)]


class Net(nn.Module):
    """Convolutions, a norm and edge weights, as in the detector."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.edge_weights = nn.Parameter(torch.ones(2))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.norm(self.conv(x)))
        return self.head(x * self.edge_weights[0] + x * self.edge_weights[1])


def make_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def make_batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(count)]


def start(precision: Precision, net: nn.Module, opt: str = "fusedmomentum", lr: float = 0.05) -> torch.optim.Optimizer:
    precision.prepare_model(net)
    return build_optimizer(net, opt, lr=lr, masters=precision.master_parameters(net))


def train_step(
    precision: Precision,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    clip: tuple[float, str] | None = (10.0, "norm"),
    factor: float = 1.0,
) -> float:
    optimizer.zero_grad()
    with precision.autocast():
        output = net(images)
    loss = (output.float() - 1).square().mean() * factor
    precision.backward(loss)
    precision.step(optimizer, clip)
    return loss.item()


def one_weight(
    precision: Precision, opt: str = "fusedmomentum", lr: float = 0.5
) -> tuple[nn.Conv2d, torch.optim.Optimizer]:
    """A single weight of 1.0 with the gradient that `push` chooses: arithmetic that can be checked by hand."""
    net = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(net.weight)
    return net, start(precision, net, opt, lr)


def push(precision: Precision, net: nn.Conv2d, optimizer: torch.optim.Optimizer, grad: float, **keys) -> float:
    """Step on a loss whose gradient on the weight is `grad`; return the norm that `step` reports."""
    optimizer.zero_grad()
    precision.backward((net.weight.float() * grad).sum())
    return float(precision.step(optimizer, **keys))


# -- what is stored in which dtype -----------------------------------------------------------------------------------


def test_o2_halves_convolutions_only() -> None:
    net = make_net()
    before = copy.deepcopy(net.state_dict())
    precision = Precision(CPU, opt_level="O2", dtype="bfloat16")
    assert precision.prepare_model(net) is net
    dtypes = {name: value.dtype for name, value in net.state_dict().items() if value.is_floating_point()}
    halved = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert halved == {"conv.weight", "head.weight", "head.bias"}
    assert {dtypes[name] for name in ("norm.weight", "norm.running_var", "edge_weights")} == {torch.float32}
    masters = precision.master_parameters(net)
    assert masters.keys() == dict(net.named_parameters()).keys()
    for name, master in masters.items():
        assert master.dtype == torch.float32 and torch.equal(master, before[name])
    assert masters["norm.weight"] is net.norm.weight


@pytest.mark.parametrize(("enabled", "level"), [(False, "O2"), (True, "O0"), (True, "O1")])
def test_other_levels_leave_the_model_alone(enabled: bool, level: str) -> None:
    net = make_net()
    precision = Precision(CPU, enabled=enabled, opt_level=level)
    precision.prepare_model(net)
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    assert all(precision.master_parameters(net)[name] is parameter for name, parameter in net.named_parameters())
    with precision.autocast():
        assert net(torch.zeros(1, 3, 8, 8)).dtype == (torch.float16 if enabled and level == "O1" else torch.float32)
    assert precision.dtype == (torch.float16 if enabled and level == "O1" else torch.float32)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "dtype"), HALVES)
@pytest.mark.parametrize("opt", ["fusedmomentum", "adamw"])
def test_half_precision_follows_the_float32_trace(level: str, dtype: torch.dtype, opt: str) -> None:
    traces = []
    for precision in (Precision(CPU, enabled=False), Precision(CPU, opt_level=level, dtype=dtype)):
        net = make_net()
        optimizer = start(precision, net, opt, lr=0.02)
        traces.append([train_step(precision, net, optimizer, images) for images in make_batches(12)])
        assert precision.skipped() == 0
    reference, half = map(torch.tensor, traces)
    assert reference[-1] < 0.5 * reference[0]  # it learns something to compare
    torch.testing.assert_close(half, reference, rtol=0.03, atol=0.01)


def test_float32_is_plain_training() -> None:
    precision = Precision(CPU, enabled=False)
    net, twin = make_net(), make_net()
    optimizer, plain = (
        start(precision, net),
        torch.optim.SGD(
            [
                {"params": [twin.conv.weight, twin.head.weight], "weight_decay": 4e-5},
                {"params": [*twin.norm.parameters(), twin.edge_weights, twin.head.bias]},
            ],
            lr=0.05,
            momentum=0.9,
        ),
    )
    for images in make_batches(5):
        train_step(precision, net, optimizer, images, clip=(0.1, "norm"))
        plain.zero_grad()
        (twin(images) - 1).square().mean().backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        plain.step()
    for mine, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_o2_masters_collect_steps_too_small_for_the_weight(dtype: torch.dtype) -> None:
    precision = Precision(CPU, opt_level="O2", dtype=dtype, init_scale=512.0)
    net, optimizer = one_weight(precision, "momentum", lr=1e-4)
    optimizer.param_groups[0]["momentum"] = 0.0
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for _ in range(40):  # each step is far below half a unit in the last place of 1.0
        push(precision, net, optimizer, -1.0)
    master = precision.float_state_dict(net)["weight"]
    assert master.item() == pytest.approx(1.004, rel=1e-6)
    assert net.weight.dtype == dtype and net.weight.item() == torch.tensor(1.004).to(dtype).item()


@pytest.mark.parametrize(("level", "scale"), [("O1", "dynamic"), ("O1", 1024), ("O2", "1024")])
def test_clipping_acts_on_unscaled_gradients(level: str, scale: float | str) -> None:
    precision = Precision(CPU, opt_level=level, loss_scale=scale)
    net, optimizer = one_weight(precision, "momentum")
    norm = push(precision, net, optimizer, 0.5, clip=(0.125, "norm"))
    assert norm == pytest.approx(0.5)
    assert precision.float_state_dict(net)["weight"].item() == pytest.approx(1 - 0.5 * (0.125 + 4e-5), rel=1e-5)


def test_a_static_scale_in_float32_where_the_device_computes_it_in_half(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []
    for has_range in (True, False):
        monkeypatch.setattr(device_layer, "has_float32_range", lambda device, answer=has_range: answer)
        precision = Precision(CPU, enabled=False, loss_scale="dynamic" if has_range else 128)
        net, optimizer = one_weight(precision, "momentum")
        assert precision.loss_scale() == (None if has_range else 128)
        precision.backward((net.weight * 0.5).sum())
        assert net.weight.grad.item() == (0.5 if has_range else 64.0)
        assert precision.step(optimizer).item() == 0.5
        weights.append(net.weight.item())
    assert weights[0] == weights[1] != 1.0


@pytest.mark.parametrize(("level", "dtype"), HALVES)
def test_backward_calls_accumulate(level: str, dtype: torch.dtype) -> None:
    precision = Precision(CPU, opt_level=level, dtype=dtype)
    net, optimizer = one_weight(precision, "momentum")
    for _ in range(2):
        optimizer.zero_grad()
        for _ in range(3):
            precision.backward((net.weight.float() * 0.25).sum())
        assert float(precision.step(optimizer)) == pytest.approx(0.75)  # the second round starts from nothing


def test_a_step_without_gradients_is_an_error() -> None:
    net = make_net()
    precision = Precision(CPU)
    with pytest.raises(RuntimeError, match="call backward"):
        precision.step(build_optimizer(net, "sgd", lr=0.1))


# -- overflow ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opt", ["fusedmomentum", "adamw", "lamb", "lookahead_sgd"])
@pytest.mark.parametrize(
    ("level", "dtype", "scale"),
    [
        ("O0", torch.float16, "dynamic"),
        ("O1", torch.bfloat16, "dynamic"),
        ("O1", torch.float16, "dynamic"),
        ("O1", torch.float16, 256.0),
        ("O2", torch.float16, "dynamic"),
        ("O2", torch.float16, 256.0),
        ("O2", torch.bfloat16, "dynamic"),
    ],
)
def test_overflow_changes_nothing_but_a_dynamic_scale(
    level: str, dtype: torch.dtype, scale: float | str, opt: str
) -> None:
    precision = Precision(CPU, opt_level=level, dtype=dtype, loss_scale=scale, init_scale=512.0)
    net = make_net()
    optimizer = start(precision, net, opt)
    images, other = make_batches(2)
    train_step(precision, net, optimizer, images)
    weights = {name: precision.float_state_dict(net)[name].clone() for name, _ in net.named_parameters()}
    state = copy.deepcopy(optimizer.state_dict())
    for bad in (math.inf, math.nan):
        train_step(precision, net, optimizer, images, factor=bad)
    after = precision.float_state_dict(net)
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    for key, values in optimizer.state_dict()["state"].items():
        for field, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state["state"][key][field])), field
    assert precision.skipped() == 2
    if dtype == torch.bfloat16 or level == "O0":
        assert precision.loss_scale() is None
    else:
        assert precision.loss_scale() == (512.0 / 4 if scale == "dynamic" else 256.0)
    train_step(precision, net, optimizer, other)  # and training goes on
    assert not torch.equal(precision.float_state_dict(net)["conv.weight"], weights["conv.weight"])
    assert precision.skipped() == 2


@pytest.fixture
def poisoned_memory():
    """Fill memory that torch allocates and does not write with NaN, so that reading it cannot go unnoticed."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_overflow_in_the_very_first_step_leaves_no_trace(level: str, poisoned_memory) -> None:
    results = []
    for first in ([math.inf], []):
        precision = Precision(CPU, opt_level=level, loss_scale=64.0)
        net, optimizer = one_weight(precision)
        for grad in [*first, 0.25, -0.5, 1.0]:
            push(precision, net, optimizer, grad)
        results.append(precision.float_state_dict(net)["weight"].item())
        assert precision.skipped() == len(first)
    assert results[0] == results[1] != 1.0


def test_a_real_float16_overflow_is_found() -> None:
    precision = Precision(CPU, opt_level="O2", init_scale=2.0**17)  # 2**17 itself does not fit float16
    net, optimizer = one_weight(precision)
    push(precision, net, optimizer, 1.0)
    assert net.weight.item() == 1.0 and precision.skipped() == 1 and precision.loss_scale() == 2.0**16
    push(precision, net, optimizer, 0.5)
    assert net.weight.item() < 1.0 and precision.skipped() == 1


def test_clip_by_value_does_not_hide_an_overflow() -> None:
    for precision in (Precision(CPU, enabled=False), Precision(CPU)):
        net, optimizer = one_weight(precision)
        assert math.isinf(push(precision, net, optimizer, math.inf, clip=(1.0, "value")))
        assert net.weight.item() == 1.0 and precision.skipped() == 1


class CountHostReads(TorchDispatchMode):
    """Count operators that give the host a value or a data-dependent shape: on an accelerator each is a wait."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket._qualified_op_name in {
            "aten::_local_scalar_dense",
            "aten::is_nonzero",
            "aten::equal",
            "aten::nonzero",
        }
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("opt", "reads"), [("fusedmomentum", 0), ("sgd", 0), ("adamw", 0), ("lookahead_sgd", 1)])
@pytest.mark.parametrize(
    "keys", [{"enabled": False}, {"dtype": "bfloat16"}, {}, {"loss_scale": 128}, {"opt_level": "O2"}]
)
@pytest.mark.parametrize("clip", [(1.0, "norm"), (1.0, "value"), (0.1, "agc"), None])
def test_fused_optimizers_never_make_the_host_wait(opt: str, reads: int, keys: dict, clip: tuple | None) -> None:
    precision = Precision(CPU, **keys)
    net = make_net()
    optimizer, ema = start(precision, net, opt), ModelEma(net)
    (images,) = make_batches(1)
    for _ in range(2):
        optimizer.zero_grad()
        with precision.autocast():
            loss = net(images).float().square().mean()
        with CountHostReads() as counter:
            precision.backward(loss)
            precision.step(optimizer, clip)
            ema.update(precision.float_state_dict(net))
        assert counter.count == reads
    with CountHostReads() as counter:
        precision.skipped()
    assert counter.count == 1


def overflow_on_rank_1(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    images = make_batches(2)[rank]
    results = []
    for level in ("O1", "O2"):
        precision, net = Precision(CPU, opt_level=level, init_scale=512.0), make_net()
        optimizer = start(precision, net)
        wrapped = nn.parallel.DistributedDataParallel(net)
        train_step(precision, wrapped, optimizer, images)
        before = precision.float_state_dict(net)["conv.weight"].clone()
        train_step(precision, wrapped, optimizer, images, factor=math.inf if rank == 1 else 1.0)
        same = torch.equal(precision.float_state_dict(net)["conv.weight"], before)
        train_step(precision, wrapped, optimizer, images)
        after = precision.float_state_dict(net)["conv.weight"]
        results.append(
            {
                "same": same,
                "moved_later": not torch.equal(after, before),
                "weight": after,
                "skipped": precision.skipped(),
                "scale": precision.loss_scale(),
            }
        )
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_skip_when_one_overflows(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(overflow_on_rank_1, args=(str(tmp_path),), nprocs=2)
    for pair in zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True):
        for result in pair:
            assert result["same"] and result["moved_later"] and result["skipped"] == 1 and result["scale"] == 256.0
        assert torch.equal(pair[0]["weight"], pair[1]["weight"])


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("prepared_first", [True, False])
def test_a_resumed_run_continues_bit_for_bit(level: str, prepared_first: bool, tmp_path: Path) -> None:
    batches = make_batches(6)
    precision, net = Precision(CPU, opt_level=level, init_scale=512.0), make_net()
    optimizer = start(precision, net)
    train_step(precision, net, optimizer, batches[0], factor=math.inf)
    for images in batches[:3]:
        train_step(precision, net, optimizer, images)
    torch.save(
        {
            "model": precision.float_state_dict(net),
            "optimizer": optimizer.state_dict(),
            "precision": precision.state_dict(),
        },
        tmp_path / "last.pt",
    )
    expected = [train_step(precision, net, optimizer, images) for images in batches[3:]]

    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert {value.dtype for value in saved["model"].values() if value.is_floating_point()} == {torch.float32}
    precision, net = Precision(CPU, opt_level=level, init_scale=2.0), make_net(seed=9)
    if prepared_first:
        optimizer = start(precision, net)
        precision.load_float_state_dict(net, saved["model"])
    else:
        net.load_state_dict(saved["model"])
        optimizer = start(precision, net)
    optimizer.load_state_dict(saved["optimizer"])
    precision.load_state_dict(saved["precision"])
    assert precision.skipped() == 1 and precision.loss_scale() == 256.0
    assert [train_step(precision, net, optimizer, images) for images in batches[3:]] == expected


def test_the_scale_of_the_new_run_wins_over_the_saved_one() -> None:
    states = {}
    for name, scale in (("static", 8.0), ("dynamic", "dynamic")):
        precision = Precision(CPU, loss_scale=scale, init_scale=512.0)
        net, optimizer = one_weight(precision)
        push(precision, net, optimizer, math.inf)
        states[name] = precision.state_dict()
    states["none"] = Precision(CPU, dtype="bfloat16").state_dict()
    for name, scale, expected in (
        ("static", 128.0, 128.0),
        ("dynamic", 128.0, 128.0),
        ("static", "dynamic", 1024.0),
        ("none", "dynamic", 1024.0),
        ("dynamic", "dynamic", 256.0),
    ):
        precision = Precision(CPU, loss_scale=scale, init_scale=1024.0)
        precision.load_state_dict(states[name])
        assert precision.loss_scale() == expected
    assert states["static"] == {"skipped": 1}


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"opt_level": "O3"}, "Unknown opt level 'O3'"),
        ({"dtype": "float8"}, "float16 or bfloat16"),
        ({"dtype": torch.float64}, "float16 or bfloat16"),
        ({"loss_scale": 0}, "number above 0"),
        ({"loss_scale": "big"}, "number above 0, got 'big'"),
        ({"loss_scale": math.inf}, "number above 0"),
        ({"loss_scale": 128, "dtype": "bfloat16"}, "128 would have no effect: bfloat16"),
        ({"loss_scale": 16, "enabled": False}, "16 would have no effect: float32"),
        ({"loss_scale": 16, "opt_level": "O0"}, "16 would have no effect: float32"),
    ],
)
def test_settings_without_meaning_are_refused(keys: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Precision(CPU, **keys)
