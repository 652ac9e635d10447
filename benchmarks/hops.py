#!/usr/bin/env python3
"""How many files a reader opens to follow one thing through the code, and how often a call leaves one file for another.

    python benchmarks/hops.py           of this checkout
    python benchmarks/hops.py FOLDER    of another one, such as a `git worktree` of an older commit

Each path is run twice on small synthetic data and counted the second time, so imports and caches do not count. A file
counts when one of its functions is entered; a hop is a call from one file of ours into another, also by way of torch or
timm; "pairs" are the different ones among the hops, the arrows of a drawing. On the way of `--lr` only functions count
that hold the value, or the config with it, when they are called or return.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

MODEL, SIDE = "tf_efficientdet_d0", 128
LR = 0.0123456789  # a number that nothing else has
# The modules that have had a name, the newest first.
HOMES = {
    "build_dataset": ("effdet.data.build", "effdet.build"),
    "build_loader": ("effdet.data.build",),
    "build_train_loader": ("effdet.data.build", "effdet.build"),
    "place_model": ("effdet.factory", "effdet.build"),
    "draw_detections": ("effdet.report.draw", "effdet.draw"),
}


class Reached(BaseException):
    """The function that a path leads to has returned."""


def find(name: str) -> Any:
    """Return a function from where this checkout has it."""
    for home in HOMES[name]:
        try:
            return getattr(importlib.import_module(home), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise ImportError(f"{name} is in none of {HOMES[name]}")


def count(root: Path, work: Callable[[], Any], until: str = "", holds: Callable[[Any], bool] | None = None) -> str:
    """Run `work` twice, the second time counted; return files, pairs of files and hops.

    Args:
        root: of the checkout; only its own files count.
        work: one path through the code.
        until: name of the function after which the path ends; empty: when `work` returns.
        holds: counts only functions with a local variable for which this is true.
    """
    ours = tuple(f"{root}/{name}" for name in ("effdet/", "timm_patches/", "train.py", "validate.py", "demo.py"))
    files: set[str] = set()
    hops: Counter[tuple[str, str]] = Counter()  # calls by (caller, callee)

    def is_ours(frame: FrameType) -> bool:
        name = frame.f_code.co_filename
        is_function = frame.f_code.co_flags & inspect.CO_OPTIMIZED  # not the body of a module or a class
        return bool(is_function) and name.startswith(ours)

    def callers(frame: FrameType) -> Iterator[FrameType]:
        while frame := frame.f_back:
            if is_ours(frame):
                yield frame

    def on_event(frame: FrameType, event: str, _: Any) -> None:
        if event not in ("call", "return") or not is_ours(frame):
            return
        name = frame.f_code.co_filename
        if holds is None or any(map(holds, list(frame.f_locals.values()))):
            files.add(name)
            caller = next(callers(frame), None) if event == "call" else None
            if caller is not None and caller.f_code.co_filename != name:
                hops[caller.f_code.co_filename, name] += 1
        if event == "return" and until == frame.f_code.co_name:
            raise Reached

    for profile in (on_event if until else None, on_event):  # without an end there is nothing to look for at first
        files.clear()
        hops.clear()
        sys.setprofile(profile)
        try:
            work()
        except Reached:
            pass
        finally:
            sys.setprofile(None)
    names = " ".join(sorted(name[len(str(root)) + 1 :] for name in files))
    return f"{len(files):3} files {len(hops):4} pairs {hops.total():6} hops  {names}"


def holds_lr(value: Any, depth: int = 2) -> bool:
    """Tell whether a value is the learning rate, or something that carries it."""
    if isinstance(value, (float, str)):
        return value == LR or str(LR) in str(value)
    if isinstance(value, argparse.Namespace):
        return holds_lr(vars(value), depth)
    if isinstance(value, (dict, list, tuple)) and depth:
        return any(holds_lr(v, depth - 1) for v in (value.values() if isinstance(value, dict) else value))
    return type(value).__name__ in ("RunConfig", "OptimConfig")


def main(root: Path) -> None:
    sys.path.insert(0, str(root))
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    import torch
    from PIL import Image

    import effdet
    from effdet.config.cli import parse_train_args

    with tempfile.TemporaryDirectory() as folder:
        data, weights = f"{folder}/data", f"{folder}/weights.pth"
        make_data = ["-m", "effdet.data.synthetic", "--out", data, "--num-train", "8", "--num-val", "2"]
        subprocess.run([sys.executable, *make_data], cwd=root, check=True, stdout=subprocess.DEVNULL)
        size = ["--image-size", str(SIDE), str(SIDE)]
        flags = ["--root", data, "--model", MODEL, *size, "-b", "4", "-j", "0", "--device", "cpu"]
        cfg, device = parse_train_args(flags), torch.device("cpu")
        dataset = find("build_dataset")(cfg.data, "train")
        classes = dataset.parser.category_map.num_classes
        more = {"num_classes": classes, "image_size": (SIDE, SIDE), "pretrained_backbone": False}
        bench = effdet.create_model(MODEL, bench_task="train", bench_labeler=True, **more).train()
        find("place_model")(bench.model, device)
        torch.save(bench.model.state_dict(), weights)
        arguments = (dataset, cfg.data, bench.model.config, 4, 0, device, 42, False)
        try:
            loader = find("build_loader")(*arguments, is_training=True)
        except ImportError:
            loader = find("build_train_loader")(*arguments)
        images, target = next(iter(loader))
        image_file = next(Path(data, "val2017").iterdir())

        def load_and_draw() -> None:
            predictor = effdet.load(weights, device="cpu", model=MODEL, image_size=(SIDE, SIDE))
            (found,) = predictor.predict(str(image_file))
            find("draw_detections")(Image.open(image_file), found.boxes_xyxy, found.names, found.scores.tolist())

        paths = {
            "one item of the training set": lambda: dataset[0],
            "batch to loss and gradients": lambda: bench(images, target)["loss"].backward(),
            "JPEG to loss and gradients": lambda: bench(*next(iter(loader)))["loss"].backward(),
            "weights to drawn boxes": load_and_draw,
        }
        lines = [f"{name:28} {count(root, work)}" for name, work in paths.items()]
        run = [*flags, "--no-pretrained-backbone", "--lr", str(LR), "--output", f"{folder}/runs"]
        train = importlib.import_module("train").main
        lines.append(f"{'--lr to the optimizer':28} {count(root, lambda: train(run), 'build_optimizer', holds_lr)}")
        print("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve())
