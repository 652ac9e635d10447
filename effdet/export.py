"""Write a checkpoint's network for other runtimes: ONNX, TorchScript, a torch.export program, or CANN's .om.

`python -m effdet.export CHECKPOINT --format onnx`; docs/export.md has examples. What lives here: the exported module,
the writers, the command line. The NMS nodes of the ONNX graph are in nms_onnx.py, the call of CANN's converter in
runtime/atc.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import shlex
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effdet.checkpoint.io import ensure_writable, replacing
from effdet.config.model_spec import ModelSpec
from effdet.config.schema import DemoModelConfig
from effdet.data import resolve_input_config
from effdet.ops.boxes import decode_boxes
from effdet.ops.nms import select_candidates
from effdet.ops.nms_onnx import append_nms
from effdet.predict.load import Detector, load_detector
from effdet.runtime import atc
from effdet.runtime.console import add_ema_argument, make_tool_parser, one_line_errors

from .bench import DetBenchPredict

_logger = logging.getLogger(__name__)

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torchscript": ".ts.pt", "torch_export": ".pt2"}
OM = "om"  # made from an ONNX file by CANN's converter
OUTPUTS = ("raw", "detections")
DEFAULT_OPSET = 15
_FIRST_OPSET, _LAST_OPSET = 13, 20
_FIRST_OPSET_OF_NEW_EXPORTER = 18  # what torch.onnx.export writes with dynamo=True; below it needs dynamo=False


class _RawHeads(nn.Module):
    """Images to the heads' outputs: class logits of each level, then box deltas of each level, finest first."""

    def __init__(self, bench: DetBenchPredict) -> None:
        super().__init__()
        self.bench = bench

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        cls_outputs, box_outputs = self.bench.head_outputs(images)
        return (*cls_outputs, *box_outputs)


class _Candidates(nn.Module):
    """Images to decoded boxes [B, k, 4] xyxy, scores [B, k] and class_idx [B, k]: all but the suppression."""

    def __init__(self, bench: DetBenchPredict) -> None:
        super().__init__()
        self.bench = bench

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bench = self.bench
        logits, deltas, anchors, classes = select_candidates(
            *bench.head_outputs(images), bench.num_classes, bench.max_detection_points
        )
        return decode_boxes(deltas, bench.anchors.boxes[anchors], output_xyxy=True), logits.sigmoid(), classes


class _Detections(nn.Module):
    """Images to detections [B, max_det, 6], as the bench gives them in input pixels."""

    def __init__(self, bench: DetBenchPredict) -> None:
        super().__init__()
        self.bench = bench

    def forward(self, images: Tensor) -> Tensor:
        return self.bench(images)


def export(
    detector: Detector,
    path: str | Path,
    file_format: str = "onnx",
    outputs: str = "raw",
    batch_size: int | None = 1,
    opset: int = DEFAULT_OPSET,
) -> dict[str, Any]:
    """Write a detector's network into a file.

    Args:
        detector: of `build.load_detector`, on the CPU.
        path: the file; its folder is made.
        file_format: 'onnx', 'openvino' (the weights are in a .bin beside the .xml), 'torchscript' or 'torch_export'.
        outputs: 'raw' for the heads' outputs `class_p3`.. [B, A * K, h, w] and `box_p3`.. [B, A * 4, h, w];
            'detections' for one output [B, max_det, 6]: x_min, y_min, x_max, y_max in input pixels, score, class from
            1, by falling score, zero rows as padding.
        batch_size: number of images in a batch; None leaves it open.
        opset: ONNX operator set, 13..20; from 18 on torch's newer exporter is used, which also needs onnxscript.

    Returns:
        What the file carries about itself: names, sizes, normalisation, classes.

    Raises:
        ValueError: an unknown format, a setting that cannot be exported, or a package is missing.
    """
    _check(file_format, outputs, opset, detector)
    if file_format == "openvino":
        return _export_openvino(detector, Path(path), outputs, batch_size, opset)
    bench = DetBenchPredict(detector.model).eval()
    config = detector.model.config
    facts = _describe(detector, outputs, batch_size)
    images = torch.zeros(batch_size or 2, 3, *config.image_size)  # an open dimension must not be traced with size 1
    module = (_RawHeads if outputs == "raw" else _Candidates if file_format == "onnx" else _Detections)(bench).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    with replacing(path) as temporary:
        if file_format == "onnx":
            _write_onnx(module, images, temporary, facts, batch_size is None, opset)
        elif file_format == "torchscript":
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # tracing warns of shapes that become constants, and of its own age
                traced = torch.jit.trace(module, images, check_trace=False)
            torch.jit.save(traced, str(temporary), _extra_files={"effdet.json": json.dumps(facts)})
        else:
            shapes = ({0: torch.export.Dim("batch", min=1)},) if batch_size is None else None
            with torch.no_grad():
                program = torch.export.export(module, (images,), dynamic_shapes=shapes)
            with temporary.open("wb") as file:  # a path would have to end in .pt2
                torch.export.save(program, file, extra_files={"effdet.json": json.dumps(facts)})
    return facts


