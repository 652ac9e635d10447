"""Simulate the NPU in a process whose script knows nothing of it: act when torch_npu is imported.

Lives here: the import hook, the settings from the environment, and the report at exit.
"""

from __future__ import annotations

import atexit
import importlib.abc
import importlib.machinery
import json
import os
import sys
from pathlib import Path

import npu_sim


class _Finder(importlib.abc.MetaPathFinder):
    """Find torch_npu as usual, but load the fake libraries before it runs and install the values after."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch_npu":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader) -> None:
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module) -> None:
        npu_sim.load_libraries(*npu_sim.from_environment())
        self._loader.exec_module(module)
        npu_sim.install()
        _report_at_exit()


def install() -> None:
    """Install the import hook, before anything imports torch."""
    sys.meta_path.insert(0, _Finder())


def _report_at_exit() -> None:
    report, process = os.environ.get("NPU_SIM_REPORT"), os.getpid()
    if not report:
        return
    suffix = os.environ.get("RANK") or f"p{process}"

    def write() -> None:
        if os.getpid() == process:  # not in forked children
            Path(f"{report}.{suffix}").write_text(json.dumps(npu_sim.meters.as_dict(), indent=1))

    atexit.register(write)
