"""Batch norm over the batch of all ranks, and the conversion of a model to it.

torch.nn.SyncBatchNorm refuses CPU tensors and DistributedDataParallel refuses it in a CPU model (seen in torch 2.11 and
2.13), and on an accelerator it makes the host wait once per layer. So gloo runs get the exact module below,
accelerators one that calls their fused kernels without waiting. Neither changes a state-dict key.

Source: Ioffe & Szegedy 2015 (batch norm and its gradient); Chan, Golub & LeVeque 1979 (combining partial variances).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .device import batch_norm_stats

__all__ = ["FusedSyncBatchNorm", "SyncBatchNorm", "convert_sync_batchnorm", "normalize_together"]


def _per_channel(vector: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """View [C] as [1, C, 1, ...] to broadcast over `like`."""
    return vector.view(1, -1, *[1] * (like.dim() - 2))


def _global_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Combine the ranks' means and centred sums of squares, one collective.

    Each rank centres its own values before squaring, so a mean that is large against the spread costs no digits, as
    sum(x^2) - mean^2 would. A rank may have an empty batch.

    Args:
        x: [B, C, ...], B may be 0 and may differ between ranks.

    Returns:
        mean [C], sum of squared deviations [C], number of values per channel as a [] tensor; equal on all ranks.
    """
    channels = x.size(1)
    local = x.new_zeros(2 * channels + 1)
    if x.numel() > 0:
        count = x.numel() // channels
        var, mean = torch.var_mean(x, dim=[d for d in range(x.dim()) if d != 1], correction=0)
        local[:channels], local[channels:-1], local[-1] = mean, var * count, count
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, local)
    table = torch.stack(gathered)  # [ranks, 2C + 1]
    means, squares, counts = table[:, :channels], table[:, channels:-1], table[:, -1:]
    total = counts.sum()
    mean = (means * counts).sum(0) / total.clamp(min=1)
    square = (squares + counts * (means - mean) ** 2).sum(0)
    return mean, square, total


