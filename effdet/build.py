"""From a resolved config to objects: data sets, loaders, the model. What train.py, validate.py and demo.py share."""
from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from timm_patches.fused_layers import convert_fused_layers
from timm_patches.same_padding import convert_same_padding

from . import device as device_layer
from .anchors import check_image_size
from .bench import DetBenchPredict
from .checkpoint import CheckpointError, extract_state_dict, load_checkpoint_file, load_state_dict_report
from .config import get_efficientdet_config
from .config.model_config import model_config_from_plain, published_model_name
from .config.schema import DataConfig, DemoModelConfig, EvalDataConfig, LossConfig, ModelConfig
from .data import SkipSubset, create_loader, resolve_input_config
from .data.augmentation import build_train_transform, describe_augmentation
from .data.bad_pictures import BadPictures, default_limit
from .data.categories import CategoryMap
from .data.coco import coco_paths
from .data.dataset_factory import open_coco
from .data.dataset_report import DatasetError
from .factory import create_model_from_config, set_pad_type
from .folding import fold_batch_norm
from .predictor import Predictor
from .tta import TtaBench, build_network_of_size, scaled_size

_logger = logging.getLogger(__name__)


def build_dataset(data: DataConfig | EvalDataConfig, split: str, num_classes: int | None = None,
                  stored: Mapping[str, Any] | None = None, crowd: str = "drop", seed: int | None = None) -> Any:
    """Open the training or the validation split that the config names; its unreadable pictures are put up with.

    Args:
        data: the data section.
        split: 'train' or 'val'.
        num_classes: class count asked for, checked against the json.
        stored: category map of a checkpoint, checked against the json.
        crowd: 'drop' or 'ignore'.
        seed: of the augmentations.

    Raises:
        ValueError: the config names no data, or the data contradict it; FileNotFoundError: something is absent.
    """
    images, ann = split_paths(data, split)
    dataset = open_coco(None, split, images=images, ann=ann, num_classes=num_classes, stored=stored, crowd=crowd,
                        seed=seed)
    report = dataset.parser.report
    if split == "train" and len(dataset) and not report.num_boxes:
        dropped = "".join(f", {reason}" for reason in report.reasons())
        raise DatasetError(f"{report.source} has no box to train on: {report.num_images} images, "
                           f"{report.num_annotations} annotations{dropped}. Annotate the pictures, or name another "
                           "file.")
    limit = default_limit(len(dataset)) if data.max_bad_images is None else data.max_bad_images
    dataset.bad_pictures = BadPictures(len(dataset), limit, replace=split == "train")
    return dataset


def split_paths(data: DataConfig | EvalDataConfig, split: str) -> tuple[Path, Path]:
    """Return the picture folder and the annotation file of a split, as `build_dataset` uses them.

    Raises:
        ValueError: the config names no data; FileNotFoundError: something is absent in the root.
    """
    images, ann = (data.train_images, data.train_ann) if split == "train" else (data.val_images, data.val_ann)
    if not (images and ann):
        if not data.root:
            raise ValueError(f"no data given: name a folder in COCO's layout with --root DIR, or the files with "
                             f"--{split}-images DIR --{split}-ann FILE")
        images_in_root, ann_in_root = coco_paths(data.root, split)
        images, ann = images or images_in_root, ann or ann_in_root  # one of the two may be given instead of the root's
    return Path(images), Path(ann)


def build_train_loader(dataset: Any, data: DataConfig, model_config: Any, batch_size: int, num_workers: int,
                       device: torch.device, seed: int, channels_last: bool) -> Any:
    """Make the loader of the augmented training split.

    Args:
        dataset: of `build_dataset`; its transform is set.
        data: the data section.
        model_config: gives input size, mean and std.
        batch_size: pictures a step of this process.
        num_workers: loading processes of this process.
        device: where batches go.
        seed: of shuffling and augmentation, the same on all ranks.
        channels_last: memory layout of the batches.
    """
    inputs = resolve_input_config({"fill_color": _fill_color(data)}, model_config)
    transform = build_train_transform(dataset, data, inputs)
    _logger.info("augmentation: %s", describe_augmentation(data))
    return create_loader(
        dataset, inputs["input_size"], batch_size, is_training=True, re_prob=data.reprob, re_mode=data.remode,
        re_count=data.recount, mean=inputs["mean"], std=inputs["std"], num_workers=num_workers, distributed=True,
        pin_mem=True, transform_fn=transform, device=device, seed=seed, channels_last=channels_last,
        multi_scale=multi_scale_sizes(data, inputs["input_size"][1:]))


