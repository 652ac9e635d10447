"""Network and loss of training steps, replayed from a recorded graph of the device's kernels.

A step of a small detector is thousands of short kernels, and starting them one by one takes the host longer than the
device needs to run them. A graph starts them all at once.
"""
from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effdet.runtime import device as device_layer

_logger = logging.getLogger(__name__)


class GraphedLosses:
    """Calls a bench's losses; records them at the first call and replays the record wherever the next calls fit it.

    Kernels of a record always read and write the same memory, and what Python decides is decided once. So another
    shape, or a norm layer that was frozen or thawed since, does not fit: for the former the usual way is taken, for the
    latter the record is made anew. Gradients lie in the record's memory and are overwritten by the next call: clear
    them before (`zero_grad()` with None), and do not accumulate.

    The numbers are those of the usual way. Memory that a record uses stays with it.
    """

    def __init__(self, model: nn.Module, losses: Callable[..., tuple[Tensor, ...]]) -> None:
        """Wrap a function of the network's input and further tensors, possibly in lists, that returns losses.

        Args:
            model: the network; its buffers are put back to what they were before the recording.
            losses: calls `model`.
        """
        self.model, self.losses = model, losses
        self._recorded: nn.Module | None = None
        self._fits: tuple | None = None
        self._failed = False

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Return the losses."""
        flat = [tensor for argument in arguments for tensor in (argument if isinstance(argument, list) else [argument])]
        shapes = tuple((tensor.shape, tensor.dtype, tensor.stride()) for tensor in flat)
        modes = tuple(module.training for module in self.model.modules())
        if self._failed or (self._fits is not None and self._fits[0] != shapes):
            return self.losses(*arguments)
        if self._fits != (shapes, modes):
            self._record(arguments, flat)
            self._fits = shapes, modes
            if self._failed:
                return self.losses(*arguments)
        return self._recorded(*flat)

    def _record(self, arguments: Sequence[Any], flat: list[Tensor]) -> None:
        self._recorded = None  # gives its memory back
        module = _Recordable(self.model, self.losses, [len(argument) if isinstance(argument, list) else None
                                                       for argument in arguments])
        before = [buffer.clone() for buffer in self.model.buffers()]
        try:
            self._recorded = device_layer.record_graph(module, [tensor.clone() for tensor in flat])
        except RuntimeError as error:  # out of memory is one, too
            self._failed = True
            _logger.warning("the kernels of a step could not be recorded, they are started one by one: %s",
                            str(error).partition("\n")[0])
        with torch.no_grad():
            for buffer, value in zip(self.model.buffers(), before, strict=True):
                buffer.copy_(value)


class _Recordable(nn.Module):
    """The losses as a module whose arguments are tensors only."""

    def __init__(self, model: nn.Module, losses: Callable[..., tuple[Tensor, ...]], lengths: Sequence[int | None]
                 ) -> None:
        """Take `lengths` of the arguments that are lists, None for those that are not."""
        super().__init__()
        self.model, self.losses, self.lengths = model, losses, lengths

    def forward(self, *flat: Tensor) -> tuple[Tensor, ...]:
        """Put the lists together again and compute."""
        rest = iter(flat)
        return self.losses(*(next(rest) if length is None else [next(rest) for _ in range(length)]
                             for length in self.lengths))
