"""The parser of COCO's annotations, where effdet has it."""

from ..coco.annotations import CocoParser, CocoParserCfg
from ..coco.parser import Parser

__all__ = ["CocoParser", "CocoParserCfg", "Parser"]
