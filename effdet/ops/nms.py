"""From head outputs to detections: candidate selection, exact class-aware NMS, soft-NMS; batched, fixed shapes.

Hard NMS is in nms_cpu.py for CPUs, where reading a value costs nothing, and in nms_blocks.py for accelerators, where
launches do. The loops here run `max_det` times, once for each detection kept, and need no value on the host: soft-NMS,
whose scores change from box to box, and hard NMS in a program that is traced or compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from effdet.runtime.device import is_host, is_recorded
from effdet.runtime.memory import to_host

from . import nms_blocks, nms_cpu
from .boxes import box_area, clip_boxes_xyxy, common_area, decode_boxes, iou_from_areas

# Post-processing constants of the reference (google/automl, efficientdet/nms_np.py and rwightman/efficientdet-pytorch).
IOU_THRESHOLD = 0.5
SOFT_NMS_SIGMA = 0.5
SOFT_NMS_MIN_SCORE = 0.001

_SUPPRESSED = -1.0  # below any score

Suppress = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


def select_candidates(
    cls_outputs: Sequence[Tensor], box_outputs: Sequence[Tensor], num_classes: int, max_detection_points: int = 5000
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keep the (anchor, class) pairs with the largest logits.

    Args:
        cls_outputs: logits [B, A * K, height, width] of each level, finest first.
        box_outputs: deltas [B, A * 4, height, width] of each level.
        num_classes: K.
        max_detection_points: number of pairs to keep; fewer when there are fewer.

    Returns:
        logits [B, k], deltas [B, k, 4], anchor index int64 [B, k], class_idx int64 [B, k]; by falling logit.
    """
    if is_host(cls_outputs[0].device):
        return nms_cpu.select_candidates(cls_outputs, box_outputs, num_classes, max_detection_points)
    # A pair among the k best belongs to one of the k anchors with the largest maxima over classes, so the search goes
    # through the anchors and then through the pairs of k of them, not through all pairs.
    batch = cls_outputs[0].shape[0]
    logits = torch.cat([level.permute(0, 2, 3, 1).reshape(batch, -1, num_classes) for level in cls_outputs], 1)
    deltas = torch.cat([level.permute(0, 2, 3, 1).reshape(batch, -1, 4) for level in box_outputs], 1)
    count = min(max_detection_points, logits.shape[1] * num_classes)
    anchors = logits.amax(2).topk(min(count, logits.shape[1]), dim=1).indices
    pairs = logits.gather(1, anchors.unsqueeze(2).expand(-1, -1, num_classes)).reshape(batch, -1)
    order = pairs.topk(count, dim=1).indices
    top_logits = pairs.gather(1, order)  # the first Ascend 910 has top-k's own values in float16
    order = order.to(torch.int32)  # an accelerator may have no division of int64 of its own
    rows = torch.div(order, num_classes, rounding_mode="floor")
    anchors = anchors.gather(1, rows.long())
    classes = (order - rows * num_classes).long()
    return top_logits, deltas.gather(1, anchors.unsqueeze(2).expand(-1, -1, 4)), anchors, classes


def batched_nms(
    boxes_xyxy: Tensor, scores: Tensor, classes: Tensor, max_det: int = 100, iou_threshold: float = IOU_THRESHOLD
) -> tuple[Tensor, Tensor]:
    """Keep the best boxes, dropping those that overlap a better one of their class by more than `iou_threshold`.

    Args:
        boxes_xyxy: float [B, k, 4].
        scores: float [B, k], at least 0, or -1 of boxes that are left out.
        classes: [B, k]; boxes of different classes never suppress each other.
        max_det: number of boxes to keep at most.
        iou_threshold: in 0..1.

    Returns:
        index of the kept boxes int64 [B, min(max_det, k)], by falling score, and their scores; where fewer boxes were
        left the score is -1 and the index means nothing. Ties go to the first box.
    """
    if is_host(boxes_xyxy.device):
        return nms_cpu.batched_nms(boxes_xyxy, scores, classes, max_det, iou_threshold)
    if not is_recorded():
        return nms_blocks.batched_nms(boxes_xyxy, scores, classes, max_det, iou_threshold)
    areas = box_area(boxes_xyxy)
    positions = torch.arange(scores.shape[1], device=scores.device)
    corners = boxes_xyxy.unbind(-1)
    planes = torch.stack((*corners, areas, classes.to(areas.dtype)), 1)  # [B, 6, k]
    alive = scores
    kept_indices, kept_scores = [], []
    for _ in range(min(max_det, scores.shape[1])):
        score, index = alive.max(1, keepdim=True)
        kept_indices.append(index)
        kept_scores.append(score)
        best = planes.gather(2, index.unsqueeze(1).expand(-1, 6, 1)).unbind(1)  # 6 x [B, 1]
        iou = iou_from_areas(common_area(corners, best), areas, best[4])
        # Two empty boxes give NaN: the comparison is false and neither suppresses the other.
        suppressed = ((iou > iou_threshold) & (planes[:, 5] == best[5])) | (positions == index)
        alive = alive.masked_fill(suppressed, _SUPPRESSED)
    return torch.cat(kept_indices, 1), torch.cat(kept_scores, 1)


