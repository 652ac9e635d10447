"""`python -m effdet.data.formats ROOT --out DIR`: write a data set of any known form as COCO jsons.

The images stay in place. Training needs no such step: `train.py --root ROOT` does the same by itself.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effdet.checkpoint.io import replacing
from effdet.runtime.console import make_tool_parser, one_line_errors

from ..coco.read import collector_paused, read_json
from .found import FoundData
from .hold_out import hold_out, take_classes
from .recognise import recognise

_logger = logging.getLogger(__name__)


def read_part(found: FoundData, part: str) -> dict[str, Any]:
    """Return the content of a part's COCO json, read or converted."""
    ann = found.parts[part].ann
    if ann is not None:
        return read_json(ann)
    assert found.convert is not None  # FoundData: a part without a json is converted
    return found.convert(part)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = make_tool_parser(
        "effdet.data.formats",
        "Write a data set as COCO jsons, train.json, val.json and test.json; the images stay where they are.",
        "VOCdevkit --out converted\nmydata/data.yaml --out converted --val-split 0.2",
    )
    parser.add_argument("root", help="the data set's folder, or its data.yaml or json")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the jsons")
    parser.add_argument(
        "--val-split",
        type=float,
        default=0.0,
        metavar="X",
        help="share of the training images held out as val.json, where there is no validation part (default: none)",
    )
    parser.add_argument("--classes", nargs="+", default=[], metavar="NAME", help="these classes alone (default: all)")
    args = parser.parse_args(arguments)
    if not 0 <= args.val_split < 1:
        parser.error(f"--val-split {args.val_split:g}: must be at least 0 and below 1")
    with one_line_errors("effdet.data.formats"), collector_paused():
        found = recognise(args.root)
        _logger.info(found.sentence)
        contents = {part: read_part(found, part) for part in found.parts}
        images = {part: where.images for part, where in found.parts.items()}
        if args.val_split:
            if "val" in contents or "train" not in contents:
                raise ValueError(
                    f"--val-split divides training data without a validation part, found: {list(contents)}"
                )
            contents["train"], contents["val"], _ = hold_out(contents["train"], args.val_split)
            images["val"] = images["train"]
        for part, content in contents.items():
            path = Path(args.out) / f"{part}.json"
            if args.classes:
                content = take_classes(content, args.classes, keep_images=part != "train")
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(content), encoding="utf-8")
            flag = "train" if part == "train" else "val"
            _logger.info(
                "%d images, %d boxes: --%s-images %s --%s-ann %s",
                len(content["images"]),
                len(content["annotations"]),
                flag,
                images[part],
                flag,
                path,
            )


if __name__ == "__main__":
    main()
