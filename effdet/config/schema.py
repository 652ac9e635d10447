"""Every setting of a run, declared once: name, type, default, unit and range, flag, help text.

`RunConfig` belongs to train.py, `ValidateConfig` to validate.py, `DemoConfig` to demo.py. An instance never changes:
what is known later makes a new one (`load.replace_settings`). The sections of the latter two are in eval_schema.py.
What a declaration means is in options.py, where the values come from in load.py, what they must fulfil together in
check.py; no argument parsing, no file access and no torch here.
"""

from dataclasses import dataclass, field

from .eval_schema import (
    DEVICE_TEXT,
    JSON_TEXT,
    NPU_DEFAULTS_TEXT,
    PLAIN_TEXT,
    DemoModelConfig,
    DemoRunSectionConfig,
    EvalAmpConfig,
    EvalDataConfig,
    EvalDistConfig,
    EvalModelConfig,
    EvalRunSectionConfig,
)
from .options import setting

_SCHEDULES = ("cosine", "tanh", "poly", "step", "multistep", "plateau", "constant", "none")


# ---- sections: training's adds to evaluation's, that to the demo's; the docstring heads the section in --help-all ----


@dataclass(frozen=True)
class ModelConfig(EvalModelConfig):
    """Choose the network and the weights it starts from."""

    name: str = setting("tf_efficientdet_d0", "model name", flags="--model -m")
    initial_checkpoint: str = setting("", "start from the weights of this file, nothing else of it", metavar="PATH")
    anchor_scale: float | None = setting(None, "anchor size in multiples of a level's stride", above=0)
    anchors: str = setting(
        "table", "'auto': fit anchor scale and aspect ratios to the training boxes", choices=("table", "auto")
    )
    aspect_ratios: list[float] | None = setting(
        None, "width / height of the anchors; published weights need three", above=0, metavar="R,R,R"
    )
    drop_path: float | None = setting(None, "stochastic depth rate of the backbone", low=0, below=1)
    pretrained_backbone: str | None = setting(
        None,
        "ImageNet weights that the backbone starts from: 'auto' (of an installed package, of timm's cache, else "
        "downloaded), a FILE, or a NAME of timm's; --no-pretrained-backbone: random weights",
        bare="auto",
        negatable=True,
        metavar="auto|FILE|NAME",
        none="auto, without a network; random weights and a warning where there are none",
    )
    freeze_backbone: bool = setting(False, "do not train the backbone")
    freeze_stages: int = setting(
        0, "keep the first N stages of the backbone as they are, the stem being the first; faster", low=0, high=8
    )
    freeze_bn: str = setting(
        "",
        "keep batch-norm statistics and affine weights: all, or the backbone's",
        bare="all",
        negatable=True,
        choices=("", "all", "backbone"),
    )
    freeze_bn_epochs: int = setting(
        0, "last N epochs with fixed batch-norm statistics, as evaluation has; for short runs, small batches", low=0
    )
    bn_momentum: float | None = setting(None, "weight of a new batch in the batch-norm statistics", above=0, high=1)


