"""Load the simulated NPU for the tests of this folder, or say why they cannot run.

    NPU_SIM_SOC=Ascend910A python -m pytest test/npu

NPU_SIM_SOC and NPU_SIM_DEVICES choose the chip and the number of devices of this process. Started as part of a larger
run (`pytest` over test/), this folder is left out: the simulation must be there before torch_npu and changes the
process for good.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
SIMULATION = HERE / "sim"

if str(SIMULATION) not in sys.path:
    sys.path.insert(0, str(SIMULATION))
import npu_sim  # noqa: E402

DEVICES, SOC = npu_sim.from_environment()

_REASON = npu_sim.missing()
if _REASON is None and "torch" in sys.modules and not npu_sim.loaded():
    _REASON = "the simulated NPU needs a pytest process of its own: python -m pytest test/npu"
if _REASON is None:
    npu_sim.load(devices=DEVICES, soc=SOC)


class _Skipped(pytest.Module):
    """Stand for a test file that is not even imported: it would import torch_npu."""

    def collect(self):
        pytest.skip(_REASON)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Replace every test file below this folder by its reason where the simulation cannot run."""
    return None if _REASON is None else _Skipped.from_parent(parent, path=module_path)


@pytest.fixture(scope="session", autouse=True)
def tuned(device) -> None:
    """Make the settings of a run before the first operator of the process, as train.py does.

    On Ascend910A some operators of torch_npu ask for the compile mode at their first call only, so that an earlier test
    with another mode would decide for the tests after it.
    """
    from effdet.runtime.device import tune

    tune(device)


@pytest.fixture(scope="session")
def soc() -> str:
    """The simulated chip, such as 'Ascend910B1'."""
    return SOC


@pytest.fixture(scope="session")
def is_910a(soc: str) -> bool:
    """Whether the chip saturates instead of producing inf and NaN."""
    return soc.startswith("Ascend910A")


@pytest.fixture
def exact_products():
    """Compute products and top-k in float32 on every chip: for comparisons with the CPU to the last digits.

    Ascend910A computes them in float16, in which gradients and the order of close scores are others after some layers.
    """
    from npu_sim import rounding

    with rounding.exact():
        yield


@pytest.fixture(scope="session")
def device():
    """The first simulated device."""
    import torch

    return torch.device("npu", 0)


@pytest.fixture(scope="session")
def run_simulated() -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that runs a script in a process of its own on the simulated NPU.

    run_simulated(argv, devices=1, soc=None, env=None, timeout=120): `argv` is what follows `python`, relative paths are
    taken from the repository's root; `soc` None means this process's chip; `env` is added to the environment, a value
    of None removes the name. Returns the CompletedProcess with stdout and stderr as text; does not check the exit code.
    """

    def run(
        argv: list[str],
        devices: int = 1,
        soc: str | None = None,
        env: Mapping[str, str | None] | None = None,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(SIMULATION), str(REPOSITORY), *filter(None, [environment.get("PYTHONPATH")])]
        )
        environment.update(
            NPU_SIM="1",
            NPU_SIM_DEVICES=str(devices),
            NPU_SIM_SOC=soc or SOC,
            TORCH_DEVICE_BACKEND_AUTOLOAD="0",
            OMP_NUM_THREADS="1",
        )
        for name, value in (env or {}).items():
            if value is None:
                environment.pop(name, None)
            else:
                environment[name] = str(value)
        # A group of its own, so that after a time-out nothing the script started is left.
        with subprocess.Popen(
            [sys.executable, *map(str, argv)],
            env=environment,
            cwd=REPOSITORY,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            try:
                output, errors = process.communicate(timeout=timeout)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    return run
