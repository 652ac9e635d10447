"""Products are rounded as the chip's cube unit rounds them: float16 on the first generation, HF32 where it is on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from npu_sim import rounding
from torch.testing import assert_close

CPU = torch.device("cpu")


@pytest.fixture
def hf32(device):
    """Allow HF32 as torch_npu does by itself; the tests' process has it off, as a float32 run has."""
    before = torch.npu.conv.allow_hf32
    torch.npu.conv.allow_hf32 = True
    yield
    torch.npu.conv.allow_hf32 = before


def make(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def test_hf32_keeps_eleven_bits_and_rounds_to_even():
    step = 2.0**-11
    given = [1 + step, 1 + step / 2, 1 + 3 * step / 2, 1 + 0.51 * step, -1 - 0.51 * step, 3e38, 0.0, torch.inf]
    rounded = [1 + step, 1.0, 1 + 2 * step, 1 + step, -1 - step, 3e38, 0.0, torch.inf]
    assert_close(rounding.to_hf32(torch.tensor(given)), torch.tensor(rounded), rtol=2.0**-12, atol=0)
    assert rounding.to_hf32(torch.tensor(given))[:5].tolist() == rounded[:5]
    assert rounding.to_hf32(torch.tensor([torch.nan])).isnan().all()


def convolve(x, weight, where):
    x, weight = x.to(where).requires_grad_(), weight.to(where).requires_grad_()
    y = F.conv2d(x, weight, padding=1)
    gradients = torch.autograd.grad(y.square().sum(), (x, weight))
    return [tensor.detach().cpu() for tensor in (y, *gradients)]


def test_convolutions_are_those_of_the_shortened_factors(device, is_910a, hf32):
    x, weight = make(2, 4, 9, 9), make(5, 4, 3, 3)
    shorten = (lambda t: t.half().float()) if is_910a else rounding.to_hf32
    y = F.conv2d(shorten(x), shorten(weight), padding=1)
    y = y.half().float() if is_910a else y
    expected = [y, *torch.ops.aten.convolution_backward(
        shorten(2 * y), shorten(x), shorten(weight), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
    )[:2]]  # fmt: skip
    for got, wanted in zip(convolve(x, weight, device), expected, strict=True):
        assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    # and not the CPU's, by an error of the size that the shorter form has
    error = (convolve(x, weight, device)[0] - F.conv2d(x, weight, padding=1)).abs().max() / y.abs().max()
    assert 1e-5 < error < 2e-3


def test_without_hf32_later_chips_compute_in_float32(device, is_910a):
    x, weight = make(2, 4, 9, 9), make(5, 4, 3, 3)
    equal = torch.equal(convolve(x, weight, device)[0], convolve(x, weight, CPU)[0])
    assert equal != is_910a


def test_matrix_products_are_shortened_on_the_first_generation_only(device, is_910a, hf32):
    x, y = make(7, 9), make(9, 5, 1)[..., 0]
    expected = x.half().float() @ y.half().float() if is_910a else x @ y
    assert_close((x.to(device) @ y.to(device)).cpu(), expected, rtol=1e-6, atol=1e-6)


def test_half_precision_is_left_alone(device, hf32):
    x, weight = make(2, 4, 9, 9).half(), make(5, 4, 3, 3).half()
    expected = F.conv2d(x.float(), weight.float()).half()
    assert torch.equal(F.conv2d(x.to(device), weight.to(device)).cpu(), expected)


def test_a_factor_beyond_float16_saturates_on_the_first_generation(device, is_910a):
    x = torch.full((1, 1, 2, 2), 1e6)
    y = F.conv2d(x.to(device), torch.full((1, 1, 1, 1), 1e-3).to(device)).cpu()
    assert_close(y, torch.full((1, 1, 2, 2), 65504e-3 if is_910a else 1e3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("k", [7, 8])
def test_top_k_from_eight_values_on_is_float16_on_the_first_generation(device, is_910a, k):
    x = make(50)
    short = is_910a and k == 8
    expected = (x.half().float() if short else x).topk(k).values
    assert torch.equal(x.to(device).topk(k).values.cpu(), expected)


def test_a_detectors_loss_stays_near_the_cpus(device, is_910a, hf32):
    from test_npu_step import make_batches, make_run

    losses = {}
    for where in (CPU, device):
        run = make_run(where, {"enabled": False})
        run.bench.train()
        losses[where.type] = run.bench(*make_batches(where, 1)[0])["loss"].item()
    assert losses["npu"] != losses["cpu"]
    assert losses["npu"] == pytest.approx(losses["cpu"], rel=1e-2 if is_910a else 2e-3)
