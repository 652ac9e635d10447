#!/usr/bin/env python3
"""COCO's box metric for random detections, 100 for each image, in 80 classes. The peer is plain pycocotools.

From the parsed ground truth and the result rows to the 12 numbers. Compared: these numbers, to the last digit. --images
is the number of images. Nothing here runs on an accelerator, whatever --device says.
"""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any

import pairing

NAMES = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR1",
    "AR10",
    "AR100",
    "AR_small",
    "AR_medium",
    "AR_large",
)


def build(side: str, case: Any) -> pairing.Work:
    import numpy as np

    source, rows = make_results(case.images)
    run = score_ours if side == "ours" else score_peer
    return pairing.Work(lambda: run(source, rows), lambda: {"stats": np.asarray(run(source, rows))})


def make_results(num_images: int, per_image: int = 100, classes: int = 80) -> tuple[dict, list[dict]]:
    """Draw ground truth of 7 boxes an image, and detections: a few near the truth, the rest anywhere."""
    import numpy as np

    rng = np.random.default_rng(0)
    annotations, rows = [], []
    for image in range(1, num_images + 1):
        count = min(60, int(rng.geometric(1 / 7)))
        sides = np.exp(rng.uniform(np.log(8), np.log(400), (count, 2)))
        truth = np.concatenate((rng.uniform(0, 1, (count, 2)) * 200, sides), 1).round(2)
        labels = rng.integers(1, classes + 1, count)
        for number, (box, label) in enumerate(zip(truth.tolist(), labels.tolist(), strict=True)):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3] * 0.7,
                    "iscrowd": int(number == 5 and image % 20 == 0),
                }
            )
        near = rng.integers(0, count, per_image // 5)
        boxes = np.concatenate(
            (truth[near] * rng.uniform(0.85, 1.15, (len(near), 4)), rng.uniform(1, 300, (per_image - len(near), 4)))
        )
        found = np.concatenate((labels[near], rng.integers(1, classes + 1, per_image - len(near))))
        scores = rng.uniform(0, 1, per_image).round(4)
        rows += [
            {"image_id": image, "category_id": label, "bbox": box, "score": score}
            for box, label, score in zip(boxes.round(2).tolist(), found.tolist(), scores.tolist(), strict=True)
        ]
    images = [{"id": image, "width": 640, "height": 480} for image in range(1, num_images + 1)]
    categories = [{"id": label, "name": str(label)} for label in range(1, classes + 1)]
    return {"images": images, "annotations": annotations, "categories": categories}, rows


def score_ours(source: dict, rows: list[dict]) -> list[float]:
    from effdet.metrics.coco import index_ground_truth, score_rows

    truth = index_ground_truth(source)
    scores = score_rows(truth, rows, {image["id"] for image in source["images"]}, 100)
    return [scores.stats[name] for name in NAMES]


def score_peer(source: dict, rows: list[dict]) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = source
        truth.createIndex()
        found = truth.loadRes([dict(row) for row in rows])  # it writes into the rows
        run = COCOeval(truth, found, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return list(run.stats)


def make_cases(options: Any) -> list[dict[str, Any]]:
    return [
        pairing.base_case(
            options,
            f"coco_evaluation_{count}",
            dtype="float64",
            batch=0,
            threads=options.threads,
            images=count,
            tolerance=0,
        )
        for count in (options.images[:1] if options.quick else options.images)
    ]


if __name__ == "__main__":
    parser = pairing.make_parser(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--images", type=int, nargs="+", default=[500, 5000])
    options = parser.parse_args()
    sys.exit(pairing.main(__file__, options, make_cases(options)))
