"""Many tensors joined in one, where few launches pay: moved there, copied, or cast for the time of a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


class _CastTogether(torch.autograd.Function):
    """Cast tensors in two operations, and their gradients back in two."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors in `dtype`, views of one flat tensor."""
        ctx.shapes = [weight.shape for weight in weights]
        ctx.dtype = weights[0].dtype
        return join(weights, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients in the weights' dtype."""
        return None, *join(gradients, ctx.dtype)


def join(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Copy tensors of one dtype into one flat tensor of another; return views of it in their shapes."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(dtype)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return tuple(part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))


@torch.no_grad()
def join_in_place(tensors: Sequence[Tensor]) -> Tensor:
    """Move tensors into one flat tensor, of which each is a view from then on, and return it."""
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.data = part.view(tensor.shape)
    return flat


@contextlib.contextmanager
def cast_together(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Have the convolutions of a model compute with weights in `dtype` in this block; parameters stay as they are.

    Outputs and gradients are those of autocast, which casts each weight by itself, forward and back. The gradients of
    all these weights are there at the end of the backward pass and not layer by layer.

    Args:
        model: with float32 weights; layers that it has twice are cast once.
        dtype: half precision.
    """
    places = [
        (layer, name, weight)
        for layer in model.modules()
        if isinstance(layer, (_ConvNd, nn.Linear))
        for name, weight in layer.named_parameters(recurse=False)
        if weight.dtype == torch.float32
    ]
    # What is trained apart from what is frozen, which has no gradient to be made.
    for trained in (True, False):
        group = [place for place in places if place[2].requires_grad == trained]
        if group:
            halves = _CastTogether.apply(dtype, *[weight for _, _, weight in group])
            for (layer, name, _), half in zip(group, halves, strict=True):
                layer.__dict__[name] = half  # found before the parameter of that name, which stays registered
    try:
        yield
    finally:
        for layer, name, _ in places:
            layer.__dict__.pop(name, None)
