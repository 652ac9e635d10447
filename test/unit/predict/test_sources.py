"""What is named to be predicted is found, named once, and read."""

from __future__ import annotations

import functools
import http.server
import io
import shutil
import threading

import numpy as np
import pytest
from PIL import Image

from effdet.data.images import ImageError, read_image
from effdet.predict.sources import fetch_image, find_sources, image_of, is_video, shown_name, unique_stems


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):  # noqa: N802 (the module's name)
        if self.path == "/promised.png":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"few")
        elif self.path == "/endless.png":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(bytes(200_000))
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_an_address(server, tmp_path, synthetic_images):
    shutil.copy(synthetic_images[0], tmp_path / "a b.jpg")
    address = f"{server}/a%20b.jpg?size=large"
    assert find_sources([address]) == [address] and unique_stems([address]) == ["a_b"]
    item = image_of(address, "a_b")
    assert (item.name, item.path, item.frame) == (address, None, None)
    assert np.array_equal(item.read(), read_image(synthetic_images[0], upright=True))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.jpg", "404"),
        ("text.jpg", "cannot be read as an image"),
        ("large.jpg", "900000 bytes, more than 100000"),
        ("promised.png", "3 of 100000 bytes"),
        ("endless.png", "more than 100000"),
    ],
)
def test_an_address_without_an_image(server, tmp_path, name, reason):
    (tmp_path / "text.jpg").write_text("<html>")
    (tmp_path / "large.jpg").write_bytes(bytes(900_000))
    largest = 100_000
    with pytest.raises(ImageError, match=reason) as error:
        fetch_image(f"{server}/{name}", largest)
    assert str(error.value).startswith(f"{server}/{name}: ")


def test_a_server_that_is_not_there():
    with pytest.raises(ImageError, match="cannot be downloaded"):
        fetch_image("http://127.0.0.1:1/a.jpg")
    with pytest.raises(ImageError, match="cannot be downloaded"):
        fetch_image("http://in valid/a.jpg")


def test_a_list_on_standard_input(tmp_path, monkeypatch):
    for name in ("a.jpg", "b c.jpg", "d.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    text = f"{tmp_path}/b c.jpg\r\n\nhttp://x/y.jpg\n{tmp_path}\n{tmp_path}/*.png"
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    found = find_sources([str(tmp_path / "d.png"), "-"])
    assert found == [tmp_path / "d.png", tmp_path / "b c.jpg", "http://x/y.jpg", tmp_path / "a.jpg"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    with pytest.raises(FileNotFoundError, match="standard input"):
        find_sources(["-"])
    monkeypatch.setattr("sys.stdin", io.StringIO("absent.jpg\n"))
    with pytest.raises(FileNotFoundError, match="'absent.jpg'"):
        find_sources(["-"])


@pytest.mark.parametrize(
    ("address", "stem"),
    [
        ("http://host.org/", "host.org"),
        ("https://h/a/b.c.png#x", "b.c"),
        ("http://h/%2e%2e%2f..", "image"),
        ("http://h/x%2Fy.jpg", "y"),
        ("http://h/" + "n" * 300 + ".jpg", "n" * 100),
    ],
)
def test_an_address_gives_a_safe_file_name(address, stem):
    assert unique_stems([address]) == [stem]


def test_videos_cameras_and_streams_are_told_from_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("clip.MP4", "a.jpg", "7"):
        (tmp_path / name).touch()
    names = [
        "clip.MP4",
        "a.jpg",
        "7",
        "0",
        "/dev/video12",
        "rtsp://me:pass@host/live.jpg",
        "http://h/clip.webm?x=1.jpg",
    ]
    found = find_sources([*names, "http://h/a.jpg?clip.mp4"])
    assert [is_video(source) for source in found] == [True, False, False, True, True, True, True, False]
    assert unique_stems(found) == ["clip", "a", "7", "camera0", "camera12", "live", "clip_2", "a_2"]
    assert shown_name(found[5]) == "rtsp://host/live.jpg"
    assert unique_stems([tmp_path / "labels.mp4", tmp_path / "images.jpg"]) == ["labels_2", "images"]
