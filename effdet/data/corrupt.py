"""Images that cannot be read while a run is under way: what comes in their place, and how many a run puts up with.

Data are checked before a run (coco/check.py), but not by reading every image, and files get lost or damaged later.
One bad file must not end a run of days, and a disk that has gone must not turn it into a run on nothing. So:

- Training takes another image with its own boxes instead, always the same one for the same bad image, augmented as
  the bad one would have been.
- Evaluation never takes another image, as that would score another data set: nothing is detected in a bad image and
  all its objects count as missed. So the metric never gets better by a bad file.
- Each bad image is named once, and when there are more than the limit, all processes end together, with an error.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from effdet.runtime import distributed

from .coco.report import DatasetError, shown
from .images import ImageError, read_image

_logger = logging.getLogger(__name__)

_MAX_NAMED = 8  # in one message
_BLANK_PX = 64


class BadImagesError(DatasetError):
    """More images cannot be read than the run puts up with. The text says how many, and names the first."""


def default_limit(count: int) -> int:
    """How many bad images a training run puts up with when nobody says: 1 % of `count`, at least 10.

    A percent is far more than a healthy disk loses, and too little to change what is learned; 10 leave room in a small
    data set.
    """
    return max(10, count // 100)


class BadImages:
    """Which images could not be read; shared by the loading processes of one process.

    Args:
        count: images in the data set.
        limit: how many of them may be bad; one is always needed to be good.
        replace: True as in training, False as in evaluation (module docstring).
    """

    def __init__(self, count: int, limit: int, replace: bool) -> None:
        self.limit = min(limit, max(0, count - 1))
        self.replace = replace
        self._flags = torch.zeros(count, dtype=torch.bool).share_memory_()

    def __contains__(self, index: int) -> bool:
        return bool(self._flags[index])

    def __len__(self) -> int:
        return int(np.count_nonzero(self._flags.numpy()))

    @property
    def too_many(self) -> bool:
        """True when there are more than the limit: then nothing is read any more in place of others."""
        return len(self) > self.limit

    def indices(self) -> list[int]:
        """Return the dataset indices of the bad images, ascending."""
        return np.flatnonzero(self._flags.numpy()).tolist()

    def add(self, index: int) -> None:
        """Note a bad image."""
        self._flags[index] = True

    def clear(self) -> None:
        """Forget all of them: the next pass over the data set tries each again."""
        self._flags.zero_()

    def item_instead(self, index: int, read: Callable[[int], Any]) -> Any:
        """Note that image `index` is bad and give what comes in its place.

        Args:
            index: its dataset index.
            read: gives the item of an index, or raises ImageError.

        Returns:
            Another image's item; None in evaluation, and when too many are bad.
        """
        self.add(index)
        if self.replace:
            for other in np.random.default_rng(index).permutation(len(self._flags)).tolist():
                if self.too_many:
                    break
                try:
                    return read(other)
                except ImageError:
                    self.add(other)
        return None


def blank_item(index: int, width: int, height: int, has_labels: bool) -> tuple[Image.Image, dict[str, Any]]:
    """Give an item of an empty image, so that batches keep their size until all processes know."""
    target: dict[str, Any] = {"img_idx": index, "img_size": (width, height)}
    if has_labels:
        target |= {"bbox": np.zeros((0, 4), dtype=np.float32), "cls": np.zeros(0, dtype=np.int64)}
    return Image.new("RGB", (_BLANK_PX, _BLANK_PX), (128, 128, 128)), target


def find_bad_images(dataset: Any) -> tuple[Any, BadImages] | None:
    """Return the data set that keeps a `bad_images`, behind any subsets, and these; None where there is none."""
    while dataset is not None:
        if getattr(dataset, "bad_images", None) is not None:
            return dataset, dataset.bad_images
        dataset = getattr(dataset, "dataset", None)
    return None


class BadImageWatch:
    """Bring together what the processes of a run found, name it, and end all of them when it is too much.

    Args:
        dataset: a DetectionDatset whose `bad_images` is set.
        what: its name in messages, 'training' or 'validation'.
    """

    def __init__(self, dataset: Any, what: str) -> None:
        self.dataset, self.what = dataset, what
        self.bad: BadImages = dataset.bad_images
        self.named: dict[int, str] = {}  # dataset index -> file and reason, of all processes
        self._late = distributed.LateMax()

    def look(self) -> None:
        """Exchange when any process has found a new one by its last call; every process calls it as often, none waits.

        Raises:
            BadImagesError: see `exchange`.
        """
        if self._late(int(len(self.bad) > len(self.named))):
            self.exchange()

    def exchange(self, together: bool = True) -> int:
        """Exchange what was found, name the new ones, and return how many are bad; every process calls it together.

        In evaluation the count is that of the pass that ends here.

        Args:
            together: False: this process alone, which has seen the whole data set.

        Raises:
            BadImagesError: on all processes together, when there are more than the limit.
        """
        mine = self.bad.indices()
        fresh = {
            index: self._describe(index, n < _MAX_NAMED)
            for n, index in enumerate(index for index in mine if index not in self.named)
        }
        every = distributed.all_gather_object((mine, fresh)) if together else [(mine, fresh)]
        bad = sorted({index for indices, _ in every for index in indices})
        fresh = {index: text for _, texts in every for index, text in texts.items() if index not in self.named}
        self.named |= fresh
        if self.bad.replace:
            for index in bad:
                self.bad.add(index)
        else:
            self.bad.clear()
        if len(bad) > self.bad.limit:
            raise BadImagesError(self._error_text(bad))
        if (fresh or bad and not self.bad.replace) and distributed.is_primary():
            _logger.warning(
                "%d of %d %s images cannot be read (at most %d may be, --max-bad-images) and %s%s",
                len(bad),
                len(self.dataset),
                self.what,
                self.bad.limit,
                "others are trained on instead" if self.bad.replace else "count as images in which nothing was found",
                ": " + _list(list(fresh.values())) if fresh else "",
            )
        return len(bad)

    def _describe(self, index: int, with_reason: bool) -> str:
        info = self.dataset.parser.img_infos[index]
        if not with_reason:
            return shown(info["file_name"])
        try:
            read_image(Path(self.dataset.data_dir) / info["file_name"], info["width"], info["height"])
        except ImageError as error:
            return str(error)
        return f"{shown(info['file_name'])}: can be read again by now"

    def _error_text(self, bad: list[int]) -> str:
        everything = ", that is all of them" if len(bad) == len(self.dataset) else ""
        return (
            f"{len(bad)} of {len(self.dataset)} {self.what} images cannot be read{everything}; at most "
            f"{self.bad.limit} may be (--max-bad-images): {_list([self.named[index] for index in bad], 3)}. "
            f"See whether {self.dataset.data_dir} and the disk it is on are still there; mend these files, take "
            "them out of the json, or allow more."
        )


def _list(texts: list[str], limit: int = _MAX_NAMED) -> str:
    more = f"; and {len(texts) - limit} more" if len(texts) > limit else ""
    return "; ".join(text.removesuffix(".") for text in texts[:limit]) + more
