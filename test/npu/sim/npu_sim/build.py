"""Build the stand-ins for the CANN libraries with gcc, once, and load them.

Lives here: the list of libraries torch_npu links against, the generated operator library, and the cache. What the
libraries do is in cann/*.c.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.machinery
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

VERSION = "2.13.0"  # the torch_npu these sources were written and checked against
LIBRARIES = ("ascendcl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel", "hccl", "opapi")
_EMPTY = ("acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")  # linked, but nothing is taken from them
_SOURCES = Path(__file__).with_name("cann")


def missing() -> str | None:
    """Say in one sentence what this machine lacks for the simulation; None when it has everything."""
    if sys.platform != "linux":
        return f"the simulated NPU needs Linux, this is {sys.platform}"
    if shutil.which("gcc") is None:
        return "the simulated NPU needs gcc to build its stand-ins for the CANN libraries"
    try:
        version = importlib.metadata.version("torch_npu")
    except importlib.metadata.PackageNotFoundError:
        return f"the simulated NPU needs torch_npu {VERSION} (requirements-npu.txt), which is not installed"
    if version.split("+")[0] != VERSION:
        return f"the simulated NPU is written for torch_npu {VERSION}, installed is {version}"
    return None


def torch_npu_folder() -> Path:
    """Return the folder of the installed torch_npu, without importing it."""
    spec = importlib.machinery.PathFinder.find_spec("torch_npu")
    return Path(spec.origin).parent


def load_libraries() -> dict[str, ctypes.CDLL]:
    """Build the libraries if need be and load them, so that torch_npu finds them already there under their names."""
    folder = build()
    return {name: ctypes.CDLL(str(folder / f"lib{name}.so"), ctypes.RTLD_GLOBAL) for name in LIBRARIES}


def build() -> Path:
    """Return the folder of the built libraries.

    The folder's name is a digest of everything that goes into it. Each process builds in a folder of its own and then
    renames it: whoever comes second finds the first one's result and drops its own.
    """
    torch_npu = torch_npu_folder()
    sources = {path.name: path.read_text() for path in sorted(_SOURCES.iterdir()) if path.suffix in (".c", ".h")}
    installed = importlib.metadata.distribution("torch_npu").read_text("RECORD")  # holds the library's sha256
    digest = hashlib.sha256(repr((Path(__file__).read_text(), sorted(sources.items()), installed)).encode())
    cache = Path(os.environ.get("NPU_SIM_CACHE") or Path(tempfile.gettempdir()) / f"npu_sim-{os.getuid()}")
    result = cache / digest.hexdigest()[:16]
    if result.is_dir():
        return result
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    work = Path(tempfile.mkdtemp(dir=cache))
    try:
        _build_in(work, sources, torch_npu)
        work.rename(result)
    except OSError:  # another process was first
        if not result.is_dir():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return result


def _build_in(work: Path, sources: dict[str, str], torch_npu: Path) -> None:
    wheel = (torch_npu / "lib" / "libtorch_npu.so").read_bytes()
    sources = sources | {
        "operators.c": sources["operators.c"] + _empty_operators(wheel, sources["operators.c"]),
        "empty.c": "",
    }
    for name, text in sources.items():
        (work / name).write_text(text)
    headers = f"-I{torch_npu}/include/third_party/acl/inc"
    runtime = (f"-L{work}", "-lascendcl")
    _compile(work, "ascendcl", "runtime.c", "lazy.c", "memory.c", "graph_operators.c", "unreached.c", headers)
    _compile(work, "hccl", "hccl.c", "-lrt", *runtime)
    _compile(work, "opapi", "operators.c", headers, *runtime)
    for name in _EMPTY:
        _compile(work, name, "empty.c", "-Wl,--no-as-needed", *runtime)


def _empty_operators(wheel: bytes, written: str) -> str:
    """Return C code for every aclnn operator the wheel asks for by name and `written` does not define."""
    names = {
        name.decode().removesuffix("GetWorkspaceSize")
        for name in re.findall(rb"(?<=\0)aclnn[A-Za-z0-9_]+(?=\0)", wheel)
    }
    lines = []
    for name in sorted(names):
        if not re.search(rf"\b{name}\b", written):
            lines.append(
                f'int {name}(void *w, uint64_t s, void *e, void *t) {{ sim_launch("aclnn", "{name}"); return 0; }}'
            )
            lines.append(f"int {name}GetWorkspaceSize(void) {{ return 0; }}")
    return "\n" + "\n".join(lines) + "\n"


def _compile(folder: Path, name: str, *arguments: str) -> None:
    file = f"lib{name}.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", f"-Wl,-soname,{file}", "-o", file, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"Building the simulated NPU failed: {' '.join(command)}\n{done.stderr}")
