"""Every command in README.md and docs/ is run as it stands there, or stands in NOT_RUN with the reason.

What is smaller than on the page: SMALLER, flags put behind a command (the last of two equal flags wins), and the
fixture `home`, which makes tiny data sets. Pages with a test of their own are in test/unit/test_docs_pages.py.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib
import io
import json
import logging
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import demo
import effdet.data.synthetic.dataset
import train
import validate
from effdet.config.cli import parse_demo_args, parse_train_args, parse_validate_args
from effdet.config.model_config import efficientdet_model_param_dict

REPO = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "README.zh-CN.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(str(page.relative_to(REPO)) for page in (REPO / "docs").glob("*.md")),
]
_OTHER_TEST = (REPO / "test" / "unit" / "test_docs_pages.py").read_text(encoding="utf-8")
RUN_ELSEWHERE = {f"docs/{page}" for page in re.findall(r'blocks\("(\w+\.md)"', _OTHER_TEST)}
TRANSLATED = {"README.zh-CN.md": "README.md", "docs/ascend.zh-CN.md": "docs/ascend.md"}
SCRIPTS = {"train.py": train, "validate.py": validate, "demo.py": demo}
PARSERS = {"train.py": parse_train_args, "validate.py": parse_validate_args, "demo.py": parse_demo_args}

SMALLER = {
    "train.py": "--image-size 64 --epochs 1 --max-steps 1 -b 4 -j 0 --device cpu",
    "validate.py": "-b 4 -j 0 --device cpu",
    "demo.py": "--device cpu",
    "effdet.data.synthetic": "--num-train 12 --num-val 4",
}

# A pattern of whole commands, and why they are not run here. Flags of our scripts are parsed all the same.
NOT_RUN = {
    r"make (check|test|test-slow|test-npu|test-npu-slow|lint|bench|environments)": (
        "runs this test, or minutes; targets are compared"
    ),
    r"make|make train.*": "makes an environment by downloads; what it would run is run: test_make_train",
    r"python3 -m venv .*|source .*|pip install .*": "downloads packages; needs torch_npu's environment",
    r"TORCH_DEVICE_BACKEND_AUTOLOAD=0 python .*": "needs an NPU",
    r"bash (test/train_\w+-?\w*|run_train)\.sh .*": "needs NPUs; test_shell_scripts.py runs these scripts on the CPU",
    r"(python|torchrun) .*(--device npu|configs/ascend_).*": "needs NPUs; test/npu runs the scripts on simulated ones",
    r"python -m effdet.export model_best.pth.tar --format onnx --outputs detections": "run by test_docs_pages.py",
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (REPO / page).read_text(encoding="utf-8"), re.DOTALL)


def commands(page: str) -> list[tuple[str, ...]]:
    """Return the command lines of a page as words, comments left out."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [tuple(words) for line in lines if (words := shlex.split(line, comments=True))]


def reason_not_to_run(words: tuple[str, ...]) -> str | None:
    return next((reason for pattern, reason in NOT_RUN.items() if re.fullmatch(pattern, " ".join(words))), None)


def to_run(page: str) -> list[tuple[str, ...]]:
    return [words for words in commands(page) if reason_not_to_run(words) is None]


# ---- what can be said without running anything ----


def test_each_page_with_commands_is_run_somewhere():
    run_here = {"README.md", "docs/own_data.md", "docs/training.md"}
    with_commands = {page for page in PAGES if to_run(page)} - set(TRANSLATED)
    assert with_commands == run_here | RUN_ELSEWHERE
    for pattern in NOT_RUN:
        assert any(re.fullmatch(pattern, " ".join(words)) for page in PAGES for words in commands(page)), pattern


@pytest.mark.parametrize("translated", TRANSLATED)
def test_translations_have_the_same_commands(translated):
    def shape(page: str) -> list[tuple[str, ...]]:
        return [tuple(word if word.isascii() else "IP_OF_THE_FIRST" for word in words) for words in commands(page)]

    assert shape(translated) == shape(TRANSLATED[translated])
    figures = [
        sorted(re.findall(r"\d+\.\d+|\.\d{3}", (REPO / page).read_text(encoding="utf-8")))
        for page in (translated, TRANSLATED[translated])
    ]
    assert figures[0] == figures[1]


