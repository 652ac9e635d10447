"""Compare runs: `effdet compare RUN RUN...`; what they were set to, how they did, and how sure the difference is."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effdet.checkpoint.io import CheckpointError, ensure_writable, load_checkpoint_file, replacing
from effdet.checkpoint.manager import BEST_NAME
from effdet.config.load import from_plain, read_yaml
from effdet.data.build import build_dataset
from effdet.data.coco.truth import load_ground_truth, plain_id
from effdet.metrics.bootstrap import find_difference, find_interval, match_for_intervals
from effdet.metrics.coco import index_ground_truth
from effdet.report.compare import RunRecord, collect_page, format_comparison
from effdet.report.html import fill_page
from effdet.report.log import METRICS_NAME
from effdet.runtime.console import make_tool_parser, one_line_errors
from effdet.training.recorder import METRICS_LOG_NAME, read_rows
from effdet.training.run import DETECTIONS_NAME

_logger = logging.getLogger("effdet.compare")
_SAME_AP = 1e-3


def read_run(folder: Path) -> RunRecord:
    """Read what a run's folder says of it.

    Raises:
        ValueError: it is none, or nothing has been trained in it yet.
    """
    if not folder.is_dir():
        hint = f": give its folder, {folder.parent}" if folder.is_file() else ""
        raise ValueError(f"{folder} is not a folder{hint}")
    absent = [name for name in ("config.yaml", METRICS_LOG_NAME) if not (folder / name).is_file()]
    if absent:
        inside = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
        hint = f"; these inside it are runs: {', '.join(inside)}" if inside else ""
        raise ValueError(f"{folder} is no run's folder: it has no {' and no '.join(absent)}{hint}")
    sections = read_yaml(folder / "config.yaml")
    settings = {f"{section}.{key}": value for section, part in sections.items() for key, value in part.items()}
    record = RunRecord(folder.resolve().name, settings, read_rows(folder / METRICS_LOG_NAME))
    if (folder / METRICS_NAME).is_file():
        facts = json.loads((folder / METRICS_NAME).read_text(encoding="utf-8")).get("run", {})
        record.seconds, record.continued = facts.get("seconds"), bool(facts.get("first_epoch"))
    return record


@dataclasses.dataclass
class _Scored:
    """A run's best detections, matched with its validation set."""

    matched: Any
    nothing: Any  # the same evaluation without detections
    same_set: tuple[Any, ...]  # equal for runs that were evaluated on the same images and boxes


def _match_best(folder: Path, best_ap: float) -> _Scored:
    """Match the detections of a run's best epoch anew.

    Raises:
        ValueError, OSError, CheckpointError: says why that cannot be done.
    """
    if not (folder / DETECTIONS_NAME).is_file():
        raise ValueError(f"it has no {DETECTIONS_NAME}")
    rows = json.loads((folder / DETECTIONS_NAME).read_text(encoding="utf-8"))
    cfg = from_plain(read_yaml(folder / "config.yaml"))
    stored = load_checkpoint_file(folder / BEST_NAME, skim=True)["category_map"]
    parser = build_dataset(cfg.data, "val", stored=stored).parser
    truth = index_ground_truth(load_ground_truth(parser))
    img_ids = {plain_id(img_id) for img_id in parser.img_ids[:: max(1, cfg.run.val_skip)]}
    rows = [row for row in rows if row["image_id"] in img_ids]
    matched = match_for_intervals(truth, rows, img_ids)
    if matched is None:
        raise ValueError("hotcoco is not installed, or nothing was detected")
    least = [{**rows[0], "bbox": [-2.0, -2.0, 1.0, 1.0], "score": 1e-6}]  # hotcoco takes no empty list
    nothing = match_for_intervals(truth, least, img_ids)
    again = find_interval(matched, nothing, 1, 0).value
    if abs(again - best_ap) > _SAME_AP:
        raise ValueError(f"its {DETECTIONS_NAME} give AP {again:.4f} on the data of today, not {best_ap:.4f}")
    boxes = sorted((a["image_id"], a["category_id"], *a["bbox"]) for a in truth.dataset["annotations"])
    return _Scored(matched, nothing, (sorted(img_ids), boxes))


def add_intervals(folders: Sequence[Path], runs: Sequence[RunRecord], resamples: int, seed: int) -> None:
    """Put intervals of AP, and of what it is more than the first run's, into the records, or why there are none."""
    scored: list[_Scored | None] = []
    for folder, run in zip(folders, runs, strict=True):
        scored.append(None)
        try:
            if not run.best:
                raise ValueError("it has no evaluation yet")
            one = scored[-1] = _match_best(folder, run.best["AP"])
            run.ap = find_interval(one.matched, one.nothing, resamples, seed)
        except (ValueError, OSError, CheckpointError) as error:
            run.note = str(error)
            continue
        first = scored[0]
        if len(scored) == 1 or first is None:
            continue
        if first.same_set == one.same_set:
            run.gain = find_difference(first.matched, one.matched, resamples, seed)
        else:
            _logger.warning("%s was evaluated on other images or boxes than %s", run.name, runs[0].name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = make_tool_parser(
        "effdet.commands.compare", "Compare runs of train.py.", "output/train/A output/train/B --html compare.html"
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, two or more")
    parser.add_argument("--html", metavar="FILE", help="also write the comparison with its curves as a page")
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=200,
        metavar="N",
        help="draws of images for the intervals; 0: none (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (%(default)s)")
    args = parser.parse_args(arguments)
    with one_line_errors("effdet.commands.compare"):
        folders = [Path(name) for name in args.runs]
        if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
            raise ValueError("give the folders of two different runs or more")
        if args.bootstrap < 0:
            raise ValueError(f"--bootstrap is {args.bootstrap}: must be 0 or more")
        if args.html:
            ensure_writable(args.html, "--html")
        runs = [read_run(folder) for folder in folders]
        if args.bootstrap:
            add_intervals(folders, runs, args.bootstrap, args.seed)
        _logger.info("%s", format_comparison(runs))
        if args.html:
            page = collect_page(runs)
            with replacing(Path(args.html)) as temporary:
                temporary.write_text(fill_page(page["title"], page, "compare.js"), encoding="utf-8")
            _logger.info("\npage: %s", args.html)


if __name__ == "__main__":
    main()
