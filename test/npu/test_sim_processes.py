"""Scripts that know nothing of the simulation run on it in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(
    os.environ.get("NPU_SIM_SOC") == "Ascend910A",
    reason="runs once, as Ascend910B1: nothing here depends on this process's chip",
)


def code(text: str) -> list[str]:
    return ["-c", textwrap.dedent(text)]


def last_line(done) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("autoload", ["0", "1"])
def test_an_unmodified_script_finds_devices_and_values(autoload, run_simulated, tmp_path):
    script = code(f"""
        import torch
        {"import torch_npu" if autoload == "0" else ""}
        from torch.utils.data import DataLoader, TensorDataset

        x = torch.arange(6.0).npu()
        x[x > 2].sum().item()
        batches = DataLoader(TensorDataset(torch.arange(8.0)), batch_size=4, num_workers=2, pin_memory=True)
        total = sum(batch.npu(non_blocking=True).sum() for batch, in batches)
        print(torch.npu.device_count(), torch.npu.get_device_name(0), total.item())
    """)
    done = run_simulated(
        script,
        devices=3,
        soc="Ascend910A",
        env={"NPU_SIM_REPORT": tmp_path / "report", "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload},
    )
    assert last_line(done) == "3 Ascend910A 28.0"
    (report,) = tmp_path.iterdir()  # the loader's workers write none
    counts = json.loads(report.read_text())
    assert report.name.startswith("report.p")
    assert counts["waits"]["aten::index.Tensor"] == 1 and counts["copies_to_host"]["aten::_local_scalar_dense"] == 2
    assert "float32" in counts["dtypes"]["aten::sum"]


def test_nothing_happens_unless_asked_for(run_simulated):
    done = run_simulated(
        code("""
        import sys
        print(any(name.startswith("npu_sim") for name in sys.modules), "torch" in sys.modules)
    """),
        env={"NPU_SIM": None},
    )
    assert last_line(done) == "False False"


def test_neither_torch_nor_a_library_is_loaded_before_the_script_asks(run_simulated):
    done = run_simulated(
        code("""
        import sys
        maps = open("/proc/self/maps").read()
        print("torch" in sys.modules, "libascendcl" in maps)
    """)
    )
    assert last_line(done) == "False False"


def test_visible_devices_are_renumbered(run_simulated):
    done = run_simulated(
        code("""
        import torch, torch_npu
        from npu_sim import runtime

        numbers = []
        for device in range(torch.npu.device_count()):
            torch.npu.set_device(device)
            numbers.append(runtime.physical_device())
        try:
            torch.npu.set_device(2)
        except RuntimeError as error:
            print(numbers, "107001" in str(error))
    """),
        devices=4,
        env={"ASCEND_RT_VISIBLE_DEVICES": "1,3"},
    )
    assert last_line(done) == "[1, 3] True"


@pytest.mark.parametrize(
    ("visible", "physical"),
    [
        (None, [0, 1, 2, 3]),
        ("2", [2]),
        ("0,2,3", [0, 2, 3]),
        ("0, 1", [0]),
        ("1,4", [1]),
        ("2,1", []),
        ("1,1", []),
        ("x", []),
        ("", []),
    ],
    ids=str,
)
def test_how_the_list_of_visible_devices_is_read(visible, physical, run_simulated):
    done = run_simulated(
        code("""
        import ctypes
        from npu_sim import build

        cann, count = build.load_libraries()["ascendcl"], ctypes.c_uint32()
        cann.aclrtGetDeviceCount(ctypes.byref(count))
        print([cann.aclrtSetDevice(device) or cann.sim_physical_device() for device in range(count.value)],
              cann.aclrtSetDevice(count.value), cann.aclrtSetDevice(-1))
    """),
        devices=4,
        env={"ASCEND_RT_VISIBLE_DEVICES": visible},
    )
    assert last_line(done) == f"{physical} 107001 107001"


def test_an_unknown_chip_is_refused(run_simulated):
    done = run_simulated(code("import torch_npu"), soc="Ascend1")
    assert done.returncode != 0 and "Ascend1" in done.stderr and "Ascend910B1" in done.stderr


def test_processes_that_build_at_once_end_with_one_result(tmp_path):
    build = f"import sys; sys.path.insert(0, {str(HERE / 'sim')!r}); from npu_sim import build; print(build.build())"
    environment = {"NPU_SIM_CACHE": str(tmp_path), "PATH": os.environ["PATH"]}
    processes = [
        subprocess.Popen([sys.executable, "-c", build], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folders = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(folders) == 1 and [str(path) for path in tmp_path.iterdir()] == list(folders)
    assert {path.name for path in Path(folders.pop()).glob("*.so")} >= {"libascendcl.so", "libhccl.so", "libopapi.so"}


def test_without_gcc_it_says_so(tmp_path):
    ask = f"import sys; sys.path.insert(0, {str(HERE / 'sim')!r}); import npu_sim; print(npu_sim.missing())"
    done = subprocess.run([sys.executable, "-c", ask], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert "gcc" in done.stdout, done.stderr


def test_a_run_with_torch_loaded_skips_this_folder(tmp_path):
    """As in `pytest` over all of test/: every file here is skipped with the reason, and nothing is loaded."""
    plugin = tmp_path / "torch_is_there.py"
    plugin.write_text("import os\nos.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'\nimport torch\n")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rs",
            "-p",
            "torch_is_there",
            "-p",
            "no:cacheprovider",
            str(HERE / "test_sim_meters.py"),
        ],
        cwd=HERE.parents[1],
        env={"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert "needs a pytest process of its own" in done.stdout and "1 skipped" in done.stdout, done.stdout
