"""The same models, images, boxes and files for both sides, from fixed seeds."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

REPO = Path(__file__).resolve().parents[1]
sys.path.append(str(REPO / "test" / "golden"))
from weights import make_weight  # noqa: E402  (test/golden/weights.py: weights drawn from their names)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, both sides' default
PEER_SLOTS = 100  # what the peer's collate pads boxes to


def pick_device(name: str) -> torch.device:
    """Return the device of either side; the peer has no device layer of its own."""
    if name == "npu":
        import torch_npu  # noqa: F401  (registers the device)
    return torch.device(name if name == "cpu" else f"{name}:0")


def count_devices(name: str) -> int:
    """Return how many accelerators of this kind the machine has."""
    return getattr(torch, pick_device(name).type).device_count()


def synchronizer(device: torch.device) -> Callable[[], Any]:
    """Return a function that waits for the device."""
    return (lambda: None) if device.type == "cpu" else getattr(torch, device.type).synchronize


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """Return the context for a dtype of the command line."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


def make_config(case: Any) -> Any:
    """Return the model config of a case, from the side's own package."""
    from effdet import get_efficientdet_config

    config = get_efficientdet_config(case.model)
    config.image_size = (case.image_size, case.image_size)
    config.num_classes = case.classes
    return config


def fill_weights(model: nn.Module) -> nn.Module:
    """Load drawn weights, the same for the same names; class biases make most anchors background, as in training."""
    state = {}
    for key, value in model.state_dict().items():
        drawn = torch.from_numpy(np.asarray(make_weight(key, tuple(value.shape)))).to(value.dtype)
        if key.startswith("class_net.predict") and key.endswith("bias"):
            drawn = drawn - math.log(99)
        state[key] = drawn
    model.load_state_dict(state, strict=True)
    return model


def make_model(case: Any) -> nn.Module:
    """Return the network with `fill_weights`' weights, on the CPU."""
    from effdet import EfficientDet

    return fill_weights(EfficientDet(make_config(case), pretrained_backbone=False))


