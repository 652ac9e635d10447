"""SiLU by torch_npu's own operator, for those who ask for it.

Lives here: the switch between nn.SiLU (F.silu, the default everywhere) and `npu_silu`. The original Ascend port needed
the latter; torch_npu has its own kernels for F.silu now and calls npu_silu deprecated. It takes float16 and float32
only, is missing on the newest chips (Ascend 950), and never works in place. It can go when torch_npu drops it.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

OPERATORS = ("silu", "npu_silu")


class NpuSiLU(nn.SiLU):
    """nn.SiLU that calls `npu_silu` for tensors on an NPU; elsewhere it is nn.SiLU."""

    def forward(self, input: Tensor) -> Tensor:
        """Map a tensor of any shape to x * sigmoid(x)."""
        return torch.ops.npu.npu_silu(input) if _is_on_npu(input) else super().forward(input)


def convert_silu(model: nn.Module, operator: str = "npu_silu") -> int:
    """Choose the operator of a model's SiLU layers, in place and reversibly; a second call changes nothing.

    Args:
        model: any module; only its layers of exactly the class nn.SiLU take part.
        operator: 'npu_silu', or 'silu' to undo.

    Returns:
        The number of layers changed by this call.

    Raises:
        ValueError: unknown operator.
    """
    if operator not in OPERATORS:
        raise ValueError(f"Unknown SiLU operator {operator!r}: use 'silu' (F.silu) or 'npu_silu' (torch_npu's, "
                         "deprecated there).")
    old, new = (nn.SiLU, NpuSiLU) if operator == "npu_silu" else (NpuSiLU, nn.SiLU)
    layers = [module for module in model.modules() if type(module) is old]
    for layer in layers:
        layer.__class__ = new
    return len(layers)


def _is_on_npu(tensor: Tensor) -> bool:
    return tensor.device.type == "npu"
