"""Seeds and the state of an accelerator's random generator."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> torch.Tensor | None:
    """Return the random generator's state of an accelerator as a byte tensor; None for the CPU."""
    return None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def set_rng_state(state: torch.Tensor | None, device: torch.device) -> None:
    """Set the random generator's state of an accelerator; a no-op for None or the CPU."""
    if device.type != "cpu" and state is not None:
        torch.get_device_module(device).set_rng_state(state.cpu(), device)
