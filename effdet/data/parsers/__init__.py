"""The names that users of effdet 0.4.1 know for reading annotations."""

from .parser_config import CocoParserCfg, OpenImagesParserCfg, VocParserCfg
from .parser_factory import create_parser

__all__ = ["CocoParserCfg", "OpenImagesParserCfg", "VocParserCfg", "create_parser"]
