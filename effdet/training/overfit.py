"""`--overfit N`: learn a few images by heart, and say what is likely wrong when that fails.

The settings that suit it are in config/load.py. Here: which images, what is measured after the training, and what
follows from the measurements. `diagnose` takes numbers only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from effdet.bench import DetBenchTrain
from effdet.config.schema import RunConfig
from effdet.data.dataset import DetectionDatset
from effdet.datacheck.anchor_reach import find_reached, letterbox_boxes
from effdet.metrics.voc import MATCH_IOU
from effdet.ops.boxes import pairwise_iou

_logger = logging.getLogger("effdet.train")

PASS_AP = 0.9
FAILED_STATUS = 3
_BATCHES_PER_EPOCH = 10
_PASSES_PER_EPOCH = 5
_LEARNT_LOSS, _EXPLODED_LOSS = 0.5, 10.0  # an untrained network has a loss of 2 to 3, images known by heart 0.01
_SCORE = 0.3  # predictions below do not count as found


@dataclass
class OverfitStats:
    """What was measured in and after the run."""

    ap: float
    ap50: float
    losses: Sequence[float]  # mean training loss of each epoch
    eval_loss: float  # of the evaluated weights on the same images, in evaluation mode
    steps: int
    skipped: int  # of the steps, for an inf or NaN in the gradients
    lr: float
    boxes: int  # ground truth, crowd regions aside
    unreached: int  # of them, no anchor overlaps with IoU 0.5
    missed: int  # not predicted with IoU 0.5, whatever the class
    missed_unreached: int
    wrong_class: int  # predicted in place, but as another class only
    conflicts: int  # pairs of boxes in one image, nearly equal, of different classes
    beyond_limit: int  # boxes of images that have more of them than are predicted
    max_det: int
    frozen: Sequence[str] = ()  # flags that keep parts from learning
    ema_share: float = 0.0  # of the evaluated average that is still the initial weights
    confused: Sequence[str] = field(default_factory=tuple)  # 'truth as prediction', the most frequent first


def choose_images(dataset: DetectionDatset, cfg: RunConfig) -> tuple[DetectionDatset, DetectionDatset]:
    """Make both splits of the images that `--overfit N`, as a `--limit N`, has left.

    Args:
        dataset: the training split, of these images alone.
        cfg: of the run.

    Returns:
        The images as a training set, each repeated so often that an epoch has several passes and steps, shuffled by the
        run's seed, whole batches; and as a validation set.

    Raises:
        ValueError: there are fewer images with boxes than asked for.
    """
    count, batch, parser = cfg.run.overfit, cfg.run.batch_size, dataset.parser
    assert isinstance(batch, int)  # check_config refuses --overfit with -b auto
    chosen = [k for k in range(len(dataset)) if (parser.get_ann_info(k)["cls"] > 0).any()]
    if len(chosen) < count:
        raise ValueError(f"--overfit {count} needs as many images with boxes, but the training split has {len(chosen)}")
    rng = np.random.default_rng(cfg.run.seed)
    batches = max(_BATCHES_PER_EPOCH, -(-_PASSES_PER_EPOCH * count // batch))
    order = np.concatenate([rng.permutation(chosen) for _ in range(-(-batches * batch // count))])[: batches * batch]
    val = DetectionDatset(dataset.data_dir, parser.subset(chosen), seed=dataset.seed)
    val.img_ids = val.parser.img_ids
    _logger.info(
        "overfit: %d images, %d steps an epoch, no augmentation: %s",
        count,
        batches,
        ", ".join(info["file_name"] for info in val.parser.img_infos[:8]) + (", ..." if count > 8 else ""),
    )
    return DetectionDatset(dataset.data_dir, parser.subset(order), seed=dataset.seed), val


def examine(run: Any, losses: Sequence[float]) -> OverfitStats:
    """Measure a finished run: a trainer.Run, and the training loss of each of its epochs."""
    cfg, training = run.cfg, run.training
    eval_model = run.eval_bench.model
    config, ap, ap50 = eval_model.config, run.loaders.evaluator.stats["AP"], run.loaders.evaluator.stats["AP50"]
    bench = DetBenchTrain(eval_model, ignore_regions=cfg.data.crowd == "ignore").to(run.place.device).eval()
    eval_loss, predictions = predict(bench, run.loaders.val, training.precision.autocast)
    stats = OverfitStats(
        ap=ap,
        ap50=ap50,
        losses=losses,
        eval_loss=eval_loss,
        steps=training.steps,
        skipped=training.precision.skipped(),
        lr=cfg.optim.lr,
        boxes=0,
        unreached=0,
        missed=0,
        missed_unreached=0,
        wrong_class=0,
        conflicts=0,
        beyond_limit=0,
        max_det=config.max_det_per_image,
        frozen=[
            flag
            for flag, on in (("--freeze-backbone", cfg.model.freeze_backbone), ("--freeze-bn", cfg.model.freeze_bn))
            if on
        ],
        ema_share=training.ema.share_of_init() if training.ema else 0.0,
    )
    confused: dict[tuple[int, int], int] = {}
    for index, found in predictions:
        count_boxes(stats, confused, run.data.val_set.parser, index, found, config)
    names = run.data.categories.class_names
    stats.confused = [
        f"{names[truth - 1]} as {names[other - 1]} ({count})"
        for (truth, other), count in sorted(confused.items(), key=lambda item: -item[1])[:3]
    ]
    return stats


@torch.no_grad()
def predict(bench: nn.Module, loader: Any, autocast: Any) -> tuple[float, list[tuple[int, torch.Tensor]]]:
    """Return the mean loss of the batches, and each image's index and detections [D, 6] on the host."""
    losses, results = [], []
    for images, target in loader:
        with autocast():
            output = bench(images, target)
        losses.append(float(output["loss"]))
        results += list(zip(target["img_idx"].tolist(), output["detections"].cpu(), strict=True))
    return sum(losses) / len(losses), results


