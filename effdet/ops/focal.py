"""The focal loss and its gradient in closed form, of a whole level at once, and on CPUs piece by piece.

Every logit is treated as background, and the few at an anchor's own class are corrected afterwards, so no one-hot
target exists. Accelerators need fixed shapes and few large kernels. A CPU spends the loss on reading and writing the
logits, not on arithmetic, and reading a value costs it nothing: there the logits are worked off in pieces that stay in
the cache, and the few are found.

Source: RetinaNet, https://arxiv.org/abs/1708.02002.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effdet.runtime.device import is_host

from .labels import BACKGROUND, IGNORE

IGNORED_LOGIT = -1e4  # probability, loss and gradient are exactly 0 there

# Logits of one piece. Large enough that threads share it and the calls cost little, small enough for the cache.
PIECE = 1 << 17

LARGE = 80.0  # exp() of more overflows float32


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
    """Sum the focal loss over one level and compute its gradient; but on CPUs in fixed shapes, without any wait.

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
    if is_host(logits.device) and gamma > 0:
        return _in_pieces(logits, class_targets, num_classes, alpha, gamma, smoothing, with_gradient, gradient_dtype)
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


def _in_pieces(
    logits: Tensor,
    class_targets: Tensor,
    num_classes: int,
    alpha: float,
    gamma: float,
    smoothing: float,
    with_gradient: bool,
    gradient_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Compute `focal_loss_and_gradient` in one pass through memory, in its layout; gamma must be above 0."""
    by_cell = logits.is_contiguous(memory_format=torch.channels_last)
    logits = logits if by_cell else logits.contiguous()
    gradient = torch.empty_like(logits, dtype=gradient_dtype) if with_gradient else None
    flat = _in_memory_order(logits, by_cell)
    flat_gradient = None if gradient is None else _in_memory_order(gradient, by_cell)
    first, step, targets = _find_objects(class_targets, logits.shape, num_classes, by_cell)
    ignored = first[targets == IGNORE]
    if len(ignored):
        flat = flat.clone()
        flat[(ignored.unsqueeze(1) + torch.arange(num_classes) * step).reshape(-1)] = IGNORED_LOGIT
    total = _background(flat, flat_gradient, 1 - alpha, gamma, smoothing)

    positive = targets >= 0
    index = first[positive] + targets[positive] * step
    own = flat[index].float()
    old_loss, _ = background_terms(own, gamma, smoothing, with_gradient=False)
    new_loss, new_gradient = foreground_terms(own, gamma, smoothing)
    total += (alpha * new_loss - (1 - alpha) * old_loss).sum(dtype=torch.float64)
    if flat_gradient is not None:
        flat_gradient[index] = (alpha * new_gradient).to(gradient_dtype)
    return total.float(), gradient


def _find_objects(
    class_targets: Tensor, shape: torch.Size, num_classes: int, by_cell: bool
) -> tuple[Tensor, int, Tensor]:
    """Find the anchors that are not plain background.

    Returns:
        position of each one's first logit in memory [n], steps from one class to the next, targets [n].
    """
    image, number = (class_targets != BACKGROUND).nonzero().unbind(1)
    if by_cell:
        first, step = (image * class_targets.shape[1] + number) * num_classes, 1
    else:
        per_cell, step = shape[1] // num_classes, shape[2] * shape[3]
        first = (image * per_cell + number % per_cell) * num_classes * step + number // per_cell
    return first, step, class_targets[image, number]


def _in_memory_order(maps: Tensor, by_cell: bool) -> Tensor:
    """View [B, C, height, width] as one row in the order of its memory."""
    return (maps.permute(0, 2, 3, 1) if by_cell else maps).reshape(-1)


def _background(x: Tensor, gradient: Tensor | None, weight: float, gamma: float, smoothing: float) -> Tensor:
    """Treat each logit as background: write the gradient, return the loss, a float64 scalar; see `background_terms`."""
    size = min(PIECE, len(x))
    p, ce, modulator = (torch.empty(size) for _ in range(3))
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(x), PIECE):
        piece = x[start : start + PIECE].float()
        if len(piece) < size:
            size = len(piece)
            p, ce, modulator = p[:size], ce[:size], modulator[:size]
        _background_piece(piece, gamma, smoothing, p, ce, modulator)
        total += torch.dot(ce, modulator)
        if gradient is not None:
            # modulator * (gamma * (1 - p) * ce + p - smoothing / 2) * weight
            ce.addcmul_(ce, p, value=-1.0)
            torch.add(p, ce, alpha=gamma, out=ce)
            if smoothing:
                ce.sub_(0.5 * smoothing)
            part = gradient[start : start + PIECE]
            part.copy_(ce.mul_(modulator.mul_(weight)))
    return total * weight


def _background_piece(x: Tensor, gamma: float, smoothing: float, p: Tensor, ce: Tensor, modulator: Tensor) -> None:
    """Write sigmoid(x), softplus(x) - smoothing / 2 * x and sigmoid(x)**gamma."""
    if x.amax() < LARGE:
        torch.exp(x, out=modulator)  # sigmoid and softplus share it: half the time of torch's own two
        torch.log1p(modulator, out=ce)
        torch.add(modulator, 1.0, out=p)
        torch.div(modulator, p, out=p)
    else:
        torch.sigmoid(x, out=p)
        torch._C._nn.softplus(x, out=ce)  # type: ignore[call-arg]  # its stub lacks `out`
    if smoothing:
        ce.sub_(x, alpha=0.5 * smoothing)
    if gamma == 1.5:
        torch.sqrt(p, out=modulator).mul_(p)
    elif gamma == 2.0:
        torch.mul(p, p, out=modulator)
    else:
        torch.pow(p, gamma, out=modulator)
