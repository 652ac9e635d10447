"""The work of demo.py: find images and a checkpoint, detect, draw, and write what was found."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from effdet.checkpoint.io import ensure_writable
from effdet.checkpoint.manager import find_newest_checkpoint
from effdet.config.schema import DemoConfig
from effdet.data.corrupt import BadImagesError
from effdet.data.formats.hold_out import find_classes
from effdet.data.images import ImageError
from effdet.predict.detections import Detections
from effdet.predict.load import build_predictor, load_detector
from effdet.predict.sources import Item, Source, find_sources, image_of, is_video, refuse_replacing, unique_stems
from effdet.predict.video import count_frames, frames_of, require_av
from effdet.predict.writers import Classes, Drawings, Result, Results
from effdet.report.draw import make_class_colors
from effdet.runtime import progress, signals

_logger = logging.getLogger("effdet.demo")

SOME_BAD_STATUS = 3
_FEW = 20  # images that a terminal gets a line each for, and each of their objects
_LINE_S = 30.0  # between two lines about many


def detect_and_draw(cfg: DemoConfig) -> int:
    """Detect objects in what the config names, draw them, and write them into files as they come.

    Returns:
        The exit status: 0, or 3 where images could not be read and were passed over.

    Raises:
        BadImagesError: more than are allowed cannot be read. StopRequested: a signal came. Both leave what was found
            until then.
    """
    if cfg.run.max_image_pixels is not None:
        Image.MAX_IMAGE_PIXELS = -(-cfg.run.max_image_pixels // 2)  # Pillow refuses from twice this on
    output_dir = Path(cfg.run.output)
    checkpoint = find_checkpoint(cfg)
    ensure_writable(output_dir / "detections", "--output")
    sources = find_sources(cfg.run.images, cfg.run.recursive, output_dir)
    stems = unique_stems(sources)
    _check_sources(cfg, sources, stems)
    detector = load_detector(checkpoint, cfg.model, cfg.run.use_ema)
    predictor = build_predictor(
        detector,
        cfg.model,
        cfg.run.device,
        cfg.run.batch_size,
        cfg.run.tta_flip,
        cfg.run.tta_scales,
        npu_defaults=cfg.run.npu_defaults,
    )
    classes = Classes(predictor.class_names, [predictor.category_id_of(k) for k in range(predictor.num_classes)])
    choose = chooser(cfg, classes)
    colors = make_class_colors(detector.category_map.class_names) if detector.category_map else None
    threshold, line = predictor.threshold_to_show(cfg.run.score_thr)
    _logger.info("%s", detector.source)
    _logger.info("%s", line)
    with contextlib.ExitStack() as stack:
        results = stack.enter_context(contextlib.closing(Results(output_dir, cfg.run.save, classes)))
        drawings = None
        if cfg.run.draw:
            drawings = Drawings(output_dir, cfg.run.draw, colors, cfg.run.save_video)
            stack.enter_context(contextlib.closing(drawings))
        report = stack.enter_context(_reporting(_count(sources, cfg.run.every), any(map(is_video, sources))))
        items = _items(sources, stems, cfg.run.every)
        predict = functools.partial(predictor.predict, score_threshold=threshold)
        bad, done = _detect(cfg, items, predict, choose, drawings, results, report)
    _logger.info("%d image(s)%s, results in %s", done, " drawn" if cfg.run.draw else "", output_dir)
    if bad:
        _logger.warning("%d of %d image(s) could not be read, see above", bad, bad + done)
    return SOME_BAD_STATUS if bad else 0


def _check_sources(cfg: DemoConfig, sources: list[Source], stems: list[str]) -> None:
    """Raise where a setting does not fit the sources, or what is drawn would replace one of them."""
    videos = [source for source in sources if is_video(source)]
    if videos:
        require_av(videos[0])
    elif cfg.run.save_video or cfg.run.every > 1:
        raise ValueError(f"{'--save-video' if cfg.run.save_video else '--every'} is for videos, and none is named")
    if not cfg.run.draw:
        if cfg.run.save_video:
            raise ValueError("--save-video writes what is drawn: leave --no-draw out")
        return
    suffixes = ("." + cfg.run.draw, ".mp4" if cfg.run.save_video else "")  # of an image, of a video
    output_dir = Path(cfg.run.output)
    targets = [output_dir / (stem + suffixes[is_video(source)]) for source, stem in zip(sources, stems, strict=True)]
    refuse_replacing(sources, targets)


def _items(sources: list[Source], stems: list[str], every: int) -> Iterator[Item]:
    for source, stem in zip(sources, stems, strict=True):
        if is_video(source):
            yield from frames_of(source, stem, every)
        else:
            yield image_of(source, stem)


def _count(sources: list[Source], every: int) -> int | None:
    """Return how many images there are in sources, for a bar; None where that is not known."""
    counts = [count_frames(source, every) if is_video(source) else 1 for source in sources]
    return None if None in counts else sum(filter(None, counts))


def _detect(
    cfg: DemoConfig,
    items: Iterator[Item],
    predict: Callable[[list[Image.Image]], list[Detections]],
    choose: Callable[[Detections], Detections],
    drawings: Drawings | None,
    results: Results,
    report: Callable[[Item, Detections], None],
) -> tuple[int, int]:
    """Predict batch by batch; return how many images could not be read, and how many are done."""
    bad = done = 0
    while batch := list(itertools.islice(items, cfg.run.batch_size)):
        if signals.requested():
            _logger.info("%d image(s) done, see %s", done, cfg.run.output)
            raise signals.StopRequested(signals.requested())
        images = [(item, image) for item in batch if (image := _read(item)) is not None]
        bad += len(batch) - len(images)
        if cfg.run.max_bad_images is not None and bad > cfg.run.max_bad_images:
            raise BadImagesError(
                f"{bad} image(s) cannot be read, {cfg.run.max_bad_images} are allowed (--max-bad-images). {done} "
                f"are done, see {cfg.run.output}."
            )
        batch_results = []
        found = predict([image for _, image in images])
        for (item, image), objects in zip(images, map(choose, found), strict=True):
            drawn = drawings.add(item, image, objects) if drawings else None
            batch_results.append(Result(item, image, objects, drawn))
            report(item, objects)
        results.add(batch_results)
        done += len(images)
    return bad, done


def _read(item: Item) -> Image.Image | None:
    """Read an image; log why it cannot be read and return None."""
    try:
        return item.read()
    except ImageError as error:
        _logger.warning("passed over: %s", error)
        return None


def chooser(cfg: DemoConfig, classes: Classes) -> Callable[[Detections], Detections]:
    """Return what takes those objects out of an image's that were not asked for.

    Raises:
        DatasetError: a class was asked for that the network does not know.
    """
    wanted = find_classes(cfg.run.classes, classes.names, "The checkpoint has")

    def choose(found: Detections) -> Detections:
        if wanted:
            found = found.take(np.isin(found.names, wanted))
        return found.suppress_across_classes() if cfg.run.agnostic_nms else found

    return choose


@contextlib.contextmanager
def _reporting(count: int | None, moving: bool = False) -> Iterator[Callable[[Item, Detections], None]]:
    """Say what is found: a bar for many images in a terminal, else a line for each image and each object.

    Args:
        count: how many images there are; None where nobody knows, as of a camera.
        moving: they are frames of videos: where there is no bar, a line now and then.
    """
    if count is not None and count > _FEW and progress.current() is not None:
        with progress.bar("Predicting", count, "img") as show:
            numbers = itertools.count(1)
            yield lambda item, found: show(next(numbers))
    else:
        yield _occasional_line() if moving else _each_object


def _occasional_line() -> Callable[[Item, Detections], None]:
    said_at, images, objects = time.monotonic(), 0, 0

    def say(item: Item, found: Detections) -> None:
        nonlocal said_at, images, objects
        images, objects = images + 1, objects + len(found)
        if time.monotonic() - said_at >= _LINE_S:
            _logger.info("%d images, %d objects, now at %s", images, objects, item.stem)
            said_at = time.monotonic()

    return say


def _each_object(item: Item, found: Detections) -> None:
    _logger.info("%s: %d object(s)", item.name, len(found))
    for name, score, box in zip(found.names, found.scores.tolist(), found.boxes_xyxy.tolist(), strict=True):
        _logger.info("  %-20s %.3f  x %6.1f .. %6.1f  y %6.1f .. %6.1f", name, score, box[0], box[2], box[1], box[3])


def find_checkpoint(cfg: DemoConfig) -> str:
    """Return the checkpoint asked for, else the newest one of `make train` or train.py."""
    if cfg.run.checkpoint:
        return cfg.run.checkpoint
    newest = find_newest_checkpoint(["runs", "output"])
    if newest is None:
        raise FileNotFoundError(
            "no checkpoint under runs/ or output/: train one with `make train`, or name one with --checkpoint FILE"
        )
    return str(newest)
