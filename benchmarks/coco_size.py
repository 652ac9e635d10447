#!/usr/bin/env python3
"""Opening a data set of COCO's size, and what it costs each loader process; ours alone, against json and an index.

118,287 pictures with 860,001 boxes of 80 classes are made up; their files are links to a few JPEGs of noise. The floor
is json's parser and a dictionary from pictures to their boxes, which is what pycocotools builds. A loader process reads
the boxes of all pictures; its own memory is what is not shared with its parent. At last train.py starts on the set,
with 5,000 pictures to validate on, until it logs its first step.
"""
from __future__ import annotations

import collections
import gc
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pairing

sys.path.insert(0, str(pairing.REPO))
CLASSES = 80


def make_split(root: Path, split: str, pictures: int, boxes: int) -> Path:
    """Write a split in COCO's layout, whose pictures are links to a few files; return its json."""
    from PIL import Image
    draw = random.Random(0)
    folder, file = root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json"
    folder.mkdir()
    file.parent.mkdir(exist_ok=True)
    images = [{"id": 7 * number + 3, "file_name": f"{number:012d}.jpg", "width": 640, "height": 480}
              for number in range(pictures)]
    for number, image in enumerate(images):
        if number % 10_000 == 0:  # a file system allows some ten thousand links to a file
            first = folder / image["file_name"]
            Image.effect_noise((640, 480), 60).convert("RGB").save(first)
        else:
            os.link(first, folder / image["file_name"])
    annotations = []
    for number in range(boxes):
        x, y = round(draw.uniform(0, 500), 2), round(draw.uniform(0, 350), 2)
        width, height = round(draw.uniform(4, 130), 2), round(draw.uniform(4, 120), 2)
        annotations.append({
            "id": number + 1, "image_id": images[draw.randrange(pictures)]["id"], "iscrowd": 0,
            "category_id": draw.randrange(CLASSES) + 1, "bbox": [x, y, width, height], "area": width * height,
            "segmentation": [[x, y, x + width, y, x + width, y + height, x, y + height]]})
    categories = [{"id": number + 1, "name": f"class {number}"} for number in range(CLASSES)]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


def time_to_first_step(root: Path, options: Any) -> float:
    """Return the seconds from the start of train.py to the log line of its first step."""
    command = [sys.executable, "train.py", "--root", root, "--model", options.model, "--num-classes", CLASSES,
               "--batch-size", options.batch[0], "--image-size", options.image_size, "--device", options.device,
               "--workers", "2", "--log-interval", "1", "--output", root / "runs"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "PYTHONUNBUFFERED": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), cwd=pairing.REPO, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("Train: 0 ["):
            seconds = time.perf_counter() - started
            process.terminate()
            process.communicate()
            return seconds
    raise RuntimeError("train.py ended before its first step:\n" + "".join(said))


def load_floor(file: Path) -> Any:
    """Parse and index."""
    content = json.loads(file.read_bytes())
    by_image = collections.defaultdict(list)
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    return content, by_image, {image["id"]: image for image in content["images"]}


def time_of(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of one call, and its result."""
    gc.collect()
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def own_memory_mib() -> float:
    """Return the memory that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def read_all(dataset: Any, answers: Any) -> None:
    """Be a loader process: read every picture's boxes, and tell the memory that took."""
    before, boxes = own_memory_mib(), 0
    for index in range(len(dataset)):
        boxes += len(dataset.parser.get_ann_info(index)["bbox"])
    answers.put((boxes, own_memory_mib() - before))


def main() -> int:
    """Measure and print."""
    parser = pairing.make_parser(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--pictures", type=int, default=118_287)
    parser.add_argument("--boxes", type=int, default=860_001)
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args()
    from effdet.data.dataset_factory import open_coco
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        file = make_split(root, "train", options.pictures, options.boxes)
        make_split(root, "val", 5000, 36_000)
        floor, ours = [], []
        for _ in range(1 if options.quick else options.repeats):
            floor.append(time_of(lambda: load_floor(file))[0])
            seconds, dataset = time_of(lambda: open_coco(root, "train"))
            ours.append(seconds)
        context = multiprocessing.get_context("fork")
        answers = context.Queue()
        workers = [context.Process(target=read_all, args=(dataset, answers)) for _ in range(options.workers)]
        for worker in workers:
            worker.start()
        read = [answers.get() for _ in workers]
        for worker in workers:
            worker.join()
        del dataset
        first_step = [time_to_first_step(root, options) for _ in ours]
    pairs = [mine / theirs for mine, theirs in zip(ours, floor, strict=True)]
    figures = {"figure": "coco_size", "pictures": options.pictures, "boxes": options.boxes, "ours_s": ours,
               "json_and_index_s": floor, "ratio": statistics.median(pairs), "boxes_read": read[0][0],
               "worker_mib": [round(mib, 1) for _, mib in read], "first_step_s": first_step}
    print(f"coco_size  ours {statistics.median(ours):.2f} s, json and index {statistics.median(floor):.2f} s: "
          f"{figures['ratio']:.2f} times as long (pairs {min(pairs):.2f}..{max(pairs):.2f}); each of {len(read)} "
          f"loader processes took {max(mib for _, mib in read):.1f} MiB of its own for {read[0][0]} boxes; train.py "
          f"logged its first step after {statistics.median(first_step):.1f} s")
    pairing.write_figure(figures, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
