"""The names that users of effdet 0.4.1 know for reading annotations."""

from ..coco.annotations import CocoParserCfg
from ..formats.open_images import OpenImagesParserCfg
from ..formats.voc import VocParserCfg
from .parser_factory import create_parser

__all__ = ["CocoParserCfg", "OpenImagesParserCfg", "VocParserCfg", "create_parser"]
