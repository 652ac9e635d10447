"""Number formats of a training step: float32, autocast, or half-precision weights with float32 masters.

Lives here: what runs in which dtype, loss scaling, and skipping a step whose gradients are not finite, with no wait for
the device where the optimizer can be told on the device. How a kind of device does autocast and scaling is in
device.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from effdet.runtime import device as device_layer
from effdet.runtime.distributed import all_reduce_sum, average_
from timm_patches.optim_factory import flat_gradients

from .flat import cast_together, join, join_in_place
from .optim import clip_gradients

OPT_LEVELS = ("O0", "O1", "O2")
_GROWTH_INTERVAL = 2000  # steps without overflow after which a dynamic scale doubles; torch's GradScaler's default
_SCALE_RANGE = (2.0**-20, 2.0**40)  # a scale can neither reach 0, which nothing would raise again, nor inf
_HALF_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Precision:
    """Run training steps in a chosen number format.

    O0 is float32. O1 is autocast: float32 weights, half-precision convolutions. O2 also stores the weights of
    convolutions and linear layers in half precision (norm layers and the BiFPN's edge weights stay float32), while the
    optimizer works on float32 masters; autocast stays on, so that both kinds of layer get inputs they accept.

    float16 is used with a loss scale, static or dynamic; both check for overflow and skip the step, a static scale then
    stays as it is. bfloat16 and float32 have the exponents to do without; only where the device's float32 has not
    (`device.has_float32_range`) is a static scale taken in float32, too. Whatever the format, a step with an inf or a
    NaN in its gradients changes neither weights nor optimizer state, and is counted.

    With DistributedDataParallel all ranks skip together: it averages gradients, and an inf or NaN on one rank makes the
    average inf or NaN on all. Chips that saturate instead of giving inf report an overflow in a flag of the device; it
    is read on the device and summed over the ranks.

    Args:
        device: where the model is.
        enabled: False means float32, whatever the level.
        opt_level: 'O0', 'O1' or 'O2'.
        dtype: torch.float16, torch.bfloat16 or the name of one.
        loss_scale: 'dynamic' or a number above 0. A number is refused where no loss is scaled.
        init_scale: first value of a dynamic scale.

    Raises:
        ValueError: a setting is unknown, out of range or would have no effect.
    """

    def __init__(
        self,
        device: torch.device,
        enabled: bool = True,
        opt_level: str = "O1",
        dtype: torch.dtype | str = torch.float16,
        loss_scale: float | str = "dynamic",
        init_scale: float = 2.0**16,
    ) -> None:
        half_dtype, static_scale = check_precision(device, enabled, opt_level, dtype, loss_scale)
        self.device = device
        self.level = opt_level if enabled else "O0"
        self.dtype = torch.float32 if self.level == "O0" else half_dtype
        self._half_dtype = half_dtype
        self._scale_moves = static_scale is None
        self._scale: Tensor | None = None  # both on the device, where they are updated without the host
        self._clean_steps = torch.zeros((), device=device)  # since the scale last changed
        if self.dtype == torch.float16 or static_scale is not None:
            self._scale = torch.full((), init_scale if static_scale is None else static_scale, device=device)
        self._masters: dict[Tensor, Tensor] = {}  # half-precision parameter -> its float32 master (O2)
        self._flat_halves: Tensor | None = None  # the memory of those parameters, where few launches pay
        self._skipped: Tensor | None = None  # on the device; read by skipped()
        self._skipped_before = 0
        self._in_a_row: Tensor | None = None  # on the device: steps skipped since the last that was taken
        self._in_step = False  # between the first forward of a step and its update

    # -- before training ---------------------------------------------------------------------------------------------

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Convert a float32 model in place for O2; any other level leaves it alone.

        Call it once, when the model is on its device and has its weights, before `master_parameters`, the optimizer and
        DistributedDataParallel. Make the EMA's copy before it, so that the copy starts from float32.

        Returns:
            The same model.
        """
        if self.level != "O2":
            return model
        for module in model.modules():
            if isinstance(module, (_ConvNd, nn.Linear)):
                for parameter in module.parameters(recurse=False):
                    if parameter.dtype == torch.float32:
                        self._masters[parameter] = parameter.detach().clone().requires_grad_(parameter.requires_grad)
                        parameter.data = parameter.data.to(self.dtype)
        return model

    def master_parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what the optimizer must work on, by parameter name: the float32 master, or else the parameter."""
        return {name: self._masters.get(parameter, parameter) for name, parameter in model.named_parameters()}

    # -- a training step ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def autocast(self, model: nn.Module | None = None) -> Iterator[None]:
        """Make the context in which to run the model forward; without effect in float32.

        Args:
            model: the one that will run, whose weights are then cast together where few launches pay; see
                flat.py.
        """
        if torch.is_grad_enabled():
            self._begin_step()
        together = self.level == "O1" and device_layer.few_launches_pay(self.device)
        with (
            device_layer.autocast(self.device, self._half_dtype, self.level != "O0"),
            cast_together(model, self.dtype) if together and model is not None else contextlib.nullcontext(),
        ):
            yield

    def backward(self, loss: Tensor) -> None:
        """Compute gradients of the (scaled) loss; several calls before one `step` accumulate."""
        self._begin_step()
        (loss if self._scale is None else loss * self._scale).backward()

    def _begin_step(self) -> None:
        """Clear what an evaluation or anything else has left in the device's overflow flag, once for each step."""
        if not self._in_step:
            device_layer.clear_overflow_flag(self.device)
            self._in_step = True

    @torch.no_grad()
    def step(
        self,
        optimizer: torch.optim.Optimizer,
        clip: tuple[float | None, str] | None = None,
        average_gradients: bool = False,
    ) -> Tensor:
        """Unscale and clip the gradients and take an optimizer step, unless a gradient is inf or NaN.

        Fused optimizers are told to skip on the device. Any other makes the host wait for the answer, once per step.

        Args:
            optimizer: built on `master_parameters`. The caller clears the gradients with its `zero_grad()`.
            clip: value and mode for `clip_gradients`; None clips nothing.
            average_gradients: average them over the ranks first, which nobody has done yet; for an optimizer that
                keeps them in few tensors.

        Returns:
            The gradient norm before clipping, unscaled, a tensor without dimensions on the device.

        Raises:
            RuntimeError: no parameter of the optimizer has a gradient.
        """
        self._move_gradients_to_masters()
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.grad is not None
        ]
        if not parameters:
            raise RuntimeError(
                "No parameter has a gradient: call backward() first, on a loss of the model, and "
                "build the optimizer from master_parameters()."
            )
        flat = flat_gradients(optimizer)
        for gradients in flat if average_gradients and flat else ():
            average_(gradients)
        norm = clip_gradients(
            parameters,
            *(clip or (None, "norm")),
            flat_gradients=flat,
            unscale=None if self._scale is None else self._scale.reciprocal(),
        )
        found_inf = torch.isfinite(norm).logical_not().float()
        flag = device_layer.overflow_flag(self.device)
        if flag is not None:
            found_inf = all_reduce_sum(torch.maximum(found_inf, flag)).clamp(max=1.0)
        self._skipped = found_inf if self._skipped is None else self._skipped + found_inf
        self._in_a_row = found_inf if self._in_a_row is None else (self._in_a_row + 1) * found_inf
        _step_unless(optimizer, found_inf)
        self._in_step = False
        if self._scale_moves and self._scale is not None:
            self._move_scale(self._scale, found_inf)
        if self._masters and device_layer.few_launches_pay(self.device):
            if self._flat_halves is None:
                self._flat_halves = join_in_place(list(self._masters))
            self._flat_halves.copy_(torch.cat([master.reshape(-1) for master in self._masters.values()]))
        elif self._masters:
            torch._foreach_copy_(list(self._masters), list(self._masters.values()))
        return norm

    def _move_scale(self, scale: Tensor, found_inf: Tensor) -> None:
        """Halve a dynamic scale after an overflow, double it after many steps without one, as torch's GradScaler."""
        fine = 1 - found_inf
        clean_steps = (self._clean_steps + 1) * fine
        grows = (clean_steps >= _GROWTH_INTERVAL).float()
        scale.mul_(0.5 * found_inf + fine * (1 + grows)).clamp_(*_SCALE_RANGE)
        self._clean_steps.copy_(clean_steps * (1 - grows))

    def _move_gradients_to_masters(self) -> None:
        """Copy half-precision gradients to the float32 masters and clear them, since the optimizer never will."""
        pairs = [(master, parameter.grad) for parameter, master in self._masters.items() if parameter.grad is not None]
        if pairs and device_layer.few_launches_pay(self.device):
            joined = join([gradient for _, gradient in pairs], torch.float32)
            for parameter, master in self._masters.items():
                master.grad = parameter.grad = None
            for (master, _), gradient in zip(pairs, joined, strict=True):
                master.grad = gradient
            return
        to, source = [], []
        for parameter, master in self._masters.items():
            if parameter.grad is None:
                master.grad = None
                continue
            if master.grad is None:
                master.grad = torch.empty_like(master)
            to.append(master.grad)
            source.append(parameter.grad)
            parameter.grad = None
        if to:
            torch._foreach_copy_(to, source)

    # -- for the log and checkpoints ---------------------------------------------------------------------------------

    def skipped(self) -> int:
        """Return the number of steps skipped so far; it waits for the device, so ask at log time only."""
        return self._skipped_before + (0 if self._skipped is None else int(self._skipped))

    def skipped_in_a_row(self) -> Tensor:
        """Return how many steps were skipped since the last that was not: a tensor without dimensions on the device."""
        return torch.zeros((), device=self.device) if self._in_a_row is None else self._in_a_row

    def loss_scale(self) -> float | None:
        """Return the present loss scale, None where no loss is scaled; it waits for the device."""
        return None if self._scale is None else float(self._scale)

    def float_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return weights and buffers by name, the tensors themselves, with masters in place of half-precision ones."""
        weights = dict(model.named_parameters(remove_duplicate=False))
        tensors: dict[str, Tensor] = {name: self._masters.get(weight, weight) for name, weight in weights.items()}
        return tensors | dict(model.named_buffers(remove_duplicate=False))

    def float_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the model's state dict with the float32 masters in place of half-precision weights."""
        state = model.state_dict()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter in self._masters:
                state[name] = self._masters[parameter].detach()
        return state

    def load_float_state_dict(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Load a float32 state dict into a model that may be prepared already: weights and masters both."""
        model.load_state_dict(state)
        with torch.no_grad():
            for name, parameter in model.named_parameters(remove_duplicate=False):
                if parameter in self._masters:
                    self._masters[parameter].copy_(state[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the count of skipped steps and, of a dynamic scale, its value and progress, as plain numbers."""
        state: dict[str, Any] = {"skipped": self.skipped()}
        if self._scale is not None and self._scale_moves:
            state["dynamic_scale"] = {"scale": float(self._scale), "_growth_tracker": int(self._clean_steps)}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; a static scale, or a dynamic one not saved, stays as configured."""
        self._skipped_before, self._skipped = int(state["skipped"]), None
        if self._scale is not None and self._scale_moves and "dynamic_scale" in state:
            self._scale.fill_(float(state["dynamic_scale"]["scale"]))
            self._clean_steps.fill_(int(state["dynamic_scale"]["_growth_tracker"]))


def check_precision(
    device: torch.device, enabled: bool, opt_level: str, dtype: torch.dtype | str, loss_scale: float | str = "dynamic"
) -> tuple[torch.dtype, float | None]:
    """Check the settings of a Precision, whose arguments these are, before anything is built.

    Returns:
        The half-precision dtype, and the static loss scale; None for a dynamic one.

    Raises:
        ValueError: a setting is unknown, out of range, or would have no effect.
    """
    if opt_level not in OPT_LEVELS:
        raise ValueError(
            f"Unknown opt level '{opt_level}': O0 is float32, O1 autocast, O2 half-precision weights "
            "with float32 masters."
        )
    half_dtype = _HALF_DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if half_dtype is None or half_dtype not in _HALF_DTYPES.values():
        raise ValueError(f"Unknown half-precision dtype {dtype}: choose {' or '.join(_HALF_DTYPES)}.")
    used = half_dtype if enabled and opt_level != "O0" else torch.float32
    device_layer.check_dtype(device, used)
    return half_dtype, _read_loss_scale(loss_scale, used, device)


def _read_loss_scale(loss_scale: float | str, dtype: torch.dtype, device: torch.device) -> float | None:
    """Return a static scale, or None for a dynamic one, which float32 goes without."""
    if loss_scale == "dynamic":
        return None
    try:
        value = float(loss_scale)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"The loss scale must be 'dynamic' or a number above 0, got {loss_scale!r}.")
    if dtype != torch.float16 and (dtype != torch.float32 or device_layer.has_float32_range(device)):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"A loss scale of {value:g} would have no effect: {name} has the range to do without. "
            "Leave --loss-scale out, or train in float16 (--amp --amp-dtype float16, opt level O1 or O2)."
        )
    return value


def _step_unless(optimizer: torch.optim.Optimizer, found_inf: Tensor) -> None:
    """Take a step where `found_inf` is 0; where it is 1 leave weights and state as they are."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        fused: Any = optimizer  # torch's contract between scaler and optimizer, which is not in its classes
        fused.grad_scale, fused.found_inf = None, found_inf
        try:
            optimizer.step()
        finally:
            del fused.grad_scale, fused.found_inf
    elif not bool(found_inf):
        optimizer.step()
