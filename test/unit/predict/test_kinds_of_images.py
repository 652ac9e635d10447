"""What a Predictor makes of files and Pillow objects: all orientations, all kinds of pixels, boxes beyond the edge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import effdet
from effdet.data.images import ImageError, image_suffixes, read_image, to_rgb
from effdet.ops.nms import make_detections
from effdet.predict.predictor import _to_rgb_image

EXIF_ORIENTATION = 0x0112


def scene(width=48, height=32) -> Image.Image:
    """An image that no rotation or mirror maps to itself."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 250, width)
    pixels[..., 1] = np.linspace(0, 250, height)[:, None]
    return Image.fromarray(pixels)


def save_turned(path, orientation):
    """Save the scene as a camera would that is held so: the stored pixels are turned, the tag turns them back."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = scene() if orientation == 1 else scene().transpose(undo[orientation])
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    stored.save(path, exif=exif)
    return stored


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_every_orientation_is_upright_by_path_and_as_object(tmp_path, orientation, suffix):
    path = tmp_path / f"a{suffix}"
    stored = save_turned(path, orientation)
    expected = np.asarray(scene())
    for image in (path, str(path), Image.open(path)):
        upright = _to_rgb_image(image, True)
        assert np.array_equal(np.asarray(upright), expected)
        assert np.array_equal(np.asarray(_to_rgb_image(upright, True)), expected)  # once only
        if suffix == ".png":  # a TIFF is turned by Pillow itself
            assert np.array_equal(np.asarray(_to_rgb_image(image, False)), np.asarray(stored))
    assert suffix != ".png" or np.array_equal(
        np.asarray(read_image(path, *stored.size)), np.asarray(stored)
    )  # the json's rule


def test_the_boxes_are_those_of_the_upright_image(tmp_path, small_checkpoint):
    predictor = effdet.load(small_checkpoint, "cpu")
    save_turned(tmp_path / "turned.png", 6)
    scene().save(tmp_path / "plain.png")
    (plain,) = predictor.predict(tmp_path / "plain.png")
    (turned,) = predictor.predict(tmp_path / "turned.png")
    (stored,) = effdet.load(small_checkpoint, "cpu", upright=False).predict(Image.open(tmp_path / "turned.png"))
    (on_its_side,) = predictor.predict(scene().transpose(Image.Transpose.ROTATE_90))
    assert len(stored) and np.array_equal(stored.boxes_xyxy, on_its_side.boxes_xyxy)
    assert len(plain) and np.array_equal(plain.boxes_xyxy, turned.boxes_xyxy)
    assert np.array_equal(plain.scores, turned.scores)


def kinds(tmp_path):
    """Yield files of every kind of pixels that Pillow reads from a file."""
    gray = scene().convert("L")
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        path = tmp_path / f"{mode}.png"
        scene().convert(mode).save(path)
        yield path
    scene().convert("CMYK").save(tmp_path / "cmyk.jpg")
    scene().save(tmp_path / "ycc.jfif", format="JPEG")
    with_palette = scene().convert("P")
    with_palette.save(tmp_path / "clear.png", transparency=3)
    wide = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    wide.save(tmp_path / "wide.png")
    wide.save(tmp_path / "wide.tif")
    Image.fromarray(np.asarray(gray).astype(np.int32) * 257).save(tmp_path / "wide32.tif")
    for name in ("cmyk.jpg", "ycc.jfif", "clear.png", "wide.png", "wide.tif", "wide32.tif"):
        yield tmp_path / name


def test_an_object_gives_what_its_file_gives(tmp_path):
    files = list(kinds(tmp_path))
    assert len(files) == 12
    for path in files:
        by_path = np.asarray(_to_rgb_image(path, True))
        assert np.array_equal(by_path, np.asarray(_to_rgb_image(Image.open(path), True))), path
        assert abs(by_path.astype(float).mean() - np.asarray(scene().convert("L")).mean()) < 60 or path.name in (
            "1.png",
        ), path
    gray = np.asarray(scene().convert("L"))
    for name in ("wide.png", "wide.tif", "wide32.tif"):
        assert np.array_equal(np.asarray(to_rgb(Image.open(tmp_path / name)))[..., 0], gray)


def test_floating_point_pixels_are_refused_in_both_ways(tmp_path):
    image = scene().convert("F")
    image.save(tmp_path / "a.tif")
    for one in (image, tmp_path / "a.tif"):
        with pytest.raises(ImageError, match="floating point"):
            _to_rgb_image(one, True)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.gif", "a.jpg"])
def test_large_images(tmp_path, monkeypatch, recwarn, name):
    """Above Pillow's warning nothing is said, above its error the size is; what the json knows to be large is read."""
    compression = {"compression": "tiff_lzw"} if name == "a.tif" else {}  # Pillow looks at the size twice there
    scene().save(tmp_path / name, **compression)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 32 - 1)
    assert read_image(tmp_path / name).size == (48, 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 32 // 2 - 1)
    with pytest.raises(ImageError, match="48x32 = 1536 pixels.*--max-image-pixels 1536"):
        read_image(tmp_path / name)
    assert read_image(tmp_path / name, 48, 32).size == (48, 32)
    assert not recwarn.list
    assert Image.MAX_IMAGE_PIXELS == 48 * 32 // 2 - 1


def test_the_suffixes():
    assert {".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"} <= image_suffixes()
    assert not {".pdf", ".ico", ".eps", ".json"} & image_suffixes()


# ---- boxes without area ----


def candidates(count, beyond):
    """Boxes of 10 px in a column; those in `beyond` lie right of an image 100 px wide."""
    boxes = torch.zeros(1, count, 4)
    for k in range(count):
        left = 120.0 if k in beyond else 20.0
        boxes[0, k] = torch.tensor([20.0 * k, left, 20.0 * k + 10, left + 10])  # yxyx
    logits = torch.linspace(3, -3, count)[None]
    return logits, torch.zeros(1, count, 4), boxes, torch.zeros(1, count, dtype=torch.int64)


@pytest.mark.parametrize("soft", [False, True])
def test_boxes_beyond_the_edge_take_no_place(soft):
    beyond = {0, 1, 4}
    image = {"img_scale": torch.ones(1), "img_size": torch.tensor([[100.0, 1000.0]]), "max_det": 4, "soft_nms": soft}
    kept = make_detections(*candidates(8, beyond), **image, drop_empty=True)[0]
    others = [k for k in range(8) if k not in beyond]
    alone = make_detections(*(part[:, others] for part in candidates(8, beyond)), **image)[0]
    assert torch.equal(kept, alone) and (kept[:, 4] > 0).all()
    as_effdet = make_detections(*candidates(8, beyond), **image)[0]
    assert (as_effdet[:2, 0] == as_effdet[:2, 2]).all()  # its benches keep them


def test_without_such_boxes_nothing_changes_and_only_such_boxes_give_none():
    image = {"img_scale": torch.ones(1), "img_size": torch.tensor([[100.0, 1000.0]])}
    same = [make_detections(*candidates(5, ()), **image, drop_empty=drop) for drop in (False, True)]
    assert torch.equal(*same)
    assert not make_detections(*candidates(5, range(5)), **image, drop_empty=True).any()


def test_a_long_image_has_no_boxes_without_area(small_checkpoint):
    (found,) = effdet.load(small_checkpoint, "cpu").predict(Image.fromarray(np.zeros((25, 500, 3), dtype=np.uint8)))
    assert len(found) and (found.boxes_xyxy[:, 2:] > found.boxes_xyxy[:, :2]).all()
