#!/usr/bin/env python3
"""The loader: 640x480 JPEGs to normalised batches with anchor labels, images a second; one run is one epoch.

Training transforms with the defaults of each side's train.py, labels made in the loader on both sides (ours can also
make them in the bench). Random numbers differ between the sides, what they are drawn from does not; compared are the
batches of the evaluation transform, where nothing is random. With workers each of them has one thread.

--augment measures our augmentations instead: processor time to read and transform an image in one process, without and
with each of them, switched on for every image. The peer has none of them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

import pairing

AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "read_only": {},
    "default": {},  # flip and scale jitter
    **{f"aa_{policy}": {"aa": policy} for policy in ("v0", "v1", "v2", "v3")},
    "color_jitter": {"color_jitter": 0.4},
    "mosaic": {"mosaic": 1.0},
    "mixup": {"mixup": 1.0},
    "mosaic_mixup": {"mosaic": 1.0, "mixup": 1.0},
}


def build_augmentation(case: Any) -> pairing.Work:
    from effdet.config.schema import DataConfig
    from effdet.data import open_coco
    from effdet.data.build import build_train_transform

    dataset = open_coco(case.data, "train", seed=0)
    inputs = {
        "input_size": (3, case.image_size, case.image_size),
        "fill_color": "mean",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
    if case.augmentation != "read_only":
        dataset.transform = build_train_transform(dataset, DataConfig(**AUGMENTATIONS[case.augmentation]), inputs)

    def measure() -> float:
        started = time.process_time()
        for index in range(case.images):
            dataset[index]
        return time.process_time() - started

    return pairing.Work(measure, dict, measure=measure)


def build(side: str, case: Any) -> pairing.Work:
    if hasattr(case, "augmentation"):
        return build_augmentation(case)
    import inputs
    import torch

    from effdet.anchors import AnchorLabeler, Anchors

    device = inputs.pick_device(case.device)
    labeler = None
    if case.labels:
        labeler = AnchorLabeler(Anchors.from_config(inputs.make_config(case)), case.classes)
    make = make_ours if side == "ours" else make_peer
    loader = make(case, device, labeler, is_training=True)

    def run() -> None:
        for _ in loader:
            pass

    def outputs() -> dict[str, torch.Tensor]:
        images, target = next(iter(make(case, device, labeler, is_training=False)))
        if not case.labels:  # padded to different numbers of slots
            return {"images": images}
        labels = {name: target[name] for name in sorted(target) if name.startswith("label_")}
        return {"images": images, **labels}

    return pairing.Work(run, outputs, inputs.synchronizer(device))


def make_ours(case: Any, device: Any, labeler: Any, is_training: bool) -> Any:
    """Make the loader as build.py does for train.py, with the labeler in it."""
    from effdet.data import create_loader, open_coco
    from effdet.runtime.device import use_channels_last

    dataset = open_coco(case.data, "train" if is_training else "val", seed=0)
    interpolation = "random" if is_training else "bilinear"
    return create_loader(
        dataset,
        (3, case.image_size, case.image_size),
        case.batch,
        is_training=is_training,
        num_workers=case.workers,
        interpolation=interpolation,
        pin_mem=True,
        anchor_labeler=labeler,
        device=device,
        drop_last=True,
        persistent_workers=True,
        seed=0,
        max_instances=None,
        channels_last=use_channels_last(device),
    )


def make_peer(case: Any, device: Any, labeler: Any, is_training: bool) -> Any:
    import peer

    from effdet.data import create_dataset

    dataset = create_dataset("coco", case.data, ("train",))
    dataset = dataset["train"] if isinstance(dataset, dict) else dataset
    return peer.make_loader(dataset, case.image_size, case.batch, is_training, case.workers, labeler, device.type)


def make_cases(options: Any, folder: str) -> list[dict[str, Any]]:
    images = (64 if options.quick else options.images) // options.batch[0] * options.batch[0]
    data = pairing.make_file(folder, "make_coco_folder", images, options.classes)
    if options.augment:
        return [
            pairing.base_case(
                options,
                f"augment_{name}",
                batch=1,
                dtype="uint8",
                images=images,
                threads=1,
                data=data,
                augmentation=name,
                unit="image",
            )
            for name in AUGMENTATIONS
        ]
    tolerance = {"images": 1e-2, "label_num_positives": 0, "": 1e-4}  # images: one step of 255 in rounding
    return [
        pairing.base_case(
            options,
            f"loader{'' if labels else '_no_labels'}_{workers}_workers",
            dtype="float32",
            images=images,
            workers=workers,
            labels=labels,
            data=data,
            threads=1,
            tolerance=tolerance,
        )
        for labels in (True, False)
        for workers in options.workers
    ]


if __name__ == "__main__":
    parser = pairing.make_parser(__doc__)
    parser.set_defaults(batch=[8])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--images", type=int, default=256, help="in one epoch")
    parser.add_argument("--augment", action="store_true", help="ms an image of each augmentation, ours alone")
    options = parser.parse_args()
    options.ours_only |= options.augment
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(pairing.main(__file__, options, make_cases(options, folder)))
