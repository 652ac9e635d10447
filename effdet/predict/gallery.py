"""Images to look at: a data set with the truth beside what a model predicts, and a batch as the network gets it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from effdet.data.images import ImageError, read_image
from effdet.ops.labels import IGNORE
from effdet.report.draw import draw_comparison, draw_detections, make_class_colors, make_contact_sheet

from .predictor import Predictor

_CELL_WIDTH_PX, _BATCH_CELL_PX = 640, 400
_NUM_IMAGES, _SCORE = 12, 0.3


def write_comparisons(model: nn.Module, dataset: Any, device: torch.device, output_dir: Path) -> Path:
    """Draw truth and predictions side by side for some images of a data set, evenly spread over it.

    Args:
        model: an EfficientDet with weights.
        dataset: a DetectionDatset.
        device: where to predict.
        output_dir: folder for the drawn images, made if need be.

    Returns:
        The path of a sheet with all of them; beside it each one in its own file. The folder itself when the data set
        is empty.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    parser = dataset.parser
    predictor = Predictor(model, device, parser.category_map)
    colors = make_class_colors(parser.category_map.class_names)
    count = min(_NUM_IMAGES, len(dataset))
    drawn = []
    for index in np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist() if count else []:
        info = parser.img_infos[index]
        try:
            image = read_image(Path(dataset.data_dir) / info["file_name"], info["width"], info["height"])
        except ImageError:  # the evaluation has named it
            continue
        truth = parser.get_ann_info(index)
        objects = truth["cls"] > 0
        (found,) = predictor.predict([image], _SCORE)
        drawn.append(
            draw_comparison(
                image,
                truth["bbox"][objects][:, [1, 0, 3, 2]],
                [predictor.name_of(int(label) - 1) for label in truth["cls"][objects]],
                found.boxes_xyxy,
                found.names,
                found.scores.tolist(),
                colors,
            )
        )
        drawn[-1].save(output_dir / f"{Path(info['file_name']).stem}.jpg", quality=92)
    if not drawn:
        return output_dir
    sheet = output_dir / "sheet.jpg"
    height = round(_CELL_WIDTH_PX * float(np.median([pair.height / pair.width for pair in drawn])))
    make_contact_sheet(drawn, columns=2, cell_px=(_CELL_WIDTH_PX, height)).save(sheet, quality=92)
    return sheet


def draw_training_batch(
    images: torch.Tensor,
    target: Mapping[str, torch.Tensor],
    class_names: Sequence[str],
    mean: torch.Tensor,
    std: torch.Tensor,
    num_images: int = 16,
) -> Image.Image:
    """Draw a batch with its boxes as the network sees it, augmented and resized.

    Args:
        images: float [B, 3, H, W], normalised, on any device.
        target: 'bbox' [B, M, 4] yxyx in input pixels, 'cls' [B, M]: 1..K, -1 padding, -2 an ignore region.
        class_names: the K names.
        mean: [1, 3, 1, 1], what the images were normalised with, in units of pixel values; a PrefetchLoader has it.
        std: likewise.
        num_images: draw at most the first so many.

    Returns:
        One image, a sheet in up to four columns.
    """
    pixels = (images[:num_images].float().cpu() * std.cpu() + mean.cpu()).round().clamp(0, 255).to(torch.uint8)
    boxes, classes = target["bbox"].cpu().numpy(), target["cls"].cpu().long().numpy()
    colors = make_class_colors(class_names) | {"ignore": (128, 128, 128)}
    height, width = images.shape[-2:]
    size_wh = _BATCH_CELL_PX, round(_BATCH_CELL_PX * height / width)
    drawn = []
    for image, rows, labels in zip(pixels.permute(0, 2, 3, 1).numpy(), boxes, classes, strict=False):
        shown = (labels > 0) | (labels == IGNORE)
        names = ["ignore" if label == IGNORE else class_names[label - 1] for label in labels[shown]]
        resized = Image.fromarray(image).resize(size_wh)  # before drawing, so that labels can be read
        boxes_xyxy = rows[shown][:, [1, 0, 3, 2]] * (_BATCH_CELL_PX / width)
        drawn.append(draw_detections(resized, boxes_xyxy, names, colors=colors))
    return make_contact_sheet(drawn, 4, size_wh)
