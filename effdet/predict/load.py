"""Load a detector: a checkpoint to a network with weights, a bench and a predictor around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from effdet.bench import DetBenchPredict
from effdet.checkpoint.manager import CheckpointError, extract_state_dict, load_checkpoint_file, load_state_dict_report
from effdet.checkpoint.state_dict import explain_bare_backbone, extract_score_threshold
from effdet.config.model_config import find_model_spec, published_model_name, stored_model_spec
from effdet.config.schema import DemoModelConfig
from effdet.data.coco.categories import CategoryMap
from effdet.efficientdet import EfficientDet
from effdet.factory import apply_settings, build_network, place_model, set_pad_type
from effdet.network.folding import fold_batch_norm
from effdet.ops.sizes import nearest_image_size, to_height_width
from effdet.runtime import device as device_layer

from .engines import EngineBench, EngineNetwork, is_engine_file, load_engine
from .predictor import Predictor
from .tta import TtaBench, build_network_of_size


@dataclass
class Detector:
    """A network with weights, and what its checkpoint says about it."""

    model: EfficientDet | EngineNetwork
    category_map: CategoryMap | None  # None for files that hold weights only
    source: str  # one line for the log
    score_threshold: dict[str, Any] | None = None  # recommended, see checkpoint/manager.py


def load_detector(path: str, model: Any, use_ema: bool | None = None, num_classes: int | None = None) -> Detector:
    """Build the network of a checkpoint and load its weights.

    Args:
        path: a checkpoint of train.py, which says all there is to know; or any file with weights of a known model, such
            as the published ones, for which `model.name` is needed unless the file still has its published name; or
            what effdet.export made of one, .onnx or OpenVINO's .xml.
        model: the model section of a script; what it sets goes before the checkpoint.
        use_ema: True for the averaged weights, False for the trained ones, None for the averaged ones if there are any.
        num_classes: class count asked for.

    Returns:
        The network in eval mode on the CPU.

    Raises:
        CheckpointError: the file is unusable, does not say which model it is, or contradicts what was asked for.
    """
    if is_engine_file(path):
        return _load_exported(path, model)
    payload = load_checkpoint_file(path)
    state = extract_state_dict(payload, use_ema)
    name = model.name or payload.get("arch") or published_model_name(Path(path).name)
    if isinstance(payload.get("model_config"), Mapping):
        config = stored_model_spec(payload["model_config"])
        if model.name and config.name != model.name:
            raise CheckpointError(
                f"{path} holds the model {config.name}, but --model {model.name} was asked for: leave --model out."
            )
    elif name:
        config = find_model_spec(name)
        config = config.replace(num_classes=_count_classes(state, config))
    else:
        raise CheckpointError(f"{path} holds weights only and does not say of which model: give --model NAME.")
    if num_classes is not None and num_classes != config.num_classes:
        raise CheckpointError(
            f"{path} has {config.num_classes} classes, but --num-classes {num_classes} was asked "
            "for: leave --num-classes out, or train a new head with --pretrained."
        )
    config = apply_settings(config, model)
    if getattr(model, "pad_type", None) is not None:
        config = set_pad_type(config, model.pad_type)
    network = build_network(config, pretrained_backbone=False)
    load_state_dict_report(network, state, strict=True)
    stored = payload.get("category_map")
    averaged = use_ema is not False and "state_dict_ema" in payload
    source = (
        f"{config.name}, {config.num_classes} classes, {config.image_size[0]}x{config.image_size[1]}, "
        f"{'EMA' if averaged else 'trained'} weights of {path}"
    )
    if payload.get("epoch") is not None:
        source += f", epoch {payload['epoch']}"
    categories = CategoryMap.from_dict(stored) if stored else None
    return Detector(network.eval(), categories, source, extract_score_threshold(payload, use_ema))


def _load_exported(path: str, model: Any) -> Detector:
    """Open a file of effdet.export; its size is fixed."""
    network, categories, threshold = load_engine(path)
    config = apply_settings(network.config, model)
    if config.image_size != network.config.image_size:
        height, width = network.config.image_size
        raise CheckpointError(f"{path} takes {height}x{width} px and no other size: leave --image-size out.")
    network.config = config
    source = f"{config.name}, {config.num_classes} classes, {config.image_size[0]}x{config.image_size[1]}, {path}"
    return Detector(network, categories, source, threshold)


def _count_classes(state: Mapping[str, torch.Tensor], config: Any) -> int:
    """Return how many classes a state dict's class head has."""
    for key in ("class_net.predict.conv_pw.bias", "class_net.predict.conv.bias"):
        if key in state:
            return state[key].numel() // (len(config.aspect_ratios) * config.num_scales)
    if bare := explain_bare_backbone(state):
        raise CheckpointError(f"the weights are not those of a {config.name}: {bare} of train.py")
    raise CheckpointError(
        f"the weights have no class head of a {config.name}: their first keys are "
        f"{', '.join(list(state)[:3])}. Is it another model?"
    )


