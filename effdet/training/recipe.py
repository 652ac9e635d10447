"""Look at the data and the device, and put the settings that suit them under what the command line says.

Which settings those are is in config/recipe.py; datacheck/settings.py knows what they follow from, and fits anchors.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from effdet.checkpoint.backbone import AUTO
from effdet.config.load import replace_settings
from effdet.config.options import list_options
from effdet.config.recipe import Facts, Parse, Recipe, choose_recipe, find_given, show_settings, wants_recipe
from effdet.config.schema import RunConfig
from effdet.data.build import build_dataset, split_paths
from effdet.data.settle import settle_data
from effdet.datacheck.settings import fit_anchors, is_uncounted, make_facts
from effdet.runtime import device as device_layer
from effdet.runtime import distributed

from .build import Placement
from .footprint import images_that_fit

_logger = logging.getLogger("effdet.train")


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
    if cfg.model.pretrained_backbone is not None or cfg.run.overfit or not find_given(parse, "model.name"):
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
        _logger.info("recipe: %s (%s)", recipe.name, recipe.why)
        _logger.debug("settings of the recipe: %s", show_settings(in_effect) or "the defaults")
    return cfg


def find_facts(cfg: RunConfig, device: torch.device, parse: Parse) -> tuple[Facts, int]:
    """Look at the training split and for weights; also return the number of classes, 0 where nobody has counted."""
    is_cpu, devices = device_layer.is_host(device), distributed.world_size()
    data, _ = settle_data(cfg.data, ("train",))
    _, ann = split_paths(data, "train")
    if is_uncounted(cfg, ann):
        return make_facts(cfg, parse, None, is_cpu, devices), 0
    parser = build_dataset(data, "train", cfg.model.num_classes).parser
    return make_facts(cfg, parse, parser.img_infos, is_cpu, devices), parser.category_map.num_classes


def fit_to_data(cfg: RunConfig, parser: Any) -> RunConfig:
    """Return the config with anchors fitted to the boxes of the training split's parser, see `fit_anchors`."""
    table = parser.box_table()
    boxes, rows = table["bbox"][~table["crowd"]], table["img_idx"][~table["crowd"]]
    sizes = np.array([(info["width"], info["height"]) for info in parser.img_infos])
    return fit_anchors(cfg, boxes, sizes[rows])