def multi_scale_sizes(data: DataConfig, image_size: Sequence[int]) -> list[tuple[int, int]]:
    """Return the input sizes (height, width) to train at besides evaluating at `image_size`; none: only that one.

    Raises:
        ValueError: a number that does not fit the network's stride.
    """
    for longer in data.multi_scale:
        try:
            check_image_size(longer)
        except ValueError as error:
            raise ValueError(f"--multi-scale {longer}: {error}") from error
    return [scaled_size(image_size, longer / max(image_size)) for longer in data.multi_scale]


def build_eval_loader(dataset: Any, data: EvalDataConfig, model_config: Any, batch_size: int, num_workers: int,
                      device: torch.device, val_skip: int = 0, channels_last: bool = False) -> Any:
    """Make the loader of the validation split: letterboxed, in order, every image once over all processes.

    Args:
        dataset: of `build_dataset`; its transform is set.
        data: the data section.
        model_config: gives input size, mean and std.
        batch_size: pictures a step of this process.
        num_workers: loading processes of this process.
        device: where batches go.
        val_skip: take every Nth picture; 0 and 1: all.
        channels_last: memory layout of the batches.
    """
    inputs = resolve_input_config({"fill_color": _fill_color(data), "interpolation": data.interpolation}, model_config)
    if val_skip > 1:
        dataset = SkipSubset(dataset, val_skip)
    return create_loader(
        dataset, inputs["input_size"], batch_size, interpolation=inputs["interpolation"],
        fill_color=inputs["fill_color"], mean=inputs["mean"], std=inputs["std"], num_workers=num_workers,
        distributed=True, pin_mem=True, device=device, channels_last=channels_last)


def _fill_color(data: EvalDataConfig) -> Any:
    """Return the padding colour asked for, None to leave it to the model."""
    if data.fill_color == "mean":
        return None
    return (int(data.fill_color),) * 3


def _apply_model_overrides(config: Any, model: Any, loss: LossConfig | None = None) -> None:
    """Write the settings that a run gives (not None) over the model table's."""
    overrides = {
        "image_size": None if model.image_size is None else tuple(model.image_size),
        "soft_nms": model.soft_nms,
        "max_det_per_image": model.max_det,
        "max_detection_points": model.max_detection_points,
        "redundant_bias": getattr(model, "redundant_bias", None),
        "anchor_scale": getattr(model, "anchor_scale", None),
        "aspect_ratios": getattr(model, "aspect_ratios", None),
    }
    if loss is not None:
        overrides |= {"label_smoothing": loss.label_smoothing, "legacy_focal": loss.legacy_focal, "alpha": loss.alpha,
                      "gamma": loss.gamma, "delta": loss.delta, "box_loss_weight": loss.box_loss_weight}
    for key, value in overrides.items():
        if value is not None:
            config[key] = value
    if getattr(model, "drop_path", None) is not None:
        config.backbone_args = {**(config.backbone_args or {}), "drop_path_rate": model.drop_path}


def resolve_model_config(model: Any, loss: LossConfig | None = None) -> Any:
    """Return the model table's config with what the model and loss sections of a run set over it."""
    config = get_efficientdet_config(model.name)
    _apply_model_overrides(config, model, loss)
    return config


def build_model(model: ModelConfig, loss: LossConfig, num_classes: int) -> nn.Module:
    """Build the network of a training run with the weights it starts from.

    Args:
        model: the model section.
        loss: the loss section.
        num_classes: K, from the data.

    Returns:
        The network on the CPU.

    Raises:
        ValueError: a setting or a weight file does not fit the model.
    """
    config = resolve_model_config(model, loss)
    network = create_model_from_config(
        config, num_classes=num_classes, pretrained=True if model.pretrained == "url" else model.pretrained,
        pretrained_backbone=model.pretrained_backbone, pad_type=model.pad_type)
    if model.initial_checkpoint:
        state = extract_state_dict(load_checkpoint_file(model.initial_checkpoint), use_ema=None)
        load_state_dict_report(network, state, strict=True)
        _logger.info("weights of %s loaded", model.initial_checkpoint)
    if model.bn_momentum is not None:
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = model.bn_momentum
    return network


