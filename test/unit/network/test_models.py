"""The table of models: configs, state-dict keys and shapes of all 47, and what building one refuses."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from effdet.config import get_efficientdet_config
from effdet.config.model_config import efficientdet_model_param_dict
from effdet.efficientdet import EfficientDet

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
CONFIGS = json.loads((GOLDEN / "model_configs.json").read_text())
SHAPES = json.loads(gzip.open(GOLDEN / "state_dict_shapes.json.gz").read())


def test_names():
    assert sorted(efficientdet_model_param_dict) == sorted(CONFIGS) and len(CONFIGS) == 47


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_config(name):
    config = json.loads(json.dumps(OmegaConf.to_container(get_efficientdet_config(name))))
    expected = {key: value for key, value in CONFIGS[name].items() if key != "_params"}
    assert config == expected


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_state_dict(name):
    """Keys, shapes and number of parameters are those of the published weights, so that these load strictly."""
    with torch.device("meta"):
        model = EfficientDet(get_efficientdet_config(name), pretrained_backbone=False)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == SHAPES[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == CONFIGS[name]["_params"]
