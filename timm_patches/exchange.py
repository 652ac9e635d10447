"""Put layers of another class in the place of a model's layers, with the very same tensors."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def exchange_layers(model: nn.Module, choose: Callable[[nn.Module], type[nn.Module] | None]) -> list[nn.Module]:
    """Exchange layers inside a model.

    Parameters, buffers, submodules, hooks (and handles to remove them) and the training flag go over to the new layer,
    so state-dict keys, optimizers, EMA and DistributedDataParallel do not notice. A layer with several names stays one
    layer.

    Args:
        model: changed in place. It is not exchanged itself: nothing here could tell who refers to it.
        choose: returns the class that a layer is to have, or None to leave it. It is a subclass or a superclass of the
            layer's own, and its `__init__` is not called.

    Returns:
        The layers that were taken out, in the order of `model.modules()`, each once.
    """
    exchanged: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, layer in parent._modules.items():
            if layer is not None and layer not in exchanged and (cls := choose(layer)) is not None:
                exchanged[layer] = cls.__new__(cls)
                exchanged[layer].__dict__.update(layer.__dict__)
            if layer in exchanged:
                parent._modules[name] = exchanged[layer]
    return list(exchanged)
