"""The parser of Pascal VOC's annotations, where effdet has it."""

from ..coco.parser import Parser
from ..formats.voc import VocParser, VocParserCfg

__all__ = ["Parser", "VocParser", "VocParserCfg"]
