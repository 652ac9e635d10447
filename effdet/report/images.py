"""The images of a report: objects and predictions drawn by what became of them, a training batch as it went in."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from effdet.data.images import read_image
from effdet.metrics.errors import CONFUSED, RIGHT, ImageErrors, Suspect

from .draw import draw_detections

_GREEN, _ORANGE, _RED, _GRAY = (46, 160, 88), (240, 150, 30), (222, 58, 48), (140, 140, 140)
_SIDE_PX = 420  # longest side of an image in the report
_CROP_PX = 200  # side of a crop
BATCH_NAME = "train_batch.jpg"


def encode_jpeg(image: Image.Image, quality: int = 80) -> str:
    """Return an image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def draw_errors(
    found: ImageErrors, path: Path, width: int | None, height: int | None, names: Sequence[str]
) -> dict[str, Any]:
    """Draw an image's objects, and its predictions, in the colours of what is right and wrong.

    Args:
        found: of `errors.analyse`.
        path: its file.
        width: its width by the annotations.
        height: likewise.
        names: of the classes, by the numbers that `found` has.

    Returns:
        'truth' and 'prediction': data URLs; 'width', 'height' of both in pixels; 'file', 'missed', 'confused',
        'false_alarms'.
    """
    image = read_image(path, width, height)
    factor = min(1.0, _SIDE_PX / max(image.size))
    image = image.resize(
        (max(1, round(image.width * factor)), max(1, round(image.height * factor))), Image.Resampling.BILINEAR
    )
    colors = {RIGHT: _GREEN, CONFUSED: _ORANGE, -1: _GRAY}
    matches = found.matches
    truth = draw_detections(
        image,
        found.objects_xyxy * factor,
        [names[k] for k in found.object_classes],
        colors=[colors.get(state, _RED) for state in matches.object_state.tolist()],
    )
    prediction = draw_detections(
        image,
        found.predicted_xyxy * factor,
        [names[k] for k in found.predicted_classes],
        found.scores.tolist(),
        [colors.get(state, _RED) for state in matches.prediction_state.tolist()],
    )
    return {
        "truth": encode_jpeg(truth),
        "prediction": encode_jpeg(prediction),
        "width": image.width,
        "height": image.height,
        "file": path.name,
        "missed": found.missed,
        "confused": found.confused,
        "false_alarms": found.false_alarms,
    }


def draw_suspect(
    suspect: Suspect, path: Path, width: int | None, height: int | None, names: Sequence[str]
) -> dict[str, Any]:
    """Cut out a prediction that the annotations contradict, with as much around it; arguments as for `draw_errors`.

    Returns:
        'image': data URL; 'width', 'height' in pixels; 'file'; 'predicted', 'score', 'labelled' (None: no label).
    """
    image = read_image(path, width, height)
    x0, y0, x1, y1 = suspect.box_xyxy.tolist()
    half = max(x1 - x0, y1 - y0, 16.0)
    left, top = max(0, int((x0 + x1) / 2 - half)), max(0, int((y0 + y1) / 2 - half))
    right = max(left + 1, min(image.width, int((x0 + x1) / 2 + half)))
    bottom = max(top + 1, min(image.height, int((y0 + y1) / 2 + half)))
    crop = image.crop((left, top, right, bottom))
    factor = _CROP_PX / max(crop.size)
    crop = crop.resize(
        (max(1, round(crop.width * factor)), max(1, round(crop.height * factor))), Image.Resampling.BILINEAR
    )
    box = (suspect.box_xyxy - [left, top, left, top]) * factor
    color = _RED if suspect.object_class is None else _ORANGE
    drawn = draw_detections(crop, [box], [""], colors=[color])
    return {
        "image": encode_jpeg(drawn),
        "width": drawn.width,
        "height": drawn.height,
        "file": path.name,
        "predicted": names[suspect.predicted_class],
        "score": suspect.score,
        "labelled": None if suspect.object_class is None else names[suspect.object_class],
    }
