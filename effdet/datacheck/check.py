"""Look at a data set before training on it: `python -m effdet.datacheck ROOT [flags of train.py] [--html PATH]`.

Exit status: 0 clean, 3 with warnings, 4 with errors (training would refuse, or meet broken images); 1 when the check
could not be made and 2 for a wrong flag, as everywhere.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from effdet.checkpoint.io import ensure_writable
from effdet.config.cli import in_our_words, parse_check_args
from effdet.config.recipe import Parse, choose_recipe, wants_recipe
from effdet.config.schema import DataConfig, RunConfig
from effdet.data.build import split_paths
from effdet.data.settle import settle_data
from effdet.factory import resolve_model_config
from effdet.ops.sizes import check_image_size
from effdet.runtime import device as device_layer
from effdet.runtime.console import one_line_errors
from effdet.runtime.cores import core_count
from effdet.runtime.progress import be_plain, make_handler

from .anchor_reach import SIDE_EDGES_PX
from .judge import judge
from .page import write_html
from .settings import fit_anchors, is_uncounted, make_facts
from .stats import (
    DataStats,
    SplitStats,
    box_images,
    image_sizes,
    measure_split,
    read_splits,
    suggest_for,
)

_logger = logging.getLogger(__name__)

STATUS = {"note": 0, "warning": 3, "error": 4}
_MOST_CLASSES = 100  # lines on the terminal
_BAR_WIDTH = 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    words = in_our_words("python -m effdet.datacheck", arguments)
    cfg = parse_check_args(words)
    if int(os.environ.get("RANK", "0")):  # started once for each device: one of them looks
        return 0
    be_plain(cfg.run.plain)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[make_handler(sys.stderr)])
    with one_line_errors("effdet.datacheck.check"):
        if cfg.run.html:
            ensure_writable(cfg.run.html, "--html")
        stats, config = check(cfg, lambda base: parse_check_args(words, base))
        print("\n".join(text_lines(stats, config)))
        if cfg.run.html:
            write_html(Path(cfg.run.html), stats, config, cfg.run.seed)
            print(f"written: {cfg.run.html}")
    print(verdict(stats))
    return status_of(stats)


def check(cfg: RunConfig, parse: Parse) -> tuple[DataStats, object]:
    """Check the data of a run; return the stats and the model config they were measured for.

    Args:
        cfg: of the run, without a recipe.
        parse: makes the config from the command line again, with a recipe's settings.

    Raises:
        ValueError: an image size that no model has, or no data named at all.
    """
    check_image_size(resolve_model_config(cfg.model).image_size)
    stats = read_splits(find_splits(cfg.data), cfg.data.max_bad_images)
    train = stats.split("train")
    if train is not None:
        cfg = settle_model(cfg, train, parse)
    config = resolve_model_config(cfg.model, cfg.loss)
    processes = core_count() if cfg.data.workers is None else cfg.data.workers
    for split in stats.splits:
        measure_split(split, config, processes, cfg.run.seed)
    if train is not None and len(train.sides_px):
        stats.suggestion = suggest_for(train, config, cfg.run.seed)
    judge(stats, cfg.model.num_classes, cfg.data.match_classes, config.max_det_per_image, config.image_size)
    return stats, config


def find_splits(data: DataConfig) -> dict[str, tuple[Path, Path] | Exception]:
    """Return image folder and annotation file of 'train' and 'val', or the error in their place.

    Raises:
        ValueError, OSError: neither can be had.
    """
    paths: dict[str, tuple[Path, Path] | Exception] = {}
    try:
        data, lines = settle_data(data)  # both at once; where one cannot be had, each by itself below
        for line in lines:
            _logger.info("data: %s", line)
    except (ValueError, OSError):
        pass
    for name in ("train", "val"):
        try:
            paths[name] = split_paths(data, name)
        except (ValueError, OSError) as error:
            paths[name] = error
    if all(isinstance(where, Exception) for where in paths.values()):
        raise paths["train"]
    return paths


def settle_model(cfg: RunConfig, train: SplitStats, parse: Parse) -> RunConfig:
    """Return the config with the model, input size and anchors that a new training on this split would have."""
    boxes, images = train.arrays.boxes_yxyx, box_images(train.arrays)
    used = train.is_trained_on
    if wants_recipe(parse):
        infos = [info for info, is_used in zip(train.arrays.img_infos, used, strict=True) if is_used]
        counted = None if is_uncounted(cfg, train.report.source) else infos
        facts = make_facts(cfg, parse, counted, is_on_cpu(cfg.run.device))
        recipe = choose_recipe(cfg.run.recipe, facts)
        cfg = parse(recipe.settings)
        _logger.info("recipe %s (%s): model %s", recipe.name, recipe.why, cfg.model.name)
    if cfg.model.anchors == "auto":
        kept = used[images]
        cfg = fit_anchors(cfg, boxes[kept], image_sizes(train.arrays)[images][kept])
    return cfg


def is_on_cpu(device: str) -> bool:
    """Tell whether a device of this name is a CPU; one that is not on this machine is none."""
    try:
        return device_layer.is_host(device_layer.pick_device(device))
    except RuntimeError:
        return False


def status_of(stats: DataStats) -> int:
    """Return the exit status."""
    return max((STATUS[finding.level] for finding in stats.findings), default=0)


def verdict(stats: DataStats) -> str:
    """Return the last line: what the status says."""
    count = {level: sum(finding.level == level for finding in stats.findings) for level in STATUS}
    return (
        f"data check: {count['error']} error(s), {count['warning']} warning(s), {count['note']} note(s); "
        f"status {status_of(stats)}"
    )


def text_lines(stats: DataStats, config: object) -> list[str]:
    """Return the report for a terminal."""
    lines = []
    for split in stats.splits:
        lines += ["", *split_lines(split, config)]
    if stats.categories is not None:
        lines += ["", *class_lines(stats)]
    if stats.suggestion is not None and stats.suggestion.better:
        found = stats.suggestion
        lines += [
            "",
            f"share of {found.boxes} train boxes that an anchor overlaps with IoU 0.5 or more, and the cost of a step:",
            f"  {100 * found.present.share:5.1f} %  1.0 x  as it is",
        ]
        lines += [f"  {100 * one.share:5.1f} %  {one.cost:.1f} x  {one.flags}" for one in found.better]
    lines.append("")
    lines += [
        f"{finding.level}: {finding.text}"
        for level in reversed(STATUS)
        for finding in stats.findings
        if finding.level == level
    ]
    return lines


def split_lines(split: SplitStats, config: object) -> list[str]:
    """Return a split's counts and the histogram of its boxes' sizes."""
    report, scan, per_image = split.report, split.scan, split.boxes_per_image
    height, width = config.image_size
    bad = sum(scan.broken.values()) + report.errors.get("missing_image", 0)
    empty = report.num_images_without_boxes
    lines = [
        f"{split.name}: {report.source}, images in {split.img_dir}",
        f"  {report.num_images} images ({empty} without boxes, {bad} broken or missing), "
        f"{report.num_annotations} annotations, {len(split.sides_px)} boxes"
        + (f" ({per_image.mean():.1f} in an image, at most {per_image.max()})" if len(per_image) else ""),
        f"  {len(scan.names)} images decoded in {scan.seconds:.1f} s",
        f"  box size (square root of the area) in the {height} x {width} (height x width) input of {config.name},",
        "  and the share that no anchor overlaps with IoU 0.5:",
    ]
    counts = split.side_counts
    for k, count in enumerate(counts):
        if count:
            bar = "#" * round(_BAR_WIDTH * count / counts.max()) or "."
            missed = 100 * (1 - split.reached[k] / split.tested[k]) if split.tested[k] else float("nan")
            lines.append(f"  {side_label(k):>10} px {count:9d}  {missed:5.1f} %  {bar}")
    if split.tested.sum() < len(split.sides_px):
        lines.append(f"  (anchors tested for {split.tested.sum()} of the boxes, drawn at random)")
    return lines


def side_label(k: int) -> str:
    """Return the name of a bin of SIDE_EDGES_PX."""
    low, high = SIDE_EDGES_PX[k : k + 2]
    return f"{low:g}..{high:g}" if high < float("inf") else f"{low:g}.."


def class_lines(stats: DataStats) -> list[str]:
    """Return the table of classes that have boxes: how many, and images with such boxes, in each split."""
    names = [split.name for split in stats.splits]
    counts = [split.class_counts for split in stats.splits]
    rows = [
        (f"{i}", name, *("{} ({})".format(*of.get(i, (0, 0))) for of in counts))
        for i, name in zip(stats.categories.ids, stats.categories.names, strict=True)
        if any(i in of for of in counts)
    ]
    shown = [("id", "class", *(f"{name} boxes (images)" for name in names)), *rows[:_MOST_CLASSES]]
    widths = [max(len(row[k]) for row in shown) for k in range(len(shown[0]))]
    lines = [f"{stats.categories}"]
    lines += [
        "  "
        + "  ".join(
            [
                row[0].rjust(widths[0]),
                row[1].ljust(widths[1]),
                *(cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)),
            ]
        )
        for row in shown
    ]
    if len(rows) > _MOST_CLASSES:
        lines.append(f"  ... {len(rows) - _MOST_CLASSES} more: the html has them all")
    return lines
