"""Batch norms that only scale and shift, folded into the convolutions before them: fewer passes for prediction."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import nn


@torch.no_grad()
def fold_batch_norm(model: nn.Module, images: torch.Tensor) -> int:
    """Fold each batch norm in eval mode into the convolution that feeds it, in place. It cannot be undone.

    Which convolution feeds which batch norm is seen by running the model once, so it works for any backbone.
    Convolutions that run more than once, as the heads' do for each level, stay as they are.

    Args:
        model: in eval mode.
        images: [B, 3, H, W] that the model takes, on its device; the values do not matter.

    Returns:
        The number of batch norms folded.

    Raises:
        ValueError: the model is in training mode.
    """
    if model.training:
        raise ValueError("Batch norms of a model in training mode cannot be folded: call eval() first.")
    calls: dict[nn.Module, int] = {}
    made_by: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}  # holds the tensors, or an id could come twice
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def after_conv(module: nn.Conv2d, _: Any, output: torch.Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        made_by[id(output)] = module, output

    def before_norm(module: nn.BatchNorm2d, arguments: tuple[torch.Tensor, ...]) -> None:
        calls[module] = calls.get(module, 0) + 1
        made = made_by.get(id(arguments[0]))
        if made is not None and made[1] is arguments[0]:
            pairs.append((made[0], module))

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(after_conv))
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(before_norm))
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    parents = {child: (parent, name) for parent in model.modules() for name, child in parent.named_children()}
    pairs = [(conv, norm) for conv, norm in pairs if calls[conv] == calls[norm] == 1]
    for conv, norm in pairs:
        _fold(conv, norm)
        parent, name = parents[norm]
        rest = [norm.drop, norm.act] if isinstance(norm, BatchNormAct2d) else []
        setattr(parent, name, nn.Sequential(*rest) if rest else nn.Identity())
    return len(pairs)


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Multiply the weights by the norm's scale and add its shift to the bias, computed in float64."""
    assert norm.running_mean is not None and norm.running_var is not None  # norms without statistics got no hook
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale
    weight = conv.weight
    folded = (weight.double() * scale.view(-1, 1, 1, 1)).to(weight.dtype)
    conv.weight = nn.Parameter(
        folded.contiguous(memory_format=torch.channels_last)
        if weight.is_contiguous(memory_format=torch.channels_last)
        else folded,
        requires_grad=False,
    )
    conv.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)
