"""Model configs (effdet's names) and run configs; omegaconf stays inside this folder."""

from .config_utils import set_config_readonly, set_config_writeable
from .fpn_config import get_fpn_config
from .model_config import default_detection_model_configs, get_efficientdet_config
from .train_config import default_detection_train_config

__all__ = [
    "default_detection_model_configs",
    "default_detection_train_config",
    "get_efficientdet_config",
    "get_fpn_config",
    "set_config_readonly",
    "set_config_writeable",
]
