"""Write another data set's annotations as COCO json files, for train.py and validate.py; the images stay in place.

`python -m effdet.data.formats.to_coco voc2012 VOCdevkit --out DIR`
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from effdet.checkpoint.io import ensure_writable
from effdet.runtime.console import make_tool_parser, one_line_errors

from ..dataset_factory import create_dataset

_logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = make_tool_parser(
        "effdet.data.formats.to_coco",
        "Write another data set's annotations as COCO json.",
        "voc2012 VOCdevkit --out DIR",
    )
    parser.add_argument("name", help="voc2007, voc2012, voc0712, openimages or openimages-challenge2019")
    parser.add_argument("root", help="the data set's folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for SPLIT.json")
    parser.add_argument(
        "--splits",
        nargs="+",
        default=["train", "val"],
        metavar="SPLIT",
        help="parts of the data set (default: train val)",
    )
    args = parser.parse_args(arguments)
    with one_line_errors("effdet.data.formats.to_coco"):
        out = Path(args.out)
        ensure_writable(out / "train.json", "--out")
        out.mkdir(parents=True, exist_ok=True)
        for split in args.splits:
            dataset = create_dataset(args.name, args.root, split)
            (out / f"{split}.json").write_text(json.dumps(dataset.parser.coco_dict()), encoding="utf-8")
            flag = "train" if split == "train" else "val"
            _logger.info(
                "give train.py: --%s-images %s --%s-ann %s", flag, dataset.data_dir, flag, out / f"{split}.json"
            )


if __name__ == "__main__":
    main()
