"""Write docs/flags.md from schema.py: `python -m effdet.config.flags_page`, or `--out FILE` for another file.

What lives here: the page's form. Names, defaults, ranges and texts are the schema's; a test compares the page with it.
"""
import argparse
import typing
from collections.abc import Sequence
from pathlib import Path

from .cli import REFUSED, default_text, value_text
from .options import Option, list_options
from .schema import DemoConfig, RunConfig, ValidateConfig, flags_of, range_text

_HEAD = """# Every flag

Made by `python -m effdet.config.flags_page` from `effdet/config/schema.py`; do not edit it here.

Each row is one setting. `--flag value` and `section.field=value` set the same thing on the command line; in a YAML file
(`-c FILE`, repeatable) it is `field` below `section`. Later ones win: defaults, the model table, YAML files in their
order, flags, `section.field=value`. A switch is turned off by `--no-...`. Lists are written `0,1,2`.
"""
_OTHERS = (("validate.py", ValidateConfig), ("demo.py", DemoConfig))
_GONE = """## Flags that are gone

Flags of effdet 0.4.1's scripts and of the original Ascend port that are refused. The scripts give the same hints.

| flag | what to do |
|---|---|
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _row(key: str, option: Option) -> str:
    value = value_text(option)
    flags = ", ".join(f"`{flag}{' ' + value if value else ''}`" for flag in flags_of(option.item))
    flags = flags or ("`PICTURE ...`" if key == "run.images" else "(no flag)")
    limits = "" if option.item.metadata["choices"] else range_text(option.item)
    default = default_text(option) + (f"; {limits}" if limits else "")
    return f"| {_cell(flags)} | `{key}` | {_cell(default)} | {_cell(option.item.metadata['text'])} |"


def _table(rows: list[str]) -> str:
    return "\n".join(["| flag | setting | default, range | what it is |", "|---|---|---|---|", *rows, ""])


def flags_page() -> str:
    """Return the page as Markdown: train.py's settings by section, the other scripts', and the flags that are gone."""
    parts = [_HEAD, "## train.py\n"]
    options = list_options(RunConfig)
    for section, section_type in typing.get_type_hints(RunConfig).items():
        rows = [_row(key, option) for key, option in options.items() if key.startswith(f"{section}.")]
        parts += [f"### {section}\n\n{section_type.__doc__}\n", _table(rows)]
    for heading, root in _OTHERS:
        parts += [f"## {heading}\n", _table([_row(key, option) for key, option in list_options(root).items()])]
    parts.append(_GONE + "\n".join(f"| `{flag}` | {_cell(hint)} |" for flag, hint in REFUSED.items()) + "\n")
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m effdet.config.flags_page",
                                     description="Write the page of all flags from the schema.")
    parser.add_argument("--out", default="docs/flags.md", metavar="FILE", help="the page (default: docs/flags.md)")
    Path(parser.parse_args(arguments).out).write_text(flags_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
