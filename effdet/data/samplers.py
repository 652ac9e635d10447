"""Which process sees which images, in which order."""

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import Sampler, Subset


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
