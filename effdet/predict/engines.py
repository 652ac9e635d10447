"""Exported files in place of a network: an ONNX file runs in onnxruntime, an OpenVINO file in OpenVINO, both on CPUs.

The files are those of effdet.export, which carry what their user must know. With raw outputs, post-processing is ours,
so that the boxes are those of the checkpoint; a file with NMS inside gives its own.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effdet.checkpoint.manager import CheckpointError
from effdet.config.model_config import stored_model_spec
from effdet.data.coco.categories import CategoryMap

Infer = Callable[[np.ndarray], Sequence[np.ndarray]]

PACKAGES = {".onnx": "onnxruntime", ".xml": "openvino"}
"""What runs a file, by suffix."""


class EngineNetwork(nn.Module):
    """An exported network, called as the network it was made of: images to the heads' outputs of each level."""

    def __init__(self, infer: Infer, facts: Mapping[str, Any]) -> None:
        """Take over a file's contents.

        Args:
            infer: runs float32 [B, 3, H, W] and returns the outputs in the file's order.
            facts: what the file says about itself.
        """
        super().__init__()
        self.config = stored_model_spec(facts["model_config"])
        self.image_size = tuple(self.config.image_size)
        self.batch_size = facts["input_shape"][0] if isinstance(facts["input_shape"][0], int) else None
        self.has_nms = facts["outputs"] == ["detections"]
        self._infer = infer

    def run(self, images: Tensor) -> list[Tensor]:
        """Return all outputs, joined over as many calls as a fixed batch needs."""
        pixels = images.contiguous().numpy()
        size = self.batch_size or len(pixels)
        parts = []
        for start in range(0, len(pixels), size):
            part = pixels[start : start + size]
            missing = size - len(part)
            full = np.concatenate([part, np.zeros((missing, *part.shape[1:]), part.dtype)]) if missing else part
            parts.append([output[: len(part)] for output in self._infer(full)])
        return [torch.from_numpy(np.concatenate(outputs)) for outputs in zip(*parts, strict=True)]

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return class logits [B, A * K, h, w] and box deltas [B, A * 4, h, w] of each level, finest first."""
        outputs = self.run(images)
        return outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :]


class EngineBench(nn.Module):
    """An exported network with decoding and NMS inside, called as a DetBenchPredict."""

    def __init__(self, model: EngineNetwork) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def head_outputs(self, images: Tensor) -> tuple[Tensor]:
        """Return the file's detections [B, n, 6] in input pixels, in a tuple."""
        return (self.model.run(images)[0],)

    def post_process(self, rows: Tensor, img_scale: Tensor | None, img_size: Tensor | None) -> Tensor:
        """Bring boxes from input pixels into those of the images, clipped to them; what has no area there goes."""
        boxes, rest = rows[..., :4], rows[..., 4:]
        if img_scale is not None:
            boxes = boxes * img_scale[:, None, None]
        if img_size is not None:
            boxes = torch.minimum(boxes.clamp(min=0), img_size.repeat(1, 2)[:, None])
        is_box = ((boxes[..., 2:] > boxes[..., :2]).all(-1, keepdim=True)).to(rows.dtype)
        return torch.cat([boxes, rest], -1) * is_box

    def forward(self, images: Tensor, img_info: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return detections [B, n, 6] as a DetBenchPredict does; rows of zeros may be between them."""
        info = img_info or {}
        return self.post_process(*self.head_outputs(images), info.get("img_scale"), info.get("img_size"))


def is_engine_file(path: str) -> bool:
    """Tell whether a file is for one of the engines, by its suffix."""
    return Path(path).suffix.lower() in PACKAGES


def load_engine(path: str) -> tuple[EngineNetwork, CategoryMap | None, dict[str, Any] | None]:
    """Open an exported file.

    Returns:
        What stands in for the network; the classes, None for a file of weights without names; the recommended score
        thresholds, None where the checkpoint had none.

    Raises:
        CheckpointError: no such file, the package that runs it is missing, or it is not of effdet.export.
    """
    suffix = Path(path).suffix.lower()
    package = PACKAGES[suffix]
    if not Path(path).is_file():
        raise CheckpointError(f"No file at {path}.")
    if importlib.util.find_spec(package) is None:
        raise CheckpointError(f"{path} needs the package {package}: pip install {package}, or give the checkpoint.")
    try:
        infer, text = (_open_onnx if suffix == ".onnx" else _open_openvino)(path)
    except Exception as error:  # both have classes of their own for it, onnxruntime's without a common base
        raise CheckpointError(f"{package} cannot open {path}: {str(error).splitlines()[0]}") from error
    facts = json.loads(text) if text else {}
    if "model_config" not in facts:
        raise CheckpointError(
            f"{path} does not say which model it is: write it anew with `python -m effdet.export CHECKPOINT`."
        )
    stored = facts["category_map"]
    categories = CategoryMap.from_dict(stored) if stored else None
    return EngineNetwork(infer, facts), categories, facts.get("score_threshold")


def _open_onnx(path: str) -> tuple[Infer, str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors alone
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map.get("effdet", "")
    return (lambda images: session.run(None, {session.get_inputs()[0].name: images})), facts


def _open_openvino(path: str) -> tuple[Infer, str]:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    facts = model.get_rt_info("effdet").astype(str) if model.has_rt_info("effdet") else ""
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(model, "CPU", settings)
    return (lambda images: [np.array(output) for output in compiled(images).values()]), facts
