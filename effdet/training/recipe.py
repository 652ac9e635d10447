"""Look at the data and the device, and put the settings that suit them under what the command line says.

Which settings those are is in config/recipe.py; the anchors are fitted here, as that needs the boxes.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from effdet.checkpoint.backbone import AUTO, resolve_backbone
from effdet.config.load import replace_settings
from effdet.config.options import list_options
from effdet.config.recipe import Facts, Parse, Recipe, choose_recipe, is_given, show_settings, wants_recipe
from effdet.config.schema import RunConfig
from effdet.data.build import build_dataset, split_paths
from effdet.data.settle import settle_data
from effdet.datacheck.anchor_reach import suggest_anchors
from effdet.factory import resolve_model_config
from effdet.runtime import device as device_layer
from effdet.runtime import distributed

from .build import Placement
from .footprint import images_that_fit

_logger = logging.getLogger("effdet.train")

_MODELS = ("tf_efficientdet_lite0", "tf_efficientdet_d0")  # with weights at hand, the first is for CPUs
_LARGE_JSON = 256 * 2**20  # bytes; with polygons a small set's has less; a large one is not worth reading twice
_BOXES = 2000  # that anchors are fitted to


def apply_recipe(cfg: RunConfig, device: torch.device, parse: Parse) -> tuple[RunConfig, Recipe | None]:
    """Return the config with a recipe's settings below those given, and the recipe; None where none was wanted.

    Args:
        cfg: as parsed without a recipe.
        device: where the run takes place.
        parse: makes the config from the command line again, with other defaults.

    Raises:
        ValueError, OSError: the data are not there or cannot be read.
    """
    if not wants_recipe(parse):
        return cfg, None
    facts, num_classes = find_facts(cfg, device, parse)
    facts = distributed.run_on_primary(lambda: facts)  # machines may have other weights at hand
    recipe = choose_recipe(cfg.run.recipe, facts)
    cfg = replace_settings(parse(recipe.settings), run={"recipe": recipe.name})
    batch_size = recipe.settings.get("run.batch_size")
    if batch_size is not None and cfg.run.batch_size == batch_size:
        channels_last = device_layer.use_channels_last(device, cfg.run.channels_last)
        found = images_that_fit(cfg, Placement(device, facts.devices, 0, channels_last), num_classes)
        fits = min((one for one in distributed.all_gather_object(found) if one is not None), default=None)
        if fits is not None and fits * facts.devices < batch_size:
            recipe.settings["run.batch_size"] = max(1, fits) * facts.devices
            cfg = replace_settings(cfg, run={"batch_size": recipe.settings["run.batch_size"]})
    return cfg, recipe


def name_backbone(cfg: RunConfig, parse: Parse) -> RunConfig:
    """Return the config with the ImageNet weights asked for by name, where the user has named the model."""
    if cfg.model.pretrained_backbone is not None or cfg.run.overfit or not is_given(parse, "model.name"):
        return cfg
    return replace_settings(cfg, model={"pretrained_backbone": AUTO})


def keep_recipe(cfg: RunConfig, recipe: Recipe | None, parse: Parse, payload: Mapping[str, Any]) -> RunConfig:
    """Log the recipe, and return the config; a run that goes on keeps what it began with, a recipe's settings or none.

    Data, memory and the weights at hand may have changed since.
    """
    if payload:
        stored = payload.get("config") or {}
        name = stored.get("run", {}).get("recipe")
        if name not in ("finetune", "scratch"):
            return parse({})
        facts = Facts(1, (1.0, 1.0), True)
        keys = {*choose_recipe("finetune", facts).settings, *choose_recipe("scratch", facts).settings}
        settings = {key: stored[key.partition(".")[0]][key.partition(".")[2]] for key in sorted(keys)}
        recipe = Recipe(name, "as the run began", settings)
        cfg = replace_settings(parse(settings), run={"recipe": name})
    if recipe is not None:
        options = list_options(RunConfig)
        in_effect = {key: value for key, value in recipe.settings.items() if options[key].get(cfg) == value}
        _logger.info("recipe %s (%s): %s", recipe.name, recipe.why, show_settings(in_effect) or "the defaults")
    return cfg


def find_facts(cfg: RunConfig, device: torch.device, parse: Parse) -> tuple[Facts, int]:
    """Look at the training split and for weights; also return the number of classes, 0 where nobody has counted."""
    is_cpu, devices = device_layer.is_host(device), distributed.world_size()
    data, _ = settle_data(cfg.data, ("train",))
    _, ann = split_paths(data, "train")
    if cfg.run.recipe == "auto" and ann.stat().st_size > _LARGE_JSON:
        return Facts(None, (1.0, 1.0), is_cpu, devices), 0
    parser = build_dataset(data, "train", cfg.model.num_classes).parser
    sizes = np.array([(info["height"], info["width"]) for info in parser.img_infos])
    height, width = np.median(sizes, axis=0) if len(sizes) else (1.0, 1.0)
    facts = Facts(len(sizes), (float(height), float(width)), is_cpu, devices)
    detector = cfg.model.pretrained or cfg.model.initial_checkpoint
    if detector:
        facts = dataclasses.replace(facts, model=cfg.model.name, weights=detector, has_heads=True)
    else:
        model, weights = _weights_at_hand(cfg, is_cpu, parse)
        facts = dataclasses.replace(facts, model=model, weights=weights)
    return facts, parser.category_map.num_classes


def _weights_at_hand(cfg: RunConfig, is_cpu: bool, parse: Parse) -> tuple[str, str]:
    """Return a model whose weights need no fetching, and where they are; empty texts where there is none."""
    names: tuple[str, ...] = _MODELS if is_cpu else _MODELS[::-1]
    if is_given(parse, "model.name"):
        names = (cfg.model.name,)
    for name in names if cfg.model.pretrained_backbone != "" else ():
        source = resolve_backbone(cfg.model.pretrained_backbone or AUTO, name)
        if source is not None:
            return name, source.describe()
    return "", ""


def fit_anchors(cfg: RunConfig, parser: Any) -> RunConfig:
    """Return the config with anchor scale and aspect ratios that reach more of the training boxes, if some do.

    Args:
        cfg: of the run; both stay where they are given.
        parser: of the training split.
    """
    table = parser.box_table()
    boxes, rows = table["bbox"][~table["crowd"]], table["img_idx"][~table["crowd"]]
    if cfg.model.anchor_scale is not None or cfg.model.aspect_ratios is not None or not len(boxes):
        return cfg
    sample = np.linspace(0, len(boxes) - 1, min(len(boxes), _BOXES)).astype(int)
    sizes = np.array([(parser.img_infos[row]["width"], parser.img_infos[row]["height"]) for row in rows[sample]])
    found = suggest_anchors(boxes[sample], sizes, resolve_model_config(cfg.model))
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
