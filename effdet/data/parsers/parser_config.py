"""The parsers' settings, where effdet has them."""

from ..coco.annotations import CocoParserCfg
from ..formats.open_images import OpenImagesParserCfg
from ..formats.voc import VocParserCfg

__all__ = ["CocoParserCfg", "OpenImagesParserCfg", "VocParserCfg"]