@torch.no_grad()
def make_weights(path: str, model_name: str, image_size: int, classes: int) -> None:
    """Write a state dict with which the network behaves like a trained one: few high scores, that depend on the place.

    Drawn weights alone give outputs that are nearly the same everywhere. So batch norms take their statistics from a
    batch of 8, and the heads are scaled until the largest logit of the batch is 2 and box codes have a standard
    deviation of 0.2: scores of exactly 1 would tie, and the order of ties is anybody's.
    """
    model = make_model(SimpleNamespace(model=model_name, image_size=image_size, classes=classes)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    torch.manual_seed(0)
    images = make_images(8, image_size)
    model(images)
    logits, codes = (torch.cat([level.flatten() for level in levels]) for levels in model.eval()(images))
    for net, factor in (
        (model.class_net, (2 + math.log(99)) / (logits.max() + math.log(99))),
        (model.box_net, 0.2 / codes.std()),
    ):
        last = [parameter for name, parameter in net.predict.named_parameters() if name.endswith("weight")][-1]
        last.mul_(factor)
    torch.save(model.state_dict(), path)


def make_images(batch: int, size: int, seed: int = 0) -> Tensor:
    """Draw normalised images, float32 [batch, 3, size, size]: blobs of several sizes and some noise."""
    rng = np.random.default_rng(seed)
    images = torch.zeros(batch, 3, size, size)
    for cells in (4, 8, 16, 32, size):
        noise = torch.from_numpy(rng.standard_normal((batch, 3, cells, cells), dtype=np.float32))
        images += 0.5 * nn.functional.interpolate(noise, (size, size), mode="bilinear")
    return images


def make_pixels(batch: int, size: int, device: torch.device) -> Tensor:
    """Return `make_images`' images before their normalisation, as a loader hands them on: uint8, on the device."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (MEAN, STD))
    return (make_images(batch, size) * std + mean).clamp(0, 255).to(torch.uint8).to(device)


def make_boxes(batch: int, size: int, classes: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw boxes yxyx and classes from 1 for each image, as many as COCO has: 7 on average, at most 60."""
    rng = np.random.default_rng(seed)
    objects = []
    for _ in range(batch):
        count = min(60, int(rng.geometric(1 / 7)))
        sides = np.exp(rng.uniform(math.log(size / 40), math.log(size * 0.8), (count, 2)))
        corner = rng.uniform(0, 1, (count, 2)) * (size - sides)
        boxes = np.concatenate((corner, corner + sides), 1).astype(np.float32)
        objects.append((boxes, rng.integers(1, classes + 1, count)))
    return objects


def make_target(side: str, batch: int, size: int, classes: int, device: torch.device) -> dict[str, Tensor]:
    """Return `make_boxes` as the side's own loader hands them on, padded in its way."""
    objects = make_boxes(batch, size, classes)
    slots = PEER_SLOTS
    if side == "ours":
        from effdet.data.batches import padded_instances

        slots = padded_instances(max(len(boxes) for boxes, _ in objects))
    bbox = torch.full((batch, slots, 4), -1.0)
    cls = torch.full((batch, slots), -1, dtype=torch.int64 if side == "ours" else torch.float32)
    for number, (boxes, labels) in enumerate(objects):
        bbox[number, : len(boxes)] = torch.from_numpy(boxes)
        cls[number, : len(labels)] = torch.from_numpy(labels)
    return {"bbox": bbox.to(device), "cls": cls.to(device)}


def make_head_outputs(batch: int, size: int, classes: int, seed: int = 2) -> tuple[list[Tensor], list[Tensor]]:
    """Draw class logits and box codes for levels 3..7, as test/golden does: few scores are high."""
    rng = np.random.default_rng(seed)
    sides = [math.ceil(size / 2**level) for level in range(3, 8)]

    def draw(channels: int, side: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal((batch, channels, side, side), dtype=np.float32))

    return [draw(9 * classes, side) * 2 - 6 for side in sides], [draw(36, side) * 0.5 for side in sides]


def make_coco_folder(path: str, num_images: int, classes: int, size_wh: tuple[int, int] = (640, 480)) -> None:
    """Make a data set in COCO's layout: JPEGs of four synthetic images each, the same set for train and val.

    Category ids are 1..classes, because the peer takes ids as class numbers.
    """
    from PIL import Image

    from effdet.data.synthetic.dataset import make_image

    folder, rng = Path(path), np.random.default_rng(0)
    width, height = size_wh
    images, annotations = [], []
    (folder / "annotations").mkdir(parents=True)
    (folder / "train2017").mkdir()
    for index in range(num_images):
        canvas = Image.new("RGB", size_wh)
        for quarter in range(4):
            part = make_image(0, "train", 4 * index + quarter)
            left, top = quarter % 2 * width // 2, quarter // 2 * height // 2
            scale_y, scale_x = height / 2 / part.pixels.shape[0], width / 2 / part.pixels.shape[1]
            canvas.paste(Image.fromarray(part.pixels).resize((width // 2, height // 2)), (left, top))
            for found in part.annotations:
                if found["iscrowd"]:
                    continue
                x, y, box_width, box_height = found["bbox"]
                box = [left + x * scale_x, top + y * scale_y, box_width * scale_x, box_height * scale_y]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "bbox": box,
                        "iscrowd": 0,
                        "area": box[2] * box[3],
                        "category_id": int(rng.integers(1, classes + 1)),
                    }
                )
        canvas.save(folder / "train2017" / f"{index + 1:012d}.jpg", quality=90)
        images.append({"id": index + 1, "file_name": f"{index + 1:012d}.jpg", "width": width, "height": height})
    (folder / "val2017").symlink_to("train2017", target_is_directory=True)
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, classes + 1)]
    text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    for split in ("train", "val"):
        (folder / "annotations" / f"instances_{split}2017.json").write_text(text)
