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
from .tables import make_tables

_logger = logging.getLogger(__name__)

STATUS = {"note": 0, "warning": 3, "error": 4}


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
    lines = [line for table in make_tables(stats, config) for line in table.as_text()]
    return [*lines, "", *(f"{finding.level}: {finding.text}" for finding in stats.findings)]
