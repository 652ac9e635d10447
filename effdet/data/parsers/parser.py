"""The base class of annotation parsers, where effdet has it."""

from ..coco.parser import Parser

__all__ = ["Parser"]
