"""A model's configuration inside: plain, read-only, and equal to the omegaconf node that library users get."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from effdet import create_model
from effdet.config import get_efficientdet_config, set_config_readonly, set_config_writeable
from effdet.config.model_config import efficientdet_model_param_dict, find_model_spec, stored_model_spec
from effdet.config.model_spec import ModelSpec, change_config
from effdet.config.schema import LossConfig, ModelConfig
from effdet.efficientdet import HeadNet
from effdet.factory import build_model

FIELDS = {
    "name": "a",
    "image_size": (64, 96),
    "backbone_args": {"drop_path_rate": 0.1, "sizes": [1, (2, 3)]},
    "fpn_name": None,
}


def test_fields_are_read_as_attributes_and_as_keys():
    spec = ModelSpec(FIELDS)
    assert spec.image_size == spec["image_size"] == spec.get("image_size") == (64, 96)
    assert spec.backbone_args.sizes == (1, (2, 3)) and dict(**spec.backbone_args)["drop_path_rate"] == 0.1
    assert "fpn_name" in spec and spec.fpn_name is None and list(spec) == list(FIELDS) and len(spec) == 4
    assert "mean" not in spec and spec.get("mean") is None and getattr(spec, "mean", 7) == 7
    with pytest.raises(AttributeError, match="no field 'mean'"):
        spec.mean  # noqa: B018
    with pytest.raises(KeyError):
        spec["mean"]


def test_it_does_not_change():
    spec = ModelSpec(FIELDS)
    set_config_readonly(spec)
    set_config_writeable(spec)
    for target in (spec, spec.backbone_args):
        with pytest.raises(AttributeError, match="read-only"):
            target.drop_path_rate = 0.5
        with pytest.raises(AttributeError, match="read-only"):
            del target.name
        with pytest.raises(TypeError):
            target["name"] = "b"
    other = spec.replace(image_size=[32, 32], more=1)
    assert (other.image_size, other.more, other.name) == ((32, 32), 1, "a")
    assert spec == ModelSpec(FIELDS) and spec != other


def test_copies_are_equal_and_its_plain_form_loads_with_weights_only(tmp_path):
    spec = ModelSpec(FIELDS)
    assert copy.deepcopy(spec) == pickle.loads(pickle.dumps(spec)) == spec
    plain = {
        "name": "a",
        "image_size": [64, 96],
        "backbone_args": {"drop_path_rate": 0.1, "sizes": [1, [2, 3]]},
        "fpn_name": None,
    }
    assert spec.to_plain() == plain and ModelSpec(plain) == spec
    torch.save(plain, tmp_path / "plain.pth")
    assert ModelSpec(torch.load(tmp_path / "plain.pth", weights_only=True)) == spec
    assert stored_model_spec(plain).replace(**FIELDS).gamma == 1.5, "what a checkpoint lacks has its default"


@pytest.mark.parametrize("name", ["tf_efficientdet_d0", "tf_efficientdet_d7x", "cspdarkdet53m"])
def test_a_node_and_a_spec_of_a_model_say_the_same(name):
    node, spec = get_efficientdet_config(name), find_model_spec(name)
    assert isinstance(node, DictConfig) and ModelSpec(node) == spec
    assert OmegaConf.to_container(node) == spec.to_plain()
    node.backbone_args.extra = 1
    node.image_size[0] = 7
    assert find_model_spec(name) == spec == ModelSpec(get_efficientdet_config(name)), "the table is as it was"
    assert "extra" not in efficientdet_model_param_dict[name]["backbone_args"]


def test_a_change_makes_a_new_spec_and_stays_in_a_users_node():
    node, spec = get_efficientdet_config("tf_efficientdet_d0"), find_model_spec("tf_efficientdet_d0")
    assert change_config(node, num_classes=3) is node and node.num_classes == 3
    changed = change_config(spec, num_classes=3)
    assert changed.num_classes == 3 and spec.num_classes == 90 and changed == ModelSpec(node)


def test_a_run_builds_its_network_of_a_spec_and_a_caller_of_the_library_of_a_node():
    section = ModelConfig(name="tf_efficientdet_lite0", image_size=[64, 96], drop_path=0.25, pad_type="symmetric")
    network = build_model(section, LossConfig(gamma=2.0), 3)
    config = network.config
    assert type(config) is ModelSpec
    assert (config.image_size, config.num_classes, config.gamma, config.pad_type) == ((64, 96), 3, 2.0, "")
    assert dict(config.backbone_args) == {"drop_path_rate": 0.25, "pad_type": ""}
    assert type(copy.deepcopy(network).config) is ModelSpec
    network.reset_head(num_classes=5)
    assert network.config.num_classes == 5 and config.num_classes == 3
    model = create_model("tf_efficientdet_lite0", pretrained_backbone=False, image_size=64)
    assert isinstance(model.config, DictConfig)


def test_a_head_takes_any_object_with_the_fields():
    fields = find_model_spec("tf_efficientdet_d0").to_plain()
    del fields["head_act_type"], fields["head_bn_level_first"]
    head = HeadNet(SimpleNamespace(**fields), num_outputs=2)
    state = HeadNet(find_model_spec("tf_efficientdet_d0"), num_outputs=2).state_dict()
    assert {key: value.shape for key, value in head.state_dict().items()} == {
        key: value.shape for key, value in state.items()
    }
