"""The loss against a dense one-hot twin in float64, and its closed-form gradient against finite differences."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from effdet.loss import (
    DetectionLoss,
    dense_focal_loss_sum,
    focal_loss_legacy,
    focal_loss_sum,
    huber_loss,
    loss_fn,
    new_focal_loss,
    one_hot,
    smooth_l1_loss,
)
from effdet.ops import focal

ANCHORS = 3
SIZES = [(4, 3), (2, 2)]  # cells of the two levels
GAMMAS = [0.0, 1.0, 1.5, 2.0, 2.5]


@pytest.fixture(autouse=True, params=["CPU's way", "accelerator's way"])
def way(request, monkeypatch):
    monkeypatch.setattr(focal, "PIECE", 7)  # many pieces and a rest
    monkeypatch.setattr(focal, "is_host", lambda device: request.param != "accelerator's way")


def focal_slowly(
    logits: np.ndarray, one_hot_targets: np.ndarray, alpha: float, gamma: float, smoothing: float
) -> np.ndarray:
    """Compute the focal loss of each logit, float64, from the definition with a probability of the true answer."""
    positive = one_hot_targets == 1
    log_p = -np.logaddexp(0, -logits)  # log of sigmoid
    log_not_p = -np.logaddexp(0, logits)
    soft = one_hot_targets * (1 - smoothing) + 0.5 * smoothing
    cross_entropy = -(soft * log_p + (1 - soft) * log_not_p)
    wrong = np.exp(np.where(positive, log_not_p, log_p))  # 1 - p_t
    return np.where(positive, alpha, 1 - alpha) * wrong**gamma * cross_entropy


def class_loss_slowly(
    logits: np.ndarray, targets: np.ndarray, num_classes: int, alpha: float, gamma: float, smoothing: float
) -> np.ndarray:
    """Return the loss of each logit [B, A * K, height, width] of one level; targets are [B, height, width, A]."""
    dense = np.zeros_like(logits)
    counted = np.ones_like(logits)
    for image, row, column, anchor in np.ndindex(*targets.shape):
        number = targets[image, row, column, anchor]
        if number >= 0:
            dense[image, anchor * num_classes + number, row, column] = 1
        if number == -2:
            counted[image, anchor * num_classes : (anchor + 1) * num_classes, row, column] = 0
    return focal_slowly(logits, dense, alpha, gamma, smoothing) * counted


def box_loss_slowly(deltas: np.ndarray, targets: np.ndarray, delta: float) -> float:
    """Sum Huber's loss over the coordinates whose target is not 0; targets are [B, height, width, A * 4]."""
    total = 0.0
    for image, row, column, channel in np.ndindex(*targets.shape):
        target = targets[image, row, column, channel]
        if target != 0:
            error = abs(deltas[image, channel, row, column] - target)
            total += error**2 / 2 if error <= delta else delta * (error - delta / 2)
    return total


