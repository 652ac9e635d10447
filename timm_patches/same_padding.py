"""The switch between timm's SAME padding by a pad operator and the same numbers without one.

Lives here: which layers of a model are exchanged, and back (exchange.py says how). timm's own classes and functions
are never changed.
"""

from __future__ import annotations

from typing import NamedTuple

from timm.layers import BlurPool2d
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import nn

from .conv2d_same import Conv2dSameNoPad
from .exchange import exchange_layers
from .pool2d_same import AvgPool2dSameNoPad, MaxPool2dSameNoPad

MODES = ("kernel", "pad")

_WITHOUT_PAD = {Conv2dSame: Conv2dSameNoPad, MaxPool2dSame: MaxPool2dSameNoPad, AvgPool2dSame: AvgPool2dSameNoPad}
_WITH_PAD = {without: timms for timms, without in _WITHOUT_PAD.items()}


class SamePaddingReport(NamedTuple):
    """What one call exchanged, and what it had to leave."""

    convolutions: int
    max_pools: int
    avg_pools: int
    left: tuple[str, ...]  # names of the layers that still call a pad operator on their input

    @property
    def converted(self) -> int:
        """The number of layers exchanged."""
        return self.convolutions + self.max_pools + self.avg_pools

    def __str__(self) -> str:
        left = f"{len(self.left)} ({', '.join(self.left)})" if self.left else "0"
        return (
            f"{self.convolutions} convolutions, {self.max_pools} max pools and {self.avg_pools} average pools "
            f"exchanged; left as explicit padding: {left}"
        )


def convert_same_padding(model: nn.Module, mode: str = "kernel") -> SamePaddingReport:
    """Choose how the SAME layers of a model pad: in place, exact, reversible; a second call exchanges nothing.

    Call it before torch.compile and before an export; optimizers, EMA and DistributedDataParallel do not mind.

    Args:
        model: any module; one without SAME layers is left as it is, and so is one that is a SAME layer itself.
        mode: 'kernel' lets convolutions and pools pad by themselves, for devices where a pad operator on an activation
            costs (NPU); 'pad' is timm's explicit padding.

    Returns:
        How many layers this call exchanged, and the names of those that still pad explicitly: in mode 'kernel' the SAME
        layers with a forward of their own (subclasses, weight-standardised and conditional convolutions), dilated max
        pools and blur pools; in mode 'pad' all of them.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(
            f"Unknown mode of SAME padding {mode!r}: use 'kernel' (no pad operator on activations) or "
            "'pad' (timm's explicit padding)."
        )
    classes = _WITHOUT_PAD if mode == "kernel" else _WITH_PAD

    def choose(layer: nn.Module) -> type[nn.Module] | None:
        dilated = isinstance(layer, MaxPool2dSame) and layer.dilation != (1, 1)
        return None if dilated else classes.get(type(layer))  # the very class: a subclass may compute something else

    exchanged = exchange_layers(model, choose)
    counts = (sum(isinstance(layer, cls) for layer in exchanged) for cls in _WITHOUT_PAD)
    left = (name or type(layer).__name__ for name, layer in model.named_modules() if _pads_explicitly(layer))
    return SamePaddingReport(*counts, tuple(left))


def restore_same_padding(model: nn.Module) -> SamePaddingReport:
    """Undo `convert_same_padding`: timm's layers take their places again; returns its report."""
    return convert_same_padding(model, mode="pad")


def _pads_explicitly(module: nn.Module) -> bool:
    """Return whether a layer calls a pad operator on its input."""
    if type(module) in _WITH_PAD:
        return False
    # The two attributes are how timm's weight-standardised and conditional convolutions remember SAME padding.
    return (
        isinstance(module, (*_WITHOUT_PAD, BlurPool2d))
        or getattr(module, "same_pad", False) is True
        or getattr(module, "dynamic_padding", False) is True
    )
