"""What demo.py keeps when images are damaged or a signal comes, in processes of its own, and what it refuses first."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from real_process import ENVIRONMENT, REPO

from effdet.checkpoint.io import JsonList
from effdet.commands.drawing import find_images, name_drawings


def start(*argv: object, cwd: Path | None = None) -> subprocess.Popen:
    command = [sys.executable, str(REPO / "demo.py"), *map(str, argv), "--device", "cpu", "--score-thr", "0.01"]
    return subprocess.Popen(
        command, env=ENVIRONMENT, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def truncate(source, target):
    content = source.read_bytes()
    target.write_bytes(content[: len(content) // 3])
    return target


def files_in(output):
    return [entry["file"] for entry in json.loads((output / "detections.json").read_text())]


def test_a_truncated_image_among_good_ones(small_checkpoint, synthetic_images, tmp_path):
    bad = truncate(synthetic_images[1], tmp_path / "bad.jpg")
    some = [synthetic_images[0], bad, synthetic_images[2]]
    for batch, limit, status, kept in ((2, 1, 3, 2), (1, 0, 1, 1)):
        output = tmp_path / f"limit{limit}"
        options = ("--checkpoint", small_checkpoint, "--output", output, "-b", batch, "--max-bad-images", limit)
        process = start(*some, *options)
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == status, printed
        assert str(bad) in printed
        assert files_in(output) == [str(synthetic_images[0]), str(synthetic_images[2])][:kept]
        assert len(list(output.glob("*.png"))) == kept


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_what_was_found(small_checkpoint, synthetic_images, tmp_path, number):
    many = tmp_path / "many"
    many.mkdir()
    for k in range(400):
        (many / f"{k:04d}.jpg").symlink_to(synthetic_images[k % 8])
    output = tmp_path / "out"
    process = start(many, "--checkpoint", small_checkpoint, "--output", output)
    results = output / "detections.json"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (results.exists() and len(json.loads(results.read_text())) >= 2):
        time.sleep(0.02)  # the file is whole whenever it is read
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, printed
    kept = files_in(output)
    assert 2 <= len(kept) < 400 and kept == [str(many / f"{k:04d}.jpg") for k in range(len(kept))]
    assert {path.stem for path in output.glob("*.png")} == {f"{k:04d}" for k in range(len(kept))}


def test_an_output_that_cannot_be_written_is_found_before_the_work(small_checkpoint, synthetic_images, tmp_path):
    (tmp_path / "file").write_text("")
    process = start(synthetic_images[0], "--checkpoint", small_checkpoint, "--output", tmp_path / "file" / "out")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "--output" in printed and "objects" not in printed
    assert printed.count("\n") == 1


def test_images_further_down(synthetic_images, tmp_path):
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    names = ["x.jfif", "y.JPG", "notes.txt"]
    for name in names:
        (below / name).write_bytes(synthetic_images[0].read_bytes())
    with pytest.raises(FileNotFoundError, match=r"2 images .*2 in .*b.*--recursive"):
        find_images([str(tmp_path)])
    assert find_images([str(tmp_path)], recursive=True) == [below / "x.jfif", below / "y.JPG"]
    (below / "._x.jpg").write_bytes(b"not an image")
    (below / "drawn").mkdir()
    (below / "drawn" / "x.png").touch()  # of an earlier run
    assert find_images([str(tmp_path)], True, below / "drawn") == [below / "x.jfif", below / "y.JPG"]
    assert find_images([str(tmp_path / "**" / "*.jfif")], True) == [below / "x.jfif"]
    assert find_images([str(below)]) == [below / "x.jfif", below / "y.JPG"]


def test_a_second_run_with_its_output_among_the_images(small_checkpoint, synthetic_images, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(synthetic_images[0].read_bytes())
    for _ in range(2):
        options = ("--checkpoint", small_checkpoint, "--output", tmp_path / "drawn", "--recursive")
        process = start(tmp_path, *options)
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0, printed
        assert files_in(tmp_path / "drawn") == [str(tmp_path / "a" / "x.jpg")]


def test_drawings_have_names_of_their_own_however_many_are_alike(tmp_path):
    paths = [Path(f"{k}/a.jpg") for k in range(3)] + [Path("a_2.jpg"), Path("a_2.png"), Path("b.jpg")]
    names = [target.name for target in name_drawings(paths, tmp_path)]
    assert names == ["a.png", "a_2.png", "a_3.png", "a_2_2.png", "a_2_3.png", "b.png"]
    began = time.monotonic()
    many = [Path(f"{k}/a.jpg") for k in range(5000)] + [Path(f"b{k}.jpg") for k in range(5000)]
    assert len(set(name_drawings(many, tmp_path))) == 10_000
    assert time.monotonic() - began < 20  # each against all others would take minutes


def test_default_images_that_cannot_be_made_end_with_the_remedy(small_checkpoint, tmp_path):
    (tmp_path / "data").write_text("a file where the folder would be")
    process = start("--checkpoint", small_checkpoint, cwd=tmp_path)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "name images of your own" in printed and "Traceback" not in printed


def test_a_full_disk_leaves_the_list_as_it_was(tmp_path):
    path = tmp_path / "list.json"
    written = JsonList(path)
    written.add(["x" * 3000])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(OSError):
            written.add(["y" * 3000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert json.loads(path.read_text()) == ["x" * 3000]
    written.add(["z"])
    assert json.loads(path.read_text()) == ["x" * 3000, "z"]


def test_a_list_is_whole_after_each_item(tmp_path):
    path = tmp_path / "list.json"
    path.write_text("x" * 1000)
    written = JsonList(path)
    everything = []
    assert json.loads(path.read_text()) == []
    for items in ([], [{"a": "ä"}], [1, [2]], [], ["]"]):
        written.add(items)
        everything += items
        assert json.loads(path.read_text()) == everything
    written.close()
