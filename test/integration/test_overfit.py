"""A model that cannot learn eight pictures by heart has a bug: labels, loss, boxes or category ids."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
NUM_PICTURES = 8
COPIES = 10  # of each picture in an epoch, so that epochs and their checkpoints are few
SMALLEST_SIDE_PX = 48


def copy_pictures(source: Path, target: Path) -> list[int]:
    """Make a data set that trains and evaluates on the same eight pictures; return its category ids."""
    coco = json.loads((source / "annotations_coco_ids" / "instances_train2017.json").read_text())
    by_image: dict[int, list[dict]] = {}
    for annotation in coco["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    chosen = [image for image in coco["images"]
              if 1 <= len(by_image.get(image["id"], [])) <= 6
              and all(not a["iscrowd"] and min(a["bbox"][2:]) >= SMALLEST_SIDE_PX for a in by_image[image["id"]])]
    chosen = chosen[:NUM_PICTURES]
    assert len(chosen) == NUM_PICTURES
    used = sorted({a["category_id"] for image in chosen for a in by_image[image["id"]]})
    (target / "annotations").mkdir(parents=True)
    for split, copies in (("train2017", COPIES), ("val2017", 1)):
        images, annotations = [], []
        for copy in range(copies):
            for image in chosen:
                image_id = image["id"] + copy * 10**9
                images.append({**image, "id": image_id})
                annotations += [{**a, "id": a["id"] + copy * 10**13, "image_id": image_id}
                                for a in by_image[image["id"]]]
        (target / "annotations" / f"instances_{split}.json").write_text(json.dumps({
            "images": images, "annotations": annotations,
            "categories": [c for c in coco["categories"] if c["id"] in used]}))
        (target / split).mkdir()
        for image in chosen:
            shutil.copyfile(source / "train2017" / image["file_name"], target / split / image["file_name"])
    return used


@pytest.mark.slow
def test_eight_coco_pictures_are_learnt_by_heart(shared_data, tmp_path):
    category_ids = copy_pictures(shared_data / "coco_mini", tmp_path / "eight")
    command = [sys.executable, "train.py", "--root", tmp_path / "eight", "-c", "configs/own_data.yaml",
               "--output", tmp_path / "runs", "--experiment", "overfit", "--image-size", "256", "--anchor-scale", "4",
               "data.scale_min=1.0", "data.scale_max=1.0", "data.hflip=0.0", "optim.lr=0.005", "optim.weight_decay=0.0",
               "sched.epochs=20", "ema.decay=0.98", "run.val_interval=20", "run.keep_best=1"]
    done = subprocess.run([str(part) for part in command], cwd=REPO, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    best = float(re.findall(r"Best metric: ([\d.]+)", done.stdout)[-1])
    results = tmp_path / "results.json"
    subprocess.run([sys.executable, "validate.py", "--root", str(tmp_path / "eight"), "--results", str(results),
                    "--checkpoint", str(tmp_path / "runs" / "overfit" / "model_best.pth.tar")], cwd=REPO, check=True)
    assert {row["category_id"] for row in json.loads(results.read_text())} <= set(category_ids)
    assert max(category_ids) > 80, "the pictures should have one of COCO's ids above the number of classes"
    assert best > 0.9
