"""Switch a model config between read-only and writeable."""
from omegaconf import DictConfig, OmegaConf


def set_config_readonly(conf: DictConfig) -> None:
    """Make a config read-only: assignments to it raise omegaconf.ReadonlyConfigError."""
    OmegaConf.set_readonly(conf, True)


def set_config_writeable(conf: DictConfig) -> None:
    """Allow assignments to a config again."""
    OmegaConf.set_readonly(conf, False)
