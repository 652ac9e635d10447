"""Draw labelled boxes, truth beside prediction, and contact sheets, with Pillow only.

Takes images and numbers and returns new images; what to draw and where to save it is the caller's part.
"""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from effdet.data.images import to_rgb

Color = tuple[int, int, int]
_DARK, _LIGHT = (22, 24, 28), (255, 255, 255)
_PAPER = (246, 246, 244)
# For labels beyond ASCII, which Pillow's own font lacks; the first that the system has is taken, widest cover first.
_UNICODE_FONTS = ("NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf")


def make_class_colors(names: Sequence[str]) -> dict[str, Color]:
    """Return a colour for each class name, neighbours in the list far apart; the same list gives the same colours."""
    return {name: _nth_color(i) for i, name in enumerate(names)}


def draw_detections(
    image: Image.Image,
    boxes_xyxy: Any,
    labels: Sequence[str],
    scores: Sequence[float] | None = None,
    colors: Mapping[str, Color] | Sequence[Color] | None = None,
) -> Image.Image:
    """Return a copy of the image with labelled boxes on it; line width and font follow the image's size.

    Args:
        image: any mode, as for prediction: turned upright where it still says that it is not.
        boxes_xyxy: array, CPU tensor or lists [N, 4] in pixels; parts outside the image are not drawn.
        labels: N texts, any Unicode; too long ones are shortened.
        scores: N numbers shown behind the labels, or None.
        colors: by label, or one for each box, red, green, blue in 0..255. None, and labels that the mapping lacks, take
            a colour that depends on the label's text alone; `make_class_colors` gives better separated ones.

    Returns:
        An RGB image of the upright one's size; a plain copy when N is 0.

    Raises:
        ValueError: the counts differ, or a box is not four finite numbers.
    """
    boxes_xyxy = _check_boxes(boxes_xyxy, labels, scores, colors)
    canvas = to_rgb(image, upright=True).copy()
    if not len(boxes_xyxy):
        return canvas
    draw = ImageDraw.Draw(canvas)
    scale = (canvas.width * canvas.height) ** 0.5
    line_px = max(2, round(scale / 220))
    font = _load_font(max(10, round(scale / 30)), labels)

    areas = (boxes_xyxy[:, 2] - boxes_xyxy[:, 0]) * (boxes_xyxy[:, 3] - boxes_xyxy[:, 1])
    chips: list[tuple[tuple[int, int, int, int], str, Color]] = []
    for i in np.argsort(-areas, kind="stable"):  # large ones first, so that small ones stay whole
        pixels = _to_pixels(boxes_xyxy[i], canvas.size)
        if pixels is None:
            continue
        color = _color_of(labels[i], int(i), colors)
        x0, y0, x1, y1 = pixels
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=_against(color), width=line_px + 2)
        draw.rectangle(pixels, outline=color, width=line_px)
        text = " ".join(str(labels[i]).split())
        text = _shorten(text, "" if scores is None else f" {float(scores[i]):.2f}", font, canvas.width)
        chip = _place_chip(pixels, _chip_size(text, font), canvas.size, line_px, [placed for placed, _, _ in chips])
        chips.append((chip, text, color))
    for chip, text, color in chips:  # after all boxes: no line crosses a text
        draw.rectangle(chip, fill=color)
        middle = (chip[0] + chip[2]) / 2, (chip[1] + chip[3]) / 2
        draw.text(middle, text, fill=_against(color), font=font, anchor="mm")
    return canvas


