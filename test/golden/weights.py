"""The weights, inputs and head outputs the golden files were made with; README.md beside this file says how."""

import math
import zlib

import numpy as np
import torch


def make_weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw the value of one state-dict entry from its key."""
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    x = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if key.endswith("running_mean"):
        return 0.1 * x
    if key.endswith("running_var"):
        return 1 + 0.2 * np.abs(x)
    if key.endswith("edge_weights"):
        return np.abs(1 + 0.2 * x)
    if len(shape) >= 2:
        return x / math.sqrt(math.prod(shape[1:]))
    return 1 + 0.1 * x if key.endswith("weight") else 0.1 * x


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Load the drawn weights into a model and return it in eval mode."""
    state = {
        key: torch.from_numpy(np.asarray(make_weight(key, tuple(value.shape)))).to(value.dtype)
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(state, strict=True)
    return model.eval()


def make_images(height: int, width: int) -> torch.Tensor:
    """Draw the input batch [2, 3, height, width]."""
    return torch.from_numpy(np.random.RandomState(0).standard_normal((2, 3, height, width)).astype(np.float32))


def make_head_outputs(height: int, width: int, num_classes: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Draw the head outputs of the detections_* files: class logits, then box deltas, for levels 3..7."""
    rng = np.random.RandomState(2)
    sizes = [(math.ceil(height / 2**level), math.ceil(width / 2**level)) for level in range(3, 8)]
    cls = [
        torch.from_numpy((rng.standard_normal((2, 9 * num_classes, h, w)) * 2 - 6).astype(np.float32)) for h, w in sizes
    ]
    box = [torch.from_numpy((rng.standard_normal((2, 36, h, w)) * 0.5).astype(np.float32)) for h, w in sizes]
    return cls, box