def _check(file_format: str, outputs: str, opset: int, detector: Detector) -> None:
    if file_format not in FORMATS or outputs not in OUTPUTS:
        raise ValueError(
            f"format '{file_format}' with outputs '{outputs}': the formats are {', '.join(FORMATS)}, the "
            f"outputs {', '.join(OUTPUTS)}"
        )
    if file_format not in ("onnx", "openvino"):
        return
    if not _FIRST_OPSET <= opset <= _LAST_OPSET:
        raise ValueError(f"opset {opset} is not in {_FIRST_OPSET}..{_LAST_OPSET}")
    needed = ["onnx", *(["onnxscript"] if opset >= _FIRST_OPSET_OF_NEW_EXPORTER else [])]
    needed += ["openvino"] if file_format == "openvino" else []
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--format {file_format} needs the package {' and '.join(missing)}: pip install {' '.join(missing)} "
            "(tested versions: requirements-dev.txt and -extras.txt), or choose --format torchscript or torch_export"
        )
    config = detector.model.config
    if outputs == "detections" and config.soft_nms:
        raise ValueError("soft-NMS is no ONNX operator: export with --no-soft-nms, or with --outputs raw")
    if outputs == "detections" and config.max_detection_points < config.max_det_per_image:
        raise ValueError(
            f"{config.max_detection_points} candidates cannot give {config.max_det_per_image} detections: "
            "raise max_detection_points or lower max_det"
        )


def _describe(detector: Detector, outputs: str, batch_size: int | None) -> dict[str, Any]:
    """Return what a user of the file must know, as json values."""
    config, categories = detector.model.config, detector.category_map
    inputs = resolve_input_config({}, config)
    levels = range(config.min_level, config.min_level + config.num_levels)
    raw = [*(f"class_p{level}" for level in levels), *(f"box_p{level}" for level in levels)]
    return {
        "model": config.name,
        "input": "images",
        "input_shape": [batch_size or "batch", *inputs["input_size"]],
        "outputs": raw if outputs == "raw" else ["detections"],
        "mean": list(inputs["mean"]),
        "std": list(inputs["std"]),
        "num_classes": int(config.num_classes),
        "class_names": list(categories.class_names) if categories else None,
        "category_ids": categories.idx_to_id.tolist() if categories else None,
        "category_map": categories.to_dict() if categories else None,
        "score_threshold": detector.score_threshold,
        "model_config": ModelSpec(config).to_plain(),
    }


