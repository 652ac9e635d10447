"""The switch for kernels written in Triton, which run on GPUs: *_kernels.py here, *_triton.py in effdet.

They are off until `use_triton`. Triton's interpreter has run them and its compiler takes them, a GPU has not run them
yet; when one has, they can be on by themselves and the switch can go.
"""
from __future__ import annotations

import torch

_wanted = False


def use_triton(wanted: bool = True) -> None:
    """Turn the kernels on or off, in this process; Triton is imported when one is first needed."""
    global _wanted
    _wanted = wanted


def uses_triton(device: torch.device) -> bool:
    """Return whether the kernels are used on `device`. While a program is compiled they are not: it gets its own."""
    return _wanted and device.type == "cuda" and not torch.compiler.is_compiling()
