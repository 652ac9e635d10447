"""The parser of Open Images' annotations, where effdet has it."""

from ..coco.parser import Parser
from ..formats.open_images import OpenImagesParser, OpenImagesParserCfg

__all__ = ["OpenImagesParser", "OpenImagesParserCfg", "Parser"]
