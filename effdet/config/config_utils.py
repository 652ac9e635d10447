"""Switch a model config between read-only and writeable."""

from typing import Any

from omegaconf import OmegaConf

from .model_spec import ModelSpec


def set_config_readonly(conf: Any) -> None:
    """Make a config read-only: assignments to it raise omegaconf.ReadonlyConfigError. A ModelSpec is it always."""
    if not isinstance(conf, ModelSpec):
        OmegaConf.set_readonly(conf, True)


def set_config_writeable(conf: Any) -> None:
    """Allow assignments to a config again; a ModelSpec stays as it is, see `ModelSpec.replace`."""
    if not isinstance(conf, ModelSpec):
        OmegaConf.set_readonly(conf, False)
