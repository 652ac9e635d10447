"""What torch_npu's fused optimizers lack to be safe to train with; the base of npu_fused_sgd.py and npu_fused_adamw.py.

They move parameters, gradients and state into one flat tensor each at the first step, so that an update is a handful of
kernels instead of hundreds. Their traps are closed here:

- A step can be skipped on the device (`found_inf`), so an overflow costs no wait of the host.
- Gradients that are None, or not in the flat tensor, would silently be read as the old ones: they are moved there, all
  together. So `zero_grad` may set them to None, and the backward pass adds none of them to a zero.
- A parameter without a gradient at the first step would be left out for good: it starts with a zero gradient.
- `zero_grad(set_to_none=True)`, torch's own default, raises: here gradients are always set to None.
- Weights would lie in memory that is freed with the optimizer: they keep it.
- `load_state_dict` after the first step would not reach the flat state: it does.
- `state_dict()` has the keys of torch's own optimizer, so a checkpoint goes from one to the other and back.

Seen in torch_npu 2.13.0. A guard can go when test/npu/test_npu_optim.py passes without it.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float16)


class FlatMemory:
    """Mixed in before a fused optimizer of torch_npu, whose methods it calls and completes."""

    _step_supports_amp_scaling = True  # torch's name for: reads `found_inf` and `grad_scale` in step()
    _name = ""  # torch_npu's class
    _torch_settings: dict[str, Any] = {}  # what the groups of torch's own optimizer hold beside those of torch_npu's

    def __init__(self, params: Iterable[Any], **settings: Any) -> None:
        super().__init__(params, **settings)
        self._flat_views: list[tuple[Tensor, Tensor, int]] = []  # parameter, its gradient's view, its address
        self._flat_order: list[list[Tensor]] = [[], []]  # parameters by dtype, as they lie in the flat tensors
        self.defaults.update(self._torch_settings)
        for group in self.param_groups:
            group.update(self._torch_settings)
            for parameter in group["params"]:
                _check_parameter(parameter, self._name)
        self.register_load_state_dict_post_hook(_forget_flat_state)

    # -- gradients -----------------------------------------------------------------------------------------------------

    def flat_gradients(self) -> list[Tensor]:
        """Return the memory of all gradients, one tensor for each dtype; empty before the first backward pass."""
        self._collect()
        return [flat for flat in self.get_combined_grads() if flat is not None]

    def flat_parameters(self) -> list[tuple[Tensor, list[Tensor]]]:
        """Return the memory of all weights: a tensor for each dtype, and the parameters in it, in their order there."""
        return [
            (flat, parameters)
            for flat, parameters in zip(self.get_combined_params(), self._flat_order, strict=True)
            if flat is not None
        ]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to None, whatever `set_to_none` says: the next step writes all of the flat tensor anew."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def _collect(self) -> None:
        """Move parameters and gradients into the flat tensors, or check that they are still there."""
        if self._flat_views:
            self._check_addresses()
            self._restore_gradients()
            return
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if all(parameter.grad is None for parameter in parameters):
            return
        for parameter in parameters:
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                _own_gradient(parameter)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # torch_npu's own use of it
            self._maybe_init_combined_params_and_grads()
        for dtype_index, members in enumerate(self.params_all_group):
            self._flat_order[dtype_index] = list(members)
            for parameter in members:  # they do not own the memory that they were moved to, and may outlive this object
                weakref.finalize(parameter, id, self.get_combined_params()[dtype_index])
                weakref.finalize(parameter.grad, id, self.get_combined_grads()[dtype_index])
        self._flat_views = [
            (parameter, parameter.grad, parameter.data_ptr()) for members in self._flat_order for parameter in members
        ]

    @torch.no_grad()
    def _restore_gradients(self) -> None:
        """Bring the gradients of the last backward pass into the flat tensors, each in one operation; None is zero."""
        views = iter(self._flat_views)
        for flat, members in zip(self.get_combined_grads(), self._flat_order, strict=True):
            if flat is None:
                continue
            of_dtype = list(itertools.islice(views, len(members)))
            gradients = [parameter.grad for parameter, _, _ in of_dtype]
            if all(gradient is view for gradient, (_, view, _) in zip(gradients, of_dtype, strict=True)):
                continue
            if any(gradient is view for gradient, (_, view, _) in zip(gradients, of_dtype, strict=True)):
                # Somebody replaced some of them: what is joined must not overlap what it is joined into.
                gradients = [None if gradient is None else gradient.clone() for gradient in gradients]
            zeros = None
            if any(gradient is None for gradient in gradients):
                zeros = flat.new_zeros(max(view.numel() for _, view, _ in of_dtype))
            parts = [
                zeros[: view.numel()] if gradient is None else gradient.reshape(-1)
                for gradient, (_, view, _) in zip(gradients, of_dtype, strict=True)
            ]
            torch.cat(parts, out=flat)
            for parameter, view, _ in of_dtype:
                parameter.grad = view

    def _check_addresses(self) -> None:
        if any(parameter.data_ptr() != address for parameter, _, address in self._flat_views):
            raise RuntimeError(
                f"A parameter was moved after {self._name}'s first step (model.to(), .half() or a new "
                ".data): the optimizer would go on updating the old memory. Move the model first, then "
                "build the optimizer."
            )
        known = len(self._flat_views)
        present = sum(
            parameter.grad is not None or parameter.requires_grad
            for group in self.param_groups
            for parameter in group["params"]
        )
        if present > known:
            raise RuntimeError(
                f"{present - known} parameter(s) became trainable after {self._name}'s first step: it "
                "cannot take them in. Build a new optimizer after unfreezing."
            )

    # -- the step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters, unless the caller has set `found_inf` to a tensor that is not 0."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._collect()
        super().step()
        return loss

    def _group_step(self, group_index: int) -> None:
        parts = zip(
            self.combined_params_indexed_by_group[group_index],
            self.combined_grads_indexed_by_group[group_index],
            self.combined_param_states_indexed_by_group[group_index],
            strict=True,
        )
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        for weights, gradient, state in parts:
            if weights is None or gradient is None:
                continue
            if grad_scale is not None:
                gradient = gradient / grad_scale
            if found_inf is not None:
                gradient = gradient.masked_fill(found_inf > 0, 0)  # NaN times 0 is NaN, so it has to be replaced
            flag = None if found_inf is None else found_inf.to(weights.dtype)
            self._update(weights, gradient, state, self.param_groups[group_index], flag)

    def _update(
        self, weights: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], found_inf: Tensor | None
    ) -> None:
        """Take one step on flat tensors; where `found_inf` is 1, and the gradient 0, nothing changes."""
        raise NotImplementedError


def _forget_flat_state(optimizer: Any) -> None:
    """Have the flat state made anew from what was loaded, and keep this optimizer's group settings."""
    optimizer.is_states_combined = False
    for group in optimizer.param_groups:
        for key, value in optimizer.defaults.items():
            group.setdefault(key, value)
        group.update(optimizer._torch_settings)


def _check_parameter(parameter: Tensor, optimizer: str) -> None:
    if parameter.dtype not in _DTYPES:
        raise TypeError(
            f"{optimizer} takes float32 and float16 parameters, got {parameter.dtype}: train with float32 "
            "weights (opt level O1), or with float32 masters (O2)."
        )
    if not parameter.is_contiguous():
        raise ValueError(
            f"{optimizer} takes contiguous parameters, got one of shape {tuple(parameter.shape)} with "
            f"strides {parameter.stride()}: leave the channels-last layout off on this device."
        )


def _own_gradient(parameter: Tensor) -> None:
    """Give a gradient memory of its own, as it is about to be moved: it may be part of a tensor that others share."""
    gradient = parameter.grad.contiguous()
    if gradient.untyped_storage().nbytes() != gradient.numel() * gradient.element_size():
        gradient = gradient.clone()
    parameter.grad = gradient
