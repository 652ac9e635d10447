"""Build optimizers by name: the fused SGD of each device, and everything timm offers.

Lives here: which class serves a name on which device, and the work-arounds those classes need. Imports torch and timm
only (and torch_npu where the parameters are on an NPU), never effdet. What is decayed and what is frozen is decided by
the caller.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from timm.optim import (
    Lookahead,
    create_optimizer_v2,
    get_optimizer_info,
    list_optimizers,
    param_groups_weight_decay,
)
from torch import nn

from .npu_fused_adamw import npu_fused_adamw_class
from .npu_fused_sgd import npu_fused_sgd_class

Groups = Iterable[torch.Tensor] | Iterable[Mapping[str, object]]

# The names built here and not by timm, and whether their momentum is Nesterov's (timm's meaning of the two names).
_FUSED_SGD_NAMES = {"fusedmomentum": False, "fusedsgd": True}
# torch's classes that take fused=True, and the devices whose kernels for it exist. A fused optimizer can be told on the
# device that its step is to be skipped (`found_inf`), so nobody has to wait for that answer on the host.
_FUSED_CLASSES = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
_FUSED_DEVICES = ("cpu", "cuda")
# timm's classes that cannot be used: why, and the name that comes nearest.
_UNFIT = {
    "AdafactorBigVision": ("keeps types in its state that no checkpoint holds", "adafactor"),
    "Kron": ("compiles a program for each shape of weights, for minutes before the first step", "muon"),
}


def create_fused_sgd(
    params: Groups,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    device_type: str = "cpu",
    nesterov: bool = False,
) -> torch.optim.Optimizer:
    """Build the SGD with momentum that updates all parameters in few kernels on the given kind of device.

    Args:
        params: parameters, or groups of them, already on their device (NpuFusedSGD and the momentum buffers live
            there).
        lr: learning rate, > 0.
        momentum: 0 to 1.
        weight_decay: L2 penalty of groups that name none.
        device_type: 'npu' takes torch_npu's NpuFusedSGD, any other torch.optim.SGD, fused where the device has the
            kernel.
        nesterov: Nesterov's momentum instead of the classical one.

    Returns:
        The optimizer. NpuFusedSGD comes with the guards of npu_flat_memory.py; its state dict is torch.optim.SGD's.
    """
    if device_type == "npu":
        return npu_fused_sgd_class()(params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    fused = True if device_type in _FUSED_DEVICES else None
    optimizer = torch.optim.SGD(
        params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=fused
    )
    _complete(optimizer)
    return optimizer


def flat_gradients(optimizer: torch.optim.Optimizer) -> list[torch.Tensor] | None:
    """Return the tensors that hold all gradients of an optimizer that keeps them so; None for any other."""
    return optimizer.flat_gradients() if keeps_flat(optimizer) else None


def keeps_flat(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether an optimizer keeps weights and gradients in few tensors, from its first step on."""
    return hasattr(optimizer, "flat_gradients")


