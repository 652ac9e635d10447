"""Broken image files and folders, through the loaders of training and evaluation, with what is expected of each."""

from __future__ import annotations

import logging
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from broken_data import copy_set, load_all, open_split, read_ann, unprivileged, write_ann
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from effdet.data.coco.report import DatasetError
from effdet.data.corrupt import BadImages, BadImagesError, BadImageWatch, default_limit
from effdet.data.images import ImageError, read_image
from effdet.data.synthetic.dataset import make_synthetic_dataset
from effdet.evaluator import CocoEvaluator

BROKEN = 1  # dataset index of the image that is broken, of four


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_synthetic_dataset(tmp_path_factory.mktemp("whole") / "set", num_train=4, num_val=1)
    load_all(open_split(made))  # imports what reading needs, which a user without rights might not
    return made


@pytest.fixture
def root(whole: Path) -> Iterator[Path]:
    """A copy where users without rights can get to: pytest's own folders are closed to them."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield copy_set(whole, Path(folder) / "set")


def put_image(image: Image.Image, format: str = "PNG", **options) -> Callable[[Path], tuple[int, int]]:
    """Put an image into the file, whatever its name says, and return its size for the json."""

    def change(path: Path) -> tuple[int, int]:
        image.save(path, format, **options)
        return image.size

    return change


def write(content: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_bytes(content)

    return change


def cut(length: float) -> Callable[[Path], None]:
    return lambda path: write(path.read_bytes()[: int(length * path.stat().st_size)])(path)


def replace_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def as_json_size(change: Callable, width: int, height: int) -> Callable:
    return lambda path: (change(path), (width, height))[1]


RED, BLUE = Image.new("RGB", (64, 48), (250, 0, 0)), Image.new("RGB", (64, 48), (0, 0, 250))
WIDE = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (48, 1))

# name: (how the file is broken; it may return the size that the json is to give, words of the reason)
UNREADABLE: dict[str, tuple[Callable, str]] = {
    "cut off in the middle": (cut(0.5), "cannot be read as an image"),
    "cut off in the header": (write(b"\xff\xd8\xff\xe0\x00\x10JF"), "cannot be read as an image"),
    "a PNG cut off": (
        lambda path: (put_image(Image.effect_noise((64, 48), 99))(path), cut(0.6)(path))[0],
        "cannot be read as an image",
    ),
    "zero bytes": (write(b""), "cannot be read as an image"),
    "a web page": (write(b"<html>404 not found</html>"), "cannot be read as an image"),
    "zeros, as after a power failure": (write(bytes(5000)), "cannot be read as an image"),
    "another size than the json's": (put_image(RED.resize((65, 48)), "PNG"), "is 65x48 pixels"),
    "a bomb of 100 megapixels behind a usual size": (write(png_header(10_000, 10_000)), "is 10000x10000 pixels"),
    "a bomb of 400 megapixels": (as_json_size(write(png_header(20_000, 20_000)), 20_000, 20_000), "cannot be read"),
    "100 megapixels without their content": (
        as_json_size(write(png_header(10_000, 10_000)), 10_000, 10_000),
        "cannot be read as an image",
    ),
    "floating point pixels": (
        put_image(Image.fromarray(np.ones((48, 64), dtype=np.float32)), "TIFF"),
        "has floating point pixels",
    ),
    "EXIF says half a turn, the json a quarter": (
        as_json_size(put_image(RED, "JPEG", exif=exif(3)), 48, 64),
        "is 64x48 pixels",
    ),
    "a directory in its place": (replace_by(Path.mkdir), "Is a directory"),
    "a pipe that nobody writes to": (replace_by(os.mkfifo), "a pipe, socket or device"),
    "a symlink to itself": (replace_by(lambda path: path.symlink_to(path.name)), "cannot be read as an image"),
    "a symlink to nowhere": (replace_by(lambda path: path.symlink_to("gone.jpg")), "no such file"),
    "no permission": (lambda path: path.chmod(0), "Permission denied"),
}
_KEEPS_SIZE = {"another size than the json's"}


def break_image(root: Path, change: Callable, keep_size: bool = False) -> Path:
    data = read_ann(root)
    row = sorted(data["images"], key=lambda image: image["id"])[BROKEN]
    size = change(root / "train2017" / row["file_name"])
    if size is not None and not keep_size:
        row["width"], row["height"] = size
        data["annotations"] = [
            {**ann, "bbox": [0, 0, *size]} if ann["image_id"] == row["id"] else ann for ann in data["annotations"]
        ]
        write_ann(root, data)
    return root / "train2017" / row["file_name"]


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_images_are_replaced_in_training_and_empty_in_evaluation(name, root, caplog):
    change, words = UNREADABLE[name]
    path = break_image(root, change, name in _KEEPS_SIZE)
    with unprivileged(), caplog.at_level(logging.WARNING):
        train, val = open_split(root), open_split(root, "val", data={"max_bad_images": 1})
        taken = [load_all(train), load_all(train)]
        watch = BadImageWatch(train, "training")
        assert watch.exchange() == watch.exchange() == 1
        shown = load_all(val, training=False)
        assert CocoEvaluator(val)._watch.exchange() == 1
    for batches in taken:
        seen = sorted(int(target["img_idx"]) for _, target in batches)
        assert BROKEN not in seen and len(seen) == 4 and len(set(seen)) == 3
    first, again = ([int(target["img_idx"]) for _, target in batches] for batches in taken)
    assert sorted(first) == sorted(again), "always the same one takes its place"
    for _, target in taken[0]:  # boxes are those of the image that is seen
        labels = target["cls"][target["cls"] > 0]
        assert set(labels.tolist()) <= set(train.parser.get_ann_info(int(target["img_idx"]))["cls"].tolist())
    named = [record.getMessage() for record in caplog.records if "images cannot be read" in record.getMessage()]
    assert len(named) == 2 and all(path.name in text and words in text for text in named), named
    assert "1 of 4 training" in named[0] and "others are trained on instead" in named[0]
    assert "1 of 4 validation" in named[1] and "nothing was found" in named[1]
    assert [int(target["img_idx"]) for _, target in shown] == [0, 1, 2, 3], "evaluation takes no other image"
    assert (shown[BROKEN][1]["cls"] == -1).all()


def test_a_git_lfs_pointer_is_an_error_however_many_images_may_be_bad(root):
    break_image(root, write(b"version https://git-lfs.github.com/spec/v1\n"), False)
    with pytest.raises(DatasetError, match="git lfs pull"):
        open_split(root, "train", data={"max_bad_images": 4})


# name: how the file is made; right in the middle it is red
READABLE: dict[str, Callable] = {
    "a PNG called .jpg": put_image(RED),
    "CMYK": put_image(RED.convert("CMYK"), "JPEG"),
    "a palette with transparency": put_image(RED.convert("P"), "PNG", transparency=bytes([9] * 256)),
    "an animated GIF": put_image(RED, "GIF", save_all=True, append_images=[BLUE, BLUE]),
    "an animated PNG": put_image(RED, "PNG", save_all=True, append_images=[BLUE]),
    "an animated WebP": put_image(RED, "WEBP", save_all=True, append_images=[BLUE], lossless=True),
    "a TIFF of two pages": put_image(RED, "TIFF", save_all=True, append_images=[BLUE]),
    "a progressive JPEG": put_image(RED, "JPEG", progressive=True),
    "1x1": put_image(RED.resize((1, 1))),
    "30000x40": put_image(RED.resize((30_000, 40))),
    "40x30000": put_image(RED.resize((40, 30_000))),
    "EXIF says a quarter turn, the json does not": put_image(RED, "JPEG", exif=exif(6)),
    "EXIF says a quarter turn, the json too": as_json_size(put_image(RED, "JPEG", exif=exif(6)), 48, 64),
    "EXIF says a ninth kind of turn": put_image(RED, "JPEG", exif=exif(9)),
    "EXIF that is garbage": put_image(RED, "JPEG", exif=b"Exif\0\0garbage"),
    "bytes behind the end": lambda path: (put_image(RED)(path), path.write_bytes(path.read_bytes() + b"x" * 99))[0],
}


@pytest.mark.parametrize("name", READABLE)
def test_odd_images_are_read(name, root):
    path = break_image(root, READABLE[name])
    dataset = open_split(root, "val")
    info = dataset.parser.img_infos[BROKEN]
    red, green, blue = read_image(path, info["width"], info["height"]).resize((1, 1)).getpixel((0, 0))
    assert red > 200 and green < 60 and blue < 60, "the first image, with its colours"
    load_all(dataset, training=False)
    train = open_split(root)
    assert len(train) == (3 if name == "1x1" else 4), "smaller than 32 pixels: left out of training"
    load_all(train)
    assert len(dataset.bad_images) == len(train.bad_images) == 0


def test_sixteen_bits_are_scaled_and_not_clipped(root):
    break_image(root, put_image(Image.fromarray(WIDE)))
    images, _ = load_all(open_split(root, "val"), training=False)[BROKEN]
    row = images[0, 0, 24]
    assert row[0] < row[20] < row[40] < row[60]


# name: (how the folder is broken, words of the refusal)
FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such folder": (lambda root: root.rename(root.with_name("moved")), "no such directory"),
    "a file in its place": (
        lambda root: (root.rename(root.with_name("moved")), root.write_text("x")),
        "is no data set of a known form",
    ),
    "no image folder": (lambda root: (root / "train2017").rename(root / "train"), "train2017/ absent"),
    "an empty image folder": (
        lambda root: [path.unlink() for path in (root / "train2017").iterdir()],
        "4 images that are not in the image directory",
    ),
    "a file for the image folder": (
        lambda root: ((root / "train2017").rename(root / "x"), (root / "train2017").write_text("x")),
        "does not exist",
    ),
    "a folder for the annotation file": (
        lambda root: (
            (root / "annotations/instances_train2017.json").unlink(),
            (root / "annotations/instances_train2017.json").mkdir(),
        ),
        "is not a file",
    ),
    "no permission to the image folder": (lambda root: (root / "train2017").chmod(0), "may not be read"),
    "no permission to the annotation file": (
        lambda root: (root / "annotations/instances_train2017.json").chmod(0),
        "may not be read",
    ),
    "no permission to the folder": (lambda root: root.chmod(0), "ermission denied"),
    "a folder that links to itself": (
        lambda root: (root.rename(root.with_name("moved")), root.symlink_to(root.name)),
        "no such directory",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_broken_folders_are_refused(name, root):
    change, words = FOLDERS[name]
    change(root)
    try:
        with unprivileged(), pytest.raises((ValueError, OSError)) as error:
            open_split(root)
    finally:
        for path in (root, root / "train2017"):
            if path.is_dir():
                path.chmod(0o755)
    assert words in str(error.value) and str(root) in str(error.value)


def test_counts_of_loading_processes_reach_this_one_and_a_broken_disk_ends_it(root):
    dataset = open_split(root, data={"max_bad_images": 2})
    watch = BadImageWatch(dataset, "training")
    for path in sorted((root / "train2017").iterdir())[:2]:
        path.write_bytes(b"")
    load_all(dataset, workers=2)
    assert dataset.bad_images.indices() == [0, 1]
    watch.look()
    for path in (root / "train2017").iterdir():
        path.unlink()
    images = [image for image, _ in load_all(dataset, workers=2)]
    assert len(images) == 4, "batches come on until all processes know"
    with pytest.raises(BadImagesError) as error:
        watch.look()
    text = str(error.value)
    assert "of 4 training images cannot be read" in text and "at most 2 may be (--max-bad-images)" in text
    assert "000000000001.jpg" in text and "mend these files, take them out of the json, or allow more" in text


def test_all_processes_learn_of_what_one_found(root, monkeypatch):
    mine, theirs = open_split(root), open_split(root)
    for dataset, index in ((mine, 0), (theirs, 2)):
        dataset.bad_images.add(index)
    watches = BadImageWatch(mine, "training"), BadImageWatch(theirs, "training")
    said = []
    monkeypatch.setattr("effdet.runtime.distributed.all_gather_object", lambda obj: said.append(obj) or [obj])
    for watch in watches:
        watch.exchange()
    monkeypatch.setattr("effdet.runtime.distributed.all_gather_object", lambda obj: said)
    for dataset, watch in zip((mine, theirs), watches, strict=True):
        assert watch.exchange() == 2 and dataset.bad_images.indices() == [0, 2]
    assert watches[0].named == watches[1].named


def test_the_limit_leaves_one_good_image_and_each_other_is_tried_once():
    bad = BadImages(3, 10, replace=True)
    assert bad.limit == 2 and BadImages(0, 10, True).limit == 0
    calls = []

    def read(index: int) -> int:
        calls.append(index)
        if index != 2:
            raise ImageError("broken")
        return index

    assert bad.item_instead(0, read) == 2 and 0 in bad and not bad.too_many
    assert calls == list(dict.fromkeys(calls)), "each other image is tried once"
    assert bad.item_instead(1, lambda index: read(0)) is None and len(bad) == 3 and bad.too_many
    assert [default_limit(count) for count in (5, 1000, 2000, 118_287)] == [10, 10, 20, 1182]


def test_nothing_counts_as_found_in_a_bad_image_and_the_next_pass_tries_it_again(root):
    path = break_image(root, write(b""))
    good = path.with_name(sorted(os.listdir(path.parent))[0])
    dataset = open_split(root, "val", data={"max_bad_images": 1})
    evaluator = CocoEvaluator(dataset, all_images=True)
    detections = torch.tensor([[[0.0, 0, 50, 50, 0.9, 1]]])

    def evaluate() -> dict[int, int]:
        for _, target in load_all(dataset, training=False):
            evaluator.add_predictions(detections, target)
        evaluator.evaluate()
        return {dataset.parser.img_ids.index(key): len(rows) for key, rows in evaluator.scored_predictions.items()}

    assert evaluate() == {0: 1, 1: 0, 2: 1, 3: 1} and not evaluator.is_hopeless
    path.write_bytes(good.read_bytes())
    data = read_ann(root)
    sizes = [(row["width"], row["height"]) for row in data["images"]]
    if sizes[0] == sizes[1]:
        assert evaluate() == {0: 1, 1: 1, 2: 1, 3: 1}
    for path in (root / "train2017").iterdir():
        path.write_bytes(b"")
    load_all(dataset, training=False)
    assert evaluator.is_hopeless
    with pytest.raises(BadImagesError, match="4 of 4 validation images cannot be read, that is all of them"):
        evaluator.evaluate()


@pytest.fixture(scope="module")
def encoded() -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
            Image.fromarray(noise).save(Path(folder) / kind, kind)
            files.append((Path(folder) / kind).read_bytes())
    return files


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    which=st.integers(0, 5),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    length=st.floats(0.02, 1),
)
def test_damaged_bytes_give_a_image_or_the_one_error(which, changes, length, encoded):
    raw = bytearray(encoded[which])
    for place, value in changes:
        raw[int(place * (len(raw) - 1))] = value
    with tempfile.NamedTemporaryFile() as file:
        file.write(raw[: int(length * len(raw))])
        file.flush()
        try:
            image = read_image(file.name, 32, 24)
        except ImageError as error:
            assert file.name in str(error)
        else:
            assert image.mode == "RGB" and image.size == (32, 24)
