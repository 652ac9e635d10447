"""Read one image file of any kind as 8-bit RGB, and resize it.

What an image's pixels mean is decided here (gray, palette, CMYK, 16 bit, EXIF); nothing here knows about boxes or
about datasets.
"""

import os
import stat
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

_EXIF_ORIENTATION = 0x0112
# Formats that images come in; Pillow reads many more, whose suffixes also belong to documents and icons.
_FORMATS = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"}


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in small letters and with their dot, that files with images have."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _FORMATS)


class ImageError(ValueError):
    """An image file that cannot be used. The text names the file."""


def read_image(
    path: str | os.PathLike[str], width: int | None = None, height: int | None = None, upright: bool = False
) -> Image.Image:
    """Read an image as RGB, in the orientation the annotations were made in, or as a viewer shows it.

    Where annotations are, the camera's EXIF rotation is applied only when the stored pixels do not have the expected
    size and the rotated ones do: annotation tools disagree about EXIF, and the json's size is what tells which of the
    two the boxes belong to. Transparency is dropped, not blended.

    Args:
        path: the file.
        width: in pixels, as the json says; None skips the check.
        height: the same.
        upright: apply the rotation in any case; for images without annotations.

    Returns:
        A loaded Pillow image in mode RGB.

    Raises:
        ImageError: unreadable file, a pixel format without a known 8-bit meaning, or a size other than expected.
    """
    try:
        with _open(path) as img:
            if None not in (width, height) and sorted(img.size) != sorted((width, height)):
                raise _wrong_size(img, width, height)  # before any pixel: a bomb of another size costs nothing
            if None in (width, height):  # else the json says that it is as large as that
                _check_pixels(img)
            img.load()
            rgb = to_rgb(img, upright) if upright else to_rgb(_orient(img, width, height))
    except FileNotFoundError as e:
        raise ImageError(f"{path}: no such file") from e
    except ImageError as e:
        raise ImageError(f"{path}: {e}") from e
    # Pillow's decoders raise more than OSError on damaged files: SyntaxError (PNG), ValueError, IndexError,
    # struct.error, a bomb warning's error.
    except Exception as e:
        raise ImageError(
            f"{path}: cannot be read as an image ({type(e).__name__}: {e}). Replace it or leave it out."
        ) from e
    return rgb


def read_size(path: str | Path, oriented: bool = False) -> tuple[int, int]:
    """Read (width, height) in pixels from an image's header. Raises ImageError.

    Args:
        path: the file.
        oriented: as the image is looked at, EXIF rotation applied; else as it is stored.
    """
    try:
        with _open(path) as img:
            turned = oriented and img.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            return img.size[::-1] if turned else img.size
    except Exception as e:
        raise ImageError(f"{path}: cannot be read as an image ({type(e).__name__}: {e})") from e


def _open(path: str | os.PathLike[str]) -> Image.Image:
    """Open an image of any size: whether it is too large is decided where more is known than in Pillow."""
    mode = os.stat(path).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode):
        raise OSError("a pipe, socket or device, which may block or never end")
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(path)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check_pixels(img: Image.Image) -> None:
    """Refuse what may be a decompression bomb, from the size on at which Pillow does."""
    pixels, limit = img.width * img.height, Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > 2 * limit:
        raise ImageError(
            f"is {img.width}x{img.height} = {pixels} pixels, more than {2 * limit}: cut it into tiles, or allow it by "
            f"--max-image-pixels {pixels} of demo.py, in Python PIL.Image.MAX_IMAGE_PIXELS = {pixels}"
        )


def _orient(img: Image.Image, width: int | None, height: int | None) -> Image.Image:
    if width is None or height is None or img.size == (width, height):
        return img
    if img.size == (height, width) and img.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8):
        return ImageOps.exif_transpose(img)
    raise _wrong_size(img, width, height)


def _wrong_size(img: Image.Image, width: int, height: int) -> ImageError:
    return ImageError(
        f"is {img.size[0]}x{img.size[1]} pixels (width x height), the json says {width}x{height}. "
        "Correct the json, or put the image its boxes were drawn on."
    )


def to_rgb(img: Image.Image, upright: bool = False) -> Image.Image:
    """Return an opened image as RGB, whatever its pixels are; the same image where it is RGB.

    Args:
        img: any Pillow image.
        upright: turn it as its EXIF orientation says.

    Raises:
        ImageError: pixels without a known 8-bit meaning.
    """
    if upright and img.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        img = ImageOps.exif_transpose(img)
    if img.mode == "RGB":
        return img
    if img.mode.startswith("I"):
        # 16-bit gray. Pillow's own conversion clips at 255, which turns such images white.
        wide = np.clip(np.asarray(img).astype(np.int64), 0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if img.mode == "F":
        raise ImageError("has floating point pixels, whose range is unknown. Save it with 8 bits per channel.")
    if img.mode in ("P", "PA"):
        img = img.convert("RGBA")  # a palette with transparency loses its colours (with a warning) on the direct way
    return img.convert("RGB")


# torch's uint8 resampler follows Pillow's antialiased one and has vector code for x86 with AVX2, where it is several
# times faster. Its weights have a bit or two less: of a photograph, one value in 400 differs from Pillow's by 1 of 255.
# Fine for training images, not for evaluation, which stays with Pillow. Elsewhere (ARM) Pillow is the faster one.
_TORCH_MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


@cache
def torch_is_faster() -> bool:
    """Tell whether torch resizes with vector code here."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def resize_crop(
    img: Image.Image, size_wh: tuple[int, int], crop_xyxy: tuple[int, int, int, int], method: Image.Resampling
) -> np.ndarray:
    """Resize an image and cut a part out of the result.

    Args:
        img: a Pillow image in mode RGB.
        size_wh: (width, height) of the whole result, in pixels.
        crop_xyxy: the part to cut out, in pixels of the result.
        method: Pillow's name of the filter.

    Returns:
        uint8 [height, width, 3] of the part; may be a view.
    """
    if method not in _TORCH_MODES or not torch_is_faster():
        return np.asarray(pillow_resize_crop(img, size_wh, crop_xyxy, method))
    left, top, right, bottom = crop_xyxy
    # Strides as of channels_last, which the vector code asks for; a copy because Pillow's own buffer is read-only.
    pixels = torch.from_numpy(np.array(img))[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        pixels, size=size_wh[::-1], mode=_TORCH_MODES[method], align_corners=False, antialias=True
    )
    return resized[0, :, top:bottom, left:right].permute(1, 2, 0).numpy()


def pillow_resize_crop(
    img: Image.Image, size_wh: tuple[int, int], crop_xyxy: tuple[int, int, int, int], method: Image.Resampling
) -> Image.Image:
    """Do the same as `resize_crop` with Pillow alone, computing only the pixels of the part."""
    left, top, right, bottom = crop_xyxy
    across, down = img.width / size_wh[0], img.height / size_wh[1]
    # Pillow refuses a box that rounding puts a hair outside of the image.
    box = (left * across, top * down, min(right * across, img.width), min(bottom * down, img.height))
    return img.resize((right - left, bottom - top), method, box=box)