def flat_parameters(optimizer: torch.optim.Optimizer) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Return the tensors that hold all weights of an optimizer that keeps them so, each with the parameters in it."""
    return optimizer.flat_parameters() if keeps_flat(optimizer) else []


def create_optimizer(
    model_or_groups: nn.Module | Groups,
    opt: str,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    eps: float | None = None,
) -> torch.optim.Optimizer:
    """Build an optimizer by name.

    Args:
        model_or_groups: a module (biases and 1-D parameters are then not decayed), parameters, or groups of them.
        opt: 'fusedmomentum', 'fusedsgd' (Nesterov), or a name of timm's: 'momentum', 'sgd' (Nesterov), 'adamw', ...;
            'lookahead_' before a name wraps it.
        lr: learning rate, > 0.
        momentum: used by the optimizers that have one.
        weight_decay: of groups that name none.
        eps: term for numerical stability; None keeps the optimizer's own.

    Returns:
        The optimizer; torch's own SGD, Adam and AdamW are fused on devices that have the kernels. On NPUs torch_npu's
        take the place of SGD and AdamW.

    Raises:
        ValueError: the name is unknown (the text names the nearest), needs a package that is not there, or does not
            take `eps`.
    """
    prefix, _, name = opt.lower().rpartition("_")
    known = sorted({*_FUSED_SGD_NAMES, *list_optimizers()})
    if name not in known or prefix not in ("", "lookahead"):
        near = difflib.get_close_matches(opt.lower().removeprefix("lookahead_"), known, n=3, cutoff=0.5)
        raise ValueError(
            f"Unknown optimizer '{opt}'. Nearest names: {', '.join(near or ['fusedmomentum', 'adamw'])}; "
            "'lookahead_' may stand before any name. timm.optim.list_optimizers() lists them all."
        )
    if isinstance(model_or_groups, nn.Module):
        groups = param_groups_weight_decay(model_or_groups, weight_decay)
    else:
        groups = [
            {**group, "params": list(group["params"])} if isinstance(group, Mapping) else group
            for group in model_or_groups
        ]
    extra: dict[str, Any] = {} if eps is None else {"eps": eps}
    _check_fit(opt, name, eps)
    device_type = _device_type(groups)
    if name in _FUSED_SGD_NAMES:
        optimizer = create_fused_sgd(groups, lr, momentum, weight_decay, device_type, _FUSED_SGD_NAMES[name])
    elif device_type == "npu" and _class_of(name) is torch.optim.SGD:
        nesterov = (get_optimizer_info(name).defaults or {}).get("nesterov", True)
        optimizer = create_fused_sgd(groups, lr, momentum, weight_decay, device_type, nesterov)
    elif device_type == "npu" and _class_of(name) is torch.optim.AdamW:
        optimizer = npu_fused_adamw_class()(groups, lr=lr, weight_decay=weight_decay, **extra)
    else:
        if _class_of(name) in _FUSED_CLASSES and device_type in _FUSED_DEVICES:
            extra["fused"] = True
        try:
            optimizer = create_optimizer_v2(groups, name, lr=lr, momentum=momentum, weight_decay=weight_decay, **extra)
        except (ImportError, AssertionError) as error:  # timm's answer for apex and bitsandbytes classes
            raise ValueError(
                f"Optimizer '{opt}' cannot be built here: {error}. "
                "'fusedmomentum' and 'adamw' are fused without another package."
            ) from error
        _complete(optimizer)
    return Lookahead(optimizer) if prefix else optimizer


def _class_of(name: str) -> object:
    return get_optimizer_info(name).opt_class


def _check_fit(opt: str, name: str, eps: float | None) -> None:
    """Refuse a setting the optimizer would ignore, and optimizers that cannot train or be saved here."""
    info = None if name in _FUSED_SGD_NAMES else get_optimizer_info(name)
    reason, nearest = _UNFIT.get(getattr(info and info.opt_class, "__name__", ""), ("", ""))
    if reason:
        raise ValueError(f"Optimizer '{opt}' {reason}. The nearest that works is '{nearest}'.")
    if info is not None and info.second_order:
        raise ValueError(
            f"Optimizer '{opt}' needs second derivatives, which training does not compute. "
            "Choose a first-order one, such as adamw."
        )
    if eps is not None and (info is None or not info.has_eps):
        raise ValueError(f"Optimizer '{opt}' does not take eps: leave it out, or choose one that does, such as adamw.")


def _device_type(groups: list) -> str:
    """Return the kind of device of the first parameter; 'cpu' when there is none (torch then says so itself)."""
    for group in groups:
        for parameter in group["params"] if isinstance(group, Mapping) else [group]:
            return parameter.device.type
    return "cpu"


def _complete(optimizer: torch.optim.Optimizer) -> None:
    """Make a new optimizer safe to step and to load a checkpoint of another device into.

    A checkpoint's groups also hold which implementation wrote them. That is this machine's choice, not the
    checkpoint's: torch would run an NPU's or an older run's state with fused=False while still announcing that it can
    skip on the device.
    """
    _start_momentum_at_zero(optimizer)
    chosen = {key: optimizer.defaults[key] for key in ("fused", "foreach") if key in optimizer.defaults}

    def after_load(loaded: torch.optim.Optimizer) -> None:
        for group in loaded.param_groups:
            group.update(chosen)
        _start_momentum_at_zero(loaded)

    optimizer.register_load_state_dict_post_hook(after_load)


def _start_momentum_at_zero(optimizer: torch.optim.Optimizer) -> None:
    """Give fused SGD the momentum buffers it lacks before its first step; zeros give the same first step as none.

    Symptom: when the very first step is skipped through `found_inf` (a loss scale that overflows at once), torch leaves
    the buffers it has just allocated unwritten and reads that garbage as momentum in the second step. Seen in torch
    2.13.0. It can go when test_optim.py's first-step test passes without it.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if group["fused"] and group["momentum"] != 0:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
