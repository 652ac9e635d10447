"""torch_npu's fused SGD with the guards of npu_flat_memory.py; its arithmetic is kept."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .npu_flat_memory import FlatMemory


class _GuardedSGD(FlatMemory):
    """NpuFusedSGD that can skip a step on the device."""

    _name = "NpuFusedSGD"
    _torch_settings = {"maximize": False, "foreach": None, "differentiable": False, "fused": None}

    def _init_param_state(self, p: Tensor, weight_decay: float) -> None:
        """Start momentum at zero, which gives the same first step as starting it with the gradient."""
        state = self.state[p]
        loaded = state.get("momentum_buffer")
        buffer = torch.zeros_like(p.grad)
        state["momentum_buffer"] = buffer if loaded is None else buffer.copy_(loaded)

    def _update(
        self, weights: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], found_inf: Tensor | None
    ) -> None:
        """Take one step of SGD.

        Source: the update of torch.optim.SGD; buffer = momentum * buffer + (gradient + decay * weights).
        """
        keep = None if found_inf is None else 1 - found_inf
        if group["weight_decay"] != 0:
            gradient = gradient.add(weights, alpha=group["weight_decay"])
        momentum_buffer = state["momentum_buffer"]
        if momentum_buffer is not None:
            if keep is None:
                momentum_buffer.mul_(group["momentum"]).add_(gradient)
            else:
                momentum_buffer.mul_(keep * group["momentum"] + found_inf).addcmul_(gradient, keep)
            gradient = gradient.add(momentum_buffer, alpha=group["momentum"]) if group["nesterov"] else momentum_buffer
        if keep is None:
            weights.add_(gradient, alpha=-group["lr"])
        else:
            weights.addcmul_(gradient, keep, value=-group["lr"])


@functools.cache
def npu_fused_sgd_class() -> type[torch.optim.Optimizer]:
    """Return the class: an NpuFusedSGD with the guards.

    Raises:
        ImportError: torch_npu is not installed or does not load.
    """
    from torch_npu.optim import NpuFusedSGD

    return type("GuardedNpuFusedSGD", (_GuardedSGD, NpuFusedSGD), {"__doc__": _GuardedSGD.__doc__})
