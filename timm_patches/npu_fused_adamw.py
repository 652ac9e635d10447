"""torch_npu's fused AdamW with the guards of npu_flat_memory.py, and a step that can be skipped on the device.

torch's own AdamW with fused=True has a kernel on NPUs as well (op-plugin's _fused_adamw_, aclnnApplyAdamWV2), but one
with two launches for each parameter, which CANN lists for Atlas A2 and A3 only, and which takes the step whatever
`found_inf` says. Seen in torch_npu 2.13.0: nothing it launches reads that tensor.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .npu_flat_memory import FlatMemory


class _GuardedAdamW(FlatMemory):
    """NpuFusedAdamW that can skip a step on the device; it counts the steps there."""

    _name = "NpuFusedAdamW"
    _torch_settings = {
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "decoupled_weight_decay": True,
    }

    def _combine_group_param_states(self, group_index: int) -> None:
        from torch_npu.utils import npu_combine_tensors

        combined: list[dict[str, Any]] = []
        for parameters in self.params_lists_indexed_by_group[group_index]:
            parts: dict[str, Any] = {"step": None, "exp_avg": None, "exp_avg_sq": None}
            combined.append(parts)
            if not parameters:
                continue
            done = float(self.state[parameters[0]].get("step", 0))
            parts["step"] = torch.full((), done, device=parameters[0].device)
            for name in ("exp_avg", "exp_avg_sq"):
                for parameter in parameters:
                    loaded, mean = self.state[parameter].get(name), torch.zeros_like(parameter.grad)
                    self.state[parameter][name] = mean if loaded is None else mean.copy_(loaded)
                parts[name] = npu_combine_tensors([self.state[parameter][name] for parameter in parameters])
            for parameter in parameters:
                self.state[parameter]["step"] = parts["step"]
        self.combined_param_states_indexed_by_group[group_index] = combined

    def _update(
        self, weights: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], found_inf: Tensor | None
    ) -> None:
        """Take one step of AdamW.

        Source: the update of torch.optim.AdamW, in its order.
        """
        (beta1, beta2), lr = group["betas"], group["lr"]
        step, mean, mean_square = state["step"], state["exp_avg"], state["exp_avg_sq"]
        keep = 1.0 if found_inf is None else 1 - found_inf
        step.add_(keep)
        done = step.clamp(min=1)  # a first step that is skipped corrects nothing
        if group["weight_decay"] != 0:
            weights.mul_(1 - keep * (lr * group["weight_decay"]))
        mean.lerp_(gradient, keep * (1 - beta1))
        mean_square.mul_(beta2 if found_inf is None else keep * beta2 + found_inf)
        mean_square.addcmul_(gradient, gradient, value=1 - beta2)  # of a skipped step the gradient is 0
        denominator = (mean_square.sqrt() / (1 - torch.pow(beta2, done)).sqrt()).add_(group["eps"])
        weights.addcdiv_(mean * (keep * lr / (1 - torch.pow(beta1, done))), denominator, value=-1)


@functools.cache
def npu_fused_adamw_class() -> type[torch.optim.Optimizer]:
    """Return the class: an NpuFusedAdamW with the guards.

    Raises:
        ImportError: torch_npu is not installed or does not load.
    """
    from torch_npu.optim import NpuFusedAdamW

    return type("GuardedNpuFusedAdamW", (_GuardedAdamW, NpuFusedAdamW), {"__doc__": _GuardedAdamW.__doc__})
