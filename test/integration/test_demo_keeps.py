"""What demo.py keeps when images are damaged or a signal comes, in processes of its own, and what it refuses first."""

from __future__ import annotations

import csv
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from real_process import ENVIRONMENT, REPO

from effdet.checkpoint.growing import JsonList
from effdet.predict.sources import find_sources, unique_stems


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


EVERYTHING = ("--save", "json,jsonl,csv,coco,yolo")


def files_in_each(output):
    """Return the images that each kind of results has, by the names of their files."""
    lines = [json.loads(line) for line in (output / "detections.jsonl").read_text().splitlines()]
    coco = json.loads((output / "detections.coco.json").read_text())
    assert {row["image_id"] for row in coco["annotations"]} <= {image["id"] for image in coco["images"]}
    objects = [(entry["file"], len(entry["objects"])) for entry in lines]
    with open(output / "detections.csv", newline="") as file:
        assert Counter(row["file"] for row in csv.DictReader(file)) == Counter({k: n for k, n in objects if n})
    assert len(coco["annotations"]) == sum(number for _, number in objects) > 0
    names = [
        [Path(name).name for name in files_in(output)],
        [Path(name).name for name, _ in objects],
        [image["file_name"] for image in coco["images"]],
        sorted(path.name for path in (output / "images").iterdir()),
    ]
    labels = {path.stem for path in (output / "labels").iterdir()}
    assert labels == {Path(name).stem for name in names[0]} and all(one == names[0] for one in names)
    return names[0]


def test_a_truncated_image_among_good_ones(small_checkpoint, synthetic_images, tmp_path):
    bad = truncate(synthetic_images[1], tmp_path / "bad.jpg")
    some = [synthetic_images[0], bad, synthetic_images[2]]
    for batch, limit, status, kept in ((2, 1, 3, 2), (1, 0, 1, 1)):
        output = tmp_path / f"limit{limit}"
        options = (
            "--checkpoint",
            small_checkpoint,
            "--output",
            output,
            "-b",
            batch,
            "--max-bad-images",
            limit,
            *EVERYTHING,
        )
        process = start(*some, *options)
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == status, printed
        assert str(bad) in printed
        assert files_in(output) == [str(synthetic_images[0]), str(synthetic_images[2])][:kept]
        assert len(list(output.glob("*.png"))) == len(files_in_each(output)) == kept


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_what_was_found(small_checkpoint, synthetic_images, tmp_path, number):
    many = tmp_path / "many"
    many.mkdir()
    for k in range(400):
        (many / f"{k:04d}.jpg").symlink_to(synthetic_images[k % 8])
    output = tmp_path / "out"
    process = start(many, "--checkpoint", small_checkpoint, "--output", output, *EVERYTHING)
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
    assert files_in_each(output) == [f"{k:04d}.jpg" for k in range(len(kept))]


def peak_kib(checkpoint, folder, count):
    """Return the memory that demo.py has taken at most, for so many images."""
    (folder / str(count)).mkdir(parents=True)
    Image.effect_noise((96, 64), 50).save(folder / "image.png")
    for number in range(count):
        (folder / str(count) / f"{number:05d}.png").symlink_to(folder / "image.png")
    options = ("--checkpoint", checkpoint, "--output", folder / f"out{count}", "--no-draw", "-b", 16, *EVERYTHING)
    process = start(folder / str(count), *options)
    process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0 and len(files_in(folder / f"out{count}")) == count
    return used.ru_maxrss


@pytest.mark.slow
def test_many_images_take_the_memory_of_a_few(small_checkpoint, tmp_path):
    few, many = (peak_kib(small_checkpoint, tmp_path, count) for count in (200, 2000))
    assert many - few < 20_000, (few, many)


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
        find_sources([str(tmp_path)])
    assert find_sources([str(tmp_path)], recursive=True) == [below / "x.jfif", below / "y.JPG"]
    (below / "._x.jpg").write_bytes(b"not an image")
    (below / "drawn").mkdir()
    (below / "drawn" / "x.png").touch()  # of an earlier run
    assert find_sources([str(tmp_path)], True, below / "drawn") == [below / "x.jfif", below / "y.JPG"]
    assert find_sources([str(tmp_path / "**" / "*.jfif")], True) == [below / "x.jfif"]
    assert find_sources([str(below)]) == [below / "x.jfif", below / "y.JPG"]


def test_a_second_run_with_its_output_among_the_images(small_checkpoint, synthetic_images, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(synthetic_images[0].read_bytes())
    for _ in range(2):
        options = ("--checkpoint", small_checkpoint, "--output", tmp_path / "drawn", "--recursive")
        process = start(tmp_path, *options)
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0, printed
        assert files_in(tmp_path / "drawn") == [str(tmp_path / "a" / "x.jpg")]


def test_drawings_have_names_of_their_own_however_many_are_alike():
    paths = [Path(f"{k}/a.jpg") for k in range(3)] + [Path("a_2.jpg"), Path("a_2.png"), Path("b.jpg")]
    assert unique_stems(paths) == ["a", "a_2", "a_3", "a_2_2", "a_2_3", "b"]
    began = time.monotonic()
    many = [Path(f"{k}/a.jpg") for k in range(5000)] + [Path(f"b{k}.jpg") for k in range(5000)]
    assert len(set(unique_stems(many))) == 10_000
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
