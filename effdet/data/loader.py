"""`create_loader`: data set, transform, sampler, loading processes and the way to the device, put together.

What happens inside one image is in `transforms.py`, what becomes of a batch in `batches.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils.data

from effdet.anchors import AnchorLabeler
from effdet.runtime import distributed as processes
from effdet.runtime.device import pick_device
from effdet.runtime.memory import supports_pinning
from effdet.runtime.workers import check_shared_memory, make_context

from .augment.multi_scale import MultiScaleDataset, MultiScaleSampler
from .augment.user_transform import is_pipeline, pipeline_transform
from .batches import (
    MAX_NUM_INSTANCES,
    DetectionFastCollate,
    EvalSampler,
    PrefetchLoader,
    TrainSampler,
    unwrap_subset,
)
from .random_erasing import RandomErasing
from .transforms import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    Compose,
    ImageToNumpy,
    ImageToTensor,
    RandomFlip,
    RandomResizePad,
    ResizePad,
    clip_boxes,
    clip_boxes_,
    resolve_fill_color,
    transforms_coco_eval,
    transforms_coco_train,
)

__all__ = [
    "AnchorLabeler",
    "Compose",
    "DetectionFastCollate",
    "IMAGENET_DEFAULT_MEAN",
    "IMAGENET_DEFAULT_STD",
    "IMAGENET_INCEPTION_MEAN",
    "IMAGENET_INCEPTION_STD",
    "ImageToNumpy",
    "ImageToTensor",
    "MAX_NUM_INSTANCES",
    "PrefetchLoader",
    "RandomErasing",
    "RandomFlip",
    "RandomResizePad",
    "ResizePad",
    "clip_boxes",
    "clip_boxes_",
    "create_loader",
    "resolve_fill_color",
    "transforms_coco_eval",
    "transforms_coco_train",
]


def _make_transform(input_size: Any, is_training: bool, **options: Any) -> Callable:
    # (3, height, width), (height, width) or one number; a list or a config node as well as a tuple.
    size = input_size if isinstance(input_size, (int, np.integer)) else tuple(input_size)[-2:]
    return (transforms_coco_train if is_training else transforms_coco_eval)(size, **options)


def create_loader(
    dataset: Any,
    input_size: int | Sequence[int],
    batch_size: int,
    is_training: bool = False,
    use_prefetcher: bool = True,
    re_prob: float = 0.0,
    re_mode: str = "pixel",
    re_count: int = 1,
    interpolation: str = "bilinear",
    fill_color: Any = "mean",
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    num_workers: int = 1,
    distributed: bool = False,
    pin_mem: bool = False,
    anchor_labeler: Any = None,
    transform_fn: Callable | None = None,
    collate_fn: Callable | None = None,
    *,
    device: torch.device | str | None = None,
    drop_last: bool = False,
    persistent_workers: bool = False,
    seed: int | None = None,
    channels_last: bool = False,
    max_instances: int | None = MAX_NUM_INSTANCES,
    multi_scale: Sequence[tuple[int, int]] = (),
) -> Any:
    """Make a loader that gives (images [B, 3, H, W], target).

    Sets the data set's transform (behind a torch Subset, that of the whole set). Training shuffles. Evaluation goes
    through the data set in order; over several processes each image comes exactly once. Defaults are those of effdet
    0.4.1; what train.py asks for is in build.py.

    Args:
        dataset: gives (image, target), as `DetectionDatset` does.
        input_size: (3, height, width), (height, width) or one number, in pixels.
        batch_size: of this process.
        is_training: training transform, shuffling and equal shares for all processes.
        use_prefetcher: True: batches arrive on `device`, normalised there. False: on the host, as the transform and
            collate made them; the default transforms then normalise in the workers.
        re_prob: random erasing in training, with the prefetcher: probability, 0..1.
        re_mode: what fills an area: 'const', 'rand' or 'pixel'.
        re_count: most areas in an image.
        interpolation: of the default transforms.
        fill_color: of the padding: 'mean', or RGB 0..255.
        mean: of the pixels, 0..1 a channel, for the normalisation.
        std: of the pixels.
        num_workers: loading processes; 0 loads in this one.
        distributed: take rank and world size from the process group.
        pin_mem: page-lock host batches, where the device gains from it.
        anchor_labeler: compute anchor targets in the workers, see `DetectionFastCollate`.
        transform_fn: callable (image, target) -> (image, target) instead of the default transforms; the default
            collate takes images as arrays or tensors [3, H, W], and the prefetcher values of 0..255. Or an
            Albumentations pipeline that ends in one size, with bbox_params=BboxParams(format='pascal_voc',
            label_fields=['cls']).
        collate_fn: instead of `DetectionFastCollate`.
        device: for the prefetcher; default is the best there is.
        drop_last: leave out an incomplete last batch in training, so that shapes are fixed.
        persistent_workers: keep workers between passes, where there are any.
        seed: of the shuffling and of the augmentations, the same on all ranks; the sampler's `set_epoch`, or else each
            pass, moves both to the next epoch. None leaves both to the global generators; over several processes the
            order is then that of torch's DistributedSampler.
        channels_last: memory layout of the images, with the prefetcher.
        max_instances: least number of target slots, see `DetectionFastCollate`.
        multi_scale: in training, sizes (height, width) in pixels; each batch has one of them, see `multi_scale.py`.

    Returns:
        A `PrefetchLoader`, or a torch DataLoader without the prefetcher.

    Raises:
        ValueError: a training set smaller than one global batch with `drop_last`, arguments that contradict each other,
            or shared memory that does not hold the batches of the loading processes.
    """
    if multi_scale and not (is_training and anchor_labeler is None):
        raise ValueError(
            "multi_scale is for training, and with anchor targets made by the bench (see DetBenchTrain's "
            "input_sizes), not by the loader: leave anchor_labeler out"
        )
    base = unwrap_subset(dataset)
    base.transform = (
        pipeline_transform(transform_fn)
        if is_pipeline(transform_fn)
        else transform_fn
        or _make_transform(
            input_size,
            is_training,
            interpolation=interpolation,
            use_prefetcher=use_prefetcher,
            fill_color=fill_color,
            mean=mean,
            std=std,
        )
    )
    if seed is not None and hasattr(base, "seed"):
        base.seed = seed
    drop_last = drop_last and is_training
    ranks = (processes.rank(), processes.world_size()) if distributed else (0, 1)
    if collate_fn is not None and (anchor_labeler is not None or max_instances not in (None, MAX_NUM_INSTANCES)):
        raise ValueError(
            "anchor_labeler and max_instances belong to the default collate; with a collate_fn of your own do it there"
        )
    if use_prefetcher:
        device = pick_device() if device is None else torch.device(device)
    loader = torch.utils.data.DataLoader(
        MultiScaleDataset(dataset) if multi_scale else dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        sampler=_make_sampler(dataset, batch_size, is_training, drop_last, seed, *ranks, multi_scale),
        pin_memory=pin_mem and (not use_prefetcher or supports_pinning(device)),
        collate_fn=collate_fn or DetectionFastCollate(max_instances=max_instances, anchor_labeler=anchor_labeler),
        drop_last=drop_last,
        persistent_workers=persistent_workers and num_workers > 0,
        # A generator of its own: drawing the workers' seeds leaves the training's random numbers alone.
        generator=None if seed is None else torch.Generator().manual_seed(seed),
        multiprocessing_context=make_context() if num_workers > 0 else None,
    )
    if num_workers > 0:
        check_shared_memory(_batches_ahead(loader), _batch_bytes(input_size, multi_scale, batch_size, use_prefetcher))
    if not use_prefetcher:
        return loader
    erasing = {"re_prob": re_prob, "re_mode": re_mode, "re_count": re_count} if is_training else {}
    return PrefetchLoader(loader, mean=mean, std=std, **erasing, device=device, channels_last=channels_last)


def _batches_ahead(loader: Any) -> int:
    """Return how many batches are in shared memory at once: made ahead, or worked on; of all processes here."""
    batches = loader.prefetch_factor * loader.num_workers + 1
    if hasattr(loader.sampler, "__len__"):
        batches = min(batches, len(loader))
    return processes.local_world_size() * batches


def _batch_bytes(input_size: Any, sizes: Sequence[tuple[int, int]], batch_size: int, use_prefetcher: bool) -> int:
    """Return about how large a batch is: its images, which travel as bytes to a prefetcher and else as floats."""
    height, width = (int(part) for part in np.broadcast_to(np.asarray(input_size).reshape(-1)[-2:], 2))
    pixels = max((height * width, *(one * other for one, other in sizes)))
    return batch_size * 3 * pixels * (1 if use_prefetcher else 4)


def _make_sampler(
    dataset: Any,
    batch_size: int,
    is_training: bool,
    drop_last: bool,
    seed: int | None,
    rank: int,
    world_size: int,
    sizes: Sequence[tuple[int, int]],
) -> torch.utils.data.Sampler[int]:
    if not is_training:
        return EvalSampler(dataset, rank, world_size)
    if drop_last and len(dataset) < batch_size * world_size:
        raise ValueError(
            f"the training set has {len(dataset)} images, fewer than one global batch of {batch_size * world_size} "
            f"({world_size} x {batch_size}). Use a smaller batch, or more images."
        )
    if sizes:
        return MultiScaleSampler(dataset, rank, world_size, seed or 0, drop_last, sizes, batch_size)
    if seed is None and world_size == 1:
        return torch.utils.data.RandomSampler(dataset)
    if seed is None:
        return torch.utils.data.DistributedSampler(dataset, world_size, rank, drop_last=drop_last)
    return TrainSampler(dataset, rank, world_size, seed, drop_last)
