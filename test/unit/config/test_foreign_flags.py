"""Flags of other trainers are answered with what serves for them here."""

from __future__ import annotations

import re

import pytest

from effdet.config.cli import REFUSED, parse_demo_args, parse_train_args, parse_validate_args
from effdet.config.foreign_flags import FOREIGN
from effdet.config.options import list_options
from effdet.config.schema import DemoConfig, RunConfig, ValidateConfig

PARSERS = {RunConfig: parse_train_args, ValidateConfig: parse_validate_args, DemoConfig: parse_demo_args}
KNOWN = {
    root: {"-c", "--config", *(flag for option in list_options(root).values() for flag in option.spellings)}
    for root in PARSERS
}


def refusal(capsys, parse, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(list(words))
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("flag", list(FOREIGN))
def test_a_foreign_flag_is_answered_in_our_words(flag, capsys):
    assert flag not in REFUSED and flag not in KNOWN[RunConfig]
    spellings = ((flag, "1"), (f"{flag}=1",), (f"--{flag[2:].replace('-', '_')}", "1"))
    for (root, parse), words in zip(PARSERS.items(), spellings, strict=True):
        if flag not in KNOWN[root]:
            assert FOREIGN[flag] in refusal(capsys, parse, *words)
    bare = flag[2:].replace("-", "_")
    assert FOREIGN[flag] in refusal(capsys, parse_train_args, f"{bare}=1"), "ultralytics writes name=value"


def test_every_flag_in_an_answer_exists():
    offered = {word for text in FOREIGN.values() for word in re.findall(r"(?<![\w-])--?[a-z][\w-]*", text)}
    everywhere = set().union(*KNOWN.values())
    negated = {"--no-" + flag[2:] for flag in everywhere}
    assert len(offered) > 20 and offered <= everywhere | negated
    assert len(FOREIGN) >= 40
