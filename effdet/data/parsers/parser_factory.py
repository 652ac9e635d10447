"""The names effdet's users know for reading annotations: `create_parser` and its configuration."""

import logging
from typing import Any

from ..coco.annotations import CocoParser, CocoParserCfg
from ..coco.categories import CategoryMap
from ..formats.open_images import OpenImagesParser, OpenImagesParserCfg
from ..formats.voc import VocParser, VocParserCfg

__all__ = [
    "CocoParser",
    "CocoParserCfg",
    "OpenImagesParser",
    "OpenImagesParserCfg",
    "VocParser",
    "VocParserCfg",
    "create_parser",
]

_logger = logging.getLogger(__name__)

# The 80 ids of COCO's detection classes: 1..90 without those that were never annotated.
_COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


def create_parser(name: str, **kwargs: Any) -> CocoParser:
    """Make an annotation parser by name, labelling as effdet did.

    effdet used category ids as labels. Ids 1..N give the same labels here; COCO's own 80 ids keep COCO's numbering,
    90 classes, because the published weights use it and callers of this function load them. `CocoParser` itself, like
    our own trainer, counts 0..C-1.

    Args:
        name: 'coco', 'voc' or 'openimages'.
        **kwargs: `cfg`, a `CocoParserCfg`, `VocParserCfg` or `OpenImagesParserCfg`.

    Raises:
        ValueError: unknown name.
    """
    if name == "voc":
        return VocParser(**kwargs)
    if name == "openimages":
        return OpenImagesParser(**kwargs)
    if name != "coco":
        raise ValueError(f"parser {name!r} is unknown, available: 'coco', 'voc', 'openimages'")
    parser = CocoParser(**kwargs)
    if parser.cat_ids == _COCO_IDS and kwargs["cfg"].category_map is None:
        _logger.info("COCO's 80 category ids: 90 classes by category id, as in published COCO weights")
        parser.category_map = CategoryMap.from_categories(parser.categories, num_classes=90)
    return parser
