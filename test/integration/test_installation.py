"""Both distributions in one environment, in both orders, with real pip: what is said, and that the remedy works."""

from __future__ import annotations

import json
import re
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
NAMES = REPO / "test/golden/effdet_names.json"

pytestmark = pytest.mark.slow


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd="/", timeout=600)


@pytest.fixture(scope="module")
def our_wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy, as building leaves folders behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("effdet", "timm_patches", "configs"):
        shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    done = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, source)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def effdets_wheel(tmp_path_factory) -> Path:
    """Download effdet 0.4.1; without a registry make a wheel with its module names, which is what clashes."""
    out = tmp_path_factory.mktemp("effdet")
    done = run(
        sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":none:", "-d", out, "effdet==0.4.1"
    )
    if done.returncode == 0:
        return next(out.glob("*.whl"))
    wheel = out / "effdet-0.4.1-py3-none-any.whl"
    modules = list(json.loads(NAMES.read_text()))
    packages = {name for name in modules if any(other.startswith(f"{name}.") for other in modules)}
    files = {
        f"{name.replace('.', '/')}{'/__init__' if name in packages else ''}.py": "ORIGIN = 'stand-in'\n"
        for name in modules
    }
    info = "effdet-0.4.1.dist-info"
    files[f"{info}/METADATA"] = "Metadata-Version: 2.1\nName: effdet\nVersion: 0.4.1\n"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(name, content)
    return wheel


class Environment:
    """A venv of its own, which finds everything else where this interpreter does."""

    def __init__(self, folder: Path) -> None:
        assert run(sys.executable, "-m", "venv", "--without-pip", folder).returncode == 0
        self.python = folder / "bin/python"
        self.packages = next(folder.glob("lib/python*/site-packages"))
        (self.packages / "rest.pth").write_text("\n".join(site.getsitepackages()))
        # Beside a CPU torch, torchvision may not import unless its operators are declared, which effdet does not do.
        (self.packages / "sitecustomize.py").write_text(
            "import contextlib, sys\nif 'pip' not in sys.orig_argv:\n"
            "    with contextlib.suppress(ImportError):\n        import timm_patches\n"
        )

    def pip(self, *words: object) -> None:
        done = run(self.python, "-m", "pip", *words)
        assert done.returncode == 0, done.stderr

    def install(self, wheel: Path) -> None:
        self.pip("install", "--no-deps", "--no-index", wheel)

    def say(self, *words: object) -> subprocess.CompletedProcess[str]:
        return run(self.python, "-W", "always", *words)


@pytest.fixture
def environment(tmp_path) -> Environment:
    return Environment(tmp_path / "venv")


def follow(remedy: str, environment: Environment, our_wheel: Path) -> None:
    """Do what a message says, and check that all is well."""
    words = re.search(r"pip uninstall ([\w -]+), then pip install (\S+)", remedy)
    assert words, remedy
    environment.pip("uninstall", "-y", *words[1].split())
    assert not (environment.packages / "effdet").exists()
    assert words[2] == "effdet-ascend" == our_wheel.name.partition("-")[0].replace("_", "-")
    environment.install(our_wheel)
    done = environment.say("-c", "import effdet; print(effdet.create_model)")
    assert done.returncode == 0 and "effdet-ascend" not in done.stderr
    assert environment.say("-m", "effdet.commands.train", "--help").returncode == 0
    shipped = [name for name in zipfile.ZipFile(our_wheel).namelist() if name.startswith(("effdet/", "timm_patches/"))]
    assert all((environment.packages / name).is_file() for name in shipped)


def test_ours_alone_says_nothing(environment, our_wheel):
    environment.install(our_wheel)
    done = environment.say("-c", "import effdet")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_and_its_presets_come_with_the_package(environment, our_wheel):
    environment.install(our_wheel)
    command = environment.python.with_name("effdet")
    assert run(command, "--version").stdout.split()[-1] == our_wheel.name.split("-")[1]
    for preset in ("own_data", "configs/ascend_8p.yaml"):
        done = run(command, "check", "/no/such/folder", "-c", preset)
        assert done.returncode == 1 and "/no/such/folder" in done.stderr
    assert run(command, "check", "/no/such/folder", "-c", "own_dat").returncode == 2


def test_ours_over_effdet_warns_and_the_remedy_works(environment, our_wheel, effdets_wheel):
    environment.install(effdets_wheel)
    environment.install(our_wheel)
    done = environment.say("-c", "import effdet; print(effdet.__version__)")
    assert done.returncode == 0 and "RuntimeWarning" in done.stderr and "effdet-0.4.1" in done.stderr
    assert done.stdout.strip() == our_wheel.name.split("-")[1]
    follow(done.stderr, environment, our_wheel)


def test_effdet_over_ours_ends_every_command_with_the_remedy(environment, our_wheel, effdets_wheel):
    environment.install(our_wheel)
    environment.install(effdets_wheel)
    for command in ("train", "validate", "predict", "clean"):
        done = environment.say("-m", f"effdet.commands.{command}", "--help")
        assert done.returncode != 0
    follow(done.stderr, environment, our_wheel)


@pytest.mark.parametrize("order", ["ours last", "ours first"])
def test_uninstalling_effdet_takes_files_of_ours_which_is_said(order, environment, our_wheel, effdets_wheel):
    for wheel in (effdets_wheel, our_wheel) if order == "ours last" else (our_wheel, effdets_wheel):
        environment.install(wheel)
    environment.pip("uninstall", "-y", "effdet")
    done = environment.say("-m", "effdet.commands.train", "--help")
    assert done.returncode != 0 and "lacks files" in done.stderr
    follow(done.stderr, environment, our_wheel)
