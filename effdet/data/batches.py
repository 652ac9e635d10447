"""Which images make a batch, how samples become one, and how it comes to the device, normalised there."""

from collections.abc import Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler, Subset

from effdet.anchors import AnchorLabeler
from effdet.ops.labels import PADDING
from effdet.runtime.device import pick_device, to_device

from .random_erasing import RandomErasing
from .transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

MAX_NUM_INSTANCES = 100  # the number of slots that effdet padded to

_PAD_STEP = 128


def check_rank(rank: int, world_size: int) -> None:
    """Raise ValueError unless 0 <= rank < world_size."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size} processes does not exist: ranks are 0..world_size - 1")


def unwrap_subset(dataset: Any) -> Any:
    """Find the data set behind torch's Subset, which forwards neither transform nor epoch."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


class TrainSampler(Sampler[int]):
    """Shuffle the whole data set by (seed, epoch) and deal it out: position p goes to rank p mod world_size.

    So batch k of all ranks together is batch k of a single process with the global batch size. Every rank gets the
    same number of images: with `drop_last` the remainder of the deal is left out (another one each epoch), else the
    first ones are dealt again.

    The epoch advances by itself with each pass unless `set_epoch` was called, and is passed on to the data set, whose
    augmentations follow it.

    Args:
        dataset: sized; its `set_epoch`, where it has one, is called at the start of each pass.
        rank, world_size: this process and their number.
        seed: the same on all ranks.
        drop_last: see above.
    """

    def __init__(self, dataset: Any, rank: int = 0, world_size: int = 1, seed: int = 0, drop_last: bool = True) -> None:
        check_rank(rank, world_size)
        self.dataset = dataset
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0
        self.start = 0  # how many of its images the next pass leaves out: a run continued within an epoch has seen them
        total = len(dataset)
        self.num_samples = total // world_size if drop_last else -(-total // world_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch = int(epoch)

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch
        self.epoch += 1
        base = unwrap_subset(self.dataset)
        if hasattr(base, "set_epoch"):
            base.set_epoch(epoch)
        generator = torch.Generator()
        # Not seed + epoch: run 0's epoch 1 would be run 1's epoch 0.
        generator.manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(len(self.dataset), generator=generator)
        total = self.num_samples * self.world_size
        if total > len(order):
            order = order.repeat(-(-total // len(order)))
        start, self.start = self.start, 0
        return iter(order[self.rank : total : self.world_size].tolist()[start:])

    def __len__(self) -> int:
        return self.num_samples


class EvalSampler(Sampler[int]):
    """Deal the data set out in order, every image exactly once over all ranks; lengths may differ by one.

    Nothing is repeated to even the ranks out: a repeated image is scored twice and changes the metric.
    """

    def __init__(self, dataset: Sized, rank: int = 0, world_size: int = 1) -> None:
        check_rank(rank, world_size)
        self.indices = range(rank, len(dataset), world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def padded_instances(most: int) -> int:
    """Choose the number of target slots for a batch whose fullest image has `most` boxes: 32, 64, 128, 256, 384, ...

    Few steps, because compiled graphs and graph capture pay for every new shape.
    """
    return next((m for m in (32, 64) if most <= m), -(-most // _PAD_STEP) * _PAD_STEP)


class DetectionFastCollate:
    """Put samples (image [3, H, W], target dict) together into a batch.

    Per-box entries (`instance_keys`) are padded to M slots, float32; others are stacked: numbers to [B] (int64 or
    float32), sequences to [B, n] (int32 or float32), arrays as they are.

    Args:
        instance_keys: names of per-box entries; default bbox, bbox_ignore, cls.
        instance_shapes: their shapes (M, ...); the default takes M from `max_instances` and the rest from the data.
        instance_fill: value of unused slots.
        max_instances: least M. A batch with an image of more boxes has more slots (`padded_instances`); no box is ever
            cut off. None takes M from the batch alone.
        anchor_labeler: computes the anchor targets here, in the worker, with its `batch_label_anchors(gt_boxes [B, M,
            4], gt_classes [B, M])`, or an image at a time with its `label_anchors` where a subclass has its own. They
            go into label_cls_L, label_bbox_L (L counts the levels from 0) and label_num_positives; boxes and classes
            are left out.
    """

    def __init__(
        self,
        instance_keys: set[str] | None = None,
        instance_shapes: dict[str, tuple[int, ...]] | None = None,
        instance_fill: float = PADDING,
        max_instances: int | None = MAX_NUM_INSTANCES,
        anchor_labeler: Any = None,
    ) -> None:
        self.instance_keys = set(instance_keys or ("bbox", "bbox_ignore", "cls"))
        self.instance_shapes = dict(instance_shapes or {})
        self.instance_fill = instance_fill
        self.max_instances = max_instances
        self.anchor_labeler = anchor_labeler

    def __call__(self, batch: Sequence[tuple[Any, dict[str, Any]]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Stack samples (image, target) to a batch: images [B, C, H, W], and a tensor [B, ...] for each key."""
        images = _stack_images([sample[0] for sample in batch])
        target = {}
        for key in batch[0][1]:
            values = [sample[1][key] for sample in batch]
            if key not in self.instance_keys:
                target[key] = _stack(key, values)
            elif self.anchor_labeler is None:
                target[key] = self._pad(key, values)
        if self.anchor_labeler is not None:
            target.update(self._make_labels([sample[1] for sample in batch]))
        return images, target

    def _make_labels(self, targets: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        boxes, classes = (
            [torch.as_tensor(target[key], dtype=torch.float32) for target in targets] for key in ("bbox", "cls")
        )
        cls_targets: Sequence[torch.Tensor]
        box_targets: Sequence[torch.Tensor]
        if getattr(type(self.anchor_labeler), "label_anchors", None) in (None, AnchorLabeler.label_anchors):
            cls_targets, box_targets, num_positives = self.anchor_labeler.batch_label_anchors(boxes, classes)
        else:  # effdet's collate calls this one
            labels = [
                self.anchor_labeler.label_anchors(*pair, filter_valid=False)
                for pair in zip(boxes, classes, strict=True)
            ]
            cls_targets, box_targets = (
                [torch.stack(level) for level in zip(*(image[part] for image in labels), strict=True)]
                for part in (0, 1)
            )
            num_positives = torch.tensor([float(image[2]) for image in labels])
        made = {f"label_cls_{level}": cls_target for level, cls_target in enumerate(cls_targets)}
        made |= {f"label_bbox_{level}": box_target for level, box_target in enumerate(box_targets)}
        return made | {"label_num_positives": num_positives}

    def _pad(self, key: str, values: list) -> torch.Tensor:
        rows = [torch.as_tensor(v) for v in values]
        most = max(len(r) for r in rows)
        shape = self.instance_shapes.get(key)
        least = shape[0] if shape else self.max_instances or 0
        tail = tuple(shape[1:]) if shape else tuple(rows[0].shape[1:])
        slots = least if most <= least else padded_instances(most)
        padded = torch.full((len(rows), slots, *tail), self.instance_fill, dtype=torch.float32)
        for slot, row in zip(padded, rows, strict=True):
            slot[: len(row)] = row
        return padded


def _stack_images(images: list) -> torch.Tensor:
    shapes = {tuple(i.shape) for i in images}
    if len(shapes) > 1:
        raise ValueError(
            f"images of one batch have different shapes {sorted(shapes)}; the transform must give all the same size"
        )
    if all(isinstance(i, np.ndarray) and i.strides[0] < i.strides[-1] for i in images):
        # Views of [H, W, 3]: copied row by row, they become a batch in channels_last order. The device turns it round
        # where that is wanted.
        return torch.from_numpy(np.stack([i.transpose(1, 2, 0) for i in images])).permute(0, 3, 1, 2)
    return torch.stack([torch.as_tensor(i) for i in images])


def _stack(key: str, values: list) -> torch.Tensor:
    try:
        stacked = torch.as_tensor(np.stack([np.asarray(v) for v in values]))
    except (TypeError, ValueError) as e:
        raise TypeError(
            f"target entry {key!r} cannot be batched: numbers, sequences of numbers and arrays of one shape can. "
            "Name per-box entries in instance_keys."
        ) from e
    if stacked.is_floating_point():
        return stacked.float()
    return stacked.to(torch.int32 if isinstance(values[0], (tuple, list)) else torch.int64)


class PrefetchLoader:
    """Move the batches of a loader to a device and normalise them there.

    Copies do not wait where the host memory is pinned, so the host collects the next batch while the device still
    computes.

    Args:
        loader: gives (images uint8 [B, 3, H, W], target dict of tensors).
        mean, std: per channel, in units of 255.
        re_prob, re_mode, re_count: random erasing, see `RandomErasing`; re_prob 0 turns it off.
        device: where batches go; default is the best there is.
        channels_last: memory format of the images.

    Yields:
        (images float32 [B, 3, H, W], target), on the device; nothing for an empty loader.
    """

    def __init__(
        self,
        loader: Any,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        re_prob: float = 0.0,
        re_mode: str = "pixel",
        re_count: int = 1,
        *,
        device: torch.device | str | None = None,
        channels_last: bool = False,
    ) -> None:
        self.loader = loader
        self.device = pick_device() if device is None else torch.device(device)
        self.mean = torch.tensor([x * 255 for x in mean], dtype=torch.float32).view(1, -1, 1, 1).to(self.device)
        self.std = torch.tensor([x * 255 for x in std], dtype=torch.float32).view(1, -1, 1, 1).to(self.device)
        self.random_erasing = (
            RandomErasing(probability=re_prob, mode=re_mode, max_count=re_count) if re_prob > 0 else None
        )
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __iter__(self) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        for host_images, host_target in self.loader:
            images = to_device(host_images, self.device).to(torch.float32, memory_format=self.memory_format)
            images = images.sub(self.mean).div_(self.std)
            if self.random_erasing is not None:
                images = self.random_erasing(images, host_target)
            yield images, to_device(host_target, self.device)

    def __len__(self) -> int:
        return len(self.loader)

    def close(self) -> None:
        """End the loader's processes, also one that hangs; without it they end when nothing refers to the loader.

        A traceback does, and processes that ignore SIGTERM (signals.py) would then keep the interpreter from ending.
        """
        workers = getattr(getattr(self.loader, "_iterator", None), "_workers", [])
        if workers:
            self.loader._iterator._shutdown_workers()
            self.loader._iterator = None
        for worker in workers:
            if worker.is_alive():
                worker.kill()

    @property
    def sampler(self) -> Any:
        """The inner loader's sampler; `set_epoch` on a training one chooses the epoch."""
        return self.loader.sampler

    @property
    def dataset(self) -> Any:
        """The data set."""
        return getattr(self.loader.dataset, "unsized", self.loader.dataset)
