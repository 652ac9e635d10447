"""910A saturates and raises a flag, later chips produce inf and NaN; loss scalers behave accordingly."""

from __future__ import annotations

import npu_sim
import pytest
import torch
import torch_npu
from torch_npu.npu.amp import GradScaler

LARGEST = torch.finfo(torch.float32).max


@pytest.fixture(autouse=True)
def lowered_flag(is_910a, device):
    if is_910a:
        torch_npu.npu.utils.clear_npu_overflow_flag()


def flag_is_up() -> bool:
    return torch_npu.npu.utils.get_npu_overflow_flag()


@pytest.mark.parametrize(
    ("compute", "dtype", "saturated", "ieee"),
    [
        # CANN's own two examples
        (lambda d: torch.tensor([12.0], dtype=torch.float16).to(d).exp(), torch.float16, 65504.0, torch.inf),
        (lambda d: torch.tensor([-1.0], dtype=torch.float16).to(d).sqrt(), torch.float16, 0.0, torch.nan),
        (lambda d: torch.tensor([-3e38]).to(d) * 2, torch.float32, -LARGEST, -torch.inf),
        (lambda d: torch.tensor([1.0]).to(d) / 0, torch.float32, LARGEST, torch.inf),
        (lambda d: torch.tensor([70000.0]).to(d).half(), torch.float16, 65504.0, torch.inf),
        (lambda d: torch.tensor([60000.0], dtype=torch.float16).to(d).mul_(2), torch.float16, 65504.0, torch.inf),
        (
            lambda d: torch.full((1, 300), 300.0, dtype=torch.float16).to(d) @ torch.full((300, 1), 300.0).half().to(d),
            torch.float16,
            65504.0,
            torch.inf,
        ),
        (lambda d: torch._foreach_mul([torch.tensor([3e38]).to(d)], 2.0)[0], torch.float32, LARGEST, torch.inf),
    ],
    ids=["exp", "sqrt", "multiply", "divide", "cast", "in place", "product", "foreach"],
)
def test_too_large_results(compute, dtype, saturated, ieee, device, is_910a):
    result = compute(device)
    expected = torch.full_like(result.cpu(), saturated if is_910a else ieee)
    assert result.dtype == dtype
    torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    if is_910a:
        assert flag_is_up()


def test_moving_an_infinity_keeps_it(device, is_910a):
    mask = torch.tensor([True, False, True]).to(device)
    x = torch.ones(3, device=device).masked_fill(mask, -torch.inf)
    chosen = torch.cat([x, torch.where(mask, x, 0.0)]).topk(4).values
    assert chosen.tolist() == [1.0, 0.0, -torch.inf, -torch.inf]
    assert torch.tensor([torch.inf]).to(device).clone().item() == torch.inf
    if is_910a:
        assert not flag_is_up()


def test_the_flag_stays_until_it_is_cleared(device, is_910a):
    if not is_910a:
        with pytest.raises(RuntimeError, match="Unsupported api"):  # torch_npu's own words for later chips
            flag_is_up()
        return
    assert not flag_is_up()
    torch.tensor([3e38]).to(device) * 2
    torch.ones(3, device=device) * 2
    assert flag_is_up() and flag_is_up()
    torch_npu.npu.utils.clear_npu_overflow_flag()
    assert not flag_is_up()


def step(scaler, parameter, optimizer, factor: float) -> None:
    optimizer.zero_grad()
    scaler.scale((parameter * parameter).sum() * factor).backward()
    scaler.step(optimizer)
    scaler.update()


def make_parameter(device) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    parameter = torch.nn.Parameter(torch.ones(3, device=device))
    return parameter, torch.optim.SGD([parameter], lr=0.1)


@pytest.mark.parametrize("make_scaler", [GradScaler, lambda: torch.amp.GradScaler("npu")], ids=["torch_npu", "torch"])
def test_a_dynamic_scaler_skips_the_overflow_and_goes_on(make_scaler, device, is_910a):
    parameter, optimizer = make_parameter(device)
    scaler = make_scaler()
    step(scaler, parameter, optimizer, 1.0)
    assert parameter.tolist() == pytest.approx([0.8] * 3)
    step(scaler, parameter, optimizer, torch.inf)
    assert scaler.get_scale() == 2.0**15 and parameter.tolist() == pytest.approx([0.8] * 3)
    if is_910a:
        assert parameter.grad.tolist() == [LARGEST] * 3  # saturated, and left scaled
    step(scaler, parameter, optimizer, 1.0)
    assert scaler.get_scale() == 2.0**15 and parameter.tolist() == pytest.approx([0.64] * 3)


def test_only_torch_npus_scaler_clears_a_stale_flag(device, is_910a):
    for make_scaler, steps_on_910a in ((GradScaler, True), (lambda: torch.amp.GradScaler("npu"), False)):
        parameter, optimizer = make_parameter(device)
        torch.tensor([3e38]).to(device) * 2  # long before the step, in an evaluation say
        step(make_scaler(), parameter, optimizer, 1.0)
        assert parameter.tolist() == pytest.approx([0.8 if steps_on_910a or not is_910a else 1.0] * 3)


def test_torch_npus_static_scaler_does_not_look(device):
    parameter, optimizer = make_parameter(device)
    scaler = GradScaler(init_scale=128.0, dynamic=False)
    step(scaler, parameter, optimizer, torch.inf)
    assert scaler.get_scale() == 128.0 and parameter.tolist() != [1.0] * 3


def test_a_dynamic_scaler_waits_and_a_static_one_does_not(device):
    parameter, optimizer = make_parameter(device)
    scalers = {True: GradScaler(), False: GradScaler(init_scale=128.0, dynamic=False)}
    waits = {}
    for dynamic, scaler in scalers.items():
        step(scaler, parameter, optimizer, 1.0)
        with npu_sim.count_waits() as meters:
            step(scaler, parameter, optimizer, 1.0)
        waits[dynamic] = meters.waits.total()
    assert waits[True] >= 3 and waits[False] == 0