def make_level(
    num_classes: int, size: tuple[int, int], seed: int, spread: float = 3.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw logits, class targets (a few positive, one anchor in five left out), deltas, code targets of one level."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, ANCHORS * num_classes, *size, generator=generator) * spread - 1
    targets = torch.randint(-4, num_classes, (2, *size, ANCHORS), generator=generator)
    if num_classes > 1:  # otherwise nearly every anchor would be positive
        targets[torch.rand(targets.shape, generator=generator) < 0.5] = -1
    targets[targets == -4] = -2
    targets[targets == -3] = -1
    deltas = torch.randn(2, ANCHORS * 4, *size, generator=generator) * 0.3
    code_targets = torch.randn(2, *size, ANCHORS, 4, generator=generator) * 0.3
    code_targets[targets < 0] = 0
    return logits, targets, deltas, code_targets.flatten(3)


def sum_and_gradient(
    logits: Tensor, targets: Tensor, num_classes: int, gamma: float, smoothing: float, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    total = focal_loss_sum(logits, targets.flatten(1), num_classes, 0.25, gamma, smoothing)
    (gradient,) = torch.autograd.grad(total * factor, logits)
    return total.detach(), gradient


def slow_gradient(logits: np.ndarray, *rest: object, step: float = 1e-5) -> np.ndarray:
    """Take central differences; each logit enters only its own term, so all can be moved at once."""
    return (class_loss_slowly(logits + step, *rest) - class_loss_slowly(logits - step, *rest)) / (2 * step)


@pytest.mark.parametrize("num_classes, gamma, smoothing", list(itertools.product([1, 90], GAMMAS, [0.0, 0.1])))
def test_class_loss_and_gradient(num_classes, gamma, smoothing):
    logits, targets, _, _ = make_level(num_classes, (4, 3), seed=0)
    assert (targets >= 0).any() and (targets == -1).any() and (targets == -2).any()
    total, gradient = sum_and_gradient(logits, targets, num_classes, gamma, smoothing)
    arguments = (targets.numpy(), num_classes, 0.25, gamma, smoothing)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(class_loss_slowly(logits.double().numpy(), *arguments).sum(), rel=1e-5)
    np.testing.assert_allclose(
        gradient.numpy(), slow_gradient(logits.double().numpy(), *arguments), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("num_classes, gamma, smoothing", list(itertools.product([1, 90], [1.5, 2.0], [0.0, 0.1])))
def test_dense_targets_give_the_same_sum_and_gradient(num_classes, gamma, smoothing):
    logits, targets, _, _ = make_level(num_classes, (4, 3), seed=0)
    total, gradient = sum_and_gradient(logits, targets, num_classes, gamma, smoothing)
    dense_logits = logits.clone().requires_grad_()
    dense = dense_focal_loss_sum(dense_logits, targets.flatten(1), num_classes, 0.25, gamma, smoothing)
    torch.testing.assert_close(dense, total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(dense, dense_logits)[0], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("legacy, smoothing", [(False, 0.0), (False, 0.1), (True, 0.0), (True, 0.1)])
@pytest.mark.parametrize("num_classes", [1, 90])
def test_whole_loss(legacy, smoothing, num_classes):
    """Two levels; normalised by positives + 1; the legacy form knows no smoothing."""
    levels = [make_level(num_classes, size, seed) for seed, size in enumerate(SIZES)]
    num_positives = torch.tensor([7.0, 4.0])
    logits, targets, deltas, code_targets = (list(part) for part in zip(*levels, strict=True))
    total, class_loss, box_loss = loss_fn(
        logits, deltas, targets, code_targets, num_positives, num_classes, 0.3, 1.5, 0.2, 40.0, smoothing, legacy
    )
    expected_class = (
        sum(
            class_loss_slowly(
                level[0].double().numpy(), level[1].numpy(), num_classes, 0.3, 1.5, 0.0 if legacy else smoothing
            ).sum()
            for level in levels
        )
        / 12
    )
    expected_box = (
        sum(box_loss_slowly(level[2].double().numpy(), level[3].double().numpy(), 0.2) for level in levels) / 48
    )
    assert expected_box > 0
    assert class_loss.item() == pytest.approx(expected_class, rel=1e-5)
    assert box_loss.item() == pytest.approx(expected_box, rel=1e-5)
    assert total.item() == pytest.approx(expected_class + 40 * expected_box, rel=1e-5)
    config = SimpleNamespace(
        num_classes=num_classes,
        alpha=0.3,
        gamma=1.5,
        delta=0.2,
        box_loss_weight=40.0,
        label_smoothing=smoothing,
        legacy_focal=legacy,
    )
    flat = (
        torch.cat([level.flatten(1) for level in targets], 1),
        torch.cat([level.reshape(2, -1, 4) for level in code_targets], 1),
    )
    for given in ((targets, code_targets), flat):
        for one, other in zip(
            DetectionLoss(config)(logits, deltas, *given, num_positives), (total, class_loss, box_loss), strict=True
        ):
            assert torch.equal(one, other)
    dense = DetectionLoss(config, dense_targets=True)(logits, deltas, *flat, num_positives)
    torch.testing.assert_close(dense[1], class_loss, rtol=1e-5, atol=1e-6)
    assert torch.equal(dense[2], box_loss)


def test_box_gradient():
    _, _, deltas, targets = make_level(5, (4, 3), seed=2)
    deltas.requires_grad_()
    logits, none = torch.zeros(2, ANCHORS * 5, 4, 3), torch.full((2, 4, 3, ANCHORS), -1)
    _, _, box_loss = loss_fn([logits], [deltas], [none], [targets], torch.tensor([3.0]), 5, 0.25, 1.5, 0.1, 50.0)
    (gradient,) = torch.autograd.grad(box_loss, deltas)
    wanted = targets.permute(0, 3, 1, 2)
    error = (deltas - wanted).detach()
    expected = torch.where(wanted == 0, torch.zeros_like(error), error.clamp(-0.1, 0.1)) / 16
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_only_background_is_finite():
    logits, _, deltas, code_targets = make_level(5, (4, 3), seed=3)
    logits.requires_grad_(), deltas.requires_grad_()
    targets = torch.full((2, 4, 3, ANCHORS), -1)
    total, class_loss, box_loss = loss_fn(
        [logits], [deltas], [targets], [torch.zeros_like(code_targets)], torch.zeros(2), 5, 0.25, 1.5, 0.1, 50.0
    )
    total.backward()
    expected = class_loss_slowly(logits.detach().double().numpy(), targets.numpy(), 5, 0.25, 1.5, 0.0).sum()
    assert class_loss.item() == pytest.approx(expected, rel=1e-5) and box_loss.item() == 0.0
    assert total.item() == class_loss.item() and deltas.grad.abs().max() == 0
    assert torch.isfinite(logits.grad).all() and (logits.grad > 0).all()


@pytest.mark.parametrize("gamma, smoothing", list(itertools.product([0.0, 1.5], [0.0, 0.1])))
def test_what_is_left_out_has_no_loss_and_no_gradient(gamma, smoothing):
    logits, _, _, _ = make_level(5, (4, 3), seed=4)
    total, gradient = sum_and_gradient(logits, torch.full((2, 4, 3, ANCHORS), -2), 5, gamma, smoothing)
    assert total.item() == 0.0 and gradient.abs().max() == 0.0
    targets = torch.full((2, 4, 3, ANCHORS), -1)
    targets[:, :, :, 1] = -2
    one, gradient = sum_and_gradient(logits, targets, 5, gamma, smoothing)
    logits[:, 5:10] = 50.0  # the logits of the anchor that is left out
    other, _ = sum_and_gradient(logits, targets, 5, gamma, smoothing)
    assert one.item() == other.item() > 0 and gradient[:, 5:10].abs().max() == 0


@pytest.mark.parametrize("gamma, smoothing", list(itertools.product(GAMMAS, [0.0, 0.1])))
def test_extreme_logits(gamma, smoothing):
    for target in (-1, 0):
        for value in (-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4):
            logits = torch.full((1, 1, 1, 1), value)
            targets = torch.full((1, 1, 1, 1), target)
            total, gradient = sum_and_gradient(logits, targets, 1, gamma, smoothing)
            arguments = (logits.double().numpy(), targets.numpy(), 1, 0.25, gamma, smoothing)
            assert torch.isfinite(total) and torch.isfinite(gradient).all()
            # A positive is background plus a correction: exact to float32's share of the background's loss.
            expected = class_loss_slowly(*arguments).sum()
            assert total.item() == pytest.approx(expected, rel=1e-4, abs=2e-7 * abs(value))
            # Near +-1e4 the differences of float64 are exact to about 1e-7.
            np.testing.assert_allclose(gradient.numpy(), slow_gradient(*arguments, step=1e-3), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=["fp16", "bf16"])
def test_half_precision_logits_inside_autocast(dtype, tolerance):
    """The arithmetic is fp32; only the gradient is rounded to the logits' dtype, at most twice for bfloat16."""
    logits, targets, deltas, code_targets = make_level(90, (4, 3), seed=5)
    logits, deltas = logits.to(dtype).requires_grad_(), deltas.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        total, class_loss, box_loss = loss_fn(
            [logits], [deltas], [targets], [code_targets], torch.tensor([4.0, 3.0]), 90, 0.25, 1.5, 0.1, 50.0
        )
        total.backward()
    assert total.dtype == class_loss.dtype == box_loss.dtype == torch.float32
    arguments = (logits.detach().double().numpy(), targets.numpy(), 90, 0.25, 1.5, 0.0)
    assert class_loss.item() == pytest.approx(class_loss_slowly(*arguments).sum() / 8, rel=1e-5)
    expected_box = box_loss_slowly(deltas.detach().double().numpy(), code_targets.double().numpy(), 0.1) / 32
    assert box_loss.item() == pytest.approx(expected_box, rel=1e-5)
    assert logits.grad.dtype == deltas.grad.dtype == dtype
    np.testing.assert_allclose(logits.grad.double().numpy(), slow_gradient(*arguments) / 8, rtol=tolerance, atol=1e-6)


def test_loss_scale_saves_small_gradients_of_fp16():
    """A gradient below fp16's smallest number must reach the loss scale before it is rounded."""
    logits = torch.full((1, 1, 1, 1), -8.0, dtype=torch.float16)
    targets = torch.full((1, 1, 1, 1), -1)
    expected = slow_gradient(logits.double().numpy(), targets.numpy(), 1, 0.25, 1.5, 0.0).item()
    assert 0 < expected < 2**-25, "rounds to 0 in fp16"
    _, gradient = sum_and_gradient(logits, targets, 1, 1.5, 0.0, factor=65536.0)
    assert gradient.dtype == torch.float16 and gradient.item() == pytest.approx(65536 * expected, rel=2e-3)


def test_gradient_scales_with_what_comes_after():
    logits, targets, _, _ = make_level(5, (4, 3), seed=6)
    _, gradient = sum_and_gradient(logits, targets, 5, 1.5, 0.0)
    _, scaled = sum_and_gradient(logits, targets, 5, 1.5, 0.0, factor=-3.5)
    torch.testing.assert_close(scaled, -3.5 * gradient)


@pytest.mark.parametrize("num_classes", [1, 5])
def test_memory_layout_does_not_matter(num_classes):
    logits, targets, _, _ = make_level(num_classes, (4, 3), seed=7)
    kept = logits.clone()
    total, gradient = sum_and_gradient(logits, targets, num_classes, 1.5, 0.1)
    other_total, other_gradient = sum_and_gradient(
        logits.contiguous(memory_format=torch.channels_last), targets, num_classes, 1.5, 0.1
    )
    torch.testing.assert_close(other_gradient, gradient, rtol=1e-5, atol=1e-7)
    assert other_total.item() == pytest.approx(total.item(), rel=1e-6)
    assert torch.equal(logits, kept), "the logits were changed"


@pytest.mark.parametrize("dtype, bytes_per_logit", [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 4)])
def test_one_tensor_is_kept_for_the_backward_pass(dtype, bytes_per_logit):
    """fp16 keeps its gradient in fp32; everything else but that one tensor for each level is scalars."""
    levels = [make_level(90, size, seed) for seed, size in enumerate(SIZES)]
    logits = [level[0].to(dtype).requires_grad_() for level in levels]
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_fn(
            logits,
            [level[2] for level in levels],
            [level[1] for level in levels],
            [level[3] for level in levels],
            torch.tensor([4.0, 3.0]),
            90,
            0.25,
            1.5,
            0.1,
            50.0,
        )
    large = sorted(size for size in sizes if size > 64)
    assert large == sorted(level.numel() * bytes_per_logit for level in logits)


def test_nothing_is_kept_without_a_backward_pass():
    logits, targets, _, _ = make_level(90, (4, 3), seed=8)
    with torch.no_grad():
        total = focal_loss_sum(logits, targets.flatten(1), 90, 0.25, 1.5)
    assert not total.requires_grad
    assert total.item() == sum_and_gradient(logits, targets, 90, 1.5, 0.0)[0].item()


@pytest.mark.parametrize("gamma, smoothing", list(itertools.product(GAMMAS, [0.0, 0.1])))
def test_dense_forms(gamma, smoothing):
    logits = make_level(5, (4, 3), seed=9)[0]
    targets = (torch.rand(logits.shape, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    expected = focal_slowly(logits.double().numpy(), targets.numpy(), 0.3, gamma, smoothing) / 6
    actual = new_focal_loss(logits, targets, 0.3, gamma, 6.0, smoothing)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-4, atol=1e-7)
    if not smoothing:
        np.testing.assert_allclose(
            focal_loss_legacy(logits, targets, 0.3, gamma, torch.tensor(6.0)).numpy(), expected, rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("limit", [0.0, 0.1, 1.0])
def test_huber_and_smooth_l1(limit, weighted, average):
    generator = torch.Generator().manual_seed(10)
    given, wanted, weights = (torch.randn(4, 5, generator=generator) for _ in range(3))
    huber, smooth = [], []
    for error, weight in zip((given - wanted).abs().flatten().tolist(), weights.flatten().tolist(), strict=True):
        weight = weight if weighted else 1.0
        value = error**2 / 2 if error <= limit else limit * (error - limit / 2)
        huber.append(weight * value)
        smooth.append(weight * (value / limit if limit else error))
    count = len(huber) if average else 1
    options = {"weights": weights if weighted else None, "size_average": average}
    assert smooth_l1_loss(given, wanted, limit, **options).item() == pytest.approx(sum(smooth) / count, rel=1e-4)
    if limit:
        assert huber_loss(given, wanted, limit, **options).item() == pytest.approx(sum(huber) / count, rel=1e-4)


def test_one_hot():
    assert one_hot(torch.tensor([[2, -1], [0, -2]]), 3).tolist() == [[[0, 0, 1], [0, 0, 0]], [[1, 0, 0], [0, 0, 0]]]
