"""Fuzz target (atheris) for the reader of annotation files: any bytes are taken, or refused with a documented error.

    python test/fuzz/fuzz_annotations.py [FOLDER] [libFuzzer's flags, such as -max_total_time=600]

FOLDER keeps interesting inputs between calls. An input that breaks the promise ends the call with its traceback and is
written to crash-*, which can be given as an argument to try it again. test_fuzz_annotations.py runs it for seconds.
"""
from __future__ import annotations

import copy
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import atheris
import numpy as np

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

with atheris.instrument_imports(include=["effdet.data.coco", "effdet.data.coco_check", "effdet.data.coco_json",
                                         "effdet.data.categories", "effdet.data.image_table",
                                         "effdet.data.dataset_report"]):
    from effdet.data.coco import CocoParser, CocoParserCfg, DatasetError, resolve_category_map

FOLDER = Path(tempfile.mkdtemp(prefix="effdet-fuzz-"))  # the image directory, empty but for the json
VALID = {
    "images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}, {"id": 2, "file_name": "b/c.png"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2.5, 3e1, 4], "iscrowd": 0, "area": 120,
                     "segmentation": [[1, 2, 3, 4, 5, 6]]},
                    {"id": 2, "image_id": 2, "category_id": 7, "bbox": [-1, 0, 9, 9], "ignore": 1}],
    "categories": [{"id": 3, "name": "x"}, {"id": 7, "name": "y"}],
}
_ATOMS = [0, 1, 2, 3, 7, -1, 0.5, 64, 1e308, -1e308, float("nan"), float("inf"), 2**31, 2**63, 10**400, True, False, None,
          "", "1", "a.jpg", "../x", "/etc/passwd", "\ud83d", "\0", "a\nb", "C:\\x", [], {}, [1, 2, 3, 4], [[1]],
          {"counts": "x"}]
_KEYS = ["id", "image_id", "category_id", "bbox", "file_name", "width", "height", "iscrowd", "ignore", "area", "name",
         "segmentation"]


def mutated(data: bytes) -> bytes:
    """Return a COCO json with fields that `data` chooses changed: bytes alone rarely get past the json parser."""
    choose = atheris.FuzzedDataProvider(data)
    tree = copy.deepcopy(VALID)

    def atom() -> Any:
        return copy.deepcopy(choose.PickValueInList(_ATOMS))

    for _ in range(choose.ConsumeIntInRange(1, 6)):
        rows = tree[choose.PickValueInList(["images", "annotations", "categories"])]
        action = choose.ConsumeIntInRange(0, 9)
        row = rows[choose.ConsumeIntInRange(0, len(rows) - 1)] if isinstance(rows, list) and rows else None
        if action == 0 and rows:
            tree[choose.PickValueInList(list(tree))] = atom()
        elif action == 1 and isinstance(rows, list):
            rows.append(row if choose.ConsumeBool() else atom())
        elif isinstance(row, dict) and action == 2:
            row.pop(choose.PickValueInList(_KEYS), None)
        elif isinstance(row, dict) and action == 3 and isinstance(row.get("bbox"), list) and row["bbox"]:
            row["bbox"][choose.ConsumeIntInRange(0, len(row["bbox"]) - 1)] = atom()
        elif isinstance(row, dict) and action == 4:
            row[choose.PickValueInList(_KEYS)] = choose.ConsumeUnicode(6)
        elif isinstance(row, dict):
            row[choose.PickValueInList(_KEYS)] = atom()
    return json.dumps(tree).encode()


def check(raw: bytes, has_labels: bool = True, crowd: str = "drop", with_files: bool = False) -> str:
    """Read one annotation file and hold what comes out against its promises.

    Returns:
        'refused', or 'read'.
    """
    path = FOLDER / "annotations.json"
    path.write_bytes(raw)
    try:
        parser = CocoParser(CocoParserCfg(str(path), has_labels=has_labels, crowd=crowd, min_img_size=0,
                                          img_dir=FOLDER if with_files else None))
        if parser.categories:
            resolve_category_map(parser.categories)
    except DatasetError as error:
        str(error).encode()  # fit for a log
        return "refused"
    "\n".join(parser.report.lines()).encode()
    classes = 0 if parser.category_map is None else parser.category_map.num_classes
    for index, info in enumerate(parser.img_infos):
        name = info["file_name"].replace("\\", "/")
        assert name and not name.startswith("/") and ".." not in name.split("/"), "leaves the image directory"
        target = parser.get_ann_info(index)
        boxes, labels = target["bbox"], target["cls"]
        assert boxes.shape == (len(labels), 4) and boxes.dtype == np.float32 and labels.dtype == np.int64
        assert np.isfinite(boxes).all() and (boxes[:, :2] < boxes[:, 2:]).all() and (boxes >= 0).all()
        assert (boxes[:, 2:] <= [info["height"], info["width"]]).all(), "outside its image"
        assert (((labels >= 1) & (labels <= classes)) | (labels == -2)).all()
    truth = parser.coco_dict()
    ids = [row["id"] for row in truth["annotations"]]
    assert len(set(ids)) == len(ids) and 0 not in ids
    return "read"


def test_one_input(data: bytes) -> None:
    if not data:
        return
    flags, data = data[0], data[1:]
    raw = mutated(data) if flags & 1 else data
    check(raw, has_labels=not flags & 2, crowd="ignore" if flags & 4 else "drop", with_files=bool(flags & 8))


def main() -> None:
    logging.disable(logging.CRITICAL)
    seeds = FOLDER / "seeds"
    seeds.mkdir()
    (seeds / "valid").write_bytes(b"\0" + json.dumps(VALID).encode())
    (seeds / "fields").write_bytes(b"\1" + bytes(range(40)))
    atheris.Setup([*sys.argv, str(seeds)], test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
