"""What the reader of annotation files promises for any bytes, as a check that fuzzer and property tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from effdet.data.coco.annotations import CocoParser, CocoParserCfg, DatasetError, resolve_category_map

VALID = {
    "images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}, {"id": 2, "file_name": "b/c.png"}],
    "annotations": [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 3,
            "bbox": [1, 2.5, 3e1, 4],
            "iscrowd": 0,
            "area": 120,
            "segmentation": [[1, 2, 3, 4, 5, 6]],
        },
        {"id": 2, "image_id": 2, "category_id": 7, "bbox": [-1, 0, 9, 9], "ignore": 1},
    ],
    "categories": [{"id": 3, "name": "x"}, {"id": 7, "name": "y"}],
}
KEYS = [
    "id",
    "image_id",
    "category_id",
    "bbox",
    "file_name",
    "width",
    "height",
    "iscrowd",
    "ignore",
    "area",
    "name",
    "segmentation",
]
# Values that have no place where a number, a text or a list is expected, and some that have.
ATOMS = [
    0,
    1,
    2,
    3,
    7,
    -1,
    0.5,
    64,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
    2**31,
    2**63,
    10**400,
    True,
    False,
    None,
    "",
    "1",
    "a.jpg",
    "../x",
    "/etc/passwd",
    "\ud83d",
    "\0",
    "a\nb",
    "C:\\x",
    [],
    {},
    [1, 2, 3, 4],
    [[1]],
    {"counts": "x"},
]


def check(folder: Path, raw: bytes, has_labels: bool = True, crowd: str = "drop", with_files: bool = False) -> str:
    """Read one annotation file and hold what comes out against the promises.

    Args:
        folder: where to put the file; also the image directory.
        raw: its content.
        has_labels, crowd: as in CocoParserCfg.
        with_files: also look for the images in `folder`.

    Returns:
        'refused', or 'read'. Any other error than the documented one comes through.
    """
    path = folder / "annotations.json"
    path.write_bytes(raw)
    try:
        parser = CocoParser(
            CocoParserCfg(
                str(path), has_labels=has_labels, crowd=crowd, min_img_size=0, img_dir=folder if with_files else None
            )
        )
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
    assert parser.report.num_boxes + sum(parser.report.dropped.values()) <= parser.report.num_annotations
    truth = parser.coco_dict()
    ids = [row["id"] for row in truth["annotations"]]
    assert len(set(ids)) == len(ids) and 0 not in ids
    return "read"
