"""What a run's weights start from: found, fetched and looked at before the data are read, and said in a line."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from effdet.checkpoint.backbone import (
    AUTO,
    COST,
    BackboneSource,
    explain_missing,
    read_backbone_weights,
    resolve_backbone,
)
from effdet.checkpoint.download import fetch
from effdet.checkpoint.io import CheckpointError, load_checkpoint_file
from effdet.checkpoint.state_dict import explain_bare_backbone, extract_state_dict
from effdet.config.model_config import find_model_spec
from effdet.config.schema import ModelConfig
from effdet.efficientdet import EfficientDet
from effdet.factory import resolve_model_config
from effdet.runtime import distributed

_logger = logging.getLogger("effdet.train")


class InitialWeights(NamedTuple):
    """What a run starts from."""

    origin: str  # a line for the log, the checkpoints and the report
    backbone: BackboneSource | None = None  # where the backbone's weights come from a file of its own


def find_initial_weights(model: ModelConfig, payload: Mapping[str, Any]) -> InitialWeights:
    """Find the weights that the settings name, and refuse those that cannot be had or are something else.

    Args:
        model: the model section. Without `pretrained_backbone`, ImageNet weights are used where they are at hand, and a
            warning says so where they are not.
        payload: checkpoint that the run continues, empty for a new run; it says what the run started from.

    Raises:
        ValueError: no such weights; the text says what to do.
    """
    if payload:
        return InitialWeights(str(payload.get("initial_weights", "")))
    if model.initial_checkpoint:
        _check_detector_file(model.initial_checkpoint)
        return InitialWeights(f"all of {model.initial_checkpoint}")
    if model.pretrained:
        return InitialWeights(f"what fits of {_find_published(model)}")
    if model.pretrained_backbone == "":
        return InitialWeights("random, as --no-pretrained-backbone asks for")

    def find() -> BackboneSource | None:
        named = model.pretrained_backbone is not None
        return resolve_backbone(model.pretrained_backbone or AUTO, model.name, fetch=named)

    source = distributed.run_on_primary(find)  # of a machine's processes one downloads
    if source is not None and not source.path.is_file() and source.kind != "file":
        source = find()  # another machine, with a cache of its own
    if source is None:
        _logger.warning(
            "there are no ImageNet weights for %s on this machine, so the backbone starts from random weights; %s. "
            "--pretrained-backbone downloads them. %s. --no-pretrained-backbone silences this.",
            model.name,
            COST,
            explain_missing(model.name),
        )
        return InitialWeights("random, as there are no ImageNet weights on this machine")
    with torch.device("meta"):
        network = EfficientDet(resolve_model_config(model), pretrained_backbone=False)
    read_backbone_weights(network.backbone, source)
    return InitialWeights(f"ImageNet backbone: {source.describe()}", source)


def _find_published(model: ModelConfig) -> str:
    """Return the file of --pretrained, which is there and fits a detector; published weights are fetched."""
    if model.pretrained != "url":
        _check_detector_file(model.pretrained)
        return model.pretrained
    url = find_model_spec(model.name).url
    if not url:
        raise CheckpointError(
            f"no weights of {model.name} are published: leave --pretrained out for ImageNet weights of the backbone, "
            "give --pretrained FILE, or choose another --model."
        )

    def find() -> Path:
        return fetch(url)

    path = distributed.run_on_primary(find)
    return str(path if path.is_file() else find())


def _check_detector_file(path: str) -> None:
    """Refuse a file that cannot be read, and a backbone without a detector around it."""
    state = extract_state_dict(load_checkpoint_file(path), use_ema=None)
    if bare := explain_bare_backbone(state):
        raise CheckpointError(f"{path}: {bare}")
