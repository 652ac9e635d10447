"""What build.py refuses."""

from __future__ import annotations

import pytest
import torch

from effdet.config import get_efficientdet_config
from effdet.config.cli import parse_train_args
from effdet.training.build import Placement, check_batch_norm


@pytest.mark.parametrize(
    ("batch", "size", "world", "more", "refused"),
    [
        (1, (128, 128), 1, [], True),
        (1, (64, 128), 1, [], True),
        (2, (128, 128), 1, [], False),
        (1, (128, 256), 1, [], False),
        (1, (256, 256), 1, ["--multi-scale", "128", "256"], True),
        (1, (128, 128), 1, ["--freeze-bn"], False),
        (1, (128, 128), 1, ["--sync-bn"], True),
        (1, (128, 128), 2, [], True),
        (1, (128, 128), 2, ["--sync-bn"], False),
    ],
)
def test_a_single_value_for_a_batch_norm_is_refused(batch, size, world, more, refused):
    cfg = parse_train_args(["--root", "x", *more])
    model_config = get_efficientdet_config("tf_efficientdet_lite0")
    model_config.image_size = size
    place = Placement(torch.device("cpu"), world, 0, True)
    if refused:
        with pytest.raises(ValueError, match=rf"-b {2 * world} .*above 128.*--freeze-bn"):
            check_batch_norm(cfg, place, model_config, batch)
    else:
        check_batch_norm(cfg, place, model_config, batch)
