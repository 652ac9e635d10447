"""The names effdet's users know for reading annotations: `create_parser` and its configuration."""

from typing import Any

from ..coco.annotations import CocoParser, CocoParserCfg
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

_PARSERS = {"coco": CocoParser, "voc": VocParser, "openimages": OpenImagesParser}


def create_parser(name: str, **kwargs: Any) -> CocoParser:
    """Make an annotation parser by name.

    Args:
        name: 'coco', 'voc' or 'openimages'.
        **kwargs: `cfg`, a `CocoParserCfg`, `VocParserCfg` or `OpenImagesParserCfg`.

    Raises:
        ValueError: unknown name.
    """
    if name not in _PARSERS:
        raise ValueError(f"parser {name!r} is unknown, available: {', '.join(map(repr, _PARSERS))}")
    return _PARSERS[name](**kwargs)
