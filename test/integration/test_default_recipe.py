"""What somebody gets who names a folder and nothing else: the default recipe on a small set of real images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_blood_cells_are_learned_with_defaults(shared_data, tmp_path):
    """292 images, ImageNet weights of the package. Three seeds gave AP .56 to .57; docs/configurations.md has them."""
    command = [
        sys.executable,
        REPO / "train.py",
        "--root",
        shared_data / "bccd",
        "--output",
        tmp_path,
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [*map(str, command), "--experiment", "bccd"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    stats = json.loads((tmp_path / "bccd" / "metrics.json").read_text())["stats"]
    assert stats["AP"] > 0.54 and stats["AP50"] > 0.88
