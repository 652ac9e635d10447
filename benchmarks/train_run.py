#!/usr/bin/env python3
"""A training run from JPEG files: the real loader with its workers, and the training step; one run is one epoch.

Ours is a run set up by train.py, with its own defaults for the device. The peer's is the loop of its train.py: labels
made by the loader, loss read after every step for its log. Compared: the first step, on the same batch, as in
train_step.py; what the epochs draw at random differs.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import loader as loader_script
import pairing
import train_step


def build(side: str, case: Any) -> pairing.Work:
    import inputs

    proof = train_step.build(side, case)
    if side == "ours":
        from effdet.training.engine import train_one_epoch

        trained = train_step.make_run(case, case.batch, "--workers", str(case.workers))
        device = trained.place.device

        def run() -> None:
            trained.data.train_set.set_epoch(0)
            train_one_epoch(trained.training, trained.loaders.train, 0)
    else:
        from effdet.anchors import AnchorLabeler, Anchors

        device = inputs.pick_device(case.device)
        labeler = AnchorLabeler(Anchors.from_config(inputs.make_config(case)), case.classes)
        loader = loader_script.make_peer(case, device, labeler, is_training=True)
        step, _ = train_step.make_peer_step(case, device, labels_in_bench=False)

        def run() -> None:
            for images, target in loader:
                float(step(images, target)["loss"])

    return pairing.Work(run, proof.outputs, inputs.synchronizer(device), about=proof.about)


def make_cases(options: Any, folder: str) -> list[dict[str, Any]]:
    batch = options.batch[0]
    images = (2 * batch if options.quick else options.images) // batch * batch
    data = pairing.make_file(folder, "make_coco_folder", images, options.classes)
    return [
        pairing.base_case(
            options,
            "train_run",
            dtype=dtype,
            images=images,
            workers=options.workers,
            data=data,
            folder=folder,
            ema=options.ema,
            steps=1,
            tolerance=train_step.TOLERANCES[dtype],
        )
        for dtype in options.dtype
    ]


if __name__ == "__main__":
    parser = pairing.make_parser(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--images", type=int, default=32, help="in one epoch")
    parser.add_argument("--ema", action="store_true", help="with the moving average of the weights on both sides")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(pairing.main(__file__, options, make_cases(options, folder)))
