"""Fuzz target (atheris) for the reader of annotation files: any bytes are taken, or refused with a documented error.

    python test/fuzz/fuzz_annotations.py [FOLDER] [libFuzzer's flags, such as -max_total_time=600]

FOLDER keeps interesting inputs between calls. An input that breaks the promise ends the call with its traceback and is
written to crash-*, which can be given as an argument to try it again. test_annotations.py runs it for seconds.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import atheris
import torch  # noqa: F401  not to be instrumented

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


with atheris.instrument_imports(include=["effdet.data"]):
    from annotation_promises import ATOMS, KEYS, VALID, check


def mutated(data: bytes) -> bytes:
    """Return a COCO json with fields that `data` chooses changed: bytes alone rarely get past the json parser."""
    choose = atheris.FuzzedDataProvider(data)
    tree = copy.deepcopy(VALID)

    def atom() -> Any:
        return copy.deepcopy(choose.PickValueInList(ATOMS))

    for _ in range(choose.ConsumeIntInRange(1, 6)):
        rows = tree[choose.PickValueInList(["images", "annotations", "categories"])]
        action = choose.ConsumeIntInRange(0, 9)
        row = rows[choose.ConsumeIntInRange(0, len(rows) - 1)] if isinstance(rows, list) and rows else None
        if action == 0:
            tree[choose.PickValueInList(list(tree))] = atom()
        elif action == 1 and isinstance(rows, list):
            rows.append(row if choose.ConsumeBool() else atom())
        elif not isinstance(row, dict):
            continue
        elif action == 2:
            row.pop(choose.PickValueInList(KEYS), None)
        elif action == 3 and isinstance(row.get("bbox"), list) and row["bbox"]:
            row["bbox"][choose.ConsumeIntInRange(0, len(row["bbox"]) - 1)] = atom()
        else:
            row[choose.PickValueInList(KEYS)] = choose.ConsumeUnicode(6) if action == 4 else atom()
    return json.dumps(tree).encode()


def one_input(folder: Path, data: bytes) -> None:
    if data:
        flags, data = data[0], data[1:]
        check(
            folder,
            mutated(data) if flags & 1 else data,
            has_labels=not flags & 2,
            crowd="ignore" if flags & 4 else "drop",
            with_files=bool(flags & 8),
        )


def fuzz(folder: Path) -> None:
    logging.disable(logging.CRITICAL)
    seeds = folder / "seeds"
    seeds.mkdir()
    (seeds / "valid").write_bytes(b"\0" + json.dumps(VALID).encode())
    (seeds / "fields").write_bytes(b"\1" + bytes(range(40)))
    atheris.Setup([*sys.argv, str(seeds)], functools.partial(one_input, folder))
    atheris.Fuzz()


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="effdet-fuzz-") as name:
        child = os.fork()  # libFuzzer ends its process without Python's cleaning up
        if not child:
            fuzz(Path(name))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main())