def count_boxes(
    stats: OverfitStats,
    confused: dict[tuple[int, int], int],
    parser: Any,
    index: int,
    detections: torch.Tensor,
    config: Any,
) -> None:
    """Add one image's boxes to the counts: found, missed, of another class, out of the anchors' reach."""
    info, truth = parser.img_infos[index], parser.get_ann_info(index)
    keep = truth["cls"] > 0
    boxes, classes = truth["bbox"][keep], truth["cls"][keep]
    size = np.array([[info["width"], info["height"]]], dtype=np.float64)
    reached = find_reached(letterbox_boxes(boxes, size, config.image_size), config)
    stats.boxes += len(boxes)
    stats.unreached += int((~reached).sum())
    stats.beyond_limit += max(0, len(boxes) - stats.max_det)
    boxes_xyxy = torch.from_numpy(np.ascontiguousarray(boxes[:, [1, 0, 3, 2]]))
    same = pairwise_iou(boxes_xyxy, boxes_xyxy).numpy() > 0.9
    stats.conflicts += int((same & (classes[:, None] < classes)).sum())
    sure = detections[detections[:, 4] >= _SCORE]
    overlaps = pairwise_iou(boxes_xyxy, sure[:, :4]).numpy() >= MATCH_IOU
    for k, hits in enumerate(overlaps):
        predicted = sure[hits, 5].long().tolist()  # the best score first
        if not predicted:
            stats.missed += 1
            stats.missed_unreached += not reached[k]
        elif classes[k] not in predicted:
            stats.wrong_class += 1
            pair = int(classes[k]), predicted[0]
            confused[pair] = confused.get(pair, 0) + 1