def load_published(model: Any) -> Detector:
    """Build a model with the published weights, or with a local file of them.

    Args:
        model: the model section; `pretrained` is 'url' or a path.
    """
    spec = apply_settings(find_model_spec(model.name or "tf_efficientdet_d0"), model)
    network = build_network(
        spec,
        num_classes=model.num_classes,
        pad_type=model.pad_type,
        pretrained=True if model.pretrained == "url" else model.pretrained,
    )
    source = f"{spec.name}, {network.config.num_classes} classes, weights {model.pretrained}"
    return Detector(network.eval(), None, source)


def build_predict_bench(
    model: EfficientDet | EngineNetwork,
    device: torch.device,
    same_padding: str = "auto",
    flip: bool = False,
    scales: Sequence[float] = (),
    nms: str = "auto",
) -> DetBenchPredict | TtaBench | EngineBench:
    """Put post-processing, and test-time augmentation if asked for, around a network.

    Args:
        model: a network with weights, placed on the device.
        device: where it runs.
        same_padding: see `place_model`.
        flip: also predict mirror images.
        scales: factors of the input size to predict at as well; each is rounded to the next valid size.
        nms: see `bench.DetBenchPredict`.

    Raises:
        ValueError: a scale that gives a size which is there already, an NMS that is not to be had here, or what an
            exported file cannot do.
    """
    if isinstance(model, EngineNetwork):
        if not device_layer.is_host(device):
            raise ValueError("an exported file runs on the CPU: give --device cpu, or the checkpoint")
        if scales or model.has_nms and flip:
            raise ValueError(
                "an exported file has one input size, and with NMS inside no mirror images: use the checkpoint"
            )
        if model.has_nms:
            return EngineBench(model)
    bench = DetBenchPredict(model, nms=nms, drop_empty=True).to(device).eval()
    if isinstance(model, EngineNetwork) or not scales:
        return TtaBench([bench], flip) if flip else bench
    sizes = [to_height_width(model.config.image_size)]
    benches = [bench]
    for scale in scales:
        size = nearest_image_size(sizes[0], scale)
        if scale <= 0 or size in sizes:
            raise ValueError(
                f"scale {scale:g} of the input {sizes[0]} gives {size}, and {', '.join(map(str, sizes))} "
                "(height, width) is predicted already: leave it out or choose another"
            )
        sizes.append(size)
        network = place_model(build_network_of_size(model, size), device, same_padding)
        benches.append(DetBenchPredict(network, nms=nms, drop_empty=True).to(device).eval())
    return TtaBench(benches, flip)


def build_predictor(
    detector: Detector,
    model: DemoModelConfig,
    device_name: str = "auto",
    batch_size: int = 1,
    flip: bool = False,
    scales: Sequence[float] = (),
    upright: bool = True,
    npu_defaults: bool = False,
) -> Predictor:
    """Choose the device and its settings for this process, and put a detector on it.

    Args:
        detector: of `load_detector`.
        model: the model section.
        device_name: kind of device, or 'auto'.
        batch_size: images predicted together.
        flip: test-time augmentation; see `build_predict_bench`.
        scales: the same.
        upright: see Predictor.
        npu_defaults: see `device.tune`.
    """
    exported = isinstance(detector.model, EngineNetwork)
    device = device_layer.pick_device("cpu" if exported and device_name == "auto" else device_name)
    device_layer.set_device(device)
    device_layer.tune(device, keep_defaults=npu_defaults)
    place_model(detector.model, device, model.same_padding, device_layer.use_channels_last(device))
    if not scales and not exported:  # networks of other sizes are built from unfolded weights
        fold_batch_norm(detector.model, torch.zeros(1, 3, *detector.model.config.image_size, device=device))
    bench = build_predict_bench(detector.model, device, model.same_padding, flip, scales, model.nms)
    return Predictor(
        detector.model,
        device,
        detector.category_map,
        batch_size,
        bench=bench,
        upright=upright,
        score_threshold=detector.score_threshold,
    )


def load(
    checkpoint: str,
    device: str = "auto",
    batch_size: int = 8,
    use_ema: bool | None = None,
    model: str | None = None,
    image_size: tuple[int, int] | None = None,
    max_det: int | None = None,
    flip: bool = False,
    scales: Sequence[float] = (),
    upright: bool = True,
) -> Predictor:
    """Load a detector for prediction: `effdet.load(checkpoint).predict(images)`.

    Args:
        checkpoint: a checkpoint of train.py, any file with weights of a known model, or an exported .onnx or .xml
            file, which runs in onnxruntime or OpenVINO.
        device: 'auto', 'cpu', or another kind of device that `pick_device` knows.
        batch_size: images predicted together.
        use_ema: True for the averaged weights, False for the trained ones, None for the averaged ones if there are any.
        model: the model's name, for files that hold weights only.
        image_size: another input height and width in pixels than the checkpoint's.
        max_det: at most this many objects in an image, instead of the model's own number.
        flip: test-time augmentation: also predict mirror images.
        scales: test-time augmentation: also predict at these factors of the input size.
        upright: turn photographs as their EXIF orientation says; boxes are in the coordinates that a viewer shows.

    Returns:
        The predictor; see `Predictor.predict`.

    Raises:
        CheckpointError: the file is unusable or does not say which model it is; ValueError: no such device.
    """
    section = DemoModelConfig(name=model, image_size=None if image_size is None else list(image_size), max_det=max_det)
    return build_predictor(
        load_detector(checkpoint, section, use_ema), section, device, batch_size, flip, scales, upright
    )
