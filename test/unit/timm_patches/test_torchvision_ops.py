"""The torchvision work-around, in fresh processes: what it declares, when it keeps out, and that timm imports then."""
from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[3]

BARE = "import torchvision"

APPLIED = """
    import timm_patches.torchvision_ops as patch
    declared = bool(patch._libraries)
    assert patch.declare_missing_ops() == (), "the second call must find nothing to do"
    import timm, torch, torchvision
    assert patch.declare_missing_ops() == ()
    assert torch.ops.torchvision.nms and torch.ops.torchvision.qnms
    try:
        torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except NotImplementedError:
        assert declared
    else:
        assert not declared
    print("declared", declared)
"""

# Runs beside a stand-in for torchvision whose compiled library is a file that does not load.
STEPS = """
    import importlib.util, sys
    real_find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "torchvision" else real_find_spec(name, *rest)
    import timm_patches.torchvision_ops as patch
    import torch
    assert not hasattr(torch.ops.torchvision, "nms"), "not installed: nothing to declare"
    importlib.util.find_spec = real_find_spec

    import torchvision
    assert torchvision.FAKE
    assert patch.declare_missing_ops() == () and not hasattr(torch.ops.torchvision, "nms"), "imported: too late"

    del sys.modules["torchvision"]
    own = torch.library.Library("torchvision", "FRAGMENT")
    own.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    assert patch.declare_missing_ops() == ("qnms",), "what the library declares is left alone"
    assert str(torch.ops.torchvision.qnms.default._schema) == (
        "torchvision::qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    assert patch.declare_missing_ops() == ()
    assert "torchvision" not in sys.modules, "never imported by the work-around"
    print("done")
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, tuple[int, str, str]]:
    """Run the three programs at the same time, each in its own process; name -> (exit code, stdout, stderr)."""
    fake = tmp_path_factory.mktemp("fake")
    (fake / "torchvision").mkdir()
    (fake / "torchvision" / "__init__.py").write_text("FAKE = True\n")
    (fake / "torchvision" / "_C.so").write_bytes(b"not a library")
    programs = {"bare": (BARE, []), "applied": (APPLIED, []), "steps": (STEPS, [str(fake)])}
    processes = {}
    for name, (code, folders) in programs.items():
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*folders, str(REPO)]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", textwrap.dedent(code)]
        processes[name] = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    results = {}
    for name, process in processes.items():
        out, err = process.communicate(timeout=120)
        results[name] = (process.returncode, out, err)
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


def test_keeps_out_when_absent_imported_or_complete(outcomes):
    code, out, err = outcomes["steps"]
    assert (code, out.strip()) == (0, "done"), err
