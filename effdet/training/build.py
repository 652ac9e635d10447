"""The objects of a training run, in the order in which they are made: data, network, optimizer, loaders, schedule."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from effdet.bench import DetBenchTrain
from effdet.checkpoint.backbone import BackboneSource
from effdet.checkpoint.state_dict import extract_state_dict, load_state_dict_report
from effdet.config.check import inert_settings
from effdet.config.load import replace_settings
from effdet.config.recipe import FEW_STEPS
from effdet.config.schema import RunConfig
from effdet.data import settle
from effdet.data.build import build_dataset, build_loader, multi_scale_sizes
from effdet.data.coco.categories import CategoryMap, find_empty_classes
from effdet.data.corrupt import BadImageWatch
from effdet.efficientdet import EfficientDet
from effdet.evaluator import CocoEvaluator
from effdet.factory import build_model, place_model
from effdet.ops.sizes import get_feat_sizes
from effdet.runtime import device as device_layer
from effdet.runtime import distributed
from effdet.runtime.progress import IN_LINES
from timm_patches.optim_factory import keeps_flat

from . import overfit
from .amp import Precision
from .ema import ModelEma
from .engine import Training
from .optim import build_optimizer, freeze_backbone, freeze_bn, freeze_stages
from .resume import check_fits
from .schedule import build_schedule

_logger = logging.getLogger("effdet.train")


@dataclass(frozen=True)
class Placement:
    """Where a run takes place: the device, how many processes there are, how many loader processes each of them has."""

    device: torch.device
    world: int
    workers: int
    channels_last: bool


@dataclass(frozen=True)
class Data:
    """Both splits and their classes."""

    train_set: Any
    val_set: Any
    categories: CategoryMap
    bad_images: BadImageWatch  # of the training split


@dataclass(frozen=True)
class Step:
    """What one training step needs."""

    model: EfficientDet
    ema: ModelEma | None
    precision: Precision
    optimizer: torch.optim.Optimizer
    bench: nn.Module  # DetBenchTrain, not wrapped


@dataclass(frozen=True)
class Loaders:
    """Batches of both splits, and what scores the second."""

    train: Any
    val: Any
    evaluator: CocoEvaluator
    batch_size: int  # images a step of this process

    def close(self) -> None:
        """End the loader processes."""
        self.train.close()
        self.val.close()


def settle_config(cfg: RunConfig, folder: Path, resumed: str = "") -> RunConfig:
    """Return the config with the files of both splits, and log what was found; what has to be made goes into a folder.

    Args:
        cfg: of the run.
        folder: the run's.
        resumed: the checkpoint that it continues: its run's files are used again.

    Raises:
        ValueError, OSError: no data, or they cannot be used.
    """
    earlier = [folder / settle.FOLDER, Path(resumed).parent / settle.FOLDER] if resumed else []
    parts = ("train",) if cfg.run.overfit else settle.PARTS
    data, lines = settle.settle_data(cfg.data, parts, folder / settle.FOLDER, earlier)
    for line in lines:
        _logger.info("data: %s", line)
    return dataclasses.replace(cfg, data=data)


def log_start(cfg: RunConfig, place: Placement, output_dir: Path) -> None:
    """Choose the device's settings and log them, and where the run takes place."""
    amp = cfg.amp
    lines = device_layer.tune(place.device, amp.hf32, amp.is_full_precision, cfg.run.npu_defaults)
    if cfg.run.deterministic:
        lines += device_layer.make_deterministic(place.device)
    if cfg.run.compile:
        lines.append("torch.compile of network and loss: the first step of each input size takes minutes")
    lines.append(
        f"learning rate {cfg.optim.lr:g} as given, for a global batch of {cfg.run.batch_size}: it is not scaled with it"
    )
    for line in lines:
        _logger.debug("setting: %s", line)
    if amp.is_full_precision and amp.loss_scale == "dynamic" and not device_layer.has_float32_range(place.device):
        _logger.warning(
            "float32 convolutions compute in float16 on this device: small gradients are lost, unless a loss scale is "
            "given (--loss-scale 128)"
        )
    for line in inert_settings(cfg):
        _logger.warning("setting: %s", line)
    size = cfg.run.batch_size
    each = size // place.world if isinstance(size, int) else size
    _logger.info(
        "%s on %s, %d process(es), batch %s (%s each), %d loader process(es) each, output %s",
        cfg.model.name,
        device_layer.describe(place.device),
        place.world,
        size,
        each,
        place.workers,
        output_dir,
        extra=IN_LINES,  # a terminal has it in a table, when the data have been opened
    )


