"""The reader of annotation files takes any bytes, or refuses them with a documented error: properties and fuzzing."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from annotation_promises import ATOMS, KEYS, VALID, check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effdet.data.coco.check import check_coco

FUZZ = settings(
    max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
VALUE = st.sampled_from(ATOMS) | st.text(max_size=5) | st.floats() | st.integers()
FIELD = st.tuples(
    st.sampled_from(["images", "annotations", "categories"]), st.integers(0, 1), st.sampled_from(KEYS), VALUE
)


@FUZZ
@given(
    raw=st.binary(max_size=200)
    | st.recursive(
        VALUE,
        lambda part: (
            st.lists(part) | st.dictionaries(st.sampled_from(["images", "annotations", "categories", *KEYS]), part)
        ),
    ).map(lambda tree: json.dumps(tree).encode())
)
def test_what_is_no_annotation_file_is_refused(raw, tmp_path):
    assert check(tmp_path, raw) == "refused" or json.loads(raw)["images"] == []


@FUZZ
@given(changes=st.lists(FIELD, min_size=1, max_size=4), has_labels=st.booleans(), with_files=st.booleans())
def test_an_annotation_file_with_wrong_fields_is_read_or_refused(changes, has_labels, with_files, tmp_path):
    tree = copy.deepcopy(VALID)
    for rows, number, key, value in changes:
        tree[rows][number][key] = value
    check(tmp_path, json.dumps(tree).encode(), has_labels, "ignore", with_files)


NUMBER = st.integers(-30, 130) | st.floats(-30, 130) | st.sampled_from([float("nan"), float("inf")])


@FUZZ
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from([5, 9]), st.lists(NUMBER, min_size=4, max_size=4), st.booleans()),
        max_size=12,
    )
)
def test_every_box_is_used_or_counted_as_dropped_with_the_reason_that_fits(rows, tmp_path):
    """Against the slow, obvious reading of each row by itself."""
    data = {
        "images": [{"id": k, "file_name": f"{k}", "width": 100, "height": 80} for k in range(3)],
        "categories": [{"id": 9}, {"id": 5}],
        "annotations": [
            {"id": k, "image_id": image, "category_id": category, "bbox": box, "iscrowd": int(crowd)}
            for k, (image, category, box, crowd) in enumerate(rows)
        ],
    }
    arrays, report = check_coco(data, "x", None, True, False)
    kept: dict[int, list] = {0: [], 1: [], 2: []}
    dropped: dict[str, int] = {}
    for image, category, (x, y, w, h), crowd in rows:
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, 100), min(y + h, 80)
        if not all(map(np.isfinite, (x, y, w, h))):
            kind = "bad_bbox"
        elif w <= 0 or h <= 0:
            kind = "empty_bbox"
        elif x + w <= 0 or y + h <= 0 or x >= 100 or y >= 80:
            kind = "outside_bbox"
        elif x1 - x0 < 1 or y1 - y0 < 1:
            kind = "tiny_bbox"
        elif crowd:
            kind = "crowd"
        else:
            kept[image].append([y0, x0, y1, x1, category])
            continue
        dropped[kind] = dropped.get(kind, 0) + 1
    assert report.dropped == dropped and report.num_boxes + sum(dropped.values()) == len(rows) and not report.errors
    for image, expected in kept.items():
        part = slice(arrays.offsets[image], arrays.offsets[image + 1])
        got = np.concatenate([arrays.boxes_yxyx[part], arrays.category_ids[part, None]], axis=1)
        np.testing.assert_allclose(got, np.array(expected).reshape(-1, 5), rtol=1e-6, atol=1e-6)


def test_a_broken_promise_is_noticed(tmp_path, monkeypatch):
    size = [{**row, "width": 64, "height": 48} for row in VALID["images"]]
    raw = json.dumps({**VALID, "images": size}).encode()
    assert check(tmp_path, raw) == "read"
    monkeypatch.setattr("effdet.data.coco.check.escapes", lambda name: False)
    size[0]["file_name"] = "../a.jpg"
    with pytest.raises(AssertionError, match="leaves the image directory"):
        check(tmp_path, json.dumps({**VALID, "images": size}).encode())
    with pytest.raises(ZeroDivisionError):
        monkeypatch.setattr("effdet.data.coco.read.json.loads", lambda text: 1 / 0)
        check(tmp_path, raw.replace(b'"area": 120', b'"area": NaN'))


def test_the_fuzzer_finds_nothing_in_a_few_seconds(tmp_path):
    pytest.importorskip("atheris", reason="atheris has no wheel for this Python")
    script = Path(__file__).with_name("fuzz_annotations.py")
    done = subprocess.run(
        [sys.executable, script, "-runs=600", "-max_total_time=2", "-seed=1", "-print_final_stats=1"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"number_of_executed_units: (\d+)", done.stdout)[1]) >= 20
    assert not list(tmp_path.glob("crash-*"))
