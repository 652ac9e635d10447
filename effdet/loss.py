"""Detection loss: focal loss for classes, Huber loss for boxes.

Targets are those of all anchors, [B, N]; lists with a tensor for each level, as effdet has them, are taken too. The
network's outputs stay one tensor for each level, as joining them would copy every logit. The focal loss is one pass
with its gradient in closed form (ops/focal.py). All arithmetic is fp32, whatever the logits'
dtype and also inside autocast.

Source: RetinaNet, https://arxiv.org/abs/1708.02002 (focal loss); google/automl, efficientdet/det_model_fn.py (label
smoothing, masking, normalisers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effdet.ops.focal import focal_loss_and_gradient
from effdet.ops.labels import IGNORE
from effdet.runtime.device import is_host
from effdet.runtime.device import one_hot as device_one_hot


class _FocalLossSum(torch.autograd.Function):
    """Sum of the focal loss over one level; the gradient is computed with the loss, in the same pass."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, class_targets: Tensor, num_classes: int, alpha: float, gamma: float, smoothing: float
    ) -> Tensor:
        """Return the sum as a scalar; see `focal_loss_sum`."""
        with_gradient = ctx.needs_input_grad[0]
        # fp16 would flush small gradients to zero before the loss scale reaches them; bf16 has the range.
        gradient_dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        total, gradient = focal_loss_and_gradient(
            logits, class_targets, num_classes, alpha, gamma, smoothing, with_gradient, gradient_dtype
        )
        if with_gradient:
            ctx.save_for_backward(gradient)
            ctx.logits_dtype = logits.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output.to(gradient.dtype)).to(ctx.logits_dtype), None, None, None, None, None


def dense_focal_loss_sum(
    logits: Tensor, class_targets: Tensor, num_classes: int, alpha: float, gamma: float, label_smoothing: float = 0.0
) -> Tensor:
    """Compute `focal_loss_sum` from one-hot targets by autograd: the same number, in more memory and time.

    The one-hot targets are made by the device's own operator, where it has one. Arguments are those of
    `focal_loss_sum`.
    """
    make_one_hot = device_one_hot(logits.device) or compare_one_hot
    dense = make_one_hot(class_targets.to(torch.int32), num_classes)
    by_anchor = logits.permute(0, 2, 3, 1).reshape(logits.shape[0], -1, num_classes).float()
    loss = new_focal_loss(by_anchor, dense, alpha, gamma, 1.0, label_smoothing)
    return loss.masked_fill((class_targets == IGNORE).unsqueeze(-1), 0.0).sum()


def focal_loss_sum(
    logits: Tensor, class_targets: Tensor, num_classes: int, alpha: float, gamma: float, label_smoothing: float = 0.0
) -> Tensor:
    """Sum the focal loss over one level.

    Args:
        logits: [B, A * K, height, width].
        class_targets: int64 [B, height * width * A]: 0..K-1, -1 background, -2 left out.
        num_classes: K.
        alpha: weight of the foreground in 0..1.
        gamma: focusing exponent, >= 0.
        label_smoothing: in 0..1.

    Returns:
        A float32 scalar, not normalised; finite for any finite logits.
    """
    return _FocalLossSum.apply(logits, class_targets, num_classes, alpha, gamma, label_smoothing)


def huber_loss(
    input: Tensor, target: Tensor, delta: float = 1.0, weights: Tensor | None = None, size_average: bool = True
) -> Tensor:
    """Compute the Huber loss: quadratic up to `delta`, linear beyond.

    Args:
        input: float [...].
        target: the same shape.
        delta: where the slope stops growing, > 0.
        weights: multiplied in, broadcastable to [...].
        size_average: return the mean instead of the sum.

    Returns:
        A scalar.
    """
    error = (input - target).abs()
    quadratic = error.clamp(max=delta)
    loss = 0.5 * quadratic.square() + delta * (error - quadratic)
    if weights is not None:
        loss = loss * weights
    return loss.mean() if size_average else loss.sum()