def open_data(cfg: RunConfig, stored: Mapping[str, Any] | None) -> Data:
    """Open both splits and agree on the classes.

    Args:
        cfg: of the run.
        stored: category map of the checkpoint to go on from.

    Raises:
        ValueError: the data contradict the config, or each other.
    """
    if cfg.run.overfit and distributed.world_size() > 1:
        raise ValueError("--overfit trains on one device: start one process.")
    train_set = build_dataset(cfg.data, "train", cfg.model.num_classes, stored, cfg.data.crowd, cfg.run.seed)
    bad_images = BadImageWatch(train_set, "training")
    categories = train_set.parser.category_map
    if cfg.run.overfit:
        train_set, val_set = overfit.choose_images(train_set, cfg)
    else:
        val_set = build_dataset(cfg.data, "val", stored=categories, owner="the training split")
    if cfg.data.workers is not None and cfg.data.workers > len(train_set):
        raise ValueError(
            f"{cfg.data.workers} loader processes (-j) for {len(train_set)} training images: some would "
            f"have nothing to do. Give at most {len(train_set)}."
        )
    _logger.debug("data: %d training and %d validation images, %s", len(train_set), len(val_set), categories)
    table = train_set.parser.box_table()
    empty = find_empty_classes(categories, set(table["category_id"][~table["crowd"]].tolist()))
    if empty:
        _logger.warning("data: classes without a box in training, which will not be found: %s", ", ".join(empty))
    return Data(train_set, val_set, categories, bad_images)


def build_step(
    cfg: RunConfig,
    place: Placement,
    num_classes: int,
    payload: Mapping[str, Any],
    source: str = "",
    backbone: BackboneSource | None = None,
) -> Step:
    """Build what one training step needs.

    Args:
        cfg: of the run.
        place: where; with a world of 1, the step is that of a process which is alone.
        num_classes: K.
        payload: checkpoint whose weights it starts from; may be empty.
        source: where that checkpoint came from.
        backbone: see `build_model`.

    Raises:
        ValueError: a setting or the checkpoint does not fit the model.
    """
    device, is_group = place.device, place.world > 1
    if payload:  # all weights come from there, and other files may be gone
        cfg = replace_settings(cfg, model={"pretrained": "", "initial_checkpoint": ""})
    model = build_model(cfg.model, cfg.loss, num_classes, backbone)
    if cfg.dist.sync_bn and is_group:
        distributed.convert_sync_batchnorm(model, equal_batches=True)  # in place
    if cfg.model.freeze_backbone:
        _logger.debug("backbone frozen: %s", freeze_backbone(model))
    if cfg.model.freeze_stages:
        _logger.debug("backbone stages frozen: %s", freeze_stages(model, cfg.model.freeze_stages))
    if cfg.model.freeze_bn:
        part = model.backbone if cfg.model.freeze_bn == "backbone" else model
        _logger.debug("batch norms frozen: %s", freeze_bn(part))
    place_model(model, device, cfg.model.same_padding, place.channels_last)
    if payload:
        check_fits(payload, source, cfg.model.name, list(model.config.image_size))
        load_state_dict_report(model, extract_state_dict(payload, use_ema=False), strict=True)
    ema = ModelEma(model, cfg.ema.decay, cfg.ema.warmup) if cfg.ema.enabled else None
    precision = Precision(device, cfg.amp.enabled, cfg.amp.opt_level, cfg.amp.dtype, cfg.amp.loss_scale)
    precision.prepare_model(model)
    optimizer = build_optimizer(
        model,
        cfg.optim.opt,
        cfg.optim.lr,
        cfg.optim.momentum,
        cfg.optim.weight_decay,
        cfg.optim.opt_eps,
        masters=precision.master_parameters(model),
        backbone_lr=cfg.optim.backbone_lr,
    )
    bench = DetBenchTrain(
        model,
        ignore_regions=cfg.data.crowd == "ignore",
        input_sizes=multi_scale_sizes(cfg.data, model.config.image_size),
        dense_targets=cfg.loss.dense_targets,
        normalize_over_ranks=is_group,
        compile_backend="inductor" if cfg.run.compile else "",
    )
    return Step(model, ema, precision, optimizer, bench.to(device))


def build_loaders(cfg: RunConfig, place: Placement, data: Data, model_config: Any, batch_size: int) -> Loaders:
    """Make the loaders of both splits, and the evaluator.

    Args:
        cfg: of the run.
        place: where.
        data: of `open_data`; the data sets' transforms are set.
        model_config: gives input size, mean and std.
        batch_size: images a step of this process.

    Raises:
        ValueError: the batches do not fit into shared memory, or the training set is smaller than a batch, or a batch
            norm would see a single value.
    """
    device, workers = place.device, place.workers
    last = len(data.train_set) % batch_size if cfg.run.overfit else 0  # elsewhere an incomplete batch is left out
    check_batch_norm(cfg, place, model_config, last or batch_size)
    shared = (cfg.data, model_config, batch_size, workers, device, cfg.run.seed, place.channels_last)
    # With --overfit there is no augmentation: images as the evaluation sees them.
    train = build_loader(data.train_set, *shared, is_training=not cfg.run.overfit)
    val = build_loader(data.val_set, *shared, val_skip=cfg.run.val_skip)
    evaluator = CocoEvaluator(
        val.dataset,
        distributed=True,
        max_det=max(100, model_config.max_det_per_image),
        all_images=True,
        min_score=0.0,
    )
    return Loaders(train, val, evaluator, batch_size)


