"""The torchvision work-around, in fresh processes, beside the installed torchvision and beside every shape of one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[3]

BARE = "import torchvision"

APPLIED = """
    import timm_patches.torchvision_ops
    import timm, torch, torchvision
    declared = not torchvision.extension._has_ops()
    assert torch.ops.torchvision.nms and torch.ops.torchvision.qnms
    try:
        torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except NotImplementedError:
        assert declared
    else:
        assert not declared
    print("declared", declared)
"""

# A compiled library that registers the operators while it is loaded, by the functions that torchvision 0.29 uses. What
# C++ does with an error there is abort().
LIBRARY = """
    #include <stdint.h>
    #include <stdlib.h>
    int aoti_torch_library_init_fragment(const char *, const char *, uint32_t, void **);
    int aoti_torch_library_def(void *, const char *);
    #ifdef OF_ANOTHER_TORCH
    void not_in_this_torch(void);
    #endif
    __attribute__((constructor)) static void declare(void) {
    #ifdef OF_ANOTHER_TORCH
        not_in_this_torch();
    #endif
    #ifndef EMPTY
        void *library;
        if (aoti_torch_library_init_fragment("torchvision", "the library", 1, &library)
            || aoti_torch_library_def(library, "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            || aoti_torch_library_def(library, "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"))
            abort();
    #endif
    }
"""

# Stands in for torchvision, with what its files of these names do in this order (0.28.0 and 0.29.1).
PACKAGE = {
    "__init__.py": "from . import extension, _meta_registrations\n",
    "extension.py": """
        import os
        import torch
        try:
            torch.ops.load_library(os.path.join(os.path.dirname(__file__), "{library}"))
        except (ImportError, OSError):
            loaded = False
        else:
            loaded = True
        def _has_ops():
            return loaded
    """,
    "_meta_registrations.py": """
        import torch
        import torchvision.extension
        @torch.library.register_fake("torchvision::nms")
        def meta_nms(dets, scores, iou_threshold): ...
        @torch.library.register_fake("torchvision::qnms")
        def meta_qnms(dets, scores, iou_threshold): ...
    """,
}

# name -> (the file that the package loads, file -> kind of library in its folder)
SHAPES = {
    "_C loads": ("_C.so", {"_C.so": "good"}),
    "_C cannot load": ("_C.so", {"_C.so": "bad"}),
    "_C_stable loads": ("_C_stable.so", {"_C_stable.so": "good"}),
    "_C_stable cannot load": ("_C_stable.so", {"_C_stable.so": "bad"}),
    "a new name loads": ("lib/ops.abi4.so", {"lib/ops.abi4.so": "good"}),
    "a new name cannot load": ("lib/ops.abi4.so", {"lib/ops.abi4.so": "bad"}),
    "no library": ("_C.so", {}),
    "both, the old one cannot load": ("_C_stable.so", {"_C.so": "bad", "_C_stable.so": "good"}),
    "both, the new one cannot load": ("_C_stable.so", {"_C.so": "good", "_C_stable.so": "bad"}),
    "both load": ("_C_stable.so", {"_C.so": "good", "_C_stable.so": "good"}),
    "loads without operators": ("_C.so", {"_C.so": "empty"}),
    "no library, nms is there": ("_C.so", {}),
}

# One child for each shape, made after the slow import of torch: a child that aborts takes nothing with it.
FORKS = """
    import json, os, re, sys, traceback
    import torch
    def owner(name):
        match = re.search("^debug: registered at (.*):", torch._C._dispatch_dump("torchvision::" + name), re.MULTILINE)
        return match and os.path.basename(match[1])
    def use(folder, shape):
        sys.path.insert(0, folder)
        if shape.endswith("nms is there"):
            own = torch.library.Library("torchvision", "FRAGMENT")
            own.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import timm_patches
        early = [owner("nms"), owner("qnms")]
        try:
            import torchvision
            error = None
        except RuntimeError as caught:
            error = str(caught)
        return {"early": early, "owners": [owner("nms"), owner("qnms")], "error": error}
    for folder, shape in json.loads(sys.argv[1]).items():
        child = os.fork()
        if not child:
            try:
                with open(folder + "/result.json", "w") as file:
                    json.dump(use(folder, shape), file)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        with open(folder + "/status", "w") as file:
            file.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[int, str, str]]:
    """Run the two programs beside the installed torchvision; name -> (exit code, stdout, stderr)."""
    results = {}
    for name, process in {"bare": start(BARE), "applied": start(APPLIED)}.items():
        out, err = process.communicate(timeout=120)
        results[name] = (process.returncode, out, err)
    return results


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> dict[str, tuple[int, dict]]:
    """Import the work-around, then torchvision, beside each stand-in; shape -> (exit code, what the process saw)."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("the stand-ins need a C compiler")
    base = tmp_path_factory.mktemp("shapes")
    (base / "library.c").write_text(textwrap.dedent(LIBRARY))
    for kind, flags in {"good": [], "bad": ["-DOF_ANOTHER_TORCH"], "empty": ["-DEMPTY"]}.items():
        subprocess.run(
            [
                compiler,
                "-shared",
                "-fPIC",
                *flags,
                str(base / "library.c"),
                "-o",
                str(base / f"{kind}.so"),
                "-L",
                str(Path(torch.__file__).parent / "lib"),
                "-ltorch_cpu",
            ],
            check=True,
        )
    folders = {}
    for number, (shape, (loaded, libraries)) in enumerate(SHAPES.items()):
        folder = base / str(number)
        (folder / "torchvision").mkdir(parents=True)
        for name, text in PACKAGE.items():
            (folder / "torchvision" / name).write_text(textwrap.dedent(text).replace("{library}", loaded))
        for name, kind in libraries.items():
            (folder / "torchvision" / name).parent.mkdir(exist_ok=True)
            shutil.copy(base / f"{kind}.so", folder / "torchvision" / name)
        folders[str(folder)] = shape
    process = start(FORKS, json.dumps(folders))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    results = {}
    for folder, shape in folders.items():
        code = int(Path(folder, "status").read_text())
        assert code in (0, -signal.SIGABRT), err
        results[shape] = (code, json.loads(Path(folder, "result.json").read_text()) if code == 0 else {})
    return results


def test_timm_imports_after_it(outcomes):
    code, out, err = outcomes["applied"]
    assert code == 0, err
    assert out.startswith("declared")


def test_declares_exactly_where_torchvision_fails_without_it(outcomes):
    code, _, err = outcomes["bare"]
    if "No module named 'torchvision'" in err:
        pytest.skip("torchvision is not installed here")
    broken = code != 0
    if broken:
        assert "operator torchvision::nms does not exist" in err
    assert outcomes["applied"][1].strip() == f"declared {broken}"


def test_the_symptom_still_exists(outcomes):
    if outcomes["bare"][0] == 0:
        pytest.skip("this host's torchvision imports by itself: no symptom to see (see 'Can go' in the module)")
    assert "operator torchvision::nms does not exist" in outcomes["bare"][2]


THEIRS, OURS = "the library", "torchvision_ops.py"


@pytest.mark.parametrize(
    "shape, owners",
    [
        ("_C loads", [THEIRS, THEIRS]),
        ("_C cannot load", [OURS, OURS]),
        ("_C_stable loads", [THEIRS, THEIRS]),
        ("_C_stable cannot load", [OURS, OURS]),
        ("a new name loads", [THEIRS, THEIRS]),
        ("a new name cannot load", [OURS, OURS]),
        ("no library", [OURS, OURS]),
        ("both, the old one cannot load", [THEIRS, THEIRS]),
        ("both, the new one cannot load", [OURS, OURS]),
        ("both load", [THEIRS, THEIRS]),
    ],
)
def test_each_operator_is_declared_once_and_by_the_library_where_it_loads(shapes, shape, owners):
    assert shapes[shape] == (0, {"early": [None, None], "owners": owners, "error": None})


def test_a_library_that_loads_without_the_operators_is_left_to_torchvision(shapes):
    code, seen = shapes["loads without operators"]
    assert (code, seen["owners"]) == (0, [None, None])
    assert "operator torchvision::nms does not exist" in seen["error"]


def test_what_somebody_else_declared_is_left_alone(shapes):
    code, seen = shapes["no library, nms is there"]
    assert (code, seen["owners"], seen["error"]) == (0, ["<string>", OURS], None)
