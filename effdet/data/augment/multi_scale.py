"""Training at several input sizes: one size for each batch, out of a fixed list.

The size is drawn from (seed, epoch, batch), so it is the same on all processes, with any number of workers, and when a
run is continued. It travels to the worker beside the image's index, and the image is resized there, once. A fixed
list, because devices that compile for a shape do it once for each size.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from ..batches import TrainSampler, unwrap_subset

Size = tuple[int, int]  # (height, width)


class MultiScaleSampler(TrainSampler):
    """A TrainSampler that gives (index, size of the batch).

    Args:
        dataset, rank, world_size, seed, drop_last: of TrainSampler.
        sizes: (height, width) in pixels, at least one.
        batch_size: of this process.
    """

    def __init__(
        self,
        dataset: Any,
        rank: int,
        world_size: int,
        seed: int,
        drop_last: bool,
        sizes: Sequence[Size],
        batch_size: int,
    ) -> None:
        super().__init__(dataset, rank, world_size, seed, drop_last)
        self.sizes = [tuple(size) for size in sizes]
        self.batch_size = batch_size

    def size_of(self, epoch: int, batch: int) -> Size:
        """Return the size of a batch of an epoch, both counted from 0."""
        return random.Random(f"{self.seed} {epoch} {batch}").choice(self.sizes)

    def __iter__(self) -> Iterator[tuple[int, Size]]:
        epoch, start = self.epoch, self.start
        return (
            (index, self.size_of(epoch, place // self.batch_size))
            for place, index in enumerate(super().__iter__(), start)
        )


class MultiScaleDataset:
    """A data set whose items are asked for by (index, size): its transform is told the size first.

    Args:
        dataset: a data set, or a subset of one, whose transform has `set_size`.

    Attributes:
        unsized: that data set.

    Raises:
        ValueError: the transform has no such method.
    """

    def __init__(self, dataset: Any) -> None:
        self.unsized = dataset
        self.size: Size | None = None
        transform = unwrap_subset(dataset).transform
        if not hasattr(transform, "set_size"):
            raise ValueError(
                f"the transform {transform!r} cannot change its output size: with multi_scale it needs a "
                "method set_size((height, width))"
            )

    def __getitem__(self, key: tuple[int, Size]) -> Any:
        index, size = key
        if size != self.size:
            unwrap_subset(self.unsized).transform.set_size(size)
            self.size = size
        return self.unsized[index]

    def __len__(self) -> int:
        return len(self.unsized)