def smooth_l1_loss(
    input: Tensor, target: Tensor, beta: float = 1.0 / 9, weights: Tensor | None = None, size_average: bool = True
) -> Tensor:
    """Compute the smooth L1 loss: Huber's with `delta` = `beta`, divided by it; below 1e-5 it is the L1 loss.

    Arguments and result as `huber_loss`.
    """
    if beta >= 1e-5:
        return huber_loss(input, target, beta, weights, size_average) / beta
    loss = (input - target).abs()
    if weights is not None:
        loss = loss * weights
    return loss.mean() if size_average else loss.sum()


def check_class_targets(cls_targets: Tensor | Sequence[Tensor], num_classes: int) -> None:
    """Refuse a class that the model does not have; reads the targets, so an accelerator has to be waited for.

    Raises:
        ValueError: a class target is num_classes or more.
    """
    levels = [cls_targets] if isinstance(cls_targets, Tensor) else cls_targets
    highest = max((int(level.max()) for level in levels if level.numel()), default=-1)
    if highest >= num_classes:
        raise ValueError(
            f"a label is {highest + 1}, but the model has {num_classes} classes: labels go from 1 to num_classes. Make "
            f"the model with num_classes={highest + 1} (a data set's is dataset.parser.max_label), or renumber them."
        )


