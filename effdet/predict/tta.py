"""Test-time augmentation: predict mirrored and resized versions of a batch, and fuse what they find.

Lives here: the views and the fusion, on the device and with fixed shapes. A view of another size runs a network built
for it that shares the weights.

Source: the fusion averages boxes weighted by score, as Weighted Boxes Fusion does, https://arxiv.org/abs/1910.13302;
here in one step around the boxes that survive NMS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effdet.bench import DetBenchPredict
from effdet.config.model_spec import ModelSpec
from effdet.efficientdet import EfficientDet
from effdet.ops.boxes import clip_boxes_xyxy, pairwise_iou
from effdet.ops.nms import IOU_THRESHOLD, batched_nms

_ROUNDING_PX = 1e-3  # the image's width in the input is a whole number that went through a division


def build_network_of_size(model: EfficientDet, image_size: tuple[int, int]) -> EfficientDet:
    """Build the same network for another input size (height, width) in pixels; its weights are the given one's."""
    network = EfficientDet(ModelSpec({**model.config, "image_size": image_size}), pretrained_backbone=False)
    network.load_state_dict(model.state_dict(), assign=True)
    return network.eval()


class TtaBench(nn.Module):
    """Stand in for a DetBenchPredict and predict several views of each image.

    The views are the image at each size, and its mirror image at each size where `flip` is set. A box of the result
    is the average of the boxes of its class that overlap it, weighted by score; its score is the mean over the views of
    the best score there, so an object that only some views see counts for less. Where the benches leave out boxes that
    lie wholly in the padding (their `drop_empty`), so does this one.
    """

    def __init__(self, benches: Sequence[DetBenchPredict], flip: bool) -> None:
        """Wrap benches.

        Args:
            benches: the bench of the original input size first, then those of other sizes, with the same classes and
                number of detections.
            flip: also predict mirror images.
        """
        super().__init__()
        self.benches = nn.ModuleList(benches)
        self._sizes = [bench.anchors.image_size for bench in benches]
        self.flip = flip

    @property
    def anchors(self) -> nn.Module:
        """The anchors of the original input size."""
        return self.benches[0].get_submodule("anchors")

    def forward(self, x: Tensor, img_info: Mapping[str, Tensor] | None = None) -> Tensor:
        """Detect objects; arguments and result are those of DetBenchPredict.forward."""
        info = img_info or {}
        height, width = x.shape[-2:]
        scale, size = info.get("img_scale"), info.get("img_size")
        limits: Tensor | None = None
        widths = x.new_full((len(x), 1), width, dtype=torch.float32)
        if scale is not None:
            scale = scale.to(device=x.device, dtype=torch.float32).reshape(-1, 1)
            if size is not None:
                limits = size.to(device=x.device, dtype=torch.float32) / scale  # right and lower of these is padding
                widths = (limits[:, :1] + _ROUNDING_PX).floor().clamp(1, width)
        mirror_image = _mirror(x, widths) if self.flip else x
        views = []
        for bench, sides in zip(self.benches, self._sizes, strict=True):
            factor = x.new_tensor([width / sides[1], height / sides[0]], dtype=torch.float32)
            inside = (
                None
                if limits is None
                else {"img_scale": x.new_ones(len(x), dtype=torch.float32), "img_size": limits / factor}
            )
            for mirrored in (False, True) if self.flip else (False,):
                image = mirror_image if mirrored else x
                if sides != (height, width):
                    image = F.interpolate(image, sides, mode="bilinear", align_corners=False)
                rows = bench(image, inside).to(x.device)  # a bench may suppress on the host
                boxes, scores = rows[..., :4] * factor.repeat(2), rows[..., 4:5]
                if mirrored:
                    x_min, y_min, x_max, y_max = boxes.unbind(-1)
                    boxes = torch.stack((widths - x_max, y_min, widths - x_min, y_max), -1)
                if limits is not None:
                    boxes = clip_boxes_xyxy(boxes, limits)
                    scores = scores.masked_fill((boxes[..., 2:] <= boxes[..., :2]).any(-1, keepdim=True), 0)
                views.append(torch.cat((boxes, scores, rows[..., 5:]), -1))
        stacked = torch.stack(views, 1)  # [B, V, D, 6]
        fused = fuse_detections(stacked)
        return fused if scale is None else torch.cat((fused[..., :4] * scale.unsqueeze(-1), fused[..., 4:]), -1)


def _mirror(x: Tensor, widths: Tensor) -> Tensor:
    """Mirror images [B, 3, H, W] within their widths [B, 1], so that the padding stays on the right."""
    columns = torch.arange(x.shape[-1], dtype=torch.float32, device=x.device)
    source = torch.where(columns < widths, widths - 1 - columns, columns).long()
    return x.gather(-1, source[:, None, None].expand_as(x))


def fuse_detections(views: Tensor) -> Tensor:
    """Fuse the detections of several views of the same images.

    Args:
        views: float [B, V, D, 6], rows x_min, y_min, x_max, y_max, score, class from 1; rows of score 0 are padding.

    Returns:
        float [B, D, 6] by falling score, zero rows as padding.
    """
    batch, num_views, count, _ = views.shape
    rows = views.flatten(1, 2)
    boxes, scores, classes = rows[..., :4], rows[..., 4], rows[..., 5]
    index, kept_scores = batched_nms(boxes, scores, classes, count)
    centres = rows.gather(1, index.unsqueeze(-1).expand(-1, -1, 6))
    iou = pairwise_iou(centres[..., :4], boxes)  # [B, D, V * D]
    itself = torch.arange(num_views * count, device=rows.device) == index.unsqueeze(-1)  # also a box without an area
    same = itself | ((iou > IOU_THRESHOLD) & (centres[:, :, None, 5] == classes[:, None, :]))
    weights = torch.where(same, scores.unsqueeze(1), torch.zeros_like(iou))
    fused_boxes = weights @ boxes / weights.sum(-1, keepdim=True).clamp_(min=1e-12)
    fused_scores = weights.view(batch, count, num_views, count).amax(-1).mean(-1)
    fused_scores = torch.where(kept_scores > 0, fused_scores, torch.zeros_like(fused_scores))
    fused_scores, order = fused_scores.sort(dim=1, descending=True, stable=True)
    fused = torch.cat((fused_boxes, centres[..., 5:]), -1).gather(1, order.unsqueeze(-1).expand(-1, -1, 5))
    result = torch.cat((fused[..., :4], fused_scores.unsqueeze(-1), fused[..., 4:]), -1)
    return torch.where(fused_scores.unsqueeze(-1) > 0, result, torch.zeros_like(result))