def check_batch_norm(cfg: RunConfig, place: Placement, model_config: Any, batch_size: int) -> None:
    """Refuse a batch of one image where the coarsest level has one cell: a single value a channel has no variance.

    Args:
        cfg: of the run.
        place: where.
        model_config: gives input size and levels.
        batch_size: images in the smallest batch of this process.

    Raises:
        ValueError: says what to change.
    """
    images = batch_size * (place.world if cfg.dist.sync_bn else 1)
    if images > 1 or cfg.model.freeze_bn == "all":
        return
    stride = 2**model_config.max_level
    for size in (tuple(model_config.image_size), *multi_scale_sizes(cfg.data, model_config.image_size)):
        if get_feat_sizes(size, model_config.max_level)[-1] == (1, 1):
            raise ValueError(
                f"a batch of one image of {size[0]}x{size[1]} gives the batch norms of the coarsest level a single "
                f"value a channel: use -b {2 * place.world} or more, an --image-size above {stride}, or --freeze-bn"
                + (", or --sync-bn" if place.world > 1 else "")
            )


def build_training(cfg: RunConfig, place: Placement, step: Step, steps_per_epoch: int) -> tuple[Training, int]:
    """Add the schedule, and over several processes the exchange of gradients, to a step.

    Args:
        cfg: of the run.
        place: where.
        step: of `build_step`.
        steps_per_epoch: batches.

    Returns:
        What `engine.train_one_epoch` trains, and the number of epochs with the cooldown.

    Raises:
        ValueError: the optimizer cannot exchange gradients in the way that was asked for.
    """
    sched, updates = cfg.sched, -(-steps_per_epoch // cfg.optim.grad_accum)
    schedule, epochs = build_schedule(
        step.optimizer,
        sched.sched,
        sched.epochs,
        sched.warmup_epochs,
        sched.warmup_lr,
        sched.min_lr,
        sched.cooldown_epochs,
        sched.lr_noise,
        sched.lr_noise_pct,
        sched.lr_noise_std,
        cycle_mul=sched.lr_cycle_mul,
        cycle_limit=sched.lr_cycle_limit,
        decay_epochs=sched.decay_epochs,
        decay_milestones=sched.decay_milestones,
        decay_rate=sched.decay_rate,
        patience=sched.patience_epochs,
        seed=cfg.run.seed,
        updates_per_epoch=updates,
        per_epoch=sched.per_epoch,
    )
    if updates < FEW_STEPS and not cfg.run.overfit:
        _logger.warning(
            "an epoch has %d updates, so that this run learns from %d in all: for few images give a smaller -b "
            "(or more --epochs)",
            updates,
            updates * epochs,
        )
    bench, flat_exchange = step.bench, False
    if cfg.dist.grad_exchange == "flat" and not keeps_flat(step.optimizer):
        raise ValueError(
            f"--grad-exchange flat needs an optimizer that keeps gradients in one tensor, which {cfg.optim.opt} on "
            f"{place.device.type} does not: leave it out, or take an --opt that docs/ascend.md names for it"
        )
    if place.world > 1:
        flat_exchange = cfg.dist.grad_exchange != "buckets" and keeps_flat(step.optimizer)
        ids = None if place.device.type == "cpu" else [place.device.index]
        with warnings.catch_warnings():  # torch 2.13 has another name for it, which earlier ones do not know
            warnings.simplefilter("ignore", FutureWarning)
            bench = DistributedDataParallel(bench, device_ids=ids, broadcast_buffers=False)
    training = Training(
        bench,
        step.model,
        step.optimizer,
        schedule,
        step.precision,
        place.device,
        step.ema,
        (cfg.optim.clip_grad or None, cfg.optim.clip_mode),
        cfg.optim.grad_accum,
        cfg.run.log_interval,
        steps_per_epoch * epochs,
        cfg.run.max_steps,
        cfg.run.max_skipped,
        flat_exchange=flat_exchange,
    )
    return training, epochs


def uneven_models(cfg: RunConfig, place: Placement, training: Training) -> dict[str, torch.nn.Module]:
    """Return the networks whose batch-norm statistics differ between the processes within an epoch."""
    if place.world == 1 or cfg.dist.sync_bn:
        return {}
    return {"model": training.model} | ({"ema": training.ema.module} if training.ema else {})
