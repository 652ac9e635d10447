"""A running average of a model's weights.

Lives here: the average, its warm-up and how much of it is still the initial weights. Choosing which weights are
evaluated or saved is the engine's business.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .flat import join_in_place


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel and torch.compile wrappers; any other comes back as it is."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # torch.compile's wrapper
            model = model.get_submodule("_orig_mod")
        else:
            return model


class ModelEma:
    """Keep a float32 exponential moving average of parameters and float buffers.

    Args:
        model: the model to follow, on its final device, wrapped or not. It is copied.
        decay: weight of the old average, 0 to 1.
        warmup: begin with a smaller decay, min(decay, (1 + n) / (10 + n)) at update n = 0, 1, ...

    Attributes:
        module: the averaged model in eval mode, without gradients; use it like the model itself.
        updates: number of updates so far.

    Raises:
        ValueError: decay is not in [0, 1).

    Source: the warm-up is that of TensorFlow's ExponentialMovingAverage with `num_updates`.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"The EMA's decay must be at least 0 and below 1, got {decay}.")
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self._share_of_init = 1.0
        self.module = copy.deepcopy(unwrap_model(model)).float().eval().requires_grad_(False)
        for parameter in self.module.parameters():
            parameter.grad = None
        # Tied tensors once, or they would move twice; buffers that are not saved are constants of the architecture.
        saved = self.module.state_dict().keys()
        tensors = {name: tensor for name, tensor in _named_tensors(self.module, True).items() if name in saved}
        self._floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        self._others = {name: tensor for name, tensor in tensors.items() if name not in self._floats}
        self._flat: list[tuple[Tensor, Tensor]] = []  # average and weights, where they lie in one tensor each

    @property
    def decay_now(self) -> float:
        """The decay that the next update will use."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    def share_of_init(self) -> float:
        """Return how much of the average is still the weights it began with: the product of all decays, 1 at first."""
        return self._share_of_init

    def is_cold(self) -> bool:
        """Return True while more than 5 % of the average is the initial weights; its metrics then say little."""
        return self._share_of_init > 0.05

    @torch.no_grad()
    def flatten(self, weights: Mapping[str, Tensor], groups: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> None:
        """Lay average and weights out in the same order in few tensors, so that an update is a few operations.

        To be called once. The tensors keep their identity, shapes and values, and must stay where they are from now on.

        Args:
            weights: the model's weights and buffers by name, the tensors themselves.
            groups: tensors that hold many of the weights already, as an optimizer keeps them: (flat, parts in order).
                All other float weights are moved into one for each dtype.
        """
        names = {weights[name].data_ptr(): name for name in self._floats}
        for flat, parts in groups:
            mine = [names.pop(part.data_ptr()) for part in parts]
            self._flat.append((join_in_place([self._floats.pop(name) for name in mine]), flat))
        for dtype in {weights[name].dtype for name in self._floats}:
            rest = [name for name in self._floats if weights[name].dtype == dtype]
            flat = join_in_place([weights[name] for name in rest])
            self._flat.append((join_in_place([self._floats.pop(name) for name in rest]), flat))
        buffers = dict(self.module.named_buffers(remove_duplicate=False))
        self._others = {name: buffers[name] for name in self._others}  # they may have gone to another device

    @torch.no_grad()
    def update(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        """Move the average towards the model's weights, in few multi-tensor calls and without a wait for the device.

        Args:
            model: the model, wrapped or not, in any float dtype; or its weights by name, as
                `Precision.float_state_dict` gives them where the model itself is half precision (O2). Integer buffers
                are copied.
        """
        weights = model if isinstance(model, Mapping) else _named_tensors(unwrap_model(model), False)
        decay = self.decay_now
        averages = [average for average, _ in self._flat] + list(self._floats.values())
        new = [flat.to(average.dtype) for average, flat in self._flat]
        new += [weights[name].detach().to(tensor.dtype) for name, tensor in self._floats.items()]
        torch._foreach_lerp_(averages, new, 1 - decay)
        if self._others:
            torch._foreach_copy_(list(self._others.values()), [weights[name] for name in self._others])
        self.updates += 1
        self._share_of_init *= decay

    @torch.no_grad()
    def copy_buffers(self, model: nn.Module) -> None:
        """Take the model's buffers (batch-norm statistics) over as they are, for statistics that no longer change."""
        buffers = dict(unwrap_model(model).named_buffers())
        for name, buffer in self.module.named_buffers():
            buffer.copy_(buffers[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights and the counters that a resumed run needs."""
        return {"module": self.module.state_dict(), "updates": self.updates, "share_of_init": self._share_of_init}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; decay and warm-up stay those of this object.

        Raises:
            RuntimeError: the weights do not fit the model (torch's text names the keys).
        """
        self.module.load_state_dict(state["module"])
        self.updates = int(state["updates"])
        self._share_of_init = float(state["share_of_init"])


def _named_tensors(model: nn.Module, once: bool) -> dict[str, Tensor]:
    """Return parameters and buffers by name; a tensor with several names under the first only when `once`."""
    return {**dict(model.named_parameters(remove_duplicate=once)), **dict(model.named_buffers(remove_duplicate=once))}
