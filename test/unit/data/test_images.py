"""Image files of every kind, written here with Pillow and read back."""

import warnings

import numpy as np
import pytest
from PIL import Image

from effdet.data.images import ImageError, read_image, read_size

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters(width=40, height=24) -> Image.Image:
    """Four colours: red top left, green top right, blue bottom left, white bottom right."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[: height // 2, : width // 2], pixels[: height // 2, width // 2 :] = RED, GREEN
    pixels[height // 2 :, : width // 2], pixels[height // 2 :, width // 2 :] = BLUE, WHITE
    return Image.fromarray(pixels)


def corners(img: Image.Image) -> list[tuple[int, ...]]:
    width, height = img.size
    return [img.getpixel(p) for p in ((4, 4), (width - 5, 4), (4, height - 5), (width - 5, height - 5))]


def close(got, expected, tolerance):
    return np.abs(np.array(got, dtype=int) - np.array(expected, dtype=int)).max() <= tolerance


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"),
    [
        ("RGB", "png", 0),
        ("RGBA", "png", 0),
        ("P", "png", 0),
        ("CMYK", "tif", 2),
        ("CMYK", "jpg", 12),
        ("RGB", "jpg", 12),
    ],
)
def test_colour_modes(tmp_path, mode, suffix, tolerance):
    path = tmp_path / f"a.{suffix}"
    quarters().convert(mode).save(path)
    with Image.open(path) as stored:
        assert stored.mode == mode
    img = read_image(path, 40, 24)
    assert img.mode == "RGB" and img.size == (40, 24)
    assert close(corners(img), [RED, GREEN, BLUE, WHITE], tolerance)


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_gray_modes(tmp_path, mode):
    gray = Image.fromarray(np.repeat(np.array([[0, 255]], dtype=np.uint8), 30, axis=1).repeat(20, axis=0))
    gray.convert(mode).save(tmp_path / "a.png")
    img = read_image(tmp_path / "a.png", 60, 20)
    assert img.getpixel((5, 5)) == (0, 0, 0) and img.getpixel((55, 5)) == (255, 255, 255)


def test_palette_with_transparency_keeps_its_colours_without_a_warning(tmp_path):
    paletted = quarters().convert("P")
    paletted.save(tmp_path / "a.png", transparency=bytes([128] * 256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        img = read_image(tmp_path / "a.png", 40, 24)
    assert corners(img) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_gray_is_scaled_not_clipped(tmp_path, suffix):
    values = np.array([0, 128, 257, 1000, 32896, 65535], dtype=np.uint16)
    Image.fromarray(values[None, :].repeat(3, axis=0)).save(tmp_path / f"a.{suffix}")
    img = read_image(tmp_path / f"a.{suffix}", 6, 3)
    assert np.array(img)[0, :, 0].tolist() == [0, 0, 1, 4, 128, 255]
    assert img.mode == "RGB" and (np.array(img)[..., 0] == np.array(img)[..., 2]).all()


def test_float_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="a.tif: has floating point pixels"):
        read_image(tmp_path / "a.tif")


def save_with_orientation(path, orientation, width=40, height=24):
    exif = Image.Exif()
    exif[0x0112] = orientation
    quarters(width, height).save(path, exif=exif)


def test_exif_rotation_is_applied_only_when_the_json_size_asks_for_it(tmp_path):
    path = tmp_path / "a.png"
    save_with_orientation(path, 6)  # to be turned clockwise by a quarter
    assert corners(read_image(path, 40, 24)) == [RED, GREEN, BLUE, WHITE]
    turned = read_image(path, 24, 40)
    assert turned.size == (24, 40) and corners(turned) == [BLUE, RED, WHITE, GREEN]
    assert read_image(path).size == (40, 24) and read_size(path) == (40, 24)
    save_with_orientation(path, 8)
    assert corners(read_image(path, 24, 40)) == [GREEN, WHITE, RED, BLUE]
    save_with_orientation(path, 3)
    assert corners(read_image(path, 40, 24)) == [RED, GREEN, BLUE, WHITE]
    for unturned in (3, 1):
        save_with_orientation(path, unturned)
        with pytest.raises(ImageError, match="40x24 .*24x40"):
            read_image(path, 24, 40)


def test_another_size_than_the_jsons_names_file_and_both_sizes(tmp_path):
    quarters().save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a\.png: is 40x24 pixels .*json says 41x24"):
        read_image(tmp_path / "a.png", 41, 24)


def test_unreadable_files_are_named(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(tmp_path / "good.jpg")
    whole = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.jpg", "text.jpg", "empty.png"):
        with pytest.raises(ImageError, match=rf"{name}: cannot be read as an image"):
            read_image(tmp_path / name, 200, 200)
    with pytest.raises(ImageError, match="absent.png: no such file"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(ImageError, match="text.jpg"):
        read_size(tmp_path / "text.jpg")