def place_model(model: nn.Module, device: torch.device, same_padding: str = "auto",
                channels_last: bool = False) -> nn.Module:
    """Move a network to a device and have it pad in the way that suits the device; both keep its numbers.

    Args:
        model: changed in place.
        device: where it will run.
        same_padding: 'pad', 'kernel', or 'auto' for the device's own; see timm_patches.same_padding.
        channels_last: memory layout of its weights.

    Returns:
        The same network.
    """
    mode = same_padding
    if mode == "auto":
        mode = "kernel" if device_layer.avoids_pad_operators(device) else "pad"
    convert_fused_layers(model, fused=False)
    report = convert_same_padding(model, mode)
    if mode == "kernel" and (report.converted or report.left):
        _logger.info("setting: layers pad by themselves instead of calling a pad operator: %s", report)
    if device_layer.is_host(device):
        convert_fused_layers(model)
    return model.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)


@dataclass
class Detector:
    """A network with weights, and what its checkpoint says about it."""

    model: nn.Module
    category_map: CategoryMap | None  # None for files that hold weights only
    source: str  # one line for the log


def load_detector(path: str, model: Any, use_ema: bool | None = None, num_classes: int | None = None) -> Detector:
    """Build the network of a checkpoint and load its weights.

    Args:
        path: a checkpoint of train.py, which says all there is to know; or any file with weights of a known model, such
            as the published ones, for which `model.name` is needed unless the file still has its published name.
        model: the model section of a script; what it sets goes before the checkpoint.
        use_ema: True for the averaged weights, False for the trained ones, None for the averaged ones if there are any.
        num_classes: class count asked for.

    Returns:
        The network in eval mode on the CPU.

    Raises:
        CheckpointError: the file is unusable, does not say which model it is, or contradicts what was asked for.
    """
    payload = load_checkpoint_file(path)
    state = extract_state_dict(payload, use_ema)
    name = model.name or payload.get("arch") or published_model_name(Path(path).name)
    if isinstance(payload.get("model_config"), Mapping):
        config = model_config_from_plain(payload["model_config"])
        if model.name and config.name != model.name:
            raise CheckpointError(f"{path} holds the model {config.name}, but --model {model.name} was asked for: "
                                  "leave --model out.")
    elif name:
        config = get_efficientdet_config(name)
        config.num_classes = _count_classes(state, config)
    else:
        raise CheckpointError(f"{path} holds weights only and does not say of which model: give --model NAME.")
    if num_classes is not None and num_classes != config.num_classes:
        raise CheckpointError(f"{path} has {config.num_classes} classes, but --num-classes {num_classes} was asked "
                              "for: leave --num-classes out, or train a new head with --pretrained.")
    _apply_model_overrides(config, model)
    if getattr(model, "pad_type", None) is not None:
        set_pad_type(config, model.pad_type)
    network = create_model_from_config(config, pretrained_backbone=False)
    load_state_dict_report(network, state, strict=True)
    stored = payload.get("category_map")
    averaged = use_ema is not False and "state_dict_ema" in payload
    source = (f"{config.name}, {config.num_classes} classes, {config.image_size[0]}x{config.image_size[1]}, "
              f"{'EMA' if averaged else 'trained'} weights of {path}")
    if payload.get("epoch") is not None:
        source += f", epoch {payload['epoch']}"
    return Detector(network.eval(), CategoryMap.from_dict(stored) if stored else None, source)


def _count_classes(state: Mapping[str, torch.Tensor], config: Any) -> int:
    """Return how many classes a state dict's class head has."""
    for key in ("class_net.predict.conv_pw.bias", "class_net.predict.conv.bias"):
        if key in state:
            return state[key].numel() // (len(config.aspect_ratios) * config.num_scales)
    raise CheckpointError(f"the weights have no class head of a {config.name}: their first keys are "
                          f"{', '.join(list(state)[:3])}. Is it another model?")


