"""The settings of a model that a training takes from its data: what a recipe is chosen by, and fitted anchors.

Which settings a recipe has is in config/recipe.py; the training puts them into effect, and the data check looks at the
same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effdet.checkpoint.backbone import AUTO, resolve_backbone
from effdet.config.load import replace_settings
from effdet.config.recipe import Facts, Parse, find_given
from effdet.config.schema import RunConfig
from effdet.factory import resolve_model_config

from .anchor_reach import suggest_anchors

_logger = logging.getLogger("effdet.train")

_LARGE_JSON = 256 * 2**20  # bytes; with polygons a small set's has less; a large one is not worth reading twice
_MODELS = ("tf_efficientdet_lite0", "tf_efficientdet_d0")  # with weights at hand, the first is for CPUs
_BOXES = 2000  # that anchors are fitted to


def is_uncounted(cfg: RunConfig, ann: str | Path) -> bool:
    """Tell whether the training annotations are so large that nobody counts the images to choose a recipe."""
    return cfg.run.recipe == "auto" and Path(ann).stat().st_size > _LARGE_JSON


def make_facts(
    cfg: RunConfig, parse: Parse, infos: Sequence[Mapping[str, Any]] | None, is_cpu: bool, devices: int = 1
) -> Facts:
    """Say what a recipe is chosen by.

    Args:
        cfg: as parsed without a recipe.
        parse: makes the config from the command line again, with other defaults.
        infos: 'height' and 'width' of each training image; None: nobody has counted them.
        is_cpu: whether the run is on CPUs.
        devices: processes of the run.
    """
    if infos is None:
        return Facts(None, (1.0, 1.0), is_cpu, devices)
    sizes = [(info["height"], info["width"]) for info in infos]
    height, width = np.median(sizes, axis=0).tolist() if sizes else (1.0, 1.0)
    detector = cfg.model.pretrained or cfg.model.initial_checkpoint
    model, weights = (cfg.model.name, detector) if detector else _weights_at_hand(cfg, is_cpu, parse)
    return Facts(
        len(sizes), (height, width), is_cpu, devices, model, weights, bool(detector), find_given(parse, "sched.epochs")
    )


def _weights_at_hand(cfg: RunConfig, is_cpu: bool, parse: Parse) -> tuple[str, str]:
    """Return a model whose weights need no fetching, and where they are; empty texts where there is none."""
    names: tuple[str, ...] = _MODELS if is_cpu else _MODELS[::-1]
    if find_given(parse, "model.name"):
        names = (cfg.model.name,)
    for name in names if cfg.model.pretrained_backbone != "" else ():
        source = resolve_backbone(cfg.model.pretrained_backbone or AUTO, name)
        if source is not None:
            return name, source.title
    return "", ""


def fit_anchors(cfg: RunConfig, boxes_yxyx: np.ndarray, sizes_wh: np.ndarray) -> RunConfig:
    """Return the config with anchor scale and aspect ratios that reach more of the training boxes, if some do.

    Args:
        cfg: of the run; both stay where they are given.
        boxes_yxyx: of the training split, crowd regions aside, [n, 4] in pixels of their images.
        sizes_wh: width and height of each box's image, [n, 2].
    """
    if cfg.model.anchor_scale is not None or cfg.model.aspect_ratios is not None or not len(boxes_yxyx):
        return cfg
    sample = np.linspace(0, len(boxes_yxyx) - 1, min(len(boxes_yxyx), _BOXES)).astype(int)
    found = suggest_anchors(boxes_yxyx[sample], sizes_wh[sample], resolve_model_config(cfg.model), keep_shape=True)
    if found.take is None:
        _logger.info("anchors: the model's own reach %.1f %% of the training boxes", 100 * found.present.share)
        return cfg
    _logger.info(
        "anchors fitted: %s reaches %.1f %% of the training boxes, the model's own %.1f %%",
        found.take.flags,
        100 * found.take.share,
        100 * found.present.share,
    )
    return replace_settings(cfg, model=found.take.settings)