@dataclass(frozen=True)
class DataConfig(EvalDataConfig):
    """Name the images and how they are augmented."""

    train_images: str = setting("", "folder of the training images, instead of the one in --root", metavar="DIR")
    train_ann: str = setting("", "training annotations in COCO format, instead of those in --root", metavar="JSON")
    max_bad_images: int | None = setting(
        None,
        "absent or unreadable images allowed in each split, replaced in training, without detections in evaluation",
        low=0,
        none="1 % of the split, at least 10",
    )
    train_interpolation: str = setting(
        "random", "resampling in training; 'random' draws one per image", choices=("random", "bilinear", "bicubic")
    )
    scale_min: float = setting(0.1, "scale jitter: smallest factor on the size that just fits the input", above=0)
    scale_max: float = setting(2.0, "scale jitter: largest factor; what is too large is cropped at random", above=0)
    hflip: float = setting(0.5, "probability of a horizontal flip", low=0, high=1)
    transform: str = setting(
        "", "your own function of (image, target), or an Albumentations pipeline", metavar="FILE.py:NAME"
    )
    aa: str = setting("", "AutoAugment policy for detection; v0 is the paper's", choices=("", "v0", "v1", "v2", "v3"))
    color_jitter: float = setting(0.0, "strength of random brightness, contrast and saturation; 0: off", low=0)
    mosaic: float = setting(0.0, "probability that four images are put together", low=0, high=1)
    mixup: float = setting(0.0, "probability that a further image is blended in", low=0, high=1)
    multi_scale: list[int] = setting(
        [], "longer side in pixels of the sizes to train at, one a batch", low=32, metavar="N [N ...]"
    )
    reprob: float = setting(0.0, "probability of random erasing", low=0, high=1)
    remode: str = setting("pixel", "what fills an erased area", choices=("const", "rand", "pixel"))
    recount: int = setting(1, "erased areas per image", low=1)
    crowd: str = setting(
        "drop", "'drop' crowd boxes from the targets or 'ignore' their area in the loss", choices=("drop", "ignore")
    )


@dataclass(frozen=True)
class LossConfig:
    """Override the loss of the model table."""

    label_smoothing: float | None = setting(
        None, "label smoothing of the focal loss", flags="--smoothing", low=0, below=1
    )
    dense_targets: bool = setting(
        False, "class loss from one-hot targets: the same numbers, more memory and time; for comparison"
    )
    legacy_focal: bool | None = setting(None, "the older focal loss formula")
    alpha: float | None = setting(None, "focal loss: weight of the positives", flags="", low=0, high=1)
    gamma: float | None = setting(None, "focal loss: focusing exponent", flags="", low=0)
    delta: float | None = setting(None, "Huber loss: where it turns linear, in anchor units", flags="", above=0)
    box_loss_weight: float | None = setting(None, "factor of the box loss in the sum", flags="", low=0)


@dataclass(frozen=True)
class OptimConfig:
    """Choose the optimiser and the clipping of gradients."""

    opt: str = setting(
        "fusedmomentum", "fusedmomentum, momentum, sgd or a timm name; the prefix lookahead_ wraps it in Lookahead"
    )
    lr: float = setting(0.32, "peak learning rate, for the global batch as it is", above=0)
    backbone_lr: float = setting(1.0, "factor of the backbone's learning rate; for pretrained weights below 1", above=0)
    lr_batch: int | None = setting(
        None,
        "with -b auto: batch that --lr was chosen for; for a smaller one the rate falls in proportion",
        low=1,
        flags="",
        none="the batch size of the YAML files, else 256",
    )
    momentum: float = setting(0.9, "momentum", low=0, below=1)
    weight_decay: float = setting(4e-5, "weight decay, not on biases and norms", low=0)
    opt_eps: float | None = setting(
        None, "epsilon of the optimisers that have one", above=0, none="the optimiser's own"
    )
    clip_grad: float = setting(10.0, "gradient clipping threshold; 0: off", low=0)
    clip_mode: str = setting(
        "norm", "clip the global norm, each value, or adaptively per unit", choices=("norm", "value", "agc")
    )
    grad_accum: int = setting(1, "batches whose gradients make one update", low=1)


