"""A model that cannot learn eight images by heart has a bug: labels, loss, boxes or category ids."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from effdet.data.synthetic.dataset import make_synthetic_dataset

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_eight_images_are_learnt_by_heart_with_one_flag(tmp_path):
    make_synthetic_dataset(tmp_path / "data", num_train=12, num_val=1)
    command = [
        sys.executable,
        "train.py",
        "--root",
        tmp_path / "data",
        "--overfit",
        "8",
        "--image-size",
        "128",
        "--anchor-scale",
        "2",
        "--device",
        "cpu",
        "--output",
        tmp_path / "runs",
    ]
    done = subprocess.run([str(part) for part in command], cwd=REPO, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    last = done.stdout.splitlines()[-1]
    assert float(re.match(r"overfit: AP ([\d.]+): the images are learnt by heart", last)[1]) > 0.9
