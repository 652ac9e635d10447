"""The rules of the house that a reader of imports and names can check: layers, words, where other packages may appear.

Each rule is a function from a repository's root to a list of violations, one readable line each. It is held against
this repository, and against small wrong ones made for the purpose, so that a rule that sees nothing is noticed.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGES = ("effdet", "timm_patches")

# Top to bottom, a row for each floor. A module imports from its own floor or from those below; nowhere in a circle.
ROOMS: tuple[tuple[str, ...], ...] = (
    ("train", "validate", "demo", "effdet.cli", "effdet.__main__"),
    ("effdet.commands", "effdet.export"),
    ("effdet.training",),
    ("effdet.datacheck", "effdet.predict"),
    ("effdet.report",),
    ("effdet.evaluator", "effdet.bench", "effdet.factory", "effdet.data"),
    (
        "effdet.efficientdet",
        "effdet.network",
        "effdet.anchors",
        "effdet.loss",
        "effdet.soft_nms",
        "effdet.checkpoint",
        "effdet.helpers",
        "effdet.object_detection",
        "effdet.evaluation",
        "effdet.distributed",
    ),
    ("effdet.ops", "effdet.metrics"),
    ("effdet.runtime", "effdet.config", "effdet.version"),
    ("timm_patches",),
)


@dataclass(frozen=True)
class Import:
    """One imported module: who imports what, where."""

    importer: str
    imported: str
    place: str
    inside_function: bool
    is_relative: bool


def modules_of(root: Path) -> dict[str, Path]:
    """Return dotted name -> file of every module of the packages and every script beside them."""
    files = [*root.glob("*.py"), *(file for package in PACKAGES for file in (root / package).rglob("*.py"))]
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def trees_of(root: Path) -> Iterator[tuple[str, Path, ast.Module]]:
    for name, file in sorted(modules_of(root).items()):
        yield name, file.relative_to(root), ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def imports_of(root: Path) -> list[Import]:
    """Return every import, also those inside functions, each resolved to the deepest module of ours it names."""
    modules = modules_of(root)
    found = []
    for name, file, tree in trees_of(root):
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        deferred = {id(child) for function in functions for child in ast.walk(function)}
        for node in ast.walk(tree):
            targets = []
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*parents, *([node.module] if node.module else [])])
                submodules = [f"{base}.{alias.name}" for alias in node.names]
                targets = [s if s in modules else base for s in submodules]
            for target in dict.fromkeys(targets):
                relative = isinstance(node, ast.ImportFrom) and node.level > 0
                found.append(Import(name, target, f"{file}:{node.lineno}", id(node) in deferred, relative))
    return found


def room_of(module: str) -> tuple[int, str] | None:
    """Return floor and name of the room that a module is in; None when it is in none."""
    for row, names in enumerate(ROOMS):
        for name in names:
            if module == name or module.startswith(name + "."):
                return row, name
    return None


def upward_imports(root: Path) -> list[str]:
    modules, wrong = modules_of(root), []
    for name, file in sorted(modules.items()):
        if name != "effdet" and room_of(name) is None:
            wrong.append(f"{file.relative_to(root)}: in no room of ROOMS in test_layering.py")
    for item in imports_of(root):
        if item.imported not in modules or item.importer in ("effdet", item.imported):
            continue  # the package's front door names everything; other people's packages have rules of their own
        if item.imported == "effdet":
            if "." in item.importer:
                wrong.append(f"{item.place}: {item.importer} imports the front door 'effdet'; import the module itself")
            continue
        upper, lower = room_of(item.importer), room_of(item.imported)
        if upper is None or lower is None:
            continue
        if upper[0] > lower[0]:
            wrong.append(f"{item.place}: {item.importer} imports {item.imported}, which is above it")
        elif item.imported == lower[1] == upper[1]:
            wrong.append(f"{item.place}: {item.importer} imports its room's front door {item.imported}")
        elif item.is_relative and upper[1] != lower[1] and {upper[1], lower[1]} & FOLDERS:
            wrong.append(f"{item.place}: {item.importer} imports {item.imported}, another room, by a relative name")
    return wrong


def circles(root: Path) -> list[str]:
    """Return the modules that import each other in a circle, found by peeling off those that import no other."""
    modules = modules_of(root)
    edges: dict[str, set[str]] = {name: set() for name in modules}
    for item in imports_of(root):
        inside_own_door = item.importer.startswith(item.imported + ".")  # `from folder import part` inside the folder
        if item.imported in modules and item.imported != item.importer and not inside_own_door:
            edges[item.importer].add(item.imported)
    while free := [name for name, targets in edges.items() if not targets]:
        for name in free:
            del edges[name]
        for targets in edges.values():
            targets.difference_update(free)
    while free := [name for name in edges if not any(name in targets for targets in edges.values())]:
        for name in free:  # those that only lead into a circle
            del edges[name]
    return [f"these import each other in a circle: {', '.join(sorted(edges))}"] if edges else []


def foreign_packages(root: Path) -> list[str]:
    """Return imports of packages that have a place of their own, outside of it."""
    wrong = []
    for item in imports_of(root):
        top = item.imported.partition(".")[0]
        own = item.importer.partition(".")[0]
        if top == "torchvision" and item.importer != "timm_patches.torchvision_ops":
            wrong.append(f"{item.place}: {item.importer} imports torchvision; nothing here uses it")
        if top == "omegaconf" and not (item.importer + ".").startswith("effdet.config."):
            wrong.append(f"{item.place}: {item.importer} imports omegaconf; it stays inside effdet/config")
        if top == "torch_npu" and own == "timm_patches" and item.inside_function:
            continue  # torch's plug-in for the device, fetched only where a caller asked for that device
        if own == "timm_patches" and top not in {"torch", "timm", "timm_patches", *sys.stdlib_module_names}:
            wrong.append(f"{item.place}: {item.importer} imports {top}; timm_patches imports torch and timm only")
    return wrong


FOLDERS = {
    f"effdet.{name}"
    for name in (
        "commands",
        "training",
        "datacheck",
        "predict",
        "report",
        "data",
        "network",
        "checkpoint",
        "ops",
        "metrics",
        "runtime",
        "config",
        "object_detection",
        "evaluation",
    )
}

# A vendor's word by itself or in an identifier. Names that begin with npu_ are operators, such as npu_batch_nms.
_VENDOR = re.compile(r"(?<![a-z0-9])(cuda(?![a-z])|torch_npu(?![a-z])|npu(?![a-z0-9_]))", re.IGNORECASE)


_FLAGS = ("effdet.config.schema", "effdet.config.eval_schema")  # whose help names what a user may give


def vendor_words(root: Path) -> list[str]:
    """Return identifiers and strings of effdet that name a vendor's device, docstrings and comments aside."""
    wrong = []
    for name, file, tree in trees_of(root):
        if not name.startswith("effdet") or name in ("effdet.runtime.device", *_FLAGS):
            continue
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            fields = [value for key, value in ast.iter_fields(node) if isinstance(value, str) and key != "type_comment"]
            for text in fields if id(node) not in prose else ():
                if match := _VENDOR.search(text):
                    line = getattr(node, "lineno", "?")
                    wrong.append(f"{file}:{line}: {match[0]!r} in {text[:60]!r}; only runtime/device.py names devices")
    return wrong


