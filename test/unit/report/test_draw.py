"""Drawn boxes, labels and sheets, asserted on pixels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from effdet.report.draw import draw_comparison, draw_detections, make_class_colors, make_contact_sheet

RED, BLUE = (230, 30, 30), (30, 60, 230)
GRAY = (128, 128, 128)


def plain(width: int = 200, height: int = 150, color: tuple[int, int, int] = GRAY) -> Image.Image:
    return Image.new("RGB", (width, height), color)


def where(image: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    return (np.asarray(image) == color).all(axis=-1)


def test_a_box_is_drawn_on_its_pixels_and_its_inside_stays():
    drawn = draw_detections(plain(), [[40, 60, 120, 130]], ["cat"], colors=[RED])
    red = where(drawn, RED)
    assert red[60:130, 40].all() and red[60:130, 119].all()  # x_max, y_max are edges: the last pixel is one before
    assert red[60, 40:120].all() and red[129, 40:120].all()
    assert not red[131:].any() and not red[:, 121:].any() and not red[:, :39].any()
    assert where(drawn, GRAY)[66:124, 46:114].all()


def test_the_given_image_is_not_changed_and_nothing_gives_a_plain_copy():
    image = plain()
    draw_detections(image, [[1, 1, 90, 90]], ["cat"])
    assert where(image, GRAY).all()
    for nothing in ([], np.zeros((0, 4))):
        copy = draw_detections(image, nothing, [])
        assert copy is not image and where(copy, GRAY).all()


@pytest.mark.parametrize("background", [(0, 0, 0), (255, 255, 255), RED, (255, 255, 0)])
def test_boxes_and_texts_are_readable_on_any_background(background):
    for color in (RED, (255, 255, 0), (20, 20, 60), (255, 255, 255)):
        drawn = draw_detections(plain(color=background), [[40, 60, 120, 130]], ["cat"], colors=[color])
        pixels = np.asarray(drawn, dtype=int)
        across = pixels[95, 30:60]  # over the left side of the box: some step of it is a strong one
        assert np.abs(np.diff(across @ [0.299, 0.587, 0.114])).max() > 70
        chip = pixels[46:58, 42:60].reshape(-1, 3) @ [0.299, 0.587, 0.114]
        assert chip.max() - chip.min() > 100


def lone_chip(label: str, color: tuple[int, int, int]) -> np.ndarray:
    """Cut a chip out of an image where it has all the room it wants: above its box."""
    above = np.asarray(draw_detections(plain(300, 300), [[80, 80, 220, 220]], [label], colors=[color]))[:79]
    rows, columns = np.nonzero((above != GRAY).any(axis=-1))
    return above[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def shows(image: Image.Image, part: np.ndarray) -> bool:
    views = np.lib.stride_tricks.sliding_window_view(np.asarray(image), part.shape)
    return bool((views == part).all(axis=(3, 4, 5)).any())


@pytest.mark.parametrize(
    "box", [[0, 0, 60, 60], [240, 250, 300, 300], [-9, -9, 400, 400], [290, 0, 360, 9], [5, 290, 9, 320], [7, 7, 7, 7]]
)
def test_chips_lie_whole_inside_the_image(box):
    chip = lone_chip("cat", BLUE)
    assert chip.shape[0] >= 10 and chip.shape[1] >= 15 and where(chip, BLUE).sum() > 0.5 * where(chip, BLUE).size
    assert shows(draw_detections(plain(300, 300), [box], ["cat"], colors=[BLUE]), chip)


def test_chips_of_boxes_at_the_same_place_do_not_cover_each_other():
    labels, colors = ["one", "two", "three", "four"], [RED, BLUE, (0, 120, 0), (90, 0, 90)]
    drawn = draw_detections(plain(300, 300), [[80, 80, 220, 220]] * 4, labels, colors=colors)
    for label, color in zip(labels, colors, strict=True):
        assert shows(drawn, lone_chip(label, color))


def test_scores_are_shown_and_long_labels_keep_them():
    without = draw_detections(plain(), [[20, 60, 180, 140]], ["cat"], colors=[RED])
    with_score = draw_detections(plain(), [[20, 60, 180, 140]], ["cat"], [0.87], colors=[RED])
    other = draw_detections(plain(), [[20, 60, 180, 140]], ["cat"], [0.17], colors=[RED])
    assert where(with_score, RED)[:58].sum() > where(without, RED)[:58].sum()
    assert np.asarray(with_score).tobytes() != np.asarray(other).tobytes()
    long = draw_detections(plain(), [[20, 60, 180, 140]], ["w" * 500], [0.87], colors=[RED])
    longer = draw_detections(plain(), [[20, 60, 180, 140]], ["w" * 900], [0.87], colors=[RED])
    assert np.asarray(long).tobytes() == np.asarray(longer).tobytes()
    assert (
        np.asarray(long).tobytes()
        != np.asarray(draw_detections(plain(), [[20, 60, 180, 140]], ["w" * 500], [0.17], colors=[RED])).tobytes()
    )


@pytest.mark.parametrize("label", ["貓", "Κύκλος", "naïve café", "🙂", "قطة", "line\nbreak", "\ud800", "", "\x00"])
def test_any_text_can_be_a_label(label):
    drawn = draw_detections(plain(), [[20, 60, 180, 140]], [label], [0.5])
    assert not where(drawn, GRAY)[45:58, 22:40].all()  # a chip is there
    assert where(drawn, GRAY)[70:130, 30:170].all()


@pytest.mark.parametrize("size", [(8, 8), (40, 1200), (1200, 40)])
def test_odd_image_sizes_work(size):
    drawn = draw_detections(plain(*size), [[1, 1, size[0] - 1, size[1] - 1]], ["a long label"], [1.0], colors=[RED])
    assert drawn.size == size and where(drawn, RED).any()


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "I;16", "1"])
def test_any_image_mode_works(mode):
    image = Image.new(mode, (80, 60)) if mode == "I;16" else plain(80, 60).convert(mode)
    drawn = draw_detections(image, [[10, 30, 50, 50]], ["cat"], colors=[RED])
    assert drawn.mode == "RGB" and where(drawn, RED)[31:50, 10].all()


def test_a_photograph_and_a_wide_image_are_drawn_on_as_they_are_predicted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    plain(60, 80).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    expected = draw_detections(plain(60, 80), [[10, 30, 50, 50]], ["cat"], colors=[RED])
    for image in (Image.open(tmp_path / "a.png"), Image.fromarray(np.full((80, 60), 128 * 257, np.uint16))):
        drawn = draw_detections(image, [[10, 30, 50, 50]], ["cat"], colors=[RED])
        assert drawn.size == (60, 80) and np.array_equal(np.asarray(drawn), np.asarray(expected))
    pair = draw_comparison(Image.open(tmp_path / "a.png"), [], [], [], [])
    assert pair.size == draw_comparison(plain(60, 80), [], [], [], []).size


def test_lines_and_letters_grow_with_the_image():
    def line_px(side: int) -> int:
        drawn = draw_detections(plain(side, side), [[side // 4, side // 2, side - 8, side - 8]], ["a"], colors=[RED])
        return int(where(drawn, RED)[side * 3 // 4, : side // 2].sum())

    assert 0 < line_px(200) < line_px(1100) < line_px(2200)
    assert line_px(2200) == pytest.approx(2 * line_px(1100), rel=0.2)


def test_boxes_outside_or_turned_over_are_left_out():
    boxes = [[-30, -30, -5, -5], [300, 10, 320, 40], [50, 50, 20, 80], [0, 160, 40, 190]]
    assert where(draw_detections(plain(), boxes, ["a"] * 4), GRAY).all()


def test_large_boxes_do_not_hide_small_ones_whatever_the_order():
    boxes, colors = [[50, 60, 70, 80], [50, 60, 180, 140]], [RED, BLUE]
    for order in ([0, 1], [1, 0]):
        drawn = draw_detections(plain(), [boxes[i] for i in order], ["", ""], colors=[colors[i] for i in order])
        assert where(drawn, RED)[62:80, 50].all()


def test_colors_by_label_and_without_any_are_stable():
    by_label = draw_detections(plain(), [[20, 60, 180, 140]], ["cat"], colors={"cat": BLUE})
    assert where(by_label, BLUE)[61:140, 20].all()
    first = draw_detections(plain(), [[20, 60, 90, 140]] * 2, ["cat", "dog"], colors={"dog": RED})
    alone = draw_detections(plain(), [[20, 60, 90, 140]], ["cat"])
    color = tuple(int(c) for c in np.asarray(alone)[100, 20])
    assert where(first, color).any() and where(first, RED).any()


def test_class_colors_are_distinct_and_deterministic():
    names = [f"class {i}" for i in range(20)]
    colors = make_class_colors(names)
    assert colors == make_class_colors(names) and list(colors) == names
    values = np.array(list(colors.values()))
    apart = np.abs(values[:, None] - values[None]).sum(axis=-1) + 999 * np.eye(20, dtype=int)
    assert apart.min() >= 30 and values.min() >= 0 and values.max() <= 255
    assert apart[:6, :6].min() >= 100


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="got 1 labels for 2 boxes"):
        draw_detections(plain(), [[0, 0, 5, 5]] * 2, ["cat"])
    with pytest.raises(ValueError, match="got 2 scores for 1 boxes"):
        draw_detections(plain(), [[0, 0, 5, 5]], ["cat"], [0.1, 0.2])
    with pytest.raises(ValueError, match=r"shape \[1, 5\]; needed is \[N, 4\]"):
        draw_detections(plain(), [[0, 0, 5, 5, 1]], ["cat"])
    with pytest.raises(ValueError, match="box 1 is .*nan"):
        draw_detections(plain(), [[0, 0, 5, 5], [0, 0, float("nan"), 5]], ["cat", "dog"])


def test_comparison_has_truth_left_and_prediction_right():
    colors = {"cat": RED, "dog": BLUE}
    sheet = draw_comparison(plain(), [[20, 60, 90, 140]], ["cat"], [[30, 60, 90, 140]], ["dog"], [0.9], colors)
    top = sheet.height - 150
    assert sheet.width > 400 and 10 < top < 60
    left = sheet.crop((0, top, 200, sheet.height))
    right = sheet.crop((sheet.width - 200, top, sheet.width, sheet.height))
    assert left.tobytes() == draw_detections(plain(), [[20, 60, 90, 140]], ["cat"], colors=colors).tobytes()
    assert right.tobytes() == draw_detections(plain(), [[30, 60, 90, 140]], ["dog"], [0.9], colors).tobytes()
    captions = np.asarray(sheet.convert("L"))[:top]
    for half in (captions[:, :200], captions[:, -200:]):
        assert half.min() < 80 < 230 < half.max()


def test_comparison_without_truth_and_prediction_shows_the_image_twice():
    sheet = draw_comparison(plain(), [], [], np.zeros((0, 4)), [])
    assert where(sheet, GRAY).sum() == 2 * 200 * 150


def test_contact_sheet_places_images_row_by_row():
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    sheet = make_contact_sheet([plain(50, 50, color) for color in colors], columns=2, cell_px=40)
    centers = {color: np.argwhere(where(sheet, color)).mean(axis=0) for color in colors}
    assert all(where(sheet, color).sum() == 40 * 40 for color in colors)
    red, green, blue = (centers[color] for color in colors)
    assert red[0] == green[0] < blue[0] and red[1] == blue[1] < green[1]


def test_contact_sheet_keeps_aspects_and_takes_any_mode():
    sheet = make_contact_sheet([plain(400, 100), Image.new("L", (10, 40), 3)], columns=5, cell_px=(100, 50))
    rows, columns = np.nonzero(where(sheet, GRAY))
    assert np.ptp(columns) + 1 == 100 and np.ptp(rows) + 1 == 25
    rows, columns = np.nonzero(where(sheet, (3, 3, 3)))
    assert np.ptp(rows) + 1 == 50 and np.ptp(columns) + 1 == 12
    for wrong in ({"images": []}, {"columns": 0}, {"cell_px": 0}):
        with pytest.raises(ValueError, match="each must be 1 or more"):
            make_contact_sheet(**{"images": [plain()], "columns": 1, "cell_px": 9, **wrong})
