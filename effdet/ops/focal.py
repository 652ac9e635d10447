"""The focal loss and its gradient in closed form: logit by logit, and over a whole level as accelerators compute it.

Every logit is treated as background, and the few at an anchor's own class are corrected afterwards, so no one-hot
target exists. focal_cpu.py does the same piece by piece on CPUs; loss.py chooses between them.

Source: RetinaNet, https://arxiv.org/abs/1708.02002.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .labels import IGNORE

IGNORED_LOGIT = -1e4  # probability, loss and gradient are exactly 0 there


def _power(base: Tensor, exponent: float) -> Tensor:
    """Return base**exponent for base in 0..1; the exponents in use are cheaper without pow()."""
    if exponent == 1.5:
        return base * base.sqrt()
    if exponent == 2.0:
        return base * base
    return base.pow(exponent)


def background_terms(
    logits: Tensor, gamma: float, smoothing: float, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return loss and gradient of each logit for target 0, in the logits' shape, without the factor 1 - alpha.

    With p = sigmoid(x) and t = smoothing / 2: p^gamma * (softplus(x) - t x), whose derivative is
    p^gamma * (gamma (1 - p) (softplus(x) - t x) + p - t), as dp/dx = p (1 - p).
    """
    p = logits.sigmoid()
    ce = F.softplus(logits)
    if smoothing:
        ce = ce - 0.5 * smoothing * logits
    modulator = _power(p, gamma)
    if not with_gradient:
        return ce.mul_(modulator), None
    loss = modulator * ce
    gradient = ce.mul_(gamma).mul_(1 - p).add_(p)
    if smoothing:
        gradient.sub_(0.5 * smoothing)
    return loss, gradient.mul_(modulator)


def foreground_terms(logits: Tensor, gamma: float, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return loss and gradient of each logit for target 1, without the factor alpha: the mirror of the background's."""
    loss, gradient = background_terms(-logits, gamma, smoothing, with_gradient=True)
    assert gradient is not None  # it was asked for
    return loss, -gradient


def focal_loss_and_gradient(
    logits: Tensor,
    class_targets: Tensor,
    num_classes: int,
    alpha: float,
    gamma: float,
    smoothing: float,
    with_gradient: bool,
    gradient_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Sum the focal loss over one level and compute its gradient, in fixed shapes and without waiting for values.

    Args:
        logits: [B, A * K, height, width], any float dtype and memory layout.
        class_targets: int64 [B, height * width * A]: 0..K-1, -1 background, -2 left out.
        num_classes: K.
        alpha: weight of the positives, 0..1.
        gamma: focusing exponent, >= 0.
        smoothing: label smoothing, 0..1.
        with_gradient: whether the gradient is wanted.
        gradient_dtype: its dtype.

    Returns:
        A float32 scalar, and the gradient in the shape of the logits, or None.
    """
    # A view in either memory layout, and four dimensions: some accelerators are slow or wrong with five.
    x = logits.float().flatten(2).unflatten(1, (-1, num_classes))  # [B, A, K, cells]
    targets = class_targets.unflatten(1, (-1, x.shape[1])).transpose(1, 2).unsqueeze(2)  # [B, A, 1, cells]
    x = x.masked_fill(targets == IGNORE, IGNORED_LOGIT)
    loss, gradient = background_terms(x, gamma, smoothing, with_gradient)
    if gamma == 0 and smoothing:  # p**0 is 1 even for p = 0, so the smoothing term is left of an ignored logit
        for terms in (loss,) if gradient is None else (loss, gradient):
            terms.masked_fill_(targets == IGNORE, 0)
    total = loss.sum() * (1 - alpha)

    index = targets.clamp(min=0)  # of an anchor's own logit, [B, A, 1, cells]
    positive, values, slopes = targets >= 0, loss, gradient
    if x.is_contiguous():
        # Class and cell as one axis, the last: to gather along another some accelerators turn all values round.
        places = index.to(torch.int32) * x.shape[3] + torch.arange(x.shape[3], dtype=torch.int32, device=x.device)
        positive, index = positive.squeeze(2), places.long().squeeze(2)  # [B, A, cells]
        x, values = x.flatten(2), loss.flatten(2)
        slopes = None if gradient is None else gradient.flatten(2)
    foreground_loss, foreground_gradient = foreground_terms(x.gather(2, index), gamma, smoothing)
    correction = alpha * foreground_loss - (1 - alpha) * values.gather(2, index)
    total = total + torch.where(positive, correction, torch.zeros_like(correction)).sum()
    if gradient is None or slopes is None:
        return total, None
    slopes.mul_(1 - alpha)
    correction = alpha * foreground_gradient - slopes.gather(2, index)
    slopes.scatter_add_(2, index, torch.where(positive, correction, torch.zeros_like(correction)))
    return total, gradient.flatten(1, 2).unflatten(2, logits.shape[2:]).to(gradient_dtype)
