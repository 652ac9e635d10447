"""The focal loss of focal.py on a CPU: equal values, in one pass through memory.

A CPU spends the loss on reading and writing the logits, not on arithmetic, and reading a value costs it nothing. So the
logits are worked off in pieces that stay in the cache, every one as background, and the few at an anchor's own class
are found and corrected afterwards. Accelerators need fixed shapes and few large kernels instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .focal import IGNORED_LOGIT, background_terms, foreground_terms
from .labels import BACKGROUND, IGNORE

# Logits of one piece. Large enough that threads share it and the calls cost little, small enough for the cache.
PIECE = 1 << 17

LARGE = 80.0  # exp() of more overflows float32


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
    """Sum the focal loss over one level and compute its gradient, in the memory layout of the logits.

    Arguments and result are those of `focal.focal_loss_and_gradient`, but for gamma, which must be above 0.
    """
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
    """Treat each logit as background: write the gradient, return the loss, a float64 scalar; see focal.py."""
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