@dataclass(frozen=True)
class SchedConfig:
    """Choose the learning-rate schedule and the length of the run."""

    sched: str = setting("cosine", "learning-rate schedule", choices=_SCHEDULES)
    epochs: int = setting(300, "epochs to train, without the cooldown", flags="--epochs --epoch", low=1)
    start_epoch: int | None = setting(None, "first epoch, counted from 0", low=0, none="after the resumed one, else 0")
    per_epoch: bool = setting(
        False,
        "change the learning rate once an epoch, as timm does by default, instead of at every update",
        flags="--lr-per-epoch",
    )
    warmup_epochs: float = setting(5.0, "epochs of linear warm-up, a fraction is allowed", low=0)
    warmup_lr: float = setting(1e-4, "learning rate at the start of the warm-up", low=0)
    min_lr: float = setting(1e-5, "lower bound of the learning rate", low=0)
    cooldown_epochs: int = setting(10, "epochs at min_lr after the schedule", low=0)
    lr_noise: list[float] | None = setting(
        None,
        "noise on the learning rate: fraction of the epochs where it starts and, optionally, ends",
        low=0,
        high=1,
        none="off",
        metavar="ON [OFF]",
    )
    lr_noise_pct: float = setting(0.67, "limit of the noise as a fraction of the learning rate", above=0)
    lr_noise_std: float = setting(1.0, "standard deviation of the noise", above=0)
    lr_cycle_mul: float = setting(1.0, "growth of the cycle length (cosine, tanh, poly)", above=0)
    lr_cycle_limit: int = setting(1, "number of cycles (cosine, tanh, poly)", low=1)
    decay_epochs: float = setting(30.0, "epochs between decays (step)", above=0)
    decay_milestones: list[int] = setting(
        [90, 180, 270], "epochs at whose start the rate drops (multistep)", flags="", low=1
    )
    decay_rate: float = setting(
        0.1, "factor of a decay (step, multistep, plateau), exponent (poly)", flags="--decay-rate --dr", above=0
    )
    patience_epochs: int = setting(10, "epochs without a better metric before a decay (plateau)", low=0)


@dataclass(frozen=True)
class EmaConfig:
    """Keep an exponential moving average (EMA) of the weights."""

    enabled: bool = setting(True, "keep an average of the weights; it is what is ranked", flags="--model-ema")
    decay: float = setting(0.9999, "weight of the past in the average", flags="--model-ema-decay", low=0, below=1)
    warmup: bool = setting(True, "let the decay grow to its value over the first updates", flags="--model-ema-warmup")


@dataclass(frozen=True)
class AmpConfig(EvalAmpConfig):
    """Choose the precision of the arithmetic and the loss scale."""

    loss_scale: float | str = setting("dynamic", "in float16: 'dynamic' or one fixed factor", metavar="N")


@dataclass(frozen=True)
class DistConfig(EvalDistConfig):
    """Run on several devices."""

    sync_bn: bool = setting(False, "batch-norm statistics over all devices")
    dist_bn: str = setting(
        "reduce", "before evaluation, average or send batch-norm statistics", choices=("", "reduce", "broadcast")
    )
    grad_exchange: str = setting(
        "auto",
        "how gradients are averaged: flat, all in one collective after the backward pass; buckets, those of "
        "DistributedDataParallel during it; auto is flat where the optimizer keeps gradients in one tensor, as on NPUs",
        choices=("auto", "flat", "buckets"),
    )
    max_restarts: int = setting(
        0, "with --device-list: start all processes again, up to N times, when one fails; they resume", low=0
    )
    hang_timeout: float = setting(
        1800.0, "seconds without progress after which the run ends, naming the device waited for; 0: never", low=0
    )


