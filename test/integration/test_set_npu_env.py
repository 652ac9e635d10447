"""test/set_npu_env.sh: which CANN it finds in which layout, what it leaves alone, and when the scripts need it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "test" / "set_npu_env.sh"
SYSTEM = Path("/usr/local/Ascend"), Path("/etc/Ascend/ascend_cann_install.info")
needs_no_cann = pytest.mark.skipif(any(path.exists() for path in SYSTEM), reason="this machine has CANN itself")

# As CANN's own: reads variables that are not set and $1, ends with a test that fails, and does not mind errors.
SET_ENV = """
false
[ -n "$1" ] && exit 66
export ASCEND_TOOLKIT_HOME={home}
export ASCEND_OPP_PATH={home}/opp
export LD_LIBRARY_PATH={home}/lib64:$LD_LIBRARY_PATH
[ -n "$NO_SUCH_VARIABLE" ] && export NEVER=1
"""


def install(script: Path, home: str) -> None:
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(SET_ENV.format(home=home))


def source(home: Path, after: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Source the script in a strict shell and print some of what it leaves."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ASCEND_", "HCCL_", "LD_LIBRARY_PATH"))
    }
    code = f"""set -euo pipefail
        source '{SCRIPT}'
        echo "OPP=${{ASCEND_OPP_PATH:-}} LIBRARIES=${{LD_LIBRARY_PATH:-}} arguments=$# options=$-"
        shopt -qo pipefail && echo pipefail
        declare -F | grep -c _cann || true
        {after}"""
    return subprocess.run(
        ["bash", "-c", code, "name", "argument"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        env=clean | {"HOME": str(home)} | environment,
    )


LAYOUTS = {  # files below HOME -> the one to take
    "8.5 and later": (["Ascend/cann/set_env.sh", "Ascend/ascend-toolkit/set_env.sh"], 0),
    "8.5, several versions": (
        ["Ascend/cann-8.5.0/set_env.sh", "Ascend/cann-10.0.0/set_env.sh", "Ascend/cann-9.0.0/set_env.sh"],
        1,
    ),
    "before 8.5": (["Ascend/nnae/set_env.sh", "Ascend/ascend-toolkit/set_env.sh"], 1),
    "only nnae": (["Ascend/nnae/set_env.sh"], 0),
    "oldest": (["Ascend/ascend-toolkit/latest/bin/setenv.bash"], 0),
    "a home with a space": (["my home/Ascend/cann/set_env.sh"], 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path: Path, layout: str):
    files, wanted = LAYOUTS[layout]
    for number, name in enumerate(files):
        install(tmp_path / name, f"/cann/{number}")
    home = tmp_path / "my home" if "space" in layout else tmp_path
    done = source(home)
    assert done.returncode == 0, done.stderr
    assert f"CANN: {tmp_path / files[wanted]}\n" in done.stdout
    assert f"OPP=/cann/{wanted}/opp LIBRARIES=/cann/{wanted}/lib64:" in done.stdout


def test_the_shell_stays_as_it_was(tmp_path: Path):
    install(tmp_path / "Ascend/cann/set_env.sh", "/cann")
    lines = source(tmp_path).stdout.splitlines()
    assert lines[0].startswith("CANN: ") and "arguments=1" in lines[1]
    options = lines[1].rpartition("options=")[2]
    assert "e" in options and "u" in options
    assert lines[2:] == ["pipefail", "0"], "strict again, and no function left behind"


def test_the_users_own_place_comes_first(tmp_path: Path):
    install(tmp_path / "Ascend/cann/set_env.sh", "/cann/usual")
    install(tmp_path / "opt/ascend-toolkit/set_env.sh", "/cann/mine")
    done = source(tmp_path, ASCEND_TOOLKIT_HOME=str(tmp_path / "opt/ascend-toolkit/latest"))
    assert "OPP=/cann/mine/opp" in done.stdout


def test_the_installers_record_is_read(tmp_path: Path):
    install(tmp_path / "data/apps/ascend-toolkit/set_env.sh", "/cann/recorded")
    install(tmp_path / "Ascend/ascend-toolkit/set_env.sh", "/cann/usual")
    (tmp_path / "Ascend/ascend_cann_install.info").write_text(f"version=1\nInstall_Path={tmp_path}/data/apps\n")
    assert "OPP=/cann/recorded/opp" in source(tmp_path).stdout


def test_an_environment_that_is_set_stays(tmp_path: Path):
    install(tmp_path / "Ascend/cann/set_env.sh", "/cann/other")
    (tmp_path / "opp").mkdir()
    done = source(
        tmp_path,
        'env | grep -E "^(HCCL|TASK)" | sort',
        ASCEND_OPP_PATH=str(tmp_path / "opp"),
        LD_LIBRARY_PATH="/mine",
        HCCL_EXEC_TIMEOUT="68",
        TASK_QUEUE_ENABLE="2",
    )
    assert f"OPP={tmp_path}/opp LIBRARIES=/mine " in done.stdout and "CANN: " not in done.stdout
    assert done.stdout.splitlines()[-2:] == ["HCCL_EXEC_TIMEOUT=68", "TASK_QUEUE_ENABLE=2"]


def test_only_the_way_to_cann_is_set(tmp_path: Path):
    install(tmp_path / "Ascend/cann/set_env.sh", "/cann")
    names = source(tmp_path, "compgen -e").stdout.splitlines()
    before = source(tmp_path, "compgen -e", ASCEND_OPP_PATH=str(tmp_path)).stdout.splitlines()
    assert set(names[4:]) - set(before[3:]) == {"ASCEND_TOOLKIT_HOME", "LD_LIBRARY_PATH"}


@needs_no_cann
def test_without_cann_it_says_where_it_looked(tmp_path: Path):
    done = source(tmp_path)
    assert done.returncode == 1 and "OPP=" not in done.stdout
    assert "no CANN found" in done.stderr and "ASCEND_TOOLKIT_HOME" in done.stderr
    assert "/usr/local/Ascend/cann/set_env.sh\n" in done.stderr and f"{tmp_path}/Ascend/nnae/set_env.sh" in done.stderr


# ---- what the scripts make of it -------------------------------------------------------------------------------------


def start(tmp_path: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Start a copy of a training script with a Python that prints its surroundings and fails."""
    folder = tmp_path / "copy" / "test"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("common.sh", "set_npu_env.sh", "train_performance_1p.sh"):
        (folder / name).write_bytes((REPO / "test" / name).read_bytes())
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\necho "started with OPP=${ASCEND_OPP_PATH:-none}"\nexit 3\n')
    python.chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ASCEND_", "etp_"))}
    return subprocess.run(
        ["bash", str(folder / "train_performance_1p.sh"), f"--data_path={tmp_path}", "--", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean | {"HOME": str(tmp_path), "PYTHON": str(python)} | environment,
    )


def test_a_run_on_an_npu_gets_canns_environment(tmp_path: Path):
    install(tmp_path / "Ascend/cann/set_env.sh", "/cann")
    assert "started with OPP=/cann/opp" in start(tmp_path).stdout
    assert "started with OPP=none" in start(tmp_path, "--device", "cpu").stdout
    assert "started with OPP=none" in start(tmp_path, etp_running_flag="true").stdout


@needs_no_cann
def test_cann_is_missed_on_an_npu_only(tmp_path: Path):
    for flags in ((), ("--device", "npu"), ("--device=cpu", "--device=npu:0")):
        done = start(tmp_path, *flags)
        assert done.returncode == 1 and "started" not in done.stdout
        assert "error: without CANN there is no NPU to run on" in done.stderr and "-- --device cpu" in done.stderr
        assert not (tmp_path / "copy/test/output").exists()
    for flags in (("--device", "auto"), ("--device=npu", "--device", "cpu"), ("--device", "cuda")):
        assert "started with OPP=none" in start(tmp_path, *flags).stdout
