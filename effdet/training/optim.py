"""Optimizer, gradient clipping and frozen parts.

Lives here: which parameters are decayed or left out, how gradients are clipped, how parts of a model are frozen. Which
class an optimizer's name stands for on which device is in timm_patches/optim_factory.py; skipping a step on overflow is
in amp.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from timm_patches.exchange import exchange_layers
from timm_patches.optim_factory import create_optimizer

CLIP_MODES = ("norm", "value", "agc")
_NORM_LAYERS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


def param_groups(
    model: nn.Module, weight_decay: float, masters: Mapping[str, Tensor] | None = None, backbone_lr: float = 1.0
) -> list[dict]:
    """Split the trainable parameters into those with and those without weight decay, and by learning rate.

    Not decayed: biases, parameters of norm layers, everything with fewer than two dimensions, and the BiFPN's edge
    weights.

    Args:
        model: the model; parameters with requires_grad False are left out.
        weight_decay: L2 penalty of the decayed group, >= 0.
        masters: the tensor to optimize in place of the model's parameter, by its name in `model`; None takes the
            parameters themselves.
        backbone_lr: factor of the backbone's learning rate, > 0; timm's schedules apply a group's 'lr_scale'.

    Returns:
        Groups {'params', 'weight_decay'}, the decayed one first; with a factor other than 1 those of the backbone come
        last and have 'lr_scale' too. A group without parameters is left out.

    Raises:
        ValueError: nothing is trainable, weight_decay is negative, or backbone_lr not above 0.
    """
    if weight_decay < 0 or not backbone_lr > 0:
        raise ValueError(f"weight_decay must be 0 or more, got {weight_decay}; backbone_lr above 0, got {backbone_lr}.")
    of_norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _NORM_LAYERS)
        for parameter in module.parameters(recurse=False)
    }
    groups: list[dict] = [
        {"params": [], "weight_decay": decay, **({"lr_scale": backbone_lr} if is_backbone else {})}
        for is_backbone in (False, True)
        for decay in (weight_decay, 0.0)
    ]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        last = name.rpartition(".")[2]
        exempt = parameter.ndim < 2 or id(parameter) in of_norms or last in ("bias", "edge_weights")
        of_backbone = backbone_lr != 1 and name.startswith("backbone.")
        groups[2 * of_backbone + exempt]["params"].append(parameter if masters is None else masters[name])
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(
            "The model has no trainable parameter: every one has requires_grad=False. "
            "Freeze less (see --freeze-backbone, --freeze-bn)."
        )
    return groups


def build_optimizer(
    model: nn.Module,
    opt: str,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 4e-5,
    eps: float | None = None,
    masters: Mapping[str, Tensor] | None = None,
    backbone_lr: float = 1.0,
) -> torch.optim.Optimizer:
    """Build the optimizer of a model, already on its device; frozen parameters are left out.

    Args:
        model: the model to train.
        opt: 'fusedmomentum', 'momentum', 'sgd', 'adamw', 'lookahead_...': see
            timm_patches.optim_factory.create_optimizer.
        lr: learning rate at the top of the schedule, > 0.
        momentum: used by the optimizers that have one.
        weight_decay: see `param_groups` for what is exempt.
        eps: None keeps the optimizer's own.
        masters: `Precision.master_parameters(model)`; needed for O2, where float32 copies are optimized.
        backbone_lr: factor of the backbone's learning rate, see `param_groups`.

    Returns:
        The optimizer.

    Raises:
        ValueError: unknown name, nothing to train, or a setting out of range or without effect.
    """
    if not lr > 0:
        raise ValueError(f"lr must be above 0, got {lr}.")
    groups = param_groups(model, weight_decay, masters, backbone_lr)
    return create_optimizer(groups, opt, lr, momentum=momentum, eps=eps)


def check_optimizer(opt: str, eps: float | None, device: torch.device) -> None:
    """Refuse an optimizer that cannot be built on a device, before there is a model for it.

    Raises:
        ValueError: as `build_optimizer`.
    """
    create_optimizer([torch.zeros(2, 2, device=device).requires_grad_()], opt, lr=1.0, eps=eps)


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[Tensor],
    value: float | None,
    mode: str = "norm",
    *,
    flat_gradients: list[Tensor] | None = None,
    unscale: Tensor | None = None,
) -> Tensor:
    """Limit the gradients in place, without waiting for the device.

    Args:
        parameters: those without a gradient are passed over.
        value: the largest norm over all gradients ('norm'), the largest magnitude of an element ('value'), or the
            largest ratio of a unit's gradient norm to its weight norm ('agc'); None leaves the gradients as they are.
        mode: 'norm', 'value' or 'agc'.
        flat_gradients: the memory of all the gradients in few tensors, where an optimizer keeps it so: hundreds of
            small operations become one.
        unscale: factor without dimensions that the gradients are to be multiplied by first; 'norm' does both in one
            pass.

    Returns:
        The norm over all gradients before clipping (but with `unscale`), a tensor without dimensions; 0 when there is
        no gradient. It is inf or NaN exactly where a gradient is, or where its square overflows.

    Raises:
        ValueError: unknown mode, or value not above 0.

    Source: 'agc': Brock et al. 2021, "High-Performance Large-Scale Image Recognition Without Normalization", section 4.
    """
    if mode not in CLIP_MODES:
        raise ValueError(f"Unknown clip mode '{mode}': choose from {', '.join(CLIP_MODES)}.")
    if value is not None and not value > 0:
        raise ValueError(f"The clip value must be above 0, got {value}; leave it out to clip nothing.")
    parameters = list(parameters)
    gradients = flat_gradients or [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if not gradients:
        return norm
    factor = unscale
    if unscale is not None:
        norm = norm * unscale
    if value is not None and mode == "norm":
        shrink = (value / (norm + 1e-6)).clamp(max=1.0)
        factor = shrink if unscale is None else shrink * unscale
    if factor is not None:
        torch._foreach_mul_(gradients, factor)
    if value is not None and mode == "value":
        torch._foreach_clamp_min_(gradients, -value)
        torch._foreach_clamp_max_(gradients, value)
    elif value is not None and mode == "agc":
        adaptive_clip_grad(parameters, value)
    return norm


class Frozen(NamedTuple):
    """What a freeze call fixed, counted in tensors and layers."""

    parameters: int
    norm_layers: int

    def __str__(self) -> str:
        return f"{self.parameters} weight tensors, {self.norm_layers} norm layers"


_FrozenT = TypeVar("_FrozenT", bound="_StaysInEval")


class _StaysInEval(nn.Module):
    """Goes before a frozen module's own class: `train()` on it or on any parent leaves it in eval mode."""

    def train(self: _FrozenT, mode: bool = True) -> _FrozenT:
        return super().train(False)