def draw_comparison(
    image: Image.Image,
    truth_boxes_xyxy: Any,
    truth_labels: Sequence[str],
    boxes_xyxy: Any,
    labels: Sequence[str],
    scores: Sequence[float] | None = None,
    colors: Mapping[str, Color] | None = None,
) -> Image.Image:
    """Return the image twice, side by side under the captions "truth" and "prediction".

    Args:
        image: as for `draw_detections`.
        truth_boxes_xyxy: [M, 4] in pixels, M may be 0.
        truth_labels: M texts.
        boxes_xyxy: [N, 4] predicted boxes in pixels, N may be 0.
        labels: N texts.
        scores: N numbers, or None.
        colors: by label, as for `draw_detections`.

    Raises:
        ValueError: as `draw_detections`.
    """
    image = to_rgb(image, upright=True)
    left = draw_detections(image, truth_boxes_xyxy, truth_labels, colors=colors)
    right = draw_detections(image, boxes_xyxy, labels, scores, colors)
    font = ImageFont.load_default(size=max(11, round((image.width * image.height) ** 0.5 / 24)))
    caption_px = round(1.7 * font.size)
    gap = max(4, round(image.width / 60))
    sheet = Image.new("RGB", (2 * image.width + gap, image.height + caption_px), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for x, caption, half in ((0, "truth", left), (image.width + gap, "prediction", right)):
        sheet.paste(half, (x, caption_px))
        draw.text((x + image.width / 2, caption_px / 2), caption, fill=_DARK, font=font, anchor="mm")
    return sheet


def make_contact_sheet(images: Sequence[Image.Image], columns: int, cell_px: int | tuple[int, int]) -> Image.Image:
    """Return one image with all images in rows, each scaled to fit its cell and centred there.

    Args:
        images: at least one.
        columns: 1 or more; fewer images than columns make one shorter row.
        cell_px: side of the square cells, or their (width, height).

    Raises:
        ValueError: there are no images, or a size is below 1.
    """
    width, height = (cell_px, cell_px) if isinstance(cell_px, int) else cell_px
    if not images or columns < 1 or min(width, height) < 1:
        raise ValueError(
            f"got {len(images)} images, {columns} columns, cells of {width} x {height}; each must be 1 or more"
        )
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    gap = max(2, round(min(width, height) / 40))
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), _PAPER)
    for i, image in enumerate(images):
        fitted = ImageOps.contain(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
        x = gap + (i % columns) * (width + gap) + (width - fitted.width) // 2
        y = gap + (i // columns) * (height + gap) + (height - fitted.height) // 2
        sheet.paste(fitted, (x, y))
    return sheet


def _check_boxes(boxes_xyxy: Any, labels: Sequence, scores: Sequence | None, colors: Any) -> np.ndarray:
    boxes = np.asarray(boxes_xyxy, dtype=np.float64)
    boxes = boxes.reshape(0, 4) if boxes.size == 0 else boxes
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes have the shape {list(boxes.shape)}; needed is [N, 4]: x_min, y_min, x_max, y_max")
    for what, given in (("labels", labels), ("scores", scores), ("colors", colors)):
        if given is not None and not isinstance(given, Mapping) and len(given) != len(boxes):
            raise ValueError(f"got {len(given)} {what} for {len(boxes)} boxes; give one for each box")
    bad = np.flatnonzero(~np.isfinite(boxes).all(axis=1))
    if bad.size:
        raise ValueError(f"box {bad[0]} is {boxes[bad[0]].tolist()}; boxes must be finite numbers, leave this one out")
    return boxes


def _load_font(size_px: int, labels: Sequence[str]) -> Any:
    if not all(str(label).isascii() for label in labels):
        for name in _UNICODE_FONTS:
            try:
                return ImageFont.truetype(name, size_px)
            except OSError:
                continue  # not on this system; without any of them Pillow's font draws boxes for what it lacks
    return ImageFont.load_default(size=size_px)


def _to_pixels(box_xyxy: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """Return first and last column and row of a box cut at the image's edge, or None when nothing is left."""
    width, height = size
    x0, y0, x1, y1 = box_xyxy
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height or x1 < x0 or y1 < y0:
        return None
    first_x, first_y = min(max(round(x0), 0), width - 1), min(max(round(y0), 0), height - 1)
    last_x, last_y = min(round(x1), width) - 1, min(round(y1), height) - 1
    return first_x, first_y, max(last_x, first_x), max(last_y, first_y)


def _chip_size(text: str, font: Any) -> tuple[int, int]:
    return round(font.getlength(text) + 0.6 * font.size), round(1.3 * font.size)


def _shorten(text: str, score: str, font: Any, width: int) -> str:
    """Cut the label, never the score, until its chip is no wider than the image."""
    whole = text
    while text and _chip_size(text + score, font)[0] > width:
        text = text[:-1]
    return text + score if text == whole else f"{text[:-1].rstrip()}…{score}"


def _place_chip(
    box: tuple[int, int, int, int],
    chip_wh: tuple[int, int],
    size: tuple[int, int],
    line_px: int,
    placed: list[tuple[int, int, int, int]],
) -> tuple[int, int, int, int]:
    """Return the chip's pixels, inside the image, at the first of six places around the box that is free."""
    width, height = chip_wh
    x0, y0, x1, y1 = box
    edge = line_px // 2
    places = [
        (x, y)
        for y in (y0 - height - 1, y0 + edge, y1 + 2, y1 - height - edge)
        for x in (x0 - 1, x1 - width + 1)
        if y >= 0 and y + height <= size[1]
    ] or [(x0, y0)]
    best, least = None, None
    for x, y in places:
        x = max(0, min(x, size[0] - width))
        y = max(0, min(y, size[1] - height))
        chip = (x, y, min(x + width, size[0]) - 1, min(y + height, size[1]) - 1)
        shared = sum(
            max(0, min(chip[2], other[2]) - max(chip[0], other[0]) + 1)
            * max(0, min(chip[3], other[3]) - max(chip[1], other[1]) + 1)
            for other in placed
        )
        if least is None or shared < least:
            best, least = chip, shared
    return best


def _color_of(label: str, index: int, colors: Mapping[str, Color] | Sequence[Color] | None) -> Color:
    if colors is not None and not isinstance(colors, Mapping):
        return tuple(colors[index])
    if colors is not None and label in colors:
        return tuple(colors[label])
    return _nth_color(zlib.crc32(str(label).encode("utf-8", "surrogatepass")) % 48)


def _nth_color(n: int) -> Color:
    saturation, value = ((0.80, 0.98), (0.95, 0.72), (0.50, 1.0))[n // 8 % 3]
    red, green, blue = colorsys.hsv_to_rgb((0.58 + n * 0.618034) % 1, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _against(color: Color) -> Color:
    """Return the dark or the light ink, whichever is easier to read on `color`."""
    return _DARK if 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140 else _LIGHT
