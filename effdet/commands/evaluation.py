"""The work of validate.py: build a detector and its data, evaluate, write the numbers."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effdet.checkpoint.io import ensure_writable
from effdet.checkpoint.published import compare_with_published
from effdet.config.load import split_over_devices, workers_per_device
from effdet.config.schema import ValidateConfig
from effdet.data.build import build_dataset, build_loader
from effdet.data.coco.truth import category_ids, find_parser
from effdet.data.corrupt import BadImagesError
from effdet.data.settle import FOLDER, settle_data
from effdet.evaluator import CocoEvaluator
from effdet.factory import place_model
from effdet.metrics.coco import make_result_rows
from effdet.predict.load import Detector, build_predict_bench, load_detector, load_published
from effdet.predict.speed import Speed, measure_speed
from effdet.report import html
from effdet.report.log import METRICS_NAME, setup_logging
from effdet.runtime import device as device_layer
from effdet.runtime import distributed, progress
from effdet.runtime.console import dead_workers_in_one_line, one_line_errors, typed
from effdet.training.amp import Precision
from effdet.training.engine import evaluate

_logger = logging.getLogger("effdet.validate")


def evaluate_detector(cfg: ValidateConfig, device: torch.device) -> None:
    """Build what the config names, evaluate it, print the numbers and write the files asked for."""
    setup_logging(None, distributed.rank(), cfg.run.json)
    with one_line_errors(typed("validate.py")):
        detector = find_detector(cfg)
        data, lines = settle_data(cfg.data, ("val",), Path(cfg.run.output) / FOLDER if cfg.run.output else None)
        cfg = dataclasses.replace(cfg, data=data)
        for line in lines:
            _logger.info("data: %s", line)
        dataset = open_dataset(cfg, detector)
        world = distributed.world_size()
        channels_last = device_layer.use_channels_last(device)
        loader = build_loader(
            dataset,
            cfg.data,
            detector.model.config,
            split_over_devices(cfg.run.batch_size, world),
            workers_per_device(cfg.data.workers, world),
            device,
            channels_last=channels_last,
            val_skip=cfg.run.val_skip,
        )
        for line in device_layer.tune(device, cfg.amp.hf32, cfg.amp.is_full_precision, cfg.run.npu_defaults):
            _logger.debug("setting: %s", line)
        precision = Precision(device, cfg.amp.enabled, cfg.amp.opt_level, cfg.amp.dtype)
        place_model(detector.model, device, cfg.model.same_padding, channels_last)
        bench = build_predict_bench(
            precision.prepare_model(detector.model),
            device,
            cfg.model.same_padding,
            cfg.run.tta_flip,
            cfg.run.tta_scales,
            cfg.model.nms,
        )
    with (
        contextlib.closing(loader),
        dead_workers_in_one_line(typed("validate.py")),
        one_line_errors(typed("validate.py"), (BadImagesError,)),
    ):
        run(cfg, detector, bench, loader, device, precision)


def check_outputs(cfg: ValidateConfig) -> None:
    """Refuse files and folders that cannot be written, before the work whose result they are to take.

    Raises:
        ValueError: names the path, why, and the flag that gives another.
    """
    for path, flag in ((cfg.run.results, "--results"), (cfg.run.metrics, "--metrics")):
        if path:
            ensure_writable(path, flag)
    if cfg.run.output:
        ensure_writable(Path(cfg.run.output) / METRICS_NAME, "--output")


def find_detector(cfg: ValidateConfig) -> Detector:
    """Load the weights that the flags name."""
    if cfg.run.checkpoint:
        return load_detector(cfg.run.checkpoint, cfg.model, cfg.run.use_ema, cfg.model.num_classes)
    if cfg.model.pretrained:
        return load_published(cfg.model)
    raise ValueError("no weights given: name a file with --checkpoint FILE, or use --pretrained for the published ones")


def open_dataset(cfg: ValidateConfig, detector: Detector):
    """Open the validation split with the class numbers of the detector, or check that its class count fits.

    Raises:
        ValueError: also for images without annotations, where nothing would be written or no class has a category.
    """
    if detector.category_map is not None:
        dataset = build_dataset(cfg.data, "val", stored=detector.category_map.to_dict(), unlabeled=True)
    else:
        dataset = build_dataset(cfg.data, "val", num_classes=detector.model.config.num_classes, unlabeled=True)
    parser = dataset.parser
    if parser.has_labels:
        return dataset
    if not cfg.run.results:
        raise ValueError(
            f"{parser.ann_path} lists images without annotations, so there is nothing to score: give --results FILE to "
            "write the predictions, or name a file with annotations"
        )
    if parser.category_map is None:
        if detector.category_map is None:
            raise ValueError(
                f'neither {parser.ann_path} nor the weights name the classes: add the list "categories" to the file'
            )
        parser.category_map = detector.category_map
    return dataset


class Unscored(CocoEvaluator):
    """Collect the predictions of images without annotations; `save` writes them, and there is no metric."""

    def evaluate(self, output_result_file: str | os.PathLike[str] = "") -> float:
        """Return NaN; the predictions stay for `save`."""
        if self._watch is not None:
            self._watch.exchange(together=self._spread)
        return math.nan

    def _result_rows(self, images: Mapping[Any, np.ndarray]) -> list[dict[str, Any]]:
        known_ids = self._ground_truth().getCatIds()
        ids = category_ids(self._parser, known_ids)
        return make_result_rows(images, ids, known_ids or ids)


def run(
    cfg: ValidateConfig, detector: Detector, bench: torch.nn.Module, loader, device: torch.device, precision: Precision
) -> None:
    """Evaluate, print the numbers and write the files asked for."""
    _logger.info("%s, on %s, %d images", detector.source, device_layer.describe(device), len(loader.dataset))
    if len(loader.dataset) == 0:
        _logger.warning("the validation split has no images: there is nothing to evaluate")
    labeled = find_parser(loader.dataset).has_labels
    kind = CocoEvaluator if labeled else Unscored
    evaluator = kind(
        loader.dataset,
        distributed=True,
        max_det=max(100, detector.model.config.max_det_per_image),
        all_images=True,
        min_score=0.0,
    )
    started = time.time()
    log_interval = 0 if progress.current() else cfg.run.log_interval
    with progress.bar("Evaluating", len(loader), "img", cfg.run.batch_size) as on_batch:
        autocast = functools.partial(precision.autocast, detector.model)
        found = evaluate(bench, loader, evaluator, autocast, log_interval, on_batch)
    facts = {
        "model": detector.model.config.name,
        "processes": distributed.world_size(),
        "batch_size": cfg.run.batch_size,
        "img_per_s": len(loader.dataset) / max(found.seconds, 1e-9),
        "seconds": time.time() - started,
        "checkpoint": cfg.run.checkpoint,
    }
    speed = measure(bench, loader, precision) if cfg.run.speed and len(loader.dataset) else None
    if speed is not None:
        facts |= {"model_ms": speed.model_ms, "post_processing_ms": speed.post_ms}
        _logger.info("speed: %s", speed)
    if cfg.run.results:
        evaluator.save(cfg.run.results)
        _logger.info("results: %s", cfg.run.results)
    if not labeled:
        _logger.info("the images have no annotations: there is no metric, and neither metrics nor a report are written")
        return
    if distributed.is_primary():
        _logger.info("%s", evaluator.scores.table(), extra=progress.ON_TERMINAL)
    for row in evaluator.per_class():
        ap, ap50 = ("  n/a" if math.isnan(value) else f"{value:.3f}" for value in (row.AP, row.AP50))
        _logger.info("  %5d  %-24s AP %s  AP50 %s  %d boxes", row.category_id, row.name, ap, ap50, row.count)
    if distributed.is_primary():
        write_files(cfg, detector, evaluator, loader.dataset, device, facts)
        if cfg.run.json:
            sys.stdout.write(json.dumps({**evaluator.scores.to_json(), "run": facts}) + "\n")
    if cfg.model.pretrained and not cfg.run.checkpoint:
        line = compare_with_published(detector.model.config.name, found.metric, evaluator.scores.image_count)
        if line:
            _logger.info("%s", line)
    _logger.info("AP %.5f  AP50 %.5f", found.metric, found.scores["AP50"])


def measure(bench: torch.nn.Module, loader: Any, precision: Precision) -> Speed:
    """Measure the speed on the first batch of this process."""
    images, target = next(iter(loader))
    return measure_speed(bench, images, target, precision.autocast)


def write_files(
    cfg: ValidateConfig,
    detector: Detector,
    evaluator: CocoEvaluator,
    dataset: Any,
    device: torch.device,
    facts: dict[str, Any],
) -> None:
    """Write the numbers as json and csv, and the report."""
    metrics = [Path(cfg.run.metrics)] if cfg.run.metrics else []
    if cfg.run.output:
        folder = Path(cfg.run.output)
        metrics.append(folder / METRICS_NAME)
    for path in metrics:
        evaluator.write_metrics(path, facts)
        _logger.info("metrics: %s", path)
    if not cfg.run.output:
        return
    rows = evaluator.scores.class_rows()
    with (folder / "per_class.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    tiles = [("images / s, with loading", f"{facts['img_per_s']:.1f}")]
    if "model_ms" in facts:
        tiles += [
            ("ms an image, model", f"{facts['model_ms']:.2f}"),
            ("ms, post-processing", f"{facts['post_processing_ms']:.2f}"),
        ]
    page = html.Report(
        folder / html.NAME,
        Path(cfg.run.checkpoint or cfg.model.pretrained).name,
        cfg,
        detector.model.config,
        dataset,
        device=device_layer.describe(device),
        facts=tiles,
    )
    page.write(evaluator)
    _logger.info("classes: %s", folder / "per_class.csv")
    _logger.info("report: %s", page.path)
