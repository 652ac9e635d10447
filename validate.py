#!/usr/bin/env python3
"""Evaluate a checkpoint on data in COCO format, on one device or several.

Examples:
  python validate.py --root DIR --checkpoint output/train/RUN/model_best.pth.tar
  python validate.py --root DIR --checkpoint FILE --results detections.json
  python validate.py --root DIR --checkpoint FILE --tta-flip
  python validate.py --root COCO --model tf_efficientdet_d0 --pretrained
  python validate.py --val-images pics --val-ann val.json --checkpoint FILE

A checkpoint of train.py knows its model, input size and classes.
"""
from __future__ import annotations

import csv
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# torch would load torch_npu by itself and fail where CANN is not sourced; effdet/device.py does it when an NPU is asked
# for, with an error that says what to do.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import torch

from effdet import device as device_layer
from effdet import distributed, live_line, report
from effdet.amp import Precision
from effdet.build import (
    Detector,
    build_dataset,
    build_eval_loader,
    build_predict_bench,
    load_detector,
    load_published,
    place_model,
)
from effdet.config.cli import parse_validate_args
from effdet.config.load import split_over_devices, workers_per_device
from effdet.config.schema import ValidateConfig
from effdet.data.bad_pictures import BadPicturesError
from effdet.engine import evaluate
from effdet.evaluator import CocoEvaluator
from effdet.log import METRICS_NAME, add_run_facts, setup_logging
from effdet.processes import launch, needs_launch, one_line_errors, start
from effdet.speed import Speed, measure_speed

_logger = logging.getLogger("effdet.validate")


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, evaluate, and return the exit status."""
    cfg = parse_validate_args(argv, __doc__)
    with one_line_errors("validate.py"):
        if cfg.run.speed and (cfg.run.tta_flip or cfg.run.tta_scales):
            raise ValueError("--speed measures one pass: leave --tta-flip and --tta-scales out")
        if needs_launch(cfg.dist.device_list):
            split_over_devices(cfg.run.batch_size, len(cfg.dist.device_list))  # refused once, not by every process
            return launch(__file__, argv, cfg.dist.device_list, cfg.dist.addr, cfg.dist.master_port)
        device = start(cfg.run.device, cfg.dist.device_list)
    try:
        setup_logging(None, distributed.rank())
        with one_line_errors("validate.py"):
            detector = find_detector(cfg)
            dataset = open_dataset(cfg, detector)
            world = distributed.world_size()
            channels_last = device_layer.use_channels_last(device)
            loader = build_eval_loader(dataset, cfg.data, detector.model.config,
                                       split_over_devices(cfg.run.batch_size, world),
                                       workers_per_device(cfg.data.workers, world), device, cfg.run.val_skip,
                                       channels_last)
            for line in device_layer.tune(device):
                _logger.info("setting: %s", line)
            precision = Precision(device, cfg.amp.enabled, cfg.amp.opt_level, cfg.amp.dtype)
            place_model(detector.model, device, cfg.model.same_padding, channels_last)
            bench = build_predict_bench(precision.prepare_model(detector.model), device, cfg.model.same_padding,
                                        cfg.run.tta_flip, cfg.run.tta_scales, cfg.model.nms)
        with one_line_errors("validate.py", (BadPicturesError,)):
            run(cfg, detector, bench, loader, device, precision)
    finally:
        distributed.shutdown()
    return 0


def find_detector(cfg: ValidateConfig) -> Detector:
    """Load the weights that the flags name."""
    if cfg.run.checkpoint:
        return load_detector(cfg.run.checkpoint, cfg.model, cfg.run.use_ema, cfg.model.num_classes)
    if cfg.model.pretrained:
        return load_published(cfg.model)
    raise ValueError("no weights given: name a file with --checkpoint FILE, or use --pretrained for the published ones")


def open_dataset(cfg: ValidateConfig, detector: Detector):
    """Open the validation split with the class numbers of the detector, or check that its class count fits."""
    if detector.category_map is not None:
        return build_dataset(cfg.data, "val", stored=detector.category_map.to_dict())
    return build_dataset(cfg.data, "val", num_classes=detector.model.config.num_classes)


class TimedLoader:
    """Hand on a loader's batches and measure, in `seconds`, how long it takes until the last one is worked off."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.seconds = loader, 0.0

    def __iter__(self) -> Iterator[Any]:
        started = time.perf_counter()
        yield from self.loader
        self.seconds = time.perf_counter() - started

    def __len__(self) -> int:
        return len(self.loader)