@functools.cache
def _frozen_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Frozen{cls.__name__}", (_StaysInEval, cls), {})


def freeze_backbone(model: nn.Module) -> Frozen:
    """Fix the whole backbone: no gradients, and eval mode for good (norm statistics, dropout and drop path off).

    Call it after a conversion to sync-BN and before the optimizer and DistributedDataParallel are built.

    Args:
        model: an EfficientDet, or a bench that holds one as `.model`.

    Returns:
        The number of parameters fixed by this call (tensors) and of norm layers with statistics inside.

    Raises:
        ValueError: there is no backbone.
    """
    if not hasattr(model, "backbone") and hasattr(model, "model"):
        return freeze_backbone(model.get_submodule("model"))
    backbone = getattr(model, "backbone", None)
    if backbone is None:
        raise ValueError(f"{type(model).__name__} has no `backbone` to freeze; pass the detection model or its bench.")
    frozen = _stop_gradients(backbone.parameters())
    _keep_in_eval(model, [backbone])
    norms = sum(isinstance(module, _NormBase) for module in backbone.modules())
    return Frozen(frozen, norms)


def freeze_stages(model: nn.Module, stages: int) -> Frozen:
    """Fix the first stages of the backbone, as `freeze_backbone` does the whole: their backward pass is saved too.

    Args:
        model: an EfficientDet whose backbone is one of timm's EfficientNets.
        stages: how many; the stem counts as the first.

    Raises:
        ValueError: the backbone has no such stages.
    """
    backbone = model.get_submodule("backbone")
    if not (hasattr(backbone, "conv_stem") and hasattr(backbone, "blocks")):
        raise ValueError(f"--freeze-stages: {type(backbone).__name__} has no stem and stages to freeze")
    stem = [backbone.get_submodule("conv_stem"), backbone.get_submodule("bn1")]
    parts = [stem, *([stage] for stage in backbone.get_submodule("blocks").children())]
    if stages >= len(parts):
        raise ValueError(f"--freeze-stages {stages}: the backbone has {len(parts)}; --freeze-backbone freezes them all")
    layers = [layer for part in parts[:stages] for layer in part]
    frozen = sum(_stop_gradients(layer.parameters()) for layer in layers)
    norms = sum(isinstance(module, _NormBase) for layer in layers for module in layer.modules())
    _keep_in_eval(model, layers)
    return Frozen(frozen, norms)


def freeze_bn(model: nn.Module) -> Frozen:
    """Fix every batch norm: statistics and affine parameters, also after later `train()` calls.

    The affine parameters are fixed too: with batches too small for good statistics their gradients are as noisy, and a
    fixed norm layer is one constant scale and shift. Call it after a conversion to sync-BN and before the optimizer and
    DistributedDataParallel are built.

    Returns:
        The number of parameters fixed by this call (tensors) and of norm layers kept in eval mode.
    """
    layers = _norm_layers(model)
    frozen = sum(_stop_gradients(layer.parameters(recurse=False)) for layer in layers)
    _keep_in_eval(model, layers)
    return Frozen(frozen, len(layers))


def freeze_bn_statistics(model: nn.Module) -> int:
    """Have every batch norm normalise by its running statistics from now on, and keep them; the rest goes on training.

    With batch statistics, training never sees how the network behaves with the running ones. Where the two differ, as
    after a short run or with small batches, deviations grow from layer to layer and a well trained network detects
    little. Some epochs with fixed statistics let the weights adapt to what evaluation uses.

    Returns:
        The number of norm layers.
    """
    layers = _norm_layers(model)
    _keep_in_eval(model, layers)
    return len(layers)


def _norm_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _NormBase)]


def _stop_gradients(parameters: Iterable[Tensor]) -> int:
    """Turn requires_grad off; return how many tensors still had it on."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
        parameter.grad = None
    return len(trainable)


def _keep_in_eval(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Put layers of a model into eval mode and make that last; a second call changes nothing.

    Layers of a subclass take their place: replacing their `train` by a closure would not survive a deepcopy, which
    would bind it to the original.
    """
    layers = set(layers)
    for layer in layers:
        layer.eval()

    def choose(layer: nn.Module) -> type[nn.Module] | None:
        if layer not in layers or isinstance(layer, _StaysInEval):
            return None
        return _frozen_class(type(layer))  # type: ignore[arg-type]  # mypy takes Module.__hash__ for the class's own

    exchange_layers(model, choose)
