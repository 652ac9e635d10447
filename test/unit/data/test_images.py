"""Image files of every kind, written here with Pillow and read back."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps

from effdet.data.images import ImageError, read_image, read_size, to_rgb

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


def store_turned(path, upright: np.ndarray, orientation: int) -> None:
    """Store pixels as a camera does that says which visual side the first stored row and column are."""
    first_row, first_column = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    stored = upright if first_row in ("top", "bottom") else upright.swapaxes(0, 1)
    stored = stored[::-1] if first_row in ("bottom", "right") else stored
    stored = stored[:, ::-1] if first_column in ("bottom", "right") else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    how = {".tif": {"compression": "tiff_lzw"}, ".jpg": {"quality": 100}, ".webp": {"quality": 100}}
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **how.get(path.suffix, {}))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("gray", [False, True])
def test_every_exif_orientation_is_turned_upright_once(tmp_path, orientation, suffix, gray):
    pixels = np.asarray(quarters())[..., 0] if gray else np.asarray(quarters())
    path = tmp_path / f"a.{suffix}"
    store_turned(path, pixels, orientation)
    expected = pixels[..., None].repeat(3, 2) if gray else pixels
    given = [read_image(path, upright=True)]
    for prepare in (lambda img: img, lambda img: img.convert("RGB"), lambda img: img.copy(), ImageOps.exif_transpose):
        with Image.open(path) as img:
            given.append(to_rgb(prepare(img), True))
    given += [to_rgb(img, True) for img in given]  # what is upright stays so
    for img in given:
        assert img.mode == "RGB" and img.size == (40, 24)
        assert close(corners(img), corners(Image.fromarray(expected)), 0 if suffix in ("png", "tif") else 12)
        assert np.array_equal(np.asarray(img), np.asarray(given[0])), "the same pixels by path and as object"


@pytest.mark.parametrize("orientation", [6, 8])
def test_an_uncompressed_gray_tiff_is_turned_and_not_scrambled(tmp_path, orientation):
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.rot90(pixels, {6: 1, 8: -1}[orientation])).save(tmp_path / "a.tif", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.tif", upright=True))[..., 0], pixels)


def test_what_was_read_as_stored_is_not_turned_later(tmp_path):
    save_with_orientation(tmp_path / "a.png", 6)
    stored = read_image(tmp_path / "a.png", 40, 24)
    assert corners(to_rgb(stored, True)) == [RED, GREEN, BLUE, WHITE]
    with Image.open(tmp_path / "a.png") as img:
        assert to_rgb(img).size == (40, 24)
        assert to_rgb(img, True).size == (24, 40)
        assert img.getexif()[0x0112] == 6 and img.size == (40, 24), "the caller's image is left as it is"


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01"]
)
def test_damaged_exif_turns_nothing(tmp_path, exif):
    quarters().save(tmp_path / "a.jpg", exif=exif, quality=100)
    assert close(corners(read_image(tmp_path / "a.jpg", upright=True)), [RED, GREEN, BLUE, WHITE], 12)


def test_an_orientation_beside_damaged_metadata_counts(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "Maker", 72.0
    damaged = exif.tobytes().replace(b"\x01\x1a\0\x05", b"\x01\x1a\0\x02")  # a resolution that is text
    assert damaged != exif.tobytes()
    quarters().save(tmp_path / "a.jpg", exif=damaged, quality=100)
    assert close(corners(read_image(tmp_path / "a.jpg", upright=True)), [BLUE, RED, WHITE, GREEN], 12)


def make_of_mode(mode: str) -> Image.Image:
    """Four gray values (of 16 bits where the mode has them) or colours, half transparent where the mode can be."""
    if mode.startswith("I"):
        kind = {"I": "<i4", "I;16B": ">u2"}.get(mode, "<u2")
        values = np.array([0, 1000, 32896, 65535]).astype(kind).repeat(30)
        return Image.frombytes(mode, (30, 4), values.tobytes())
    if mode == "P with transparency":
        img = Image.frombytes("P", (40, 24), bytes([0] * 20 + [1] * 20) * 12 + bytes([2] * 20 + [3] * 20) * 12)
        img.putpalette([*RED, *GREEN, *BLUE, *WHITE])
        img.info["transparency"] = 1
        return img
    if mode in ("LA", "RGBA"):
        img = quarters().convert(mode)
        img.putalpha(128)
        return img
    by_way_of = {"La": "LA", "RGBa": "RGBA", "PA": "P", "LAB": None}.get(mode, "RGB")
    if by_way_of is None:
        from PIL import ImageCms

        return ImageCms.profileToProfile(
            quarters(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    return quarters().convert(by_way_of).convert(mode)


FILES_OF_MODES = {
    "1": "png tif bmp",
    "L": "png jpg tif bmp gif",
    "LA": "png tif webp",
    "La": "",
    "P": "png gif tif bmp",
    "P with transparency": "png",
    "PA": "",
    "RGB": "png jpg tif bmp webp ppm",
    "RGBA": "png tif webp",
    "RGBa": "",
    "RGBX": "",
    "CMYK": "jpg tif",
    "YCbCr": "tif",
    "HSV": "",
    "LAB": "tif",
    "I": "tif",
    "I;16": "png tif ppm",
    "I;16B": "tif",
    "I;16L": "",
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", FILES_OF_MODES)
def test_every_mode_has_the_same_pixels_by_path_and_as_object(tmp_path, mode):
    made = make_of_mode(mode)
    results = [to_rgb(made)]
    for suffix in FILES_OF_MODES[mode].split():
        path = tmp_path / f"a.{suffix}"
        made.save(path, **({"lossless": True} if suffix == "webp" else {}))
        with Image.open(path) as img:
            results.append(to_rgb(img))
        assert np.array_equal(np.asarray(results[-1]), np.asarray(read_image(path))), suffix
    for img in results:
        assert img.mode == "RGB" and img.size == made.size
        if mode.startswith("I"):
            assert np.unique(np.asarray(img)).tolist() == [0, 4, 128, 255]
        elif mode in ("L", "LA", "La"):
            assert close(corners(img), [(value,) * 3 for value in (76, 150, 29, 255)], 3)
        elif mode == "1":
            assert set(np.unique(np.asarray(img)).tolist()) == {0, 255} and img.getpixel((35, 19)) == WHITE
        else:
            assert close(corners(img), [RED, GREEN, BLUE, WHITE], 25 if mode == "LAB" else 12)


def test_float_pixels_are_refused_by_path_and_as_object(tmp_path):
    made = Image.fromarray(np.ones((4, 4), dtype=np.float32))
    made.save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="floating point"):
        to_rgb(made)
    with Image.open(tmp_path / "a.tif") as img, pytest.raises(ImageError, match="floating point"):
        to_rgb(img)
    with pytest.raises(ImageError, match="a.tif: .*floating point"):
        read_image(tmp_path / "a.tif")


def test_threads_leave_pillows_limit_as_it_was(tmp_path):
    quarters().save(tmp_path / "a.png")
    before = Image.MAX_IMAGE_PIXELS
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(lambda _: read_image(tmp_path / "a.png").size, range(2000)))
    assert before == Image.MAX_IMAGE_PIXELS and set(sizes) == {(40, 24)}


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
