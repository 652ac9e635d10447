"""Read one image file of any kind as 8-bit RGB, and resize it.

What an image's pixels mean is decided here (gray, palette, CMYK, 16 bit, EXIF); nothing here knows about boxes or
about datasets.
"""

import contextlib
import os
import stat
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .coco.foreign import is_lfs_pointer

_EXIF_ORIENTATION = 0x0112
_TURNS = {  # what makes an image of this orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_KEYS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # of Image.info
# Modes that Pillow does not convert to RGB directly, or (palettes with transparency) only with a warning.
_BY_WAY_OF = {"P": "RGBA", "PA": "RGBA", "La": "LA"}
# Formats that images come in; Pillow reads many more, whose suffixes also belong to documents and icons.
_FORMATS = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"}


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in small letters and with their dot, that files with images have."""
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in _FORMATS}
    return frozenset(suffixes - {".pfm"})  # floating point pixels: depth maps


class ImageError(ValueError):
    """An image file that cannot be used. The text names the file."""


def images_in(folder: Path, recursive: bool = False, left_out: Path | None = None) -> list[Path]:
    """Return a folder's images by name, without hidden ones (macOS' "._a.jpg") and those of a folder to leave out."""
    left_out = None if left_out is None else left_out.resolve()
    found: list[Path] = []
    for place, folders, files in os.walk(folder):
        found += [
            Path(place, name)
            for name in files
            if Path(name).suffix.lower() in image_suffixes()
            and not name.startswith(".")
            and Path(place, name).is_file()
        ]
        folders[:] = [
            name for name in folders if recursive and name[0] != "." and Path(place, name).resolve() != left_out
        ]
    return sorted(found)


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
        A loaded Pillow image in mode RGB. It says nothing of an orientation, so that nobody turns it again.

    Raises:
        ImageError: unreadable file, a pixel format without a known 8-bit meaning, or a size other than expected.
    """
    try:
        with _open(path) as img:
            if None not in (width, height) and sorted(img.size) != sorted((width, height)):
                raise _wrong_size(img, width, height)  # before any pixel: a bomb of another size costs nothing
            if None in (width, height):  # else the json says that it is as large as that
                _check_pixels(img)
            _load(img)
            rgb = to_rgb(img, upright or _is_turned(img, width, height))
    except FileNotFoundError as e:
        raise ImageError(f"{path}: no such file") from e
    except ImageError as e:
        raise ImageError(f"{path}: {e}") from e
    # Pillow's decoders raise more than OSError on damaged files: SyntaxError (PNG), ValueError, IndexError,
    # struct.error, a bomb warning's error.
    except Exception as e:
        if is_lfs_pointer(path):
            raise ImageError(
                f"{path}: is a Git LFS pointer, a short text in place of the file. Run git lfs pull."
            ) from e
        raise ImageError(
            f"{path}: cannot be read as an image ({type(e).__name__}: {e}). Replace it or leave it out."
        ) from e
    return _forget_orientation(rgb)


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


_limit_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # no loader process begins with a lock that nobody gives back
    os.register_at_fork(
        before=_limit_lock.acquire, after_in_parent=_limit_lock.release, after_in_child=_limit_lock.release
    )


@contextlib.contextmanager
def _without_limit() -> Iterator[None]:
    with _limit_lock:  # two threads could leave Pillow without a limit
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _load(img: Image.Image) -> None:
    """Decode an opened image; of some formats, TIFF for one, Pillow looks at the size here again."""
    with _limit_lock:
        limit = Image.MAX_IMAGE_PIXELS
    with _without_limit() if limit is not None and img.width * img.height > limit else contextlib.nullcontext():
        img.load()


def _open(path: str | os.PathLike[str]) -> Image.Image:
    """Open an image of any size: whether it is too large is decided where more is known than in Pillow."""
    mode = os.stat(path).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode):
        raise OSError("a pipe, socket or device, which may block or never end")
    with _without_limit():
        img = Image.open(path)
    if img.format == "TIFF":
        # Pillow (13.0) maps uncompressed gray files into memory by the size they have once upright, which scrambles
        # them where that is a quarter turn away; a file without a name it reads. test_images.py tells when this can go.
        img.filename = ""
    return img


def _check_pixels(img: Image.Image) -> None:
    """Refuse what may be a decompression bomb, from the size on at which Pillow does."""
    with _limit_lock:
        pixels, limit = img.width * img.height, Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > 2 * limit:
        raise ImageError(
            f"is {img.width}x{img.height} = {pixels} pixels, more than {2 * limit}: cut it into tiles, or allow it by "
            f"--max-image-pixels {pixels} of demo.py, in Python PIL.Image.MAX_IMAGE_PIXELS = {pixels}"
        )


def _is_turned(img: Image.Image, width: int | None, height: int | None) -> bool:
    """Tell whether an image has the json's size only after its EXIF rotation."""
    if width is None or height is None or img.size == (width, height):
        return False
    if img.size == (height, width) and _orientation(img) in (5, 6, 7, 8):
        return True
    raise _wrong_size(img, width, height)


def _orientation(img: Image.Image) -> int:
    try:
        return img.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged metadata beside sound pixels, which Pillow reports in as many ways as damaged pixels
        return 1


def _forget_orientation(img: Image.Image) -> Image.Image:
    for key in _ORIENTATION_KEYS:
        img.info.pop(key, None)
    return img


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
    img.load()  # Pillow turns a TIFF here, by itself
    # Not ImageOps.exif_transpose: it also writes the metadata anew, and fails where some of them are damaged.
    turn = _TURNS.get(_orientation(img)) if upright else None
    if turn is not None:
        img = _forget_orientation(img.transpose(turn))
    if img.mode == "RGB":
        return img
    if img.mode.startswith("I"):
        # 16-bit gray. Pillow's own conversion clips at 255, which turns such images white.
        wide = np.clip(np.asarray(img).astype(np.int64), 0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if img.mode == "F":
        raise ImageError("has floating point pixels, whose range is unknown. Save it with 8 bits per channel.")
    if img.mode in _BY_WAY_OF:
        img = img.convert(_BY_WAY_OF[img.mode])
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