def prints_and_exits(root: Path) -> list[str]:
    """Return calls that print or end the process in the packages, outside of `main` functions and `__main__` blocks."""
    wrong = []
    for name, file, tree in trees_of(root):
        if name.partition(".")[0] not in PACKAGES:
            continue
        allowed: set[int] = set()
        for node in ast.walk(tree):
            # the last two are how the scripts end with one line, as argparse does for a wrong flag
            is_main = isinstance(node, ast.FunctionDef) and node.name in (
                "main",
                "one_line_errors",
                "dead_workers_in_one_line",
            )
            is_main |= isinstance(node, ast.If) and "__main__" in ast.dump(node.test)
            if is_main:
                allowed |= {id(child) for child in ast.walk(node)}
        for node in ast.walk(tree):
            call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Raise) and node.exc is not None and "SystemExit" in ast.unparse(node.exc):
                call = "raise SystemExit"
            known = ("print", "exit", "quit", "sys.exit", "os._exit", "SystemExit", "raise SystemExit")
            if call in known and call != "SystemExit" and id(node) not in allowed:
                wrong.append(f"{file}:{node.lineno}: {call} in a package; raise an error or use logging")
    return wrong


RULES = (upward_imports, circles, foreign_packages, vendor_words, prints_and_exits)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_this_repository_keeps(rule: Callable[[Path], list[str]]):
    assert len(modules_of(REPO)) > 10, "found no modules to check"
    violations = rule(REPO)
    assert not violations, "\n" + "\n".join(violations)


