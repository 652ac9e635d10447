"""Data sets: one index in, one (image, target) out.

Random transforms repeat: with `seed` set, an item's transform runs with Python's, numpy's and torch's (CPU) generators
seeded from (seed, epoch, index) and puts their states back afterwards. So the same seed gives the same augmentations
whatever the number of workers or processes, users' own transforms included, and nothing outside the transform sees
other random numbers. A library with a generator of its own must be seeded by its user.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.data as data

from .corrupt import BadImages, blank_item
from .images import ImageError, read_image
from .parsers import create_parser
from .parsers.parser_factory import CocoParser


@contextlib.contextmanager
def _seeded(numbers: tuple[int, ...], standard_only: bool = False) -> Iterator[None]:
    """Seed the global generators from a few non-negative integers, and put their states back at the end.

    `standard_only` leaves numpy's and torch's alone: saving and restoring numpy's state alone takes 0.2 ms.
    """
    words = np.random.SeedSequence(numbers).generate_state(4)
    seed = int.from_bytes(words.tobytes(), "little")
    before_standard = random.getstate()
    if standard_only:
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before_standard)
        return
    before = before_standard, np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(words)
    torch.random.default_generator.manual_seed(int(words[0]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class DetectionDatset(data.Dataset):
    """Serve images with their boxes; the spelling is effdet's.

    An item is (image, target): an RGB Pillow image, or what the transform made of it, and a dict with `img_idx`
    (the dataset index), `img_size` (original width, height in pixels) and, with labels, `bbox` float32 [n, 4] yxyx
    and `cls` int64 [n].

    Args:
        data_dir: the image directory.
        parser: a parser, or the name of one ('coco') made with `parser_kwargs`.
        parser_kwargs: for a parser given by name.
        transform: callable (image, target) -> (image, target), or None.
        seed: makes random transforms repeat (module docstring); None leaves the global generators alone, as effdet did.

    Attributes:
        bad_images: what becomes of images that cannot be read (corrupt.py); None, the default: their item
            raises ImageError.

    Raises:
        ValueError: no parser.
        DatasetError: images of the json that are not in `data_dir`.
    """

    img_ids: list[Any]  # set where these are fewer than the parser's json has; the evaluator asks for them

    def __init__(
        self,
        data_dir: str | Path,
        parser: Any = None,
        parser_kwargs: dict[str, Any] | None = None,
        transform: Callable | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if parser is None:
            raise ValueError("DetectionDatset needs a parser: an object, or its name ('coco') with parser_kwargs")
        self.data_dir = Path(data_dir)
        self._parser = create_parser(parser, **(parser_kwargs or {})) if isinstance(parser, str) else parser
        if isinstance(self._parser, CocoParser):
            self._parser.check_files(self.data_dir)
        self.transform = transform
        self.seed = seed
        # In shared memory, because persistent workers keep the copy of the data set they were started with.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.bad_images: BadImages | None = None

    def _read(self, index: int) -> tuple[Any, dict[str, Any]]:
        info = self._parser.img_infos[index]
        target = {"img_idx": index, "img_size": (info["width"], info["height"])}
        if self._parser.has_labels:
            target.update(self._parser.get_ann_info(index))
        return read_image(self.data_dir / info["file_name"], info["width"], info["height"]), target

    def _item_instead(self, index: int) -> tuple[Any, dict[str, Any]]:
        item = self.bad_images.item_instead(index, self._read)
        if item is None:
            info = self._parser.img_infos[index]
            item = blank_item(index, info["width"], info["height"], self._parser.has_labels)
        return item

    def read(self, index: int) -> tuple[Any, dict[str, Any]]:
        """Return an item as it is on disk, without transform; one that cannot be read is replaced (corrupt.py).

        Raises:
            ImageError: it cannot be read, and nothing says what to do then.
        """
        try:
            return self._read(index)
        except ImageError:
            if self.bad_images is None:
                raise
            return self._item_instead(index)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        index = int(index)
        img, target = self.read(index)
        if self.transform is None:
            return img, target
        if self.seed is None:
            return self.transform(img, target)
        with _seeded((self.seed, int(self._epoch), index), getattr(self.transform, "draws_standard_only", False)):
            return self.transform(img, target)

    def __len__(self) -> int:
        return len(self._parser.img_ids)

    @property
    def parser(self) -> Any:
        """The annotation parser."""
        return self._parser

    @property
    def transform(self) -> Callable | None:
        """The callable (image, target) -> (image, target)."""
        return self._transform

    @transform.setter
    def transform(self, transform: Callable | None) -> None:
        self._transform = transform

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentations come next, here and in running workers; the sampler calls it."""
        self._epoch.fill_(epoch)


class SkipSubset(data.Dataset):
    """Every n-th item of a data set. Targets keep the whole data set's `img_idx`.

    Raises:
        ValueError: n < 1.
    """

    def __init__(self, dataset: Any, n: int = 2) -> None:
        if n < 1:
            raise ValueError(f"n is {n}, take every n-th item with n >= 1")
        self.dataset = dataset
        self.indices = np.arange(len(dataset))[::n]

    def __getitem__(self, idx: int) -> tuple[Any, dict[str, Any]]:
        return self.dataset[self.indices[idx]]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def parser(self) -> Any:
        """The whole data set's parser."""
        return self.dataset.parser

    @property
    def transform(self) -> Callable | None:
        """The whole data set's transform."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Callable | None) -> None:
        self.dataset.transform = transform

    @property
    def seed(self) -> int | None:
        """The whole data set's seed."""
        return self.dataset.seed

    @seed.setter
    def seed(self, seed: int | None) -> None:
        self.dataset.seed = seed

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to a data set that has use for it."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
