"""Declare the torchvision operators that a torchvision without a loadable C++ library leaves undeclared.

Lives here: the work-around that lets `import timm` succeed. It must run before timm is imported, so importing this
module applies it.
Must not live here: anything that uses torchvision; nothing in this repository does, only timm imports it.

Symptom: `import timm` imports torchvision, which ends in "RuntimeError: operator torchvision::nms does not exist".
torchvision registers shape functions for `nms` and `qnms` even when its compiled library could not be loaded, and a
shape function needs a declared operator. It happens when that library was built for another torch than the one
installed: the package registry's torchvision is built for one accelerator, so beside a CPU-only torch (and on Ascend
hosts, which use a CPU torch plus a plug-in) the libraries it needs are not there.

Versions seen: torch 2.13.0 (CPU) with torchvision 0.28.0 from PyPI.
Can go: when `python -c "import torchvision"` works in such an environment without this file, or when timm no longer
imports torchvision. The declared operators have a schema and no kernel: calling one raises NotImplementedError, it
never returns a wrong result.
"""

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

import torch

# Source: torchvision/csrc/ops/nms.cpp (both operators share one signature).
_ARGUMENTS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")

# A Library takes its declarations back when it is collected, so it is held for the life of the process.
_libraries: list[torch.library.Library] = []


def declare_missing_ops() -> tuple[str, ...]:
    """Declare `torchvision::nms` and `torchvision::qnms` where torchvision's own library does not.

    Does nothing when torchvision is already imported, is not installed, or provides the operators itself. May be called
    any number of times.

    Returns:
        The names declared by this call, such as `("nms", "qnms")`; empty when there was nothing to do.
    """
    if "torchvision" in sys.modules:
        return ()
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:  # not installed; without an origin it is a stray folder of that name
        return ()
    _load_compiled_library(Path(spec.origin).parent)
    missing = tuple(name for name in _OPERATORS if not hasattr(torch.ops.torchvision, name))
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            library.define(name + _ARGUMENTS)
        _libraries.append(library)
    return missing


def _load_compiled_library(folder: Path) -> bool:
    """Load torchvision's compiled library the way torchvision does; return whether that worked.

    Loading it here is harmless: torchvision's own later load of the same file registers nothing twice. Not trying would
    be harmful: an operator declared by us and then again by the library is an error.
    """
    if os.name == "nt":  # the library's neighbours are found only in registered folders there
        os.add_dll_directory(str(folder))
    loader = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    spec = importlib.machinery.FileFinder(str(folder), loader).find_spec("_C")
    if spec is None or spec.origin is None:
        return False
    try:
        torch.ops.load_library(spec.origin)
    except (ImportError, OSError):  # what torchvision itself forgives here
        return False
    return True


declare_missing_ops()