def batched_soft_nms(
    boxes_xyxy: Tensor,
    scores: Tensor,
    classes: Tensor,
    max_det: int = 100,
    sigma: float = SOFT_NMS_SIGMA,
    score_threshold: float = SOFT_NMS_MIN_SCORE,
    method_gaussian: bool = True,
    iou_threshold: float = IOU_THRESHOLD,
) -> tuple[Tensor, Tensor]:
    """Keep the best boxes, lowering the scores of those that overlap a better one of their class.

    Arguments and results are those of `batched_nms`; the scores returned are the lowered ones.

    Args:
        boxes_xyxy: float [B, k, 4].
        scores: float [B, k].
        classes: [B, k].
        max_det: number of boxes to keep at most.
        sigma: width of the Gaussian exp(-iou^2 / sigma).
        score_threshold: boxes whose score falls to this or below are dropped, from the second box on.
        method_gaussian: use the Gaussian; otherwise scores with an IoU above the threshold are multiplied by 1 - iou.
        iou_threshold: of the linear method.

    Source:
        Soft-NMS, https://arxiv.org/abs/1704.04503. Classes are kept apart by moving each class's boxes by its own
        offset, as in the reference, so that the numbers agree with it.
    """
    batch, count = scores.shape
    offsets = classes.to(boxes_xyxy.dtype) * (boxes_xyxy.reshape(batch, -1).amax(1, keepdim=True) + 1)
    boxes_xyxy = boxes_xyxy + offsets.unsqueeze(-1)
    corners, areas = boxes_xyxy.unbind(-1), box_area(boxes_xyxy)
    planes = torch.stack((*corners, areas), 1)
    positions = torch.arange(count, device=scores.device)
    alive = scores
    kept_indices, kept_scores = [], []
    for _ in range(min(max_det, count)):
        score, index = alive.max(1, keepdim=True)
        kept_indices.append(index)
        kept_scores.append(score)
        best = planes.gather(2, index.unsqueeze(1).expand(-1, 5, 1)).unbind(1)
        common = common_area(corners, best)
        iou = torch.where(common > 0, iou_from_areas(common, areas, best[4]), torch.zeros_like(common))
        if method_gaussian:
            decay = torch.exp(-iou.square() / sigma)
        else:
            decay = torch.where(iou > iou_threshold, 1 - iou, torch.ones_like(iou))
        lowered = alive * decay
        dropped = (lowered <= score_threshold) | (positions == index) | (alive < 0)
        alive = lowered.masked_fill(dropped, _SUPPRESSED)
    return torch.cat(kept_indices, 1), torch.cat(kept_scores, 1)


def npu_nms(
    operator: Callable[..., tuple[Tensor, ...]],
    num_classes: int,
    boxes_xyxy: Tensor,
    scores: Tensor,
    classes: Tensor,
    max_det: int = 100,
    iou_threshold: float = IOU_THRESHOLD,
) -> tuple[Tensor, Tensor, Tensor]:
    """Suppress with the operator npu_batch_nms, in float32.

    Against `batched_nms`: it drops boxes without an area, and boxes of equal score come in no promised order.

    Args:
        operator: torch_npu's npu_batch_nms, or a function like it.
        num_classes: K.
        boxes_xyxy: as for `batched_nms`.
        scores: see there.
        classes: see there.
        max_det: 1..1000, the operator's limit.
        iou_threshold: see `batched_nms`.

    Returns:
        boxes [B, max_det, 4], scores [B, max_det], class_idx [B, max_det]; where fewer boxes were left the score is -1.

    Source: op-plugin, npu_batch_nms; ops-cv, BatchMultiClassNonMaxSuppression (keeps score > threshold, suppresses
        IoU > threshold, of each class and then of all the best).
    """
    by_class = scores.new_zeros((*scores.shape, num_classes)).scatter(2, classes.unsqueeze(2), scores.unsqueeze(2))
    boxes, kept_scores, kept_classes, counts = operator(
        boxes_xyxy.unsqueeze(2), by_class, 0.0, iou_threshold, max_det, max_det
    )
    missing = torch.arange(max_det, device=scores.device) >= counts.reshape(-1, 1)
    return boxes, kept_scores.masked_fill(missing, _SUPPRESSED), kept_classes.to(classes.dtype)