def loss_fn(
    cls_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    cls_targets: Tensor | Sequence[Tensor],
    box_targets: Tensor | Sequence[Tensor],
    num_positives: Tensor,
    num_classes: int,
    alpha: float,
    gamma: float,
    delta: float,
    box_loss_weight: float,
    label_smoothing: float = 0.0,
    legacy_focal: bool = False,
    *,
    dense_targets: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the detection loss of a batch.

    Args:
        cls_outputs: logits [B, A * K, height, width] of each level.
        box_outputs: deltas [B, A * 4, height, width] of each level.
        cls_targets: int64 [B, N]: 0..K-1, -1 background, -2 left out; or [B, height, width, A] of each level.
        box_targets: float [B, N, 4]; exact zeros are left out; or [B, height, width, A * 4] of each level.
        num_positives: positive anchors of each image [B].
        num_classes: K.
        alpha: weight of the foreground in 0..1.
        gamma: focusing exponent.
        delta: Huber's delta.
        box_loss_weight: weight of the box loss in the total.
        label_smoothing: in 0..1.
        legacy_focal: the form without label smoothing; otherwise the same function.
        dense_targets: compute the class loss by `dense_focal_loss_sum`, the equal of `focal_loss_sum`.

    Returns:
        total, class and box loss: float32 scalars, normalised by the batch's positive anchors + 1, so a batch of
        background only is finite.

    Raises:
        ValueError: a class target is num_classes or more; on accelerators it is not looked for.
    """
    if is_host(cls_outputs[0].device) and not torch.compiler.is_compiling():
        check_class_targets(cls_targets, num_classes)
    focal_sum = dense_focal_loss_sum if dense_targets else focal_loss_sum
    counts = [deltas[0].numel() // 4 for deltas in box_outputs]  # anchors of each level
    with torch.autocast(cls_outputs[0].device.type, enabled=False):
        normalizer = num_positives.sum().float() + 1.0
        smoothing = 0.0 if legacy_focal else label_smoothing
        cls_loss = (
            torch.stack(
                [
                    focal_sum(logits, targets.flatten(1), num_classes, alpha, gamma, smoothing)
                    for logits, targets in zip(cls_outputs, _by_level(cls_targets, counts), strict=True)
                ]
            ).sum()
            / normalizer
        )
        box_loss = torch.stack(
            [
                _box_loss_sum(deltas, targets, delta)
                for deltas, targets in zip(box_outputs, _by_level(box_targets, counts), strict=True)
            ]
        ).sum() / (normalizer * 4.0)
        return cls_loss + box_loss_weight * box_loss, cls_loss, box_loss


def _by_level(targets: Tensor | Sequence[Tensor], counts: Sequence[int]) -> Sequence[Tensor]:
    return targets.split(counts, 1) if isinstance(targets, Tensor) else targets


def _box_loss_sum(deltas: Tensor, targets: Tensor, delta: float) -> Tensor:
    """Sum Huber's loss over the positive anchors of one level; targets are [B, n, 4] or [B, height, width, A * 4]."""
    deltas = deltas.permute(0, 2, 3, 1).float()
    targets = targets.reshape(deltas.shape).float()
    return huber_loss(deltas, targets, delta, targets != 0, size_average=False)


class DetectionLoss(nn.Module):
    """`loss_fn` with the constants of a model config."""

    def __init__(self, config: Any, *, dense_targets: bool = False) -> None:
        """Read num_classes, alpha, gamma, delta, box_loss_weight, label_smoothing and legacy_focal from `config`.

        Args:
            config: a model config.
            dense_targets: see `loss_fn`.
        """
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        self.alpha = config.alpha
        self.gamma = config.gamma
        self.delta = config.delta
        self.box_loss_weight = config.box_loss_weight
        self.label_smoothing = config.label_smoothing
        self.legacy_focal = config.legacy_focal
        self.dense_targets = dense_targets

    def forward(
        self,
        cls_outputs: Sequence[Tensor],
        box_outputs: Sequence[Tensor],
        cls_targets: Tensor | Sequence[Tensor],
        box_targets: Tensor | Sequence[Tensor],
        num_positives: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute total, class and box loss; see `loss_fn`."""
        return loss_fn(
            cls_outputs,
            box_outputs,
            cls_targets,
            box_targets,
            num_positives,
            self.num_classes,
            self.alpha,
            self.gamma,
            self.delta,
            self.box_loss_weight,
            self.label_smoothing,
            self.legacy_focal,
            dense_targets=self.dense_targets,
        )


def compare_one_hot(x: Tensor, num_classes: int) -> Tensor:
    """Return float32 [..., K] with a 1 at each index of x; negative indices give zeros only."""
    return (x.unsqueeze(-1) == torch.arange(num_classes, device=x.device, dtype=x.dtype)).float()


one_hot = compare_one_hot  # effdet's name


def new_focal_loss(
    logits: Tensor,
    targets: Tensor,
    alpha: float,
    gamma: float,
    normalizer: Tensor | float,
    label_smoothing: float = 0.01,
) -> Tensor:
    """Compute the focal loss elementwise for dense targets; for callers that want the map, not the sum.

    Args:
        logits: float [...].
        targets: the same shape, in 0..1.
        alpha: weight of the foreground.
        gamma: focusing exponent.
        normalizer: the loss is divided by it.
        label_smoothing: in 0..1.

    Returns:
        [...], differentiable by autograd.
    """
    targets = targets.to(logits.dtype)
    error = targets * torch.sigmoid(-logits) + (1 - targets) * torch.sigmoid(logits)  # 1 - p_t without cancellation
    weight = targets * alpha + (1 - targets) * (1 - alpha)
    smoothed = targets * (1 - label_smoothing) + 0.5 * label_smoothing
    cross_entropy = F.binary_cross_entropy_with_logits(logits, smoothed, reduction="none")
    return weight * error.pow(gamma) * cross_entropy / normalizer


def focal_loss_legacy(
    logits: Tensor, targets: Tensor, alpha: float, gamma: float, normalizer: Tensor | float
) -> Tensor:
    """Compute the older form of the focal loss elementwise, without label smoothing.

    Arguments and result as `new_focal_loss`. The two agree on targets of 0 and 1; between them this one counts a target
    as background and focuses by (exp(-t x) sigmoid(x))^gamma.
    """
    targets = targets.to(logits.dtype)
    modulator = torch.exp(-gamma * (targets * logits + F.softplus(-logits)))
    foreground = (targets == 1).to(logits.dtype)
    weight = foreground * alpha + (1 - foreground) * (1 - alpha)
    return weight * modulator * F.binary_cross_entropy_with_logits(logits, targets, reduction="none") / normalizer


def _box_loss(box_outputs: Tensor, box_targets: Tensor, num_positives: Tensor | float, delta: float = 0.1) -> Tensor:
    """Compute the box loss of one level, normalised: effdet's name; deltas and targets are of one shape."""
    return huber_loss(box_outputs, box_targets, delta, box_targets != 0, size_average=False) / (num_positives * 4.0)


loss_jit = loss_fn  # effdet's name; there is one implementation
