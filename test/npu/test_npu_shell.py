"""The historic shell scripts on the simulated NPU: the tests of test/integration/test_shell_scripts.py, device npu.

They run once, on the chip that the scripts were written for: a shell script takes no path of its own on another one.
The second part, the evaluation and the fine-tuning, which need a trained checkpoint, are marked slow: on the device
they do what test_npu_scripts.py does without a script.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "integration"))

import test_shell_scripts as on_cpu  # noqa: E402

full_run = on_cpu.full_run
# In this order: each script empties the log folder of the one before.
test_one_device = on_cpu.test_one_device_from_inside_the_folder


@pytest.mark.slow
def test_eight_devices(checkout):
    on_cpu.test_eight_processes(checkout)


@pytest.mark.slow
def test_the_second_part_continues_the_first(checkout, full_run):
    on_cpu.test_the_second_part_continues_the_first_ones_checkpoint(checkout, full_run)


@pytest.mark.slow
def test_evaluation(checkout, full_run):
    on_cpu.test_evaluation(checkout, full_run)


@pytest.mark.slow
def test_fine_tuning(checkout, full_run):
    on_cpu.test_fine_tuning_starts_from_the_file(checkout, full_run)


SOC = "Ascend910A"
pytestmark = pytest.mark.skipif(os.environ.get("NPU_SIM_SOC", "Ascend910B1") != SOC, reason=f"runs once, as {SOC}")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> on_cpu.Checkout:
    path = os.pathsep.join([str(HERE / "sim"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return on_cpu.Checkout.make(
        tmp_path_factory.mktemp("scripts"),
        device="npu",
        environment={
            "etp_running_flag": "true",
            "PYTHONPATH": path,
            "NPU_SIM": "1",
            "NPU_SIM_DEVICES": "8",
            "NPU_SIM_SOC": SOC,
        },
    )
