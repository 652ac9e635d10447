"""The focal loss as a Triton kernel, against the elementwise formula in float64."""
from __future__ import annotations

import os

import pytest
import torch

from effdet.loss import new_focal_loss

pytest.importorskip("triton")
DEVICE = os.environ.get("EFFDET_TEST_DEVICE", "cpu")
CLASSES, ANCHORS = 7, 9
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def run(logits, targets, alpha, gamma, smoothing, factor):
    from effdet.loss_triton import FocalLossSum
    x = logits.clone().requires_grad_()
    total = FocalLossSum.apply(x, targets, CLASSES, alpha, gamma, smoothing)
    (total * factor).backward()
    return total.detach(), x.grad


def expect(logits, targets, alpha, gamma, smoothing, factor):
    x = logits.double().requires_grad_()
    by_anchor = x.permute(0, 2, 3, 1).reshape(len(x), -1, CLASSES)
    flat = targets.flatten(1).unsqueeze(-1)
    one_hot = (flat == torch.arange(CLASSES, device=x.device)).double()
    total = new_focal_loss(by_anchor, one_hot, alpha, gamma, 1.0, smoothing).masked_fill(flat == -2, 0).sum()
    (total * factor).backward()
    return total.detach(), x.grad


def make_logits(dtype, batch=2, height=5, width=6, scale=6.0):
    torch.manual_seed(0)
    logits = torch.randn(batch, ANCHORS * CLASSES, height, width) * scale - 3
    targets = torch.randint(-2, CLASSES, (batch, height, width, ANCHORS))
    return logits.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last), targets.to(DEVICE)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("alpha", "gamma", "smoothing"), [(0.25, 1.5, 0.0), (0.25, 2.0, 0.1), (0.5, 0.7, 0.0)])
def test_loss_and_gradient(dtype, alpha, gamma, smoothing):
    logits, targets = make_logits(dtype)
    total, gradient = run(logits, targets, alpha, gamma, smoothing, 3.0)
    expected, expected_gradient = expect(logits, targets, alpha, gamma, smoothing, 3.0)
    assert total.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    error = (gradient.double() - expected_gradient).norm() / expected_gradient.norm()
    assert error < TOLERANCES[dtype]


def test_extreme_logits_are_finite_and_right():
    logits, targets = make_logits(torch.float32, scale=200.0)
    assert logits.abs().max() > 500
    total, gradient = run(logits, targets, 0.25, 1.5, 0.0, 1.0)
    expected, expected_gradient = expect(logits, targets, 0.25, 1.5, 0.0, 1.0)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-7)


def test_a_loss_scale_keeps_gradients_that_half_precision_alone_would_flush():
    logits, targets = make_logits(torch.float16, scale=0.1)
    logits = (logits - 3).contiguous(memory_format=torch.channels_last)
    targets = torch.full_like(targets, -1)
    _, plain = run(logits, targets, 0.25, 1.5, 0.0, 1e-4)
    _, scaled = run(logits, targets, 0.25, 1.5, 0.0, 1e-4 * 2.0**24)
    _, expected = expect(logits, targets, 0.25, 1.5, 0.0, 1e-4)
    assert (plain == 0).any() and (scaled != 0).all()
    torch.testing.assert_close(scaled.double() / 2.0**24, expected, rtol=2e-3, atol=0)


def test_an_ignored_level_costs_nothing_and_more_logits_than_one_program_takes():
    logits, targets = make_logits(torch.float32, batch=3, height=9, width=11)
    assert logits.numel() > 2 * 4096
    total, gradient = run(logits, torch.full_like(targets, -2), 0.25, 1.5, 0.0, 1.0)
    assert total == 0 and not gradient.any()
    total, _ = run(logits, targets, 0.25, 1.5, 0.0, 1.0)
    torch.testing.assert_close(total.double(), expect(logits, targets, 0.25, 1.5, 0.0, 1.0)[0], rtol=1e-6, atol=0)