def test_flags_of_commands_that_are_not_run_exist(monkeypatch):
    monkeypatch.chdir(REPO)
    checked = 0
    for page in set(PAGES) - set(TRANSLATED):
        for words in commands(page):
            script = next((word for word in words if word in PARSERS), None)
            if script and reason_not_to_run(words):
                PARSERS[script](words[words.index(script) + 1 :])
                checked += 1
    assert checked >= 8


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_examples_of_the_help_are_valid(script, monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        SCRIPTS[script].main(["--help"])
    printed = capsys.readouterr().out
    examples = re.findall(rf"^  python {script}(.*?)(?:  +\(.*)?$", printed.partition("Examples:")[2], re.MULTILINE)
    assert examples and max(map(len, printed.splitlines())) <= 80
    for arguments in examples:
        PARSERS[script](shlex.split(arguments))


def test_make_has_the_targets_that_the_pages_name():
    listed = subprocess.run(["make"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^([a-z-]+) ", listed, re.MULTILINE))
    named = {words[1] for page in PAGES for words in commands(page) if words[0] == "make" and len(words) > 1}
    assert named and named <= targets


def heading_anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (REPO / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (REPO / page).parent / path if path else REPO / page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in heading_anchors(file), f"{page}: {target}"


def test_the_index_names_every_page():
    index = (REPO / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {Path(page).name for page in PAGES if page.startswith("docs/")} - {"README.md"}
    assert all(f"({name})" in index for name in pages)


def test_the_page_of_flags_is_the_schema():
    made = runpy.run_path(str(REPO / "docs" / "make_flags.py"))["flags_page"]()
    assert (REPO / "docs" / "flags.md").read_text(encoding="utf-8") == made, "run python docs/make_flags.py"


def test_the_table_of_models_is_the_model_table():
    rows = re.findall(
        r"^\| (\w+) \| ([\d.]+) \| (\d+) \| (yes)? ?\|$",
        (REPO / "docs" / "configurations.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    golden = json.loads((REPO / "test" / "golden" / "model_configs.json").read_text())
    parameters = {name: f"{entry['_params'] / 1e6:.1f}" for name, entry in golden.items() if "_params" in entry}
    table = {
        name: (parameters[name], str(entry["image_size"][0]), "yes" if entry["url"] else "")
        for name, entry in efficientdet_model_param_dict.items()
    }
    assert {name: tuple(more) for name, *more in rows} == table


# ---- running them ----


@pytest.fixture(autouse=True)
def _logging_as_before():
    """Take away the handlers that a script's main() adds."""
    yield
    for name in ("effdet", "timm_patches"):
        logger = logging.getLogger(name)
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
            handler.close()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def home(tmp_path_factory, small_checkpoint) -> Path:
    """Make a folder that looks like the repository's root to a command, with tiny data sets."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "configs").symlink_to(REPO / "configs")
    voc = folder / "VOCdevkit" / "VOC2012"
    for part in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (voc / part).mkdir(parents=True)
    for split, name in (("train", "one"), ("val", "two")):
        (voc / "ImageSets" / "Main" / f"{split}.txt").write_text(f"{name}\n")
        (voc / "Annotations" / f"{name}.xml").write_text(
            "<annotation><size><width>100</width><height>80</height></size><object><name>dog</name><difficult>0</difficult>"
            "<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>51</xmax><ymax>61</ymax></bndbox></object></annotation>"
        )
        Image.new("RGB", (100, 80)).save(voc / "JPEGImages" / f"{name}.jpg")
    return folder


def main_of(module: str) -> Callable[[list[str]], int | None]:
    """Return what `python -m MODULE` calls."""
    package = (REPO / module.replace(".", "/")).is_dir()
    return importlib.import_module(f"{module}.__main__" if package else module).main


def run(words: tuple[str, ...]) -> str:
    """Run one command line of a page in this process, with what SMALLER puts behind it; return what it printed."""
    assert words[0] in ("python", ".venv/bin/python")
    target, arguments = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    newest = max(Path("output/train").glob("*"), key=os.path.getmtime, default=Path("RUN")).name
    arguments = [word.replace("/RUN/", f"/{newest}/") for word in arguments] + shlex.split(SMALLER.get(target, ""))
    main = SCRIPTS[target].main if target in SCRIPTS else main_of(target)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(arguments) in (0, None), words
    return printed.getvalue()


def check_run(folder: Path) -> None:
    """Hold a run's folder against the table in docs/training.md."""
    page = (REPO / "docs" / "training.md").read_text(encoding="utf-8")
    names = set(
        re.findall(
            r"`([\w./-]+)`", "".join(re.findall(r"^\| (`.*?) \|", page.partition("What a run leaves")[2], re.MULTILINE))
        )
    )
    names -= {"checkpoint-N.pth.tar", "recovery.pth.tar"}
    assert len(names) >= 8 and not [name for name in names if not (folder / name).exists()]
    assert len(list(folder.glob("checkpoint-*.pth.tar"))) == 1
    with open(folder / "summary.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["train_loss"]) > 0 and 0 <= float(row["AP"]) <= 1


def test_your_own_data_in_five_minutes_and_the_readme(home, monkeypatch):
    monkeypatch.chdir(home)
    for block in blocks("docs/own_data.md", "python"):
        exec(block, {})
    assert json.loads(Path("one.json").read_text())["annotations"][0]["bbox"] == [100, 50, 80, 60]
    own = to_run("docs/own_data.md")
    (other_folders,) = [words for words in own if "--train-images" in words]
    printed = {words: run(words) for words in own if words != other_folders}
    arguments = [*other_folders[2:], *shlex.split(SMALLER["train.py"])]
    assert Path(parse_train_args(arguments).data.train_ann).is_file()  # that training starts from it: the slow test
    (runs,) = Path("output/train").iterdir()
    check_run(runs)
    assert json.loads(Path("converted/train.json").read_text())["annotations"][0]["bbox"] == [10, 20, 40, 40]
    assert sorted(path.suffix for path in Path("drawn").iterdir()) == [".json", *[".png"] * 4]
    (scores,) = [text for words, text in printed.items() if words[1] == "validate.py"]
    stats = json.loads((runs / "metrics.json").read_text())
    assert re.search(r"AP (\d\.\d+) ", scores) and "AP" in json.dumps(stats)
    assert set(to_run("README.md")) - {(".venv/bin/python", "demo.py")} <= set(own)  # all of README has been run here


def test_the_python_of_the_pages(home, monkeypatch, capsys, small_checkpoint, synthetic_images):
    monkeypatch.chdir(home)
    shutil.copy(small_checkpoint, "model_best.pth.tar")
    for name, source in zip(("a.jpg", "b.jpg"), synthetic_images, strict=False):
        Image.open(source).convert("RGB").save(name)
    seen: dict = {}
    assert blocks("README.zh-CN.md", "python") == blocks("README.md", "python")
    for page in PAGES:
        if page not in RUN_ELSEWHERE | {"docs/own_data.md", "README.zh-CN.md"}:
            for block in blocks(page, "python"):
                seen[page] = {}
                exec(block, seen[page])
                efficientdet_model_param_dict.pop("mine", None)
    assert set(seen) == {"README.md", "docs/library.md", "docs/developing.md"}
    assert {"ball", "box", "star"} & set(re.findall(r"'(\w+)'", capsys.readouterr().out))
    library = seen["docs/library.md"]
    assert library["losses"]["loss"].isfinite() and library["detections"].shape == (2, 100, 6)


def lines_of_make(*arguments: str) -> list[tuple[str, ...]]:
    """Return what `make` would run of ours, in the words of the pages."""
    planned = subprocess.run(["make", "-n", *arguments], cwd=REPO, capture_output=True, text=True, check=True).stdout
    lines = [tuple(shlex.split(line)) for line in planned.splitlines()]
    return [
        ("python", *words[1:])
        for words in lines
        if words[:1] == (".venv/bin/python",) and (words[1] == "train.py" or words[1] == "-m" and "effdet" in words[2])
    ]


def test_make_train_with_data_is_the_command_beside_it():
    (with_data,) = [words for words in commands("README.md") if words[:2] == ("make", "train") and len(words) > 2]
    (line,) = lines_of_make(*with_data[1:])
    assert sorted(line) == sorted(next(words for words in commands("README.md") if words[1] == "train.py"))


@pytest.mark.slow
def test_make_train_and_the_demo(home, monkeypatch):
    monkeypatch.chdir(home)
    few = functools.partial(effdet.data.synthetic.dataset.make_synthetic_dataset, num_train=12, num_val=4)
    monkeypatch.setattr(effdet.data.synthetic.dataset, "make_synthetic_dataset", lambda out, *ignored, **more: few(out))
    for words in lines_of_make("train"):
        run(words)
    run((".venv/bin/python", "demo.py"))
    (folder,) = Path("runs/quickstart").iterdir()
    check_run(folder)
    assert len(list(Path("output/demo").glob("*.png"))) == 4


@pytest.mark.slow
def test_the_page_on_training(home, monkeypatch):
    monkeypatch.chdir(home)
    if not Path("mydata").exists():
        run(to_run("docs/own_data.md")[0])
    run(next(words for words in to_run("docs/own_data.md") if "--train-images" in words))
    todo = to_run("docs/training.md")
    (several,) = [words for words in todo if "--device-list" in words]
    for words in todo:
        if words != several:
            run(words)
    resumed = torch.load("output/train/cups/last.pth.tar", weights_only=True)
    assert (resumed["epoch"], resumed["step"]) == (0, 1)
    smaller = shlex.split(SMALLER["train.py"])
    argv = [sys.executable, str(REPO / "train.py"), *several[2:], *smaller, "--experiment", "two"]
    done = subprocess.run(argv, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 process(es)" in done.stdout
    check_run(Path("output/train/two"))