def diagnose(stats: OverfitStats) -> list[str]:
    """Say what is likely wrong, the likeliest first; empty when the images were learnt.

    Args:
        stats: of a finished run.

    Returns:
        Sentences, each with the number it rests on.
    """
    if stats.ap >= PASS_AP:
        return []
    first, last, boxes = stats.losses[0], stats.losses[-1], stats.boxes
    learnt = last < min(0.25 * first, _LEARNT_LOSS)
    found = []
    if stats.frozen:
        found.append(f"{' and '.join(stats.frozen)} keep the network from learning these images: leave them out")
    if stats.skipped > 0.1 * stats.steps or not math.isfinite(last):
        found.append(
            f"{stats.skipped} of {stats.steps} updates were skipped for inf or NaN in the gradients: lower "
            f"--lr ({stats.lr:g}), or with --amp the --loss-scale"
        )
    if not learnt:
        found.append(_judge_lr(stats))
    elif stats.eval_loss > 3 * last and stats.eval_loss - last > 0.1:
        cause = (
            "the running batch-norm statistics do not fit the weights: raise model.bn_momentum or "
            "model.freeze_bn_epochs, or train longer"
        )
        if stats.ema_share > 0.05:
            cause = (
                f"the averaged (EMA) weights are still {100 * stats.ema_share:.0f} % initial weights: train "
                "longer, or lower --model-ema-decay"
            )
        found.append(
            f"the loss is {last:.3g} in training but {stats.eval_loss:.3g} in evaluation, on the same images: {cause}"
        )
    if stats.wrong_class > 0.05 * boxes and learnt:
        clash = (
            f"; {stats.conflicts} pairs of nearly equal boxes in one image have different classes, which no "
            "detector can learn"
            if stats.conflicts
            else ""
        )
        found.append(
            f"{stats.wrong_class} of {boxes} boxes are found with another class "
            f"({', '.join(stats.confused)}): look at the labels{clash}"
        )
    if stats.missed_unreached > 0.02 * boxes:
        found.append(
            f"{stats.unreached} of {boxes} boxes overlap no anchor with IoU 0.5, and {stats.missed_unreached} "
            "of these are missed: python -m effdet.datacheck names settings that reach more"
        )
    if stats.beyond_limit:
        found.append(
            f"{stats.beyond_limit} boxes are beyond the {stats.max_det} that are predicted in an image: give "
            "a larger --max-det"
        )
    reached_missed = stats.missed - stats.missed_unreached
    if reached_missed > 0.05 * boxes and learnt:
        found.append(
            f"{reached_missed} of {boxes} boxes are missed although an anchor reaches them: small, crowded or "
            "hidden objects; train longer (--epochs), or enlarge --image-size"
        )
    if stats.ap50 >= PASS_AP:
        found.append(
            f"the objects are found (AP50 {stats.ap50:.2f}), their boxes are not tight yet: train longer (--epochs)"
        )
    return found or [
        f"nothing that was measured explains it (the loss went from {first:.3g} to {last:.3g}): look at "
        "the drawn images, and train longer (--epochs)"
    ]


def _judge_lr(stats: OverfitStats) -> str:
    """Say whether a loss that did not fall enough speaks for a learning rate too large or too small."""
    losses, lr = stats.losses, stats.lr
    first, last, least = losses[0], losses[-1], min(losses)
    rises = sum(later > 1.02 * earlier for earlier, later in zip(losses, losses[1:], strict=False))
    text = f"the training loss went from {first:.3g} to {last:.3g} (least {least:.3g}) in {stats.steps} steps"
    if last > 1.3 * least or max(losses) > min(1.3 * first, _EXPLODED_LOSS) or rises > 0.3 * len(losses):
        return f"{text}, up and down: --lr {lr:g} is likely too large, try {lr / 10:.2g}"
    text += f", slowly but steadily: --lr {lr:g} is likely too small"
    return f"{text}, try {lr * 10:.2g}, or train longer (--epochs)"


def report(run: Any, losses: Sequence[float]) -> int:
    """Examine a run and log the answer; return the exit status."""
    stats = examine(run, losses)
    causes = diagnose(stats)
    _logger.info(
        "overfit: %d boxes: %d found, %d with another class only, %d missed (%d of them without an anchor); "
        "loss %.3g -> %.3g, in evaluation %.3g",
        stats.boxes,
        stats.boxes - stats.missed - stats.wrong_class,
        stats.wrong_class,
        stats.missed,
        stats.missed_unreached,
        stats.losses[0],
        stats.losses[-1],
        stats.eval_loss,
    )
    for cause in causes[1:]:
        _logger.info("overfit: also: %s", cause)
    if not causes:
        _logger.info(
            "overfit: AP %.3f: the images are learnt by heart; data, labels, loss and evaluation agree", stats.ap
        )
        return 0
    _logger.info(
        "overfit: AP %.3f on the training images, expected %.1f or more: %s; status %d",
        stats.ap,
        PASS_AP,
        causes[0],
        FAILED_STATUS,
    )
    return FAILED_STATUS
