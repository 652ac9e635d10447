"""The parser of data sets in other formats than COCO's: converted in memory, then treated as a COCO json."""

from collections.abc import Callable
from typing import Any

from ..coco.annotations import CocoParser, CocoParserCfg

EXACT = 12
"""Decimals for `make_coco` that leave boxes as they are: these go to the loader, not to a file."""


class ConvertedParser(CocoParser):
    """A CocoParser over a converted data set.

    Args:
        source: its name, for messages.
        read: makes the content of a COCO json.
        cfg: has_labels, bbox_yxyx, min_img_size, ignore_empty_gt and add_background as in effdet's parser configs.

    Raises:
        ValueError: add_background is off; DatasetError, a kind of it: errors in the data.
    """

    def __init__(self, source: str, read: Callable[[Any], dict[str, Any]], cfg: Any) -> None:
        if not cfg.add_background:
            raise ValueError("add_background=False is not supported: labels count from 1 here, 0 is the background")
        self._convert, self._source_cfg = read, cfg
        super().__init__(
            CocoParserCfg(
                source,
                has_labels=cfg.has_labels,
                bbox_yxyx=cfg.bbox_yxyx,
                min_img_size=cfg.min_img_size,
                ignore_empty_gt=cfg.ignore_empty_gt,
            )
        )

    def _read(self) -> dict[str, Any]:
        return self._convert(self._source_cfg)

    def _read_whole(self) -> dict[str, Any]:
        return self.coco_dict()
