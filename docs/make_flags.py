#!/usr/bin/env python3
"""Write docs/flags.md from effdet/config/schema.py: `python docs/make_flags.py`.

What lives here: the page's form. Names, defaults, ranges and texts are the schema's; a test compares the page with it.
"""

import sys
import typing
from pathlib import Path

PAGE = Path(__file__).with_name("flags.md")
sys.path.insert(0, str(PAGE.parents[1]))

from effdet.config.cli import default_text, value_text  # noqa: E402
from effdet.config.effdet_flags import MOOT, REFUSED, RENAMED  # noqa: E402
from effdet.config.foreign_flags import FOREIGN  # noqa: E402
from effdet.config.options import Option, list_options  # noqa: E402
from effdet.config.schema import DemoConfig, RunConfig, ValidateConfig  # noqa: E402

_HEAD = """# Every flag

Made by `python docs/make_flags.py` from `effdet/config/schema.py`; do not edit it here.

Each row is one setting. `--flag value` and `section.field=value` set the same thing on the command line; in a YAML file
(`-c FILE`, repeatable) it is `field` below `section`. Later ones win: defaults, the model table, YAML files in their
order, flags, `section.field=value`. A switch is turned off by `--no-...`. Lists are written `0,1,2`.
"""
_OTHERS = (("validate.py", ValidateConfig), ("demo.py", DemoConfig))
_OTHER = """## Same flag, other meaning

A command line of effdet 0.4.1's train.py (its folder has no flag, and it has no word that only this train.py knows) is
not run, as its flags and defaults would train another way: the error has the whole line that trains the same. One of
its validate.py runs, and the log has the line as it was read. `-c` takes the args.yaml that its train.py leaves beside
its checkpoints, with the meaning it had there.

| flag | in effdet 0.4.1 | here | for effdet's |
|---|---|---|---|
"""
OTHER_MEANING = (
    ("`DIR`", "the data folder, without a flag", "accepted; beside flags of ours it is `--root DIR`", "`--root DIR`"),
    ("`-b`", "train.py: images of each process, 32; validate.py: of all, 128", "of all devices, 256 and 32",
     "`-b` times the number of processes"),
    ("`-j`", "train.py: loader processes of each process, 4", "of all devices, up to 4 for each",
     "`-j` times the number of processes"),
    ("`--model`", "tf_efficientdet_d1", "tf_efficientdet_d0; validate.py: the checkpoint's",
     "`--model tf_efficientdet_d1`"),
    ("`--lr`", "0.01, changed once an epoch", "0.32, for a batch of 256; changed at every update",
     "`--lr 0.01 --lr-per-epoch`"),
    ("`--opt`", "momentum", "fusedmomentum: the same numbers in less time", "nothing"),
    ("`--no-pretrained-backbone`", "the backbone starts from ImageNet weights without it", "from random ones",
     "`--pretrained-backbone`"),
    ("`--model-ema`", "off", "on, and what is ranked", "`--no-model-ema`"),
    ("`--model-ema-decay`", "0.9998 from the first update on", "0.9999, reached over the first updates",
     "`--model-ema-decay 0.9998 --no-model-ema-warmup`"),
    ("`--dist-bn`", "off", "reduce", "`--dist-bn ''`"),
    ("`--num-classes`", "train.py: 90, category ids are labels", "the categories of the annotation file",
     "nothing: ids may have gaps"),
    ("`--color-jitter`, `--aa`", "never had an effect", "augment the training images", "leave them out"),
    ("`--output`", "`DIR/train/RUN` is made", "`DIR/RUN` is made", "`--output DIR/train`"),
    ("`--no-resume-opt`", "with `--resume FILE`: without the optimizer's state", "gone",
     "`--initial-checkpoint FILE`, from epoch 0"),
    ("`--pretrained`", "validate.py: also without it, where no `--checkpoint` is given", "only with it",
     "`--pretrained`"),
    ("`--use-ema`", "off", "on where the checkpoint has averaged weights", "`--no-use-ema`"),
    ("`-c FILE`", "flat YAML", "sections; args.yaml of a run of effdet's is accepted", "`-c args.yaml`"),
)  # fmt: skip
_MOOT = """## Flags without effect

Accepted in any line, with one line in the log, where the value asks for what happens anyway.

| flag | values | what happens |
|---|---|---|
"""
_GONE = """## Flags that are gone

Flags of effdet 0.4.1's scripts and of the original Ascend port that are refused. The scripts give the same hints.

| flag | what to do |
|---|---|
"""
_FOREIGN = """
## Flags of other trainers

What serves here for flags of ultralytics, rf-detr, timm, mmdetection and detectron2. The scripts give the same hints.

| flag | what to do |
|---|---|
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _row(key: str, option: Option) -> str:
    value = value_text(option)
    flags = ", ".join(f"`{flag}{' ' + value if value else ''}`" for flag in option.spellings)
    flags = flags or ("`IMAGE ...`" if key == "run.images" else "(no flag)")
    limits = "" if option.choices else option.range_text
    default = default_text(option) + (f"; {limits}" if limits else "")
    return f"| {_cell(flags)} | `{key}` | {_cell(default)} | {_cell(option.text)} |"


def _table(rows: list[str]) -> str:
    return "\n".join(["| flag | setting | default, range | what it is |", "|---|---|---|---|", *rows, ""])


def flags_page() -> str:
    """Return the page as Markdown: the settings of each script, those of effdet 0.4.1, and foreign flags."""
    parts = [_HEAD, "## train.py\n"]
    options = list_options(RunConfig)
    for section, section_type in typing.get_type_hints(RunConfig).items():
        rows = [_row(key, option) for key, option in options.items() if key.startswith(f"{section}.")]
        parts += [f"### {section}\n\n{section_type.__doc__}\n", _table(rows)]
    for heading, root in _OTHERS:
        parts += [f"## {heading}\n", _table([_row(key, option) for key, option in list_options(root).items()])]
    parts.append(_OTHER + "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in OTHER_MEANING) + "\n")
    rows = [(flag, ", ".join(values) or "(switch)", why) for flag, (values, why) in MOOT.items()]
    rows += [(flag, "(switch)", f"what {name} does") for flag, name in RENAMED.items()]
    parts.append(_MOOT + "\n".join(f"| `{flag}` | {values} | {why} |" for flag, values, why in rows) + "\n")
    for heading, table in ((_GONE, REFUSED), (_FOREIGN.lstrip(), FOREIGN)):
        parts.append(heading + "\n".join(f"| `{flag}` | {_cell(hint)} |" for flag, hint in table.items()) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(flags_page(), encoding="utf-8")