class _SyncNormalize(torch.autograd.Function):
    """Normalise by the global batch's moments; the gradient of x flows through those moments on every rank."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        var: torch.Tensor,
        total: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps), total)
        if x.numel() == 0:
            return torch.empty_like(x)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, inv_std, total = ctx.saved_tensors
        dims = [d for d in range(x.dim()) if d != 1]
        grad = grad_out.to(mean.dtype)
        centred = x.to(mean.dtype) - _per_channel(mean, x)
        sums = torch.cat([grad.sum(dims), (grad * centred).sum(dims)])
        # The parameters' gradients stay this rank's share: DistributedDataParallel averages them like all others.
        grad_bias, grad_centred = sums.clone().chunk(2)
        grad_weight = grad_centred * inv_std
        grad_x = None
        if ctx.needs_input_grad[0]:
            dist.all_reduce(sums)  # also with an empty batch: the other ranks wait for this one
            mean_grad, mean_grad_centred = (sums / total).chunk(2)
            scale = inv_std if weight is None else inv_std * weight.to(mean.dtype)
            grad_x = grad - _per_channel(mean_grad, x) - centred * _per_channel(mean_grad_centred * inv_std**2, x)
            grad_x = (grad_x * _per_channel(scale, x)).to(x.dtype)
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        return (
            grad_x,
            grad_weight.to(weight.dtype) if needs_weight else None,
            grad_bias.to(weight.dtype) if needs_bias else None,
            None,
            None,
            None,
            None,
        )


class _DropAct:
    """The dropout and activation that timm's BatchNormAct2d carries; absent on a plain batch norm."""

    def _drop_act(self, x: torch.Tensor) -> torch.Tensor:
        for name in ("drop", "act"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class SyncBatchNorm(_DropAct, _BatchNorm):
    """Normalise over the batches of all ranks, on the CPU (gloo) and anywhere else all_gather works.

    Gives the output, gradients and running statistics of one process with the whole batch; ranks may have unequal or
    empty batches. In eval mode, or with one process, it is a plain batch norm.
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input [B, C, ...] with at least 2 dimensions, got {input.dim()}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise, then apply the converted layer's dropout and activation.

        Args:
            input: [B, C, ...] in float32, float64, or half precision (moments are then float32).

        Returns:
            A tensor of the input's shape and dtype.

        Raises:
            ValueError: all ranks together have fewer than two values per channel.
        """
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self._drop_act(super().forward(input))
        self._check_input_dim(input)
        with torch.no_grad():
            mean, square, total = _global_moments(input if input.dtype == torch.float64 else input.float())
            if total < 2:
                raise ValueError(f"batch norm needs at least 2 values per channel over all ranks, got {int(total)}")
            if self.track_running_stats and self.running_mean is not None:
                self.num_batches_tracked.add_(1)
                factor = 1.0 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
                self.running_var.lerp_((square / (total - 1)).to(self.running_var.dtype), factor)
        output = _SyncNormalize.apply(input, self.weight, self.bias, mean, square / total, total, self.eps)
        return self._drop_act(output)


class _FusedSyncNormalize(torch.autograd.Function):
    """The same with the device's own kernels for statistics, normalisation and gradient; no wait for the device.

    Takes the inputs of several layers that do not depend on each other: they share one collective on the way forward
    and one on the way back.

    torch.nn.SyncBatchNorm calls these kernels too, but between them it picks the ranks with a non-empty batch by a
    boolean mask, whose result's size the host has to wait for: once per layer and step. Here every rank has data.
    """

    @staticmethod
    def forward(ctx: Any, layers: Sequence[FusedSyncBatchNorm], *tensors: torch.Tensor | None) -> tuple[Any, ...]:
        ranks, local, saved, outputs = dist.get_world_size(), [], [], []
        inputs = [x.contiguous() for x in tensors[::3] if x is not None]
        for layer, x in zip(layers, inputs, strict=True):
            local += batch_norm_stats(x, layer.eps)
            if not layer.equal_batches:
                local.append(torch.full_like(local[-1][:1], x.numel() // x.size(1)))
        joined = torch.cat(local)
        table = joined.new_empty(ranks * joined.numel())
        dist.all_gather_into_tensor(table, joined)
        table, start = table.view(ranks, -1), 0  # of each layer [ranks, 2C], and the counts
        for layer, x, weight, bias in zip(layers, inputs, tensors[1::3], tensors[2::3], strict=True):
            middle, end = start + x.size(1), start + 2 * x.size(1)
            if layer.equal_batches:
                counts, whole_counts = _equal_counts(x.numel() // x.size(1), ranks, x.device)
            else:
                counts = table[:, end]
                whole_counts = counts.to(torch.int32)
            mean, inv_std = torch.batch_norm_gather_stats_with_counts(
                x, table[:, start:middle], table[:, middle:end], *layer.statistics_to_update(), layer.eps, counts
            )
            outputs.append(torch.batch_norm_elemt(x, weight, bias, mean, inv_std, layer.eps))
            saved += [x, weight, mean, inv_std, whole_counts]
            start = end if layer.equal_batches else end + 1
        ctx.save_for_backward(*saved)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs, saved = ctx.needs_input_grad[1:], ctx.saved_tensors
        layers = [
            (grad_out.contiguous(), *saved[5 * i : 5 * i + 5], needs[3 * i : 3 * i + 3])
            for i, grad_out in enumerate(grads_out)
        ]
        reduced = [
            torch.batch_norm_backward_reduce(grad_out, x, mean, inv_std, weight, *need)
            for grad_out, x, weight, mean, inv_std, _, need in layers
        ]
        sums: list[torch.Tensor] = []
        if any(needs[::3]):
            joined = torch.cat([part for parts in reduced for part in parts[:2]])
            dist.all_reduce(joined)
            sums = list(joined.split([part.numel() for parts in reduced for part in parts[:2]]))
        grads: list[torch.Tensor | None] = [None]
        for i, (grad_out, x, weight, mean, inv_std, counts, need) in enumerate(layers):
            grad_x = None
            if need[0]:
                pair = [part.contiguous() for part in sums[2 * i : 2 * i + 2]]
                grad_x = torch.batch_norm_backward_elemt(grad_out, x, mean, inv_std, weight, *pair, counts)
            grad_weight, grad_bias = reduced[i][2:]
            grads += [grad_x, grad_weight if need[1] else None, grad_bias if need[2] else None]
        return tuple(grads)


@functools.lru_cache(maxsize=256)
def _equal_counts(count: int, ranks: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values per channel of each rank, all of them `count`, as floats and as int32."""
    whole = torch.full((ranks,), count, dtype=torch.int32, device=device)
    return whole.float(), whole


class FusedSyncBatchNorm(_DropAct, _BatchNorm):
    """Normalise over the batches of all ranks of an accelerator, none of them empty."""

    equal_batches = False  # whether all of them are of one size, as `convert_sync_batchnorm` was told

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input [B, C, ...] with at least 2 dimensions, got {input.dim()}")

    def statistics_to_update(self) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
        """Count a batch; return running mean and variance, if there are, and the momentum to update them with."""
        if not self.track_running_stats or self.running_mean is None:
            return None, None, 0.0
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        return self.running_mean, self.running_var, momentum

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise, then apply the converted layer's dropout and activation."""
        return normalize_together([self], [input])[0]


def normalize_together(layers: Sequence[FusedSyncBatchNorm], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Apply each layer to its input; all of them exchange their statistics in one collective.

    Args:
        layers: all in training or all in evaluation mode.
        inputs: [B, C, ...] for each of them; none may depend on another one's output.

    Returns:
        The layers' outputs.
    """
    pairs = list(zip(layers, inputs, strict=True))
    if layers[0].training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for layer, x in pairs:
            layer._check_input_dim(x)
        outputs = _FusedSyncNormalize.apply(layers, *(t for layer, x in pairs for t in (x, layer.weight, layer.bias)))
    else:
        outputs = [_BatchNorm.forward(layer, x) for layer, x in pairs]
    return [layer._drop_act(output) for layer, output in zip(layers, outputs, strict=True)]


def _converted(layer: _BatchNorm, kind: type[_BatchNorm]) -> _BatchNorm:
    new = kind(layer.num_features, layer.eps, layer.momentum, affine=False, track_running_stats=False)
    new.affine, new.track_running_stats = layer.affine, layer.track_running_stats
    # The very same parameters, buffers and children: optimiser references, frozen flags and keys survive.
    for name in ("weight", "bias"):
        new.register_parameter(name, getattr(layer, name))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        new.register_buffer(name, getattr(layer, name))
    for name, child in layer.named_children():
        new.add_module(name, child)
    new.training = layer.training
    return new


def convert_sync_batchnorm(model: nn.Module, equal_batches: bool = False) -> nn.Module:
    """Replace every batch norm of a model by one that is synchronised over the ranks.

    Call it after the process group runs and before DistributedDataParallel wraps the model. Under gloo the layers
    become `SyncBatchNorm`, otherwise a form with the accelerator's fused kernels; activations of timm's BatchNormAct2d
    are kept.

    Args:
        model: changed in place, except where it is a batch norm itself.
        equal_batches: all ranks always have batches of one shape, so that an accelerator need not exchange their sizes.

    Returns:
        The model; unchanged when there is no group of several processes, where a plain batch norm is the same.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return model
    kind = SyncBatchNorm if dist.get_backend() == "gloo" else FusedSyncBatchNorm
    synchronised = (nn.SyncBatchNorm, SyncBatchNorm, FusedSyncBatchNorm)
    done: dict[nn.Module, nn.Module] = {}  # a layer used in two places stays one layer

    def convert(module: nn.Module) -> nn.Module:
        if module not in done:
            done[module] = module
            if isinstance(module, _BatchNorm) and not isinstance(module, synchronised):
                done[module] = new = _converted(module, kind)
                new.equal_batches = equal_batches
            else:
                for name, child in list(module._modules.items()):
                    if child is not None:
                        module._modules[name] = convert(child)
        return done[module]

    return convert(model)
