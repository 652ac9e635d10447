"""Declare the torchvision operators that a torchvision without a loadable C++ library leaves undeclared.

Lives here: the work-around that lets `import timm` succeed. It must run before timm is imported, so importing this
module applies it.
Must not live here: anything that uses torchvision; nothing in this repository does, only timm imports it.

Symptom: `import timm` imports torchvision, which ends in "RuntimeError: operator torchvision::nms does not exist".
torchvision registers shape functions for `nms` and `qnms` even when its compiled library could not be loaded, and a
shape function needs a declared operator. It happens when that library was built for another torch than the one
installed: the package registry's torchvision is built for one accelerator, so beside a CPU-only torch (and on Ascend
hosts, which use a CPU torch plus a plug-in) the libraries it needs are not there.

Who decides: torchvision. An operator declared here and then by its library ends the process, so nothing is declared
before its own loader has given up. Importing this module only leaves a note for the moment after that and before the
shape functions: the import of `torchvision._meta_registrations`. What the library is called, and where it lies, is
never looked at (`_C` up to torchvision 0.28, `_C_stable` in 0.29). Should a later torchvision rename the two modules
named here, then nothing is declared: where its library loads all is well, elsewhere the symptom is back.

Versions seen: torch 2.13.0 (CPU) with torchvision 0.28.0 from PyPI; torch 2.14.1 with torchvision 0.29.1.
Can go: when `python -c "import torchvision"` works in such an environment without this file, or when timm no longer
imports torchvision. The declared operators have a schema and no kernel: calling one raises NotImplementedError, it
never returns a wrong result.
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Source: torchvision/csrc/ops/nms.cpp (both operators share one signature).
_ARGUMENTS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")

# A Library takes its declarations back when it is collected, so it is held for the life of the process.
_libraries: list[torch.library.Library] = []


class _BeforeShapeFunctions(importlib.abc.MetaPathFinder):
    """Finds no module; is asked for each one before it is imported, and acts when the shape functions are next."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Declare the missing operators where torchvision's loader says that there is no library; find nothing."""
        if fullname == "torchvision._meta_registrations":
            has_ops = getattr(sys.modules.get("torchvision.extension"), "_has_ops", None)
            if has_ops is not None and not has_ops():
                _declare_missing_ops()


def _declare_missing_ops() -> None:
    import torch  # not above: a command line is parsed before torch is imported, and this module is there by then

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + _ARGUMENTS)
    _libraries.append(library)


sys.meta_path.insert(0, _BeforeShapeFunctions())
