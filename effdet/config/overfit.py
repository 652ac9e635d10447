"""What `train.py --overfit` sets, over YAML files and below the flags: a short run that learns pictures by heart."""
from typing import Any

OVERFIT: dict[str, Any] = {
    "model.bn_momentum": 0.1,
    "model.drop_path": 0.0,
    "model.freeze_bn_epochs": 5,
    "loss.label_smoothing": 0.0,
    "optim.opt": "adamw",
    "optim.lr": 0.005,
    "optim.weight_decay": 0.0,
    "optim.grad_accum": 1,
    "sched.sched": "cosine",
    "sched.epochs": 20,
    "sched.warmup_epochs": 1.0,
    "sched.cooldown_epochs": 0,
    "sched.warmup_lr": 0.0,
    "sched.min_lr": 0.0,
    "sched.lr_noise": None,
    "ema.enabled": False,
    "run.batch_size": 8,
    "run.log_interval": 10,
    "run.val_interval": 20,
    "run.keep_best": 1,
}
"""Dotted key -> value."""