def make_repository(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


WRONG = [
    (upward_imports, {"effdet/ops/boxes.py": "from effdet.data import f"}, "effdet/ops/boxes.py:1: effdet.ops.boxes"),
    (upward_imports, {"effdet/ops/boxes.py": "def f():\n    from effdet.data import g"}, "effdet/ops/boxes.py:2"),
    (upward_imports, {"effdet/ops/a.py": "import effdet.loss", "effdet/loss.py": ""}, "effdet.loss, which is above"),
    (upward_imports, {"effdet/ops/boxes.py": "from effdet import create_model"}, "the front door 'effdet'"),
    (upward_imports, {"effdet/data/coco.py": "from effdet.data import create_loader"}, "its room's front door"),
    (upward_imports, {"effdet/data/coco.py": "from ..factory import f", "effdet/factory.py": ""}, "by a relative name"),
    (upward_imports, {"effdet/data/coco.py": "from ..ops.nms import f"}, "effdet.ops.nms, another room"),
    (upward_imports, {"effdet/ops/nms.py": "from train import main", "train.py": ""}, "effdet.ops.nms imports train"),
    (upward_imports, {"timm_patches/a.py": "from effdet.ops import nms"}, "effdet.ops"),
    (upward_imports, {"effdet/utils.py": ""}, "effdet/utils.py: in no room"),
    (
        circles,
        {"effdet/data/a.py": "from . import b", "effdet/data/b.py": "from .a import x", "effdet/ops/nms.py": ""},
        "effdet.data.a, effdet.data.b",
    ),
    (foreign_packages, {"effdet/ops/nms.py": "from torchvision.ops import nms"}, "imports torchvision"),
    (foreign_packages, {"effdet/ops/nms.py": "def f():\n    import omegaconf"}, "nms.py:2: effdet.ops.nms imports"),
    (foreign_packages, {"timm_patches/a.py": "import effdet"}, "timm_patches.a imports effdet"),
    (foreign_packages, {"timm_patches/a.py": "import numpy as np"}, "timm_patches.a imports numpy"),
    (foreign_packages, {"timm_patches/a.py": "import torch_npu"}, "timm_patches.a imports torch_npu"),
    (vendor_words, {"effdet/ops/nms.py": "import torch\ntorch.cuda.synchronize()"}, "effdet/ops/nms.py:2: 'cuda'"),
    (vendor_words, {"effdet/ops/nms.py": "import torch_npu"}, "torch_npu"),
    (vendor_words, {"effdet/ops/nms.py": "x = tensor.is_cuda"}, "is_cuda"),
    (vendor_words, {"effdet/ops/nms.py": "device = 'npu:0'"}, "npu:0"),
    (vendor_words, {"effdet/ops/nms.py": "def f(use_npu=True): pass"}, "use_npu"),
    (prints_and_exits, {"effdet/ops/nms.py": "def f():\n    print(1)"}, "effdet/ops/nms.py:2: print"),
    (prints_and_exits, {"timm_patches/a.py": "import sys\nsys.exit(1)"}, "timm_patches/a.py:2: sys.exit"),
    (prints_and_exits, {"effdet/ops/nms.py": "raise SystemExit('no')"}, "raise SystemExit"),
]


@pytest.mark.parametrize(("rule", "files", "message"), WRONG, ids=lambda value: getattr(value, "__name__", None))
def test_a_violation_is_seen(tmp_path, rule, files, message):
    common = {
        "effdet/__init__.py": "",
        "effdet/data/__init__.py": "",
        "effdet/ops/__init__.py": "",
        "effdet/ops/nms.py": "",
    }
    root = make_repository(tmp_path, {**common, **files})
    violations = rule(root)
    assert len(violations) == 1 and message in violations[0]


def test_what_is_right_is_let_through(tmp_path):
    root = make_repository(
        tmp_path,
        {
            "effdet/__init__.py": "from .factory import create_model\nfrom .data import create_loader",
            "effdet/factory.py": "import torch\nfrom effdet.ops import nms\nfrom .bench import f\nimport timm_patches",
            "effdet/bench.py": "from effdet.ops.nms import f",
            "effdet/ops/__init__.py": "",
            "effdet/ops/nms.py": '"""Runs on CUDA."""\nfrom .boxes import clip\nout = ops.npu_batch_nms  # on the NPU',
            "effdet/ops/boxes.py": "def clip(): pass",
            "effdet/runtime/device.py": "import torch_npu\ntorch.cuda.empty_cache()",
            "effdet/config/__init__.py": "from .load import load\nimport omegaconf",
            "effdet/config/load.py": "from .schema import Config\nfrom omegaconf import OmegaConf",
            "effdet/config/schema.py": "class Config:\n    lr = 1\n    '''Rate, on cuda too.'''",
            "effdet/data/__init__.py": "from .loader import create_loader\nfrom .coco.read import read",
            "effdet/data/loader.py": "from .coco import read\nfrom effdet.runtime.device import pick",
            "effdet/data/coco/__init__.py": "",
            "effdet/data/coco/read.py": "from ..images import open_image",
            "effdet/data/images.py": "def main():\n    print(1)\nif __name__ == '__main__':\n    raise SystemExit(1)",
            "timm_patches/__init__.py": "from timm_patches import torchvision_ops",
            "timm_patches/torchvision_ops.py": "import os, torch, timm\ndef f():\n    import torch_npu",
            "train.py": "import sys\nfrom effdet.commands.train import main\nsys.exit(0)",
            "effdet/commands/train.py": "from effdet.ops import nms",
        },
    )
    assert {rule.__name__: rule(root) for rule in RULES} == {rule.__name__: [] for rule in RULES}
