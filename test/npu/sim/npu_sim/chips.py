"""Compare what a device was given with what CANN's sources and pages say of the operators on its chip (chips.yaml).

The fake operators take every dtype on every chip. Told here is which would run on the AI CPU, where a kernel is slow
and in the way of what follows, and which a chip does not have by its page. An operator that the table does not know is
told as well: look at its page and its L0 kernel, and add it.
Limit: operators of the older kind (aclop) are not looked at.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any


@functools.cache
def _table() -> dict[str, Any]:
    import yaml

    return yaml.safe_load(Path(__file__).with_name("chips.yaml").read_text())


def concern(soc: str, name: str, dtypes: tuple[str, ...]) -> str | None:
    """Say what a chip makes of an operator, None where nothing speaks against it.

    Args:
        soc: the chip, such as Ascend910A.
        name: the operator, such as aclnnScatter.
        dtypes: of its tensors, in the order of its arguments.

    Returns:
        'aclnnScatter: int64 on the AI CPU', 'aclnnBatchNormStats: bfloat16 refused', 'aclnnGather: not supported',
        'aclnnFoo: unknown', or None.
    """
    if not name.startswith("aclnn"):
        return None
    table = _table()
    generation = table["generations"][soc]
    kernels = [entry for entry in table["ai_core"] if name in entry["operators"]]
    for kernel in kernels:
        given = [dtypes[index] for index in kernel["tensors"] if index < len(dtypes)]
        # Of tensors of several dtypes the operator casts all but one first, so that one on the AI cores is enough.
        if given and not set(given) & set(kernel["dtypes"][generation]):
            return f"{name}: {given[0]} on the AI CPU"
    for entry in table["refused"]:
        refused = set(dtypes).intersection(entry["dtypes"][generation])
        if name in entry["operators"] and refused:
            return f"{name}: {min(refused)} refused"
    for entry in table["unsupported"]:
        if generation in entry["generations"] and any(fnmatch(name, operator) for operator in entry["operators"]):
            return f"{name}: not supported"
    return None if kernels or name in table["listed"] else f"{name}: unknown"


def concerns(soc: str, rows: Iterable[tuple[str, tuple[str, ...], int]]) -> Counter[str]:
    """Count the launches that something speaks against: rows are (name, dtypes, launches)."""
    counted: Counter[str] = Counter()
    for name, dtypes, launches in rows:
        if text := concern(soc, name, dtypes):
            counted[text] += launches
    return counted
