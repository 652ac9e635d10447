"""CANN's converter `atc`: from an ONNX file with fixed shapes to an .om file for one kind of chip.

Only the call of the program lives here. **It was never run**: no CANN was at hand; its options are those of CANN 8.0's
"ATC Instructions" (hiascend.com).
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

_logger = logging.getLogger(__name__)

OPSETS = (11, 15)  # that atc documents for ONNX files
_ONNX = 5  # its number for the framework


def find_atc() -> str:
    """Return the path of atc.

    Raises:
        ValueError: it is not on PATH.
    """
    path = shutil.which("atc")
    if path is None:
        raise ValueError(
            "there is no 'atc' on PATH, which makes .om files: it comes with CANN's toolkit. Source CANN's environment "
            "in this shell (source test/set_npu_env.sh looks for it), or write --format onnx and convert that elsewhere"
        )
    return path


def convert(onnx: Path, om: Path, name: str, shape: Sequence[int], soc: str) -> list[str]:
    """Convert an ONNX file.

    Args:
        onnx: the file.
        om: the file to make, with the suffix .om; it is there only when atc succeeded.
        name: of the input.
        shape: of the input, every size fixed.
        soc: the chip that will run the file, as atc names it, such as Ascend310P3.

    Returns:
        The command that was run.

    Raises:
        ValueError: there is no atc; RuntimeError: it failed, with what it said last.
    """
    made = om.with_name(f".{om.stem}.part.om")
    command = [
        find_atc(),
        f"--framework={_ONNX}",
        f"--model={onnx}",
        f"--output={made.with_suffix('')}",  # atc adds the suffix
        "--input_format=NCHW",
        f"--input_shape={name}:{','.join(map(str, shape))}",
        f"--soc_version={soc}",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0 or not made.exists():
        made.unlink(missing_ok=True)
        said = " / ".join(line.strip() for line in done.stdout.splitlines() if line.strip())[-600:]
        raise RuntimeError(
            f"atc ended with status {done.returncode} and made no file; the ONNX file stays at {onnx}. It said: {said}"
        )
    os.replace(made, om)
    return command