def _write_onnx(
    module: nn.Module, images: Tensor, path: Path, facts: dict[str, Any], open_batch: bool, opset: int
) -> None:
    import onnx

    with_nms = facts["outputs"] == ["detections"]
    names = ["boxes", "scores", "classes"] if with_nms else facts["outputs"]
    settings: dict[str, Any] = {}
    if opset >= _FIRST_OPSET_OF_NEW_EXPORTER:
        settings = {"dynamo": True, "external_data": False, "verbose": False}
        if open_batch:
            settings["dynamic_shapes"] = ({0: torch.export.Dim("batch", min=1)},)
    else:
        settings = {"dynamo": False}
        if open_batch:
            settings["dynamic_axes"] = {name: {0: "batch"} for name in ("images", *names)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of shapes that become constants, and of its own age
        torch.onnx.export(
            module, (images,), str(path), input_names=["images"], output_names=names, opset_version=opset, **settings
        )
    content = onnx.load(str(path))
    if with_nms:
        config = module.bench.config
        append_nms(content, config.num_classes, config.max_det_per_image)
    onnx.helper.set_model_props(content, {"effdet": json.dumps(facts)})
    onnx.checker.check_model(content)
    onnx.save(content, str(path))


def _export_openvino(
    detector: Detector, path: Path, outputs: str, batch_size: int | None, opset: int
) -> dict[str, Any]:
    """Convert the ONNX file; .xml and .bin appear whole, the .xml, which names what is in the other, last."""
    import openvino

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        onnx_file, made = Path(folder, "model.onnx"), Path(folder, "model.xml")
        facts = export(detector, onnx_file, "onnx", outputs, batch_size, opset)
        model = openvino.convert_model(str(onnx_file))
        model.set_rt_info(json.dumps(facts), "effdet")
        openvino.save_model(model, str(made), compress_to_fp16=False)
        for suffix in (".bin", ".xml"):
            os.replace(made.with_suffix(suffix), path.with_suffix(suffix))
    return facts


def export_om(detector: Detector, path: Path, soc: str, batch_size: int | None, opset: int) -> dict[str, Any]:
    """Write the raw heads into an ONNX file beside `path`, and convert it for an Ascend chip.

    Args:
        detector: as for `export`.
        path: the .om file.
        soc: the chip that will run it, as CANN names it, such as Ascend310P3.
        batch_size: number of images in a batch.
        opset: ONNX operator set.

    Returns:
        What the ONNX file carries about itself.

    Raises:
        ValueError: as for `export`; also where CANN's converter takes no such file, or is not there.
        RuntimeError: the converter failed.
    """
    first, last = atc.OPSETS
    if batch_size is None:
        raise ValueError("an .om file has a fixed batch: give --batch N")
    if not first <= opset <= last:
        raise ValueError(f"atc takes the operator sets {first} to {last}, got --opset {opset}")
    atc.find_atc()  # before the minutes of the export
    onnx_path = path.with_name(path.name + ".onnx")  # not the name of another export's file
    facts = export(detector, onnx_path, "onnx", "raw", batch_size, opset)
    command = atc.convert(onnx_path, path, facts["input"], facts["input_shape"], soc)
    _logger.info("%s", shlex.join(command))
    return facts


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number from 1 nor 'dynamic'")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = make_tool_parser(
        "effdet.export",
        "Write a checkpoint's network for other runtimes.",
        "model_best.pth.tar --format onnx --outputs detections\n"
        "model_best.pth.tar --format torchscript --out raw.ts.pt\n"
        "weights.pth --model tf_efficientdet_d0 --batch dynamic\n"
        "model_best.pth.tar --format om --soc Ascend310P3",
    )
    parser.add_argument("checkpoint", help="a checkpoint of train.py, or any weights of a known model")
    parser.add_argument("--format", choices=[*FORMATS, OM], default="onnx", help="what is written (default onnx)")
    parser.add_argument("--out", metavar="FILE", help="default: the checkpoint's name with the format's suffix")
    parser.add_argument(
        "--outputs",
        choices=OUTPUTS,
        default="raw",
        help="raw (default): the heads' outputs; detections: decoding and NMS, a fixed number of rows",
    )
    parser.add_argument("--batch", type=_batch, default=1, metavar="N|dynamic", help="images per batch (default 1)")
    parser.add_argument(
        "--opset",
        type=int,
        default=DEFAULT_OPSET,
        metavar="N",
        help=f"ONNX operator set, {_FIRST_OPSET}..{_LAST_OPSET} (default {DEFAULT_OPSET})",
    )
    parser.add_argument("--soc", metavar="NAME", help="with om: the chip that will run the file, such as Ascend310P3")
    parser.add_argument("--model", metavar="NAME", help="the model's name, for files that hold weights only")
    parser.add_argument("--image-size", type=int, nargs="+", metavar="PX", help="other input height and width")
    parser.add_argument("--max-det", type=int, metavar="N", help="rows of the detections (default: the model's, 100)")
    add_ema_argument(parser)
    parser.add_argument(
        "--soft-nms",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="which NMS goes with the detections (default: the model's)",
    )
    args = parser.parse_args(arguments)
    if (args.format == OM) != bool(args.soc):
        parser.error("--format om and --soc NAME go together: give both, or neither")
    if args.format == OM and args.outputs != "raw":
        parser.error("an .om file has the raw heads: leave --outputs out; decoding and NMS run on the host")
    size = args.image_size and (args.image_size * 2)[:2]
    with one_line_errors("effdet.export"):
        section = DemoModelConfig(name=args.model, image_size=size, max_det=args.max_det, soft_nms=args.soft_nms)
        name = Path(args.checkpoint).name.removesuffix(".tar").removesuffix(".pth").removesuffix(".pt")
        path = (
            Path(args.out) if args.out else Path(args.checkpoint).with_name(name + {**FORMATS, OM: ".om"}[args.format])
        )
        if args.format == OM and path.suffix != ".om":
            raise ValueError(f"--out {path}: a file for Ascend chips ends in .om")
        ensure_writable(path, "--out")
        detector = load_detector(args.checkpoint, section, args.ema)
        if args.format == OM:
            facts = export_om(detector, path, args.soc, args.batch, args.opset)
        else:
            facts = export(detector, path, args.format, args.outputs, args.batch, args.opset)
    _logger.info("%s", detector.source)
    _logger.info(
        "%s: input images %s, outputs %s%s",
        path,
        facts["input_shape"],
        ", ".join(facts["outputs"]),
        f", opset {args.opset}" if args.format in ("onnx", OM) else "",
    )


if __name__ == "__main__":
    main()
