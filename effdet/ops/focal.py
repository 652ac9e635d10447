"""The focal loss and its gradient in closed form, logit by logit: what both ways of computing it share.

loss.py runs it over whole levels, focal_cpu.py piece by piece.

Source: RetinaNet, https://arxiv.org/abs/1708.02002.
"""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED_LOGIT = -1e4  # probability, loss and gradient are exactly 0 there


def _power(base: Tensor, exponent: float) -> Tensor:
    """Return base**exponent for base in 0..1; the exponents in use are cheaper without pow()."""
    if exponent == 1.5:
        return base * base.sqrt()
    if exponent == 2.0:
        return base * base
    return base.pow(exponent)


def background_terms(logits: Tensor, gamma: float, smoothing: float, with_gradient: bool
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
    return loss, -gradient