@dataclass(frozen=True)
class RunSectionConfig:
    """Say where the run takes place, how long, and what it keeps."""

    device: str = setting("auto", DEVICE_TEXT)
    npu_defaults: bool = setting(False, NPU_DEFAULTS_TEXT)
    batch_size: int | str = setting(
        256,
        "images per step over all devices; 'auto': as many as fit an accelerator's memory, found by trying",
        flags="-b --batch-size",
        low=1,
        choices=("auto",),
        metavar="N|auto",
    )
    seed: int = setting(42, "seed of every random generator; each process adds its rank", low=0)
    log_interval: int = setting(50, "steps between two log lines", low=1)
    output: str = setting("output/train", "folder that receives one folder per run", metavar="DIR")
    experiment: str = setting("", "name of the run's folder; empty: date, model and input size")
    recipe: str = setting(
        "auto",
        "settings under those given: 'finetune' and 'scratch' are for small sets, with and without ImageNet weights, "
        "'coco' for large ones; 'auto' chooses, unless --lr, --opt, --sched or --overfit are given, here or in YAML",
        choices=("auto", "finetune", "scratch", "coco"),
    )
    resume: str = setting(
        "", "checkpoint to go on from; 'auto': that of --experiment or the newest run, if any", metavar="PATH|auto"
    )
    overfit: int = setting(
        0,
        "learn the first N training images by heart, evaluate on them and say what is wrong if AP stays low (status 3)",
        low=0,
    )
    check: bool = setting(False, "check the data, say what was found, and exit: status 0 clean, 3 warnings, 4 errors")
    html: str = setting("", "with --check: also write what was found, with drawn samples, to this file", metavar="PATH")
    val_interval: int = setting(1, "epochs between two evaluations; the last epoch is always evaluated", low=1)
    val_skip: int = setting(0, "evaluate every Nth validation image only; 0: all", low=0)
    patience: int = setting(0, "stop after N evaluations in a row without a better AP; 0: never", low=0)
    save_every: int = setting(0, "keep a checkpoint every N epochs; 0: only the last and the best", low=0)
    keep_best: int = setting(10, "best checkpoints to keep", low=1)
    recovery_interval: int = setting(
        0, "also save every N updates within an epoch; 0: only when SIGTERM, SIGINT or SIGUSR1 ends the run", low=0
    )
    max_skipped: int = setting(
        50, "stop after N updates in a row skipped for inf or NaN, and keep their batch; 0: go on", low=0
    )
    deterministic: bool = setting(
        False, "algorithms that give the same bits each time, slower; operators without one are warned of"
    )
    save_errors: str = setting(
        "stop", "when a checkpoint cannot be written: 'stop' the run, or 'warn' and train on", choices=("stop", "warn")
    )
    channels_last: bool | None = setting(None, "channels-last memory layout", none="where the device is faster with it")
    compile: bool = setting(False, "train with torch.compile: equal up to rounding; minutes to compile, slower on CPUs")
    max_steps: int = setting(0, "stop training after N steps, then evaluate; 0: no limit", low=0)
    profile: int = setting(
        0, "trace N updates with the device's profiler, into profile/ of the run's folder; 0: none", low=0
    )
    tensorboard: bool = setting(False, "the same as --log-to tensorboard")
    log_to: list[str] = setting(
        [],
        "also send the numbers to these, each of which needs its package: 'tensorboard' (files in the run's folder), "
        "'wandb', 'swanlab'; services that are set to offline write into that folder, too",
        choices=("tensorboard", "wandb", "swanlab"),
        metavar="NAME,NAME",
    )
    plain: bool = setting(False, PLAIN_TEXT)
    json: bool = setting(False, JSON_TEXT)


# ---- one root per script ----


@dataclass(frozen=True)
class RunConfig:
    """Everything a training run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sched: SchedConfig = field(default_factory=SchedConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    amp: AmpConfig = field(default_factory=AmpConfig)
    dist: DistConfig = field(default_factory=DistConfig)
    run: RunSectionConfig = field(default_factory=RunSectionConfig)


@dataclass(frozen=True)
class ValidateConfig:
    """Everything an evaluation depends on."""

    model: EvalModelConfig = field(default_factory=EvalModelConfig)
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    amp: EvalAmpConfig = field(default_factory=EvalAmpConfig)
    dist: EvalDistConfig = field(default_factory=EvalDistConfig)
    run: EvalRunSectionConfig = field(default_factory=EvalRunSectionConfig)


@dataclass(frozen=True)
class DemoConfig:
    """Everything a demo depends on."""

    model: DemoModelConfig = field(default_factory=DemoModelConfig)
    run: DemoRunSectionConfig = field(default_factory=DemoRunSectionConfig)