def load_published(model: Any) -> Detector:
    """Build a model with the published weights, or with a local file of them.

    Args:
        model: the model section; `pretrained` is 'url' or a path.
    """
    config = get_efficientdet_config(model.name or "tf_efficientdet_d0")
    _apply_model_overrides(config, model)
    network = create_model_from_config(config, num_classes=model.num_classes, pad_type=model.pad_type,
                                       pretrained=True if model.pretrained == "url" else model.pretrained)
    return Detector(network.eval(), None, f"{config.name}, {config.num_classes} classes, weights {model.pretrained}")


def build_predict_bench(model: nn.Module, device: torch.device, same_padding: str = "auto", flip: bool = False,
                        scales: Sequence[float] = (), nms: str = "exact") -> DetBenchPredict | TtaBench:
    """Put post-processing, and test-time augmentation if asked for, around a network.

    Args:
        model: a network with weights, placed on the device.
        device: where it runs.
        same_padding: see `place_model`.
        flip: also predict mirror images.
        scales: factors of the input size to predict at as well; each is rounded to the next valid size.
        nms: see `bench.DetBenchPredict`.

    Raises:
        ValueError: a scale that gives a size which is there already, or an NMS that is not to be had here.
    """
    bench = DetBenchPredict(model, nms=nms).to(device).eval()
    if not flip and not scales:
        return bench
    sizes = [tuple(model.config.image_size)]
    benches = [bench]
    for scale in scales:
        size = scaled_size(sizes[0], scale)
        if scale <= 0 or size in sizes:
            raise ValueError(f"scale {scale:g} of the input {sizes[0]} gives {size}, and {', '.join(map(str, sizes))} "
                             "(height, width) is predicted already: leave it out or choose another")
        sizes.append(size)
        network = place_model(build_network_of_size(model, size), device, same_padding)
        benches.append(DetBenchPredict(network, nms=nms).to(device).eval())
    return TtaBench(benches, flip)


def build_predictor(detector: Detector, model: DemoModelConfig, device_name: str = "auto", batch_size: int = 1,
                    flip: bool = False, scales: Sequence[float] = ()) -> Predictor:
    """Choose the device and its settings for this process, and put a detector on it.

    Args:
        detector: of `load_detector`.
        model: the model section.
        device_name: kind of device, or 'auto'.
        batch_size: pictures predicted together.
        flip: test-time augmentation; see `build_predict_bench`.
        scales: the same.
    """
    device = device_layer.pick_device(device_name)
    device_layer.set_device(device)
    device_layer.tune(device)
    place_model(detector.model, device, model.same_padding, device_layer.use_channels_last(device))
    if not scales:  # networks of other sizes are built from unfolded weights
        fold_batch_norm(detector.model, torch.zeros(1, 3, *detector.model.config.image_size, device=device))
    bench = build_predict_bench(detector.model, device, model.same_padding, flip, scales, model.nms)
    return Predictor(detector.model, device, detector.category_map, batch_size, bench=bench)


def load(checkpoint: str, device: str = "auto", batch_size: int = 8, use_ema: bool | None = None,
         model: str | None = None, image_size: tuple[int, int] | None = None, max_det: int | None = None,
         flip: bool = False, scales: Sequence[float] = ()) -> Predictor:
    """Load a detector for prediction: `effdet.load(checkpoint).predict(pictures)`.

    Args:
        checkpoint: a checkpoint of train.py, or any file with weights of a known model.
        device: 'auto', 'cpu', or another kind of device that `pick_device` knows.
        batch_size: pictures predicted together.
        use_ema: True for the averaged weights, False for the trained ones, None for the averaged ones if there are any.
        model: the model's name, for files that hold weights only.
        image_size: another input height and width in pixels than the checkpoint's.
        max_det: at most this many objects in a picture, instead of the model's own number.
        flip: test-time augmentation: also predict mirror images.
        scales: test-time augmentation: also predict at these factors of the input size.

    Returns:
        The predictor; see `Predictor.predict`.

    Raises:
        CheckpointError: the file is unusable or does not say which model it is; ValueError: no such device.
    """
    section = DemoModelConfig(name=model, image_size=None if image_size is None else list(image_size), max_det=max_det)
    return build_predictor(load_detector(checkpoint, section, use_ema), section, device, batch_size, flip, scales)
