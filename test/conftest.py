"""What every test shares: thread counts, import order, where the shared data lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import timm_patches.torchvision_ops  # noqa: F401  must come before anything that imports timm

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers share the cores; threads on top of that make all of them slower


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of shared data sets beside the repository; skip the test where there is none."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the shared data sets at {folder}, which are not on this machine")
    return folder
