"""docker/Dockerfile.npu as text: what it copies is there, and what it installs leaves the image's torch alone."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """Return (word, rest) of each instruction, continued lines joined."""
    text = (REPO / "docker" / "Dockerfile.npu").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines()]


def of(instructions: list[tuple[str, str]], word: str) -> list[str]:
    return [rest for name, rest in instructions if name == word]


def test_the_base_is_a_tag_of_torch_npus_image(instructions):
    assert [word for word, _ in instructions[:2]] == ["ARG", "FROM"]
    (base,) = of(instructions, "ARG")
    tag = r"BASE=quay\.io/ascend/torch-npu:2\.\d+\.\d+(\.post\d+)?-cann\d\.\d\.\d-(910b|a3)-ubuntu22\.04-py3\.1\d"
    assert re.fullmatch(tag, base)


def test_everything_that_is_copied_is_in_the_repository(instructions):
    copied = set()
    for rest in of(instructions, "COPY"):
        *sources, target = rest.split()
        for source in sources:
            found = sorted(REPO.glob(source))
            assert found, source
            copied |= {path.relative_to(REPO).as_posix() for path in found}
        assert len(sources) == 1 or target.endswith("/"), rest
    scripts = {path.name for path in (REPO / "test").glob("train_*.sh")}
    assert {f"test/{name}" for name in scripts} <= copied
    assert {"train.py", "validate.py", "demo.py", "effdet", "timm_patches", "configs", "run_train.sh"} <= copied


def test_torch_stays_the_images(instructions, tmp_path):
    (run,) = of(instructions, "RUN")
    choice = run.partition("&&")[0].replace("/tmp/requirements.txt", str(tmp_path / "chosen.txt"))
    subprocess.run(["bash", "-c", choice], cwd=REPO, check=True)
    pinned = re.findall(r"^([\w-]+)==", (REPO / "requirements.txt").read_text(), re.MULTILINE)
    chosen = re.findall(r"^([\w-]+)==", (tmp_path / "chosen.txt").read_text(), re.MULTILINE)
    assert set(pinned) - set(chosen) == {"torch", "torchvision"}
    assert "--no-deps torchvision" in run  # which would bring a torch of its own


def test_a_command_runs_in_canns_environment(instructions, tmp_path):
    """With a stand-in for set_npu_env.sh: the variable arrives, words stay whole, the status is the command's."""
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "set_npu_env.sh").write_text("export FOUND=cann\n")
    (entry,) = of(instructions, "ENTRYPOINT")
    words = [*json.loads(entry), "bash", "-c", 'printf "%s|%s" "$FOUND" "$1"; exit 4', "x", "two words"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("cann|two words", 4)
