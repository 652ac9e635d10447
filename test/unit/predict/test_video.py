"""Frames of videos, with the real PyAV where it is installed; without it the door says so."""

from __future__ import annotations

import csv
import http.server
import importlib.util
import json
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effdet.commands import predict
from effdet.data.images import ImageError
from effdet.predict.video import VideoWriter, count_frames, frames_of, require_av
from effdet.predict.writers import Drawings

REPO = Path(__file__).resolve().parents[3]
with_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="PyAV is not installed")
RATE = Fraction(30000, 1001)


def test_without_the_package_the_door_says_what_to_install(tmp_path, monkeypatch, small_checkpoint):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(RuntimeError, match="pip install av"):
        require_av("rtsp://host")
    (tmp_path / "a.mp4").touch()
    argv = [str(tmp_path / "a.mp4"), "--checkpoint", str(small_checkpoint), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="pip install av"):
        predict.main(argv)
    assert not (tmp_path / "out").exists()


def gray_of(number):
    return 20 + 4 * (number % 50)


def make_video(path, frames=30, size=(64, 48)):
    """Write a video whose frame k has the gray value gray_of(k), its left half black."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate = 4_000_000
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), gray_of(number), np.uint8)
            pixels[:, : size[0] // 2] = 0
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    return path


@pytest.fixture
def clip(tmp_path):
    return make_video(tmp_path / "clip.mp4")


def right_gray(image):
    return np.asarray(image)[:, -image.width // 4 :].mean()


@with_av
@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 7])
def test_frames_have_their_pixels_numbers_and_times(clip, every):
    items = list(frames_of(clip, "c", every))
    assert [item.frame for item in items] == list(range(0, 30, every))
    assert count_frames(clip, every) == len(items)
    for item in items:
        assert (item.name, item.stem, item.path) == (str(clip), f"c/{item.frame:06d}", None)
        assert item.time_s == pytest.approx(item.frame / RATE, abs=1e-3)
        image = item.read()
        assert image.size == (64, 48) and abs(right_gray(image) - gray_of(item.frame)) < 2


@with_av
@pytest.mark.slow
def test_an_upright_video_of_a_telephone(clip):
    content = bytearray(clip.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40  # after version, times, track, duration, layer, group, volume
    turn = [0, 1 << 16, 0, -(1 << 16), 0, 0]  # to the right, as ISO/IEC 14496-12 has it: x' = -y, y' = x
    content[matrix : matrix + 24] = b"".join(value.to_bytes(4, "big", signed=True) for value in turn)
    clip.write_bytes(content)
    image = next(frames_of(clip, "c")).read()
    pixels = np.asarray(image)
    assert image.size == (48, 64)
    assert pixels[:28].mean() < 5 < 15 < pixels[36:].mean()  # the left half is on top now


class Absent(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802 (the module's name)
        self.send_error(404)

    def log_message(self, *_):
        pass


@with_av
@pytest.mark.slow
def test_damaged_videos_are_named(tmp_path, clip):
    (tmp_path / "text.mp4").write_text("no video")
    truncated = tmp_path / "truncated.mp4"
    truncated.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    for path in (tmp_path / "text.mp4", truncated, tmp_path / "absent.mp4"):
        (item,) = frames_of(path, "c")
        with pytest.raises(ImageError, match=re.escape(str(path))):
            item.read()
        assert count_frames(path) == 1
    (item,) = frames_of("rtsp://me:secret@127.0.0.1:1/x", "c")
    with pytest.raises(ImageError, match="rtsp://127.0.0.1:1/x") as error:
        item.read()
    assert "secret" not in str(error.value) and count_frames("rtsp://127.0.0.1:1/x") is None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Absent) as server:
        threading.Thread(target=server.serve_forever).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/clip.mp4"
        (item,) = frames_of(address, "c")
        server.shutdown()
    with pytest.raises(ImageError, match=address):
        item.read()
    inside = make_video(tmp_path / "inside.avi", 60)
    content = bytearray(inside.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 600] = b"\xff" * 600
    inside.write_bytes(content)
    items = list(frames_of(inside, "c"))
    assert len([item for item in items if item.frame is not None]) > 20  # what can be decoded is there


@with_av
@pytest.mark.slow
def test_a_written_video_has_the_frames_and_their_times(tmp_path):
    writer = VideoWriter(tmp_path / "new" / "a.mp4", (65, 49))
    times = [5.0 + number / RATE for number in range(0, 120, 2)]
    for number, time_s in enumerate(times):
        size = (65, 49) if number != 3 else (30, 30)
        writer.add(Image.new("RGB", size, (gray_of(number),) * 3), float(time_s))
    before = len(list(frames_of(writer.path, "c")))
    writer.close()
    items = list(frames_of(writer.path, "c"))
    assert len(items) == 60 > before > 0  # it plays before it has ended, too
    for number, item in enumerate(items):
        assert item.time_s == pytest.approx(float(times[number] - times[0]), abs=1e-3)
        assert abs(right_gray(item.read()) - gray_of(number)) < 6
    assert items[0].read().size == (64, 48)


def run(clip, checkpoint, *more):
    words = [clip, "--checkpoint", checkpoint, "--device", "cpu", "--output", clip.parent / "out", *more]
    return [str(word) for word in words]


@with_av
@pytest.mark.slow
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", (64, 48))
    noise = np.random.default_rng(0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="a.mp4"):
            for number in range(1000):
                writer.add(Image.fromarray(noise.integers(0, 256, (48, 64, 3), np.uint8)), number / 25)
        with pytest.raises(OSError, match="a.mp4"):
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(list(frames_of(writer.path, "c"))) > 10  # those before


@with_av
@pytest.mark.slow
def test_a_video_on_the_command_line(clip, small_checkpoint, synthetic_images):
    options = ("--save", "jsonl,csv,coco,yolo", "--every", 10, "--save-video", "-b", 2, "--score-thr", 0.01)
    assert predict.main(run(clip, small_checkpoint, synthetic_images[0], *options)) == 0
    out = clip.parent / "out"
    rows = [json.loads(line) for line in (out / "detections.jsonl").read_text().splitlines()]
    assert [row.get("frame") for row in rows] == [0, 10, 20, None]
    assert [row["time_s"] for row in rows[:3]] == pytest.approx([0, 10 / RATE, 20 / RATE], abs=1e-3)
    assert [Path(row["drawn"]).name for row in rows] == ["clip.mp4"] * 3 + [f"{synthetic_images[0].stem}.png"]
    assert len(list(frames_of(out / "clip.mp4", "c"))) == 3
    coco = json.loads((out / "detections.coco.json").read_text())
    assert [image["file_name"] for image in coco["images"]][:3] == [f"clip/0000{k}0.jpg" for k in range(3)]
    for image in coco["images"]:
        with Image.open(out / "images" / image["file_name"]) as stored:
            assert stored.size == (image["width"], image["height"])
        assert (out / "labels" / image["file_name"]).with_suffix(".txt").is_file()
    with open(out / "detections.csv", newline="") as file:
        assert {row["frame"] for row in csv.DictReader(file)} <= {"0", "10", "20", ""}
    assert predict.main(run(clip, small_checkpoint, "--every", 15, "--draw", "jpg")) == 0
    assert sorted(path.name for path in (out / "clip").iterdir()) == ["000000.jpg", "000015.jpg"]


@with_av
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--save-video", "--no-draw"), "--no-draw"),
        (("--save-video", "--output", "."), "would replace"),
        (("--output", "..", "--every", "2"), "would replace"),
    ],
)
def test_what_does_not_go_together(clip, small_checkpoint, monkeypatch, options, said):
    inner = clip.parent / "clip"
    inner.mkdir()
    monkeypatch.chdir(inner if ".." in options else clip.parent)
    if ".." in options:
        clip = clip.rename(inner / "clip.mp4")
    with pytest.raises(SystemExit, match=said):
        predict.main([str(clip), "--checkpoint", str(small_checkpoint), "--device", "cpu", *options])


def test_options_of_videos_without_one(synthetic_images, small_checkpoint):
    for option in (["--save-video"], ["--every", "2"]):
        with pytest.raises(SystemExit, match=f"{option[0]} is for videos"):
            predict.main([str(synthetic_images[0]), "--checkpoint", str(small_checkpoint), "--device", "cpu", *option])


@with_av
@pytest.mark.slow
def test_a_signal_leaves_a_video_that_plays(tmp_path, small_checkpoint):
    clip = make_video(tmp_path / "clip.mp4", 3000)
    words = [sys.executable, str(REPO / "demo.py"), *run(clip, small_checkpoint, "--save", "jsonl", "--save-video")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = tmp_path / "out" / "detections.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and not (lines.exists() and lines.read_text().count("\n") > 5):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, printed
    rows = lines.read_text().splitlines()
    assert 5 < len(rows) < 3000 and len(list(frames_of(tmp_path / "out" / "clip.mp4", "c"))) == len(rows)


@with_av
@pytest.mark.slow
def test_a_long_video_takes_the_memory_of_a_short_one(tmp_path):
    clip = make_video(tmp_path / "long.mp4", 400, (640, 480))
    drawings = Drawings(tmp_path / "out", "png", save_video=True)
    peaks = []
    for item in frames_of(clip, "long"):
        drawings._add_frame(item, item.read())
        if item.frame in (100, 399):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    drawings.close()
    assert peaks[1] - peaks[0] < 30_000  # KiB; 300 frames are 270 MB
