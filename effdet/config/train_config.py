"""The published training recipe of EfficientDet as a config node, for code written for effdet.

train.py does not read it: its own settings are in schema.py.
"""

from omegaconf import DictConfig, OmegaConf


def default_detection_train_config() -> DictConfig:
    """Return the published recipe's values. Source: google/automl, efficientdet/hparams_config.py."""
    return OmegaConf.create(
        {
            "skip_crowd_during_training": True,
            "input_rand_hflip": True,
            "train_scale_min": 0.1,
            "train_scale_max": 2.0,
            "autoaugment_policy": None,
            "momentum": 0.9,
            "learning_rate": 0.08,
            "lr_warmup_init": 0.008,
            "lr_warmup_epoch": 1.0,
            "first_lr_drop_epoch": 200.0,
            "second_lr_drop_epoch": 250.0,
            "clip_gradients_norm": 10.0,
            "num_epochs": 300,
            "weight_decay": 4e-5,
            "lr_decay_method": "cosine",
            "moving_average_decay": 0.9998,
            "ckpt_var_scope": None,
        }
    )
