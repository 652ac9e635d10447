"""Make a checkpoint that describes itself from weights of effdet 0.4.1 or of the same names.

`python -m effdet.commands.convert FILE --out FILE`. What lives here: the description that such files lack, and the
command line. Reading them is in io.py, and the names of their tensors are ours. The way back is
`python -m effdet.commands.clean FILE --weights-only`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from effdet.checkpoint.io import ensure_writable
from effdet.checkpoint.manager import CHECKPOINT_VERSION, save_checkpoint
from effdet.config.model_spec import ModelSpec
from effdet.config.schema import DemoModelConfig
from effdet.data.coco.annotations import CocoParser, CocoParserCfg
from effdet.data.coco.categories import resolve_category_map
from effdet.predict.load import load_detector
from effdet.runtime.console import add_ema_argument, make_tool_parser, one_line_errors

_logger = logging.getLogger(__name__)


def convert_checkpoint(
    path: str,
    model: str | None = None,
    ann: str | None = None,
    image_size: tuple[int, int] | None = None,
    use_ema: bool | None = None,
) -> dict[str, Any]:
    """Read weights, check them against their model, and add what prediction needs to know.

    Args:
        path: published weights, a checkpoint of effdet's or timm's trainer, or a plain state dict.
        model: the model's name; None where the file or its published name says it.
        ann: an annotation file in COCO format with the classes the weights were trained for, for ids and names; None
            leaves the classes without names.
        image_size: input height and width in pixels; None for the model table's.
        use_ema: True for the averaged weights, False for the trained ones, None for the averaged ones if there are any.

    Returns:
        A checkpoint as train.py writes it, without the state of a training.

    Raises:
        CheckpointError: unreadable, of an unknown model, or with tensors that do not fit it; names them.
        ValueError: `ann` is no annotation file, or its classes do not fit the weights.
    """
    detector = load_detector(path, DemoModelConfig(name=model, image_size=image_size and list(image_size)), use_ema)
    config = detector.model.config
    payload = {
        "version": CHECKPOINT_VERSION,
        "arch": config.name,
        "state_dict": detector.model.state_dict(),
        "model_config": ModelSpec(config).to_plain(),
        "image_size": list(config.image_size),
    }
    if ann is not None:
        categories = CocoParser(CocoParserCfg(ann_filename=ann, has_labels=False)).categories
        payload["category_map"] = resolve_category_map(categories, config.num_classes, detector.category_map).to_dict()
    elif detector.category_map is not None:
        payload["category_map"] = detector.category_map.to_dict()
    return payload


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = make_tool_parser(
        "effdet.commands.convert",
        "Make a checkpoint that describes itself from weights of effdet.",
        "tf_efficientdet_d0_34-f153e0cf.pth --out d0.pth\n"
        "weights.pth --model efficientdet_d1 --ann val.json --out d1.pth",
    )
    parser.add_argument("weights", help="published weights, a checkpoint of effdet's trainer, or a state dict")
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--model", metavar="NAME", help="where neither the file nor its published name says it")
    parser.add_argument(
        "--ann",
        metavar="JSON",
        help="annotations in COCO format with the classes of the weights, for their names and ids",
    )
    parser.add_argument("--image-size", type=int, nargs="+", metavar="PX", help="other input height and width")
    add_ema_argument(parser)
    args = parser.parse_args(arguments)
    size = args.image_size and tuple((args.image_size * 2)[:2])
    with one_line_errors("effdet.commands.convert"):
        ensure_writable(args.out, "--out")
        payload = convert_checkpoint(args.weights, args.model, args.ann, size, args.ema)
        save_checkpoint(args.out, payload)
    named = ", ".join(payload.get("category_map", {}).get("names", [])[:5])
    _logger.info(
        "%s: %s, %d tensors, input %dx%d, %d classes%s",
        args.out,
        payload["arch"],
        len(payload["state_dict"]),
        *payload["image_size"],
        payload["model_config"]["num_classes"],
        f" ({named}, ...)" if named else " without names: give --ann to add them",
    )


if __name__ == "__main__":
    main()
