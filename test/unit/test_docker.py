"""The Dockerfiles as text: what they copy is there, their commands are ours, and the image's torch stays."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from effdet.config.cli import parse_train_args

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    return read("npu")


def read(kind: str) -> list[tuple[str, str]]:
    """Return (word, rest) of each instruction, continued lines joined."""
    text = (REPO / "docker" / f"Dockerfile.{kind}").read_text()
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


def check_copies(instructions: list[tuple[str, str]]) -> set[str]:
    """Return what is copied, all of which is there."""
    copied = set()
    for rest in of(instructions, "COPY"):
        *sources, target = rest.split()
        for source in sources:
            found = sorted(REPO.glob(source))
            assert found, source
            copied |= {path.relative_to(REPO).as_posix() for path in found}
        assert len(sources) == 1 or target.endswith("/"), rest
    return copied


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_command_is_installed_as_it_is_documented(kind):
    instructions = read(kind)
    copied = check_copies(instructions)
    assert {"effdet", "timm_patches", "configs", "pyproject.toml", "README.md", "LICENSE"} <= copied
    assert json.loads(of(instructions, "ENTRYPOINT")[0]) == ["effdet"]
    assert of(instructions, "RUN")[-1].endswith("--no-deps .")
    head = (REPO / "docker" / f"Dockerfile.{kind}").read_text().partition("FROM")[0]
    line = re.sub(r"\\\n#\s*", "", head)
    run = re.search(r"docker run (.*)", line)[1]
    image, _, command = run.partition(" effdet-cuda " if kind == "cuda" else " effdet ")
    assert "--shm-size=" in image and "/work/output" in image
    words = command.split()
    assert words[0] == "train" and parse_train_args(words[1:]).data.root == "/data"


def test_everything_that_is_copied_is_in_the_repository(instructions):
    copied = check_copies(instructions)
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
