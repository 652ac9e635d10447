"""The pictures of a report: objects and predictions drawn by what became of them, a training batch as it went in."""
from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .data.pictures import read_picture
from .draw import draw_detections, make_class_colors, make_contact_sheet
from .error_analysis import CONFUSED, RIGHT, Picture

_GREEN, _ORANGE, _RED, _GRAY = (46, 160, 88), (240, 150, 30), (222, 58, 48), (140, 140, 140)
_SIDE_PX = 420  # longest side of a picture in the report
BATCH_NAME = "train_batch.jpg"


def encode_jpeg(image: Image.Image, quality: int = 80) -> str:
    """Return a picture as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def draw_errors(picture: Picture, path: Path, width: int, height: int, names: Sequence[str]) -> dict[str, Any]:
    """Draw a picture's objects, and its predictions, in the colours of what is right and wrong.

    Args:
        picture: of `error_analysis.analyse`.
        path: its file. width, height: its size by the annotations.
        names: of the classes, by the numbers that `picture` has.

    Returns:
        'truth' and 'prediction': data URLs; 'width', 'height' of both in pixels; 'file', 'missed', 'confused',
        'false_alarms'.
    """
    image = read_picture(path, width, height)
    factor = min(1.0, _SIDE_PX / max(image.size))
    image = image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))),
                         Image.Resampling.BILINEAR)
    colors = {RIGHT: _GREEN, CONFUSED: _ORANGE, -1: _GRAY}
    matches = picture.matches
    truth = draw_detections(
        image, picture.objects_xyxy * factor, [names[k] for k in picture.object_classes],
        colors=[colors.get(state, _RED) for state in matches.object_state.tolist()])
    prediction = draw_detections(
        image, picture.predicted_xyxy * factor, [names[k] for k in picture.predicted_classes], picture.scores.tolist(),
        [colors.get(state, _RED) for state in matches.prediction_state.tolist()])
    return {"truth": encode_jpeg(truth), "prediction": encode_jpeg(prediction), "width": image.width,
            "height": image.height, "file": path.name, "missed": picture.missed, "confused": picture.confused,
            "false_alarms": picture.false_alarms}


def draw_batch(images: Tensor, target: Mapping[str, Any], mean: Tensor, std: Tensor, names: Sequence[str],
               most: int = 8) -> Image.Image:
    """Draw the first pictures of a training batch with their boxes, as they go into the network.

    It waits for the device: call it once.

    Args:
        images: float [B, 3, H, W], normalised.
        target: 'bbox' [B, M, 4] yxyx in input pixels and 'cls' [B, M] from 1; anything below is padding or ignored.
        mean, std: [1, 3, 1, 1], in 0..255.
        names: of the classes, by class index.
        most: pictures drawn.
    """
    pixels = images[:most].detach().cpu().float() * std.cpu() + mean.cpu()
    pixels = pixels.round().clamp(0, 255).to(torch.uint8)
    boxes, labels = target["bbox"][:most].cpu().numpy(), target["cls"][:most].cpu().numpy()
    colors = make_class_colors(names)
    drawn = []
    for picture, box_yxyx, label in zip(pixels.permute(0, 2, 3, 1).numpy(), boxes, labels, strict=True):
        real = label > 0
        image = Image.fromarray(np.ascontiguousarray(picture))
        factor = min(2.0, _SIDE_PX / max(image.size))  # small inputs are enlarged, so that labels can be read
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BILINEAR)
        drawn.append(draw_detections(image, box_yxyx[real][:, [1, 0, 3, 2]] * factor,
                                     [names[int(k) - 1] for k in label[real]], colors=colors))
    return make_contact_sheet(drawn, columns=4, cell_px=drawn[0].size)
