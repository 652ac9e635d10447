"""Keep an overflow out of batch norm's running statistics.

A step with an inf or a NaN is skipped, so it cannot reach the weights. But the forward pass has changed the running
statistics by then, and a NaN in them stays for good: training goes on unharmed, while every evaluation detects nothing.
So the last statistics that were finite are kept and put back, at log lines, where the device is read anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StatisticsGuard:
    """Remember the finite running statistics of some models.

    Args:
        models: on one device; their running_mean and running_var are watched.
    """

    def __init__(self, *models: nn.Module) -> None:
        self._buffers = [
            buffer
            for model in models
            for name, buffer in model.named_buffers()
            if name.rpartition(".")[2] in ("running_mean", "running_var")
        ]
        self._good = [buffer.detach().clone() for buffer in self._buffers]

    @torch.no_grad()
    def damage(self, device: torch.device) -> Tensor:
        """Return 1.0 when a statistic is inf or NaN, else 0.0: a tensor without dimensions, not read by the host."""
        if not self._buffers:
            return torch.zeros((), device=device)
        sums = torch.stack([norm.float() for norm in torch._foreach_norm(self._buffers, 1)])
        return torch.isfinite(sums).all().logical_not().float()

    @torch.no_grad()
    def keep_or_restore(self, damaged: bool) -> None:
        """Put the statistics of the last good call back when they are damaged, else remember them."""
        if self._buffers:
            to, source = (self._buffers, self._good) if damaged else (self._good, self._buffers)
            for one, other in zip(to, source, strict=True):  # CANN has no copy of lists on A3 and in private formats
                one.copy_(other)


@torch.no_grad()
def count_batches_on_host(*models: nn.Module) -> None:
    """Move the batch norms' counters, `num_batches_tracked`, to the host: adding 1 there launches nothing on a device.

    The keys of a state dict stay. A model that is moved to a device afterwards takes its counters with it.
    """
    owners = [
        module
        for model in models
        for module in model.modules()
        if getattr(module, "num_batches_tracked", None) is not None
    ]
    if owners:
        counters = torch.stack([owner.get_buffer("num_batches_tracked") for owner in owners]).cpu()
        for owner, counter in zip(owners, counters, strict=True):
            owner.num_batches_tracked = counter.clone()