def run(cfg: ValidateConfig, detector: Detector, bench: torch.nn.Module, loader, device: torch.device,
        precision: Precision) -> None:
    """Evaluate, print the numbers and write the files asked for."""
    _logger.info("%s, on %s, %d pictures", detector.source, device_layer.describe(device), len(loader.dataset))
    if len(loader.dataset) == 0:
        _logger.warning("the validation split has no pictures: there is nothing to evaluate")
    evaluator = CocoEvaluator(loader.dataset, distributed=True,
                              max_det=max(100, detector.model.config.max_det_per_image))
    started, timed = time.time(), TimedLoader(loader)
    log_interval = 0 if live_line.current() else cfg.run.log_interval
    with live_line.ended():
        metric, _ = evaluate(bench, live_line.Watched(timed, "Evaluating"), evaluator, precision.autocast, log_interval)
    facts = {"model": detector.model.config.name, "processes": distributed.world_size(),
             "batch_size": cfg.run.batch_size, "img_per_s": len(loader.dataset) / max(timed.seconds, 1e-9),
             "seconds": time.time() - started, "checkpoint": cfg.run.checkpoint}
    speed = measure(bench, loader, precision) if cfg.run.speed and len(loader.dataset) else None
    if speed is not None:
        facts |= {"model_ms": speed.model_ms, "post_processing_ms": speed.post_ms}
        _logger.info("speed: %s", speed)
    if cfg.run.results:
        evaluator.save(cfg.run.results)
        _logger.info("results: %s", cfg.run.results)
    for row in evaluator.per_class():
        ap, ap50 = ("  n/a" if math.isnan(value) else f"{value:.3f}" for value in (row.AP, row.AP50))
        _logger.info("  %5d  %-24s AP %s  AP50 %s  %d boxes", row.category_id, row.name, ap, ap50, row.count)
    if distributed.is_primary():
        write_files(cfg, detector, evaluator, loader.dataset, device, facts)
    _logger.info("AP %.5f  AP50 %.5f", metric, evaluator.stats["AP50"])


def measure(bench: torch.nn.Module, loader: Any, precision: Precision) -> Speed:
    """Measure the speed on the first batch of this process."""
    images, target = next(iter(loader))
    return measure_speed(bench, images, target, precision.autocast)


def write_files(cfg: ValidateConfig, detector: Detector, evaluator: CocoEvaluator, dataset: Any, device: torch.device,
                facts: dict[str, Any]) -> None:
    """Write the numbers as json and csv, and the report."""
    metrics = [Path(cfg.run.metrics)] if cfg.run.metrics else []
    if cfg.run.output:
        folder = Path(cfg.run.output)
        metrics.append(folder / METRICS_NAME)
    for path in metrics:
        evaluator.write_metrics(path)
        add_run_facts(path, facts)
        _logger.info("metrics: %s", path)
    if not cfg.run.output:
        return
    rows = evaluator.scores.class_rows()
    with (folder / "per_class.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    tiles = [("pictures / s, with loading", f"{facts['img_per_s']:.1f}")]
    if "model_ms" in facts:
        tiles += [("ms a picture, model", f"{facts['model_ms']:.2f}"),
                  ("ms, post-processing", f"{facts['post_processing_ms']:.2f}")]
    page = report.Report(folder / report.NAME, Path(cfg.run.checkpoint or cfg.model.pretrained).name, cfg,
                         detector.model.config, dataset, device=device_layer.describe(device), facts=tiles)
    page.write(evaluator)
    _logger.info("classes: %s", folder / "per_class.csv")
    _logger.info("report: %s", page.path)


if __name__ == "__main__":
    sys.exit(main())
