"""The trace that a refactoring must not change: 20 training steps and the predictions of their weights, as numbers.

    python test/golden/loss_trace.py                   print the trace of this checkout
    python test/golden/loss_trace.py --write           store it as loss_trace.json, which a test compares with
    python test/golden/loss_trace.py COMMIT [COMMIT]   compare two commits (the second: this checkout)

It goes through the scripts as a user does: an EfficientDet-D0 of 128 px trains in fp32 on the CPU from a fixed seed on
16 images drawn here, then validate.py writes its detections. On one machine two commits must agree to the last bit.
Processors differ in the last bits, and batch norm over the four cells of P7 makes much of them: what is stored and held
to 1e-5 on all of them is a run with frozen batch norms, and nothing in it is drawn by torch (weights.py in this folder
draws the weights). Commits are compared by that run and by one with everything on.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

REPO = Path(__file__).resolve().parents[2]
STORED = Path(__file__).with_name("loss_trace.json")
STEPS = 20
FLAGS = [
    "--model",
    "tf_efficientdet_d0",
    "--image-size",
    "128",
    "-b",
    "4",
    "-j",
    "0",
    "--seed",
    "7",
    "--device",
    "cpu",
    "--lr",
    "0.0005",
    "--warmup-epochs",
    "1",
    "--epochs",
    "30",
    "--max-steps",
    str(STEPS),
    "--log-interval",
    "1",
]
STABLE = ["--freeze-bn", "--drop-path", "0"]
FULL = ["--mosaic", "0.3", "--aa", "v0", "--clip-grad", "5", "--smoothing", "0.1"]


def draw_data(root: Path, num_images: int = 16) -> None:
    """Write a COCO data set of coloured rectangles and ellipses, two classes, the same for both splits."""
    rng = np.random.RandomState(3)
    images, annotations = [], []
    for image_id in range(1, num_images + 1):
        width, height = (160, 120) if image_id % 2 else (110, 150)
        image = Image.fromarray(rng.randint(80, 140, (height, width, 3)).astype(np.uint8))
        pen = ImageDraw.Draw(image)
        for _ in range(rng.randint(1, 4)):
            w, h = rng.randint(20, 70, 2).tolist()
            x, y = rng.randint(0, width - w), rng.randint(0, height - h)
            category_id = int(rng.randint(1, 3))
            shape = pen.rectangle if category_id == 1 else pen.ellipse
            shape((x, y, x + w - 1, y + h - 1), fill=tuple(rng.randint(0, 256, 3).tolist()))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
        images.append({"id": image_id, "file_name": f"{image_id:03d}.png", "width": width, "height": height})
        for split in ("train2017", "val2017"):
            (root / split).mkdir(parents=True, exist_ok=True)
            image.save(root / split / f"{image_id:03d}.png")
    (root / "annotations").mkdir(exist_ok=True)
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "rectangle"}, {"id": 2, "name": "ellipse"}],
    }
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def run_script(repo: Path, *arguments: str) -> None:
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(repo))
    done = subprocess.run([sys.executable, *arguments], cwd=repo, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} in {repo} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def shapes_of_d0(num_classes: int) -> list[tuple[str, tuple[int, ...]]]:
    """Return name and shape of every weight of a D0, from the list in this folder, with a class head for K classes."""
    with gzip.open(Path(__file__).with_name("state_dict_shapes.json.gz"), "rt") as file:
        shapes = json.load(file)["tf_efficientdet_d0"]
    return [(key, tuple(9 * num_classes if side == 810 else side for side in shape)) for key, shape in shapes.items()]


def run_trace(repo: Path, flags: list[str]) -> dict[str, object]:
    """Train, with further flags, and predict with the scripts of a checkout.

    Returns:
        `losses`: [loss, class_loss, box_loss] of each step; `weights`, `found`: sha256 of the final weights and of all
        detections; `detections`: the best of each image as [image_id, category_id, x, y, w, h, score]; `AP`.
    """
    import torch
    import weights

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        draw_data(root / "data")
        start = {key: torch.from_numpy(np.asarray(weights.make_weight(key, shape))) for key, shape in shapes_of_d0(2)}
        torch.save(start, root / "start.pth")
        run_script(
            repo,
            "train.py",
            "--root",
            str(root / "data"),
            "--output",
            name,
            "--experiment",
            "run",
            "--initial-checkpoint",
            str(root / "start.pth"),
            *FLAGS,
            *flags,
        )
        checkpoint = root / "run" / "last.pth.tar"
        run_script(
            repo,
            "validate.py",
            "--root",
            str(root / "data"),
            "--checkpoint",
            str(checkpoint),
            "--no-use-ema",
            "-j",
            "0",
            "-b",
            "4",
            "--device",
            "cpu",
            "--results",
            str(root / "found.json"),
            "--output",
            str(root / "v"),
        )
        rows = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
        losses = [[row[key] for key in ("loss", "class_loss", "box_loss")] for row in rows if row["kind"] == "interval"]
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        digest = hashlib.sha256()
        for key in sorted(state):
            digest.update(key.encode() + state[key].contiguous().numpy().tobytes())
        found = json.loads((root / "found.json").read_text())
        ap = json.loads((root / "v" / "metrics.json").read_text())["stats"]["AP"]
    assert len(losses) == STEPS, f"{len(losses)} losses"
    best: dict[int, dict] = {}
    for one in found:
        if one["score"] > best.get(one["image_id"], {"score": 0})["score"]:
            best[one["image_id"]] = one
    return {
        "losses": losses,
        "weights": digest.hexdigest(),
        "AP": ap,
        "found": hashlib.sha256(json.dumps(found).encode()).hexdigest(),
        "detections": [[k, best[k]["category_id"], *best[k]["bbox"], best[k]["score"]] for k in sorted(best)],
    }


def traces_of(commit: str | None) -> dict[str, object]:
    """Return both traces of a commit, from a worktree of its own, or of this checkout."""

    def both(repo: Path) -> dict[str, object]:
        return {
            f"{name} {key}": value
            for name, flags in (("stable", STABLE), ("full", FULL))
            for key, value in run_trace(repo, flags).items()
        }

    if commit is None:
        return both(REPO)
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name) / "tree"
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(tree), commit], cwd=REPO, check=True, capture_output=True
        )
        try:
            return both(tree)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=REPO, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="*", metavar="COMMIT")
    parser.add_argument("--write", action="store_true", help="store the trace of this checkout")
    args = parser.parse_args()
    if not args.commits:
        trace = run_trace(REPO, STABLE)
        text = json.dumps(trace, indent=0)
        if args.write:
            STORED.write_text(text + "\n")
        print(text)
        return 0
    one, other = traces_of(args.commits[0]), traces_of(args.commits[1] if len(args.commits) > 1 else None)
    different = [key for key in one if one[key] != other[key]]
    for key in different:
        print(f"{key}:\n  {one[key]}\n  {other[key]}")
    print("different: " + ", ".join(different) if different else f"identical: weights {one['full weights'][:16]}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