def make_detections(
    logits: Tensor,
    deltas: Tensor,
    anchors_yxyx: Tensor,
    classes: Tensor,
    img_scale: Tensor | None = None,
    img_size: Tensor | None = None,
    max_det: int = 100,
    soft_nms: bool = False,
    suppress: Suppress | None = None,
    drop_empty: bool = False,
    on_host: bool = False,
) -> Tensor:
    """Decode candidates into boxes, clip, suppress, and pad to a fixed number of rows.

    Args:
        logits: [B, k], by falling logit.
        deltas: [B, k, 4].
        anchors_yxyx: float [B, k, 4], the anchors of the candidates.
        classes: class_idx [B, k].
        img_scale: [B] original pixels per input pixel; boxes are returned in original pixels when given.
        img_size: [B, 2] original width and height; boxes are clipped when given together with `img_scale`.
        max_det: rows for each image.
        soft_nms: use soft-NMS.
        suppress: instead of both, maps boxes, scores, classes and `max_det` to the boxes, scores and classes to keep,
            as `npu_nms` does.
        drop_empty: leave out boxes that clipping left without width or height: those beyond the image's edge, where the
            input is padding. They would take the places of others.
        on_host: bring the decoded candidates to the host in one copy and suppress there.

    Returns:
        float32 [B, max_det, 6]: x_min, y_min, x_max, y_max, score, class from 1; zero rows as padding. On the host
        with `on_host`, else on the candidates' device.
    """
    if logits.shape[1] == 0:
        empty = logits.new_zeros((logits.shape[0], max_det, 6), dtype=torch.float32)
        return to_host(empty) if on_host else empty
    boxes = decode_boxes(deltas.float(), anchors_yxyx, output_xyxy=True)
    if img_scale is not None:
        img_scale = img_scale.to(device=boxes.device, dtype=boxes.dtype).reshape(-1, 1)
        if img_size is not None:
            boxes = clip_boxes_xyxy(boxes, img_size.to(device=boxes.device, dtype=boxes.dtype) / img_scale)
    scores = logits.float().sigmoid()
    if on_host:
        boxes, scores, classes, img_scale = _to_host(boxes, scores, classes, img_scale)
    if drop_empty:
        final = boxes if img_scale is None else boxes * img_scale.unsqueeze(-1)  # rounding may close a last gap
        scores = scores.masked_fill((final[..., 2:] <= final[..., :2]).any(-1), _SUPPRESSED)
    if suppress is not None:
        boxes, scores, classes = suppress(boxes, scores, classes, max_det)
    else:
        index, scores = (batched_soft_nms if soft_nms else batched_nms)(boxes, scores, classes, max_det)
        boxes = boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
        classes = classes.gather(1, index)
    if img_scale is not None:
        boxes = boxes * img_scale.unsqueeze(-1)
    rows = torch.cat((boxes, scores.unsqueeze(-1), (classes + 1).to(boxes.dtype).unsqueeze(-1)), -1)
    rows = torch.where(scores.unsqueeze(-1) >= 0, rows, torch.zeros_like(rows))
    missing = max_det - rows.shape[1]
    return torch.cat((rows, rows.new_zeros((rows.shape[0], missing, 6))), 1) if missing > 0 else rows


def _to_host(
    boxes: Tensor, scores: Tensor, classes: Tensor, img_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Bring all to the host in one copy: a row for each candidate, and a last one for the scale."""
    rows = torch.cat((boxes, scores.unsqueeze(-1), classes.to(boxes.dtype).unsqueeze(-1)), -1)
    if img_scale is not None:
        rows = torch.cat((rows, img_scale.unsqueeze(-1).expand(-1, -1, 6)), 1)
    rows = to_host(rows)
    if img_scale is not None:
        rows, img_scale = rows[:, :-1], rows[:, -1, :1]
    boxes, scores, classes = rows.split((4, 1, 1), -1)
    return boxes, scores.squeeze(-1), classes.squeeze(-1), img_scale


def generate_detections(
    cls_outputs: Tensor,
    box_outputs: Tensor,
    anchor_boxes: Tensor,
    indices: Tensor,
    classes: Tensor,
    img_scale: Tensor | None,
    img_size: Tensor | None,
    max_det_per_image: int = 100,
    soft_nms: bool = False,
) -> Tensor:
    """Make the detections of one image: effdet's form of `make_detections`.

    Args:
        cls_outputs: logits [k, 1].
        box_outputs: deltas [k, 4].
        anchor_boxes: all anchors [N, 4] yxyx.
        indices: anchor of each candidate [k].
        classes: class_idx of each candidate [k].
        img_scale: scalar, or None.
        img_size: [2] original width and height, or None.
        max_det_per_image: rows of the result.
        soft_nms: use soft-NMS.

    Returns:
        float32 [max_det_per_image, 6], as `make_detections`.
    """
    logits, order = cls_outputs.reshape(1, -1).sort(dim=1, descending=True, stable=True)
    order = order[0]
    return make_detections(
        logits,
        box_outputs[order].unsqueeze(0),
        anchor_boxes[indices[order]].unsqueeze(0),
        classes[order].unsqueeze(0),
        None if img_scale is None else img_scale.reshape(1),
        None if img_size is None else img_size.reshape(1, 2),
        max_det_per_image,
        soft_nms,
    )[0]
