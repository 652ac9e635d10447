"""Read COCO annotation files and serve one image's boxes at a time.

COCO's `bbox` (x, y, width, height in pixels) and `category_id` end here: past this file boxes are float32 yxyx and
labels are class_idx + 1. What counts as a defect is `check.py`'s business, images are `dataset.py`'s.
"""

import contextlib
import copy
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from effdet.ops.labels import IGNORE

from ..dataset_config import Coco2014Cfg, Coco2017Cfg
from .categories import CategoryMap, effdet_category_map, resolve_category_map
from .check import CocoArrays, check_coco, check_files, name_source
from .mend import MENDED, mend_json
from .parser import Parser
from .read import collector_paused, read_everything, read_json
from .report import DatasetError, DatasetReport
from .rows import four_numbers, is_set

__all__ = [
    "CategoryMap",
    "CocoParser",
    "CocoParserCfg",
    "DatasetError",
    "DatasetReport",
    "coco_paths",
    "resolve_category_map",
]

_logger = logging.getLogger(__name__)

UNLABELED_SPLITS = tuple(name for name, split in Coco2017Cfg().splits.items() if not split["has_labels"])


def coco_paths(root: str | Path, split: str, year: str = "2017") -> tuple[Path, Path]:
    """Find a split in COCO's directory layout.

    Args:
        root: the directory that holds annotations/ and train2017/ etc.
        split: train, val, test or testdev.
        year: 2017 or 2014.

    Returns:
        (image directory, annotation file), both existing.

    Raises:
        ValueError: unknown split.
        FileNotFoundError: something is absent; the text says what is expected where.
    """
    splits = (Coco2014Cfg() if year == "2014" else Coco2017Cfg()).splits
    if split not in splits:
        raise ValueError(f"split {split!r} is unknown, choose one of {', '.join(splits)}")
    root = Path(root)
    img_dir, ann_path = root / splits[split]["img_dir"], root / splits[split]["ann_filename"]
    absent = [f"{p}{'/' if p is img_dir else ''}" for p in (img_dir, ann_path) if not p.exists()]
    if absent:
        there = ", ".join(sorted(p.name for p in root.iterdir())[:12]) if root.is_dir() else "no such directory"
        raise FileNotFoundError(
            f"COCO's layout expects {img_dir}/ and {ann_path} for the split {split!r}; {' and '.join(absent)} absent. "
            f"{root} holds: {there}. For another layout name the image directory and the json themselves."
        )
    return img_dir, ann_path


class ImageTable(Sequence):
    """A read-only sequence of {'id', 'file_name', 'width', 'height'}, each dict made when asked for.

    A dict per image is tens of megabytes for COCO, and every loading process would come to own a copy of them: reading
    a Python object writes its reference count, which takes its memory page out of what a forked process shares. Arrays
    have no objects inside, stay shared, and are quick to send to a spawned process.

    Args:
        infos: such mappings, ids integers or text; width and height in pixels.
    """

    def __init__(self, infos: Iterable[Mapping[str, Any]]) -> None:
        infos = list(infos)
        ids = [info["id"] for info in infos]
        whole = all(isinstance(i, int) and -(2**63) <= i < 2**63 for i in ids)
        self._ids = np.array(ids, dtype=np.int64 if whole else object)
        self._sizes = np.array([(info["width"], info["height"]) for info in infos], dtype=np.int64).reshape(-1, 2)
        # json may hold half of a surrogate pair, which plain utf-8 refuses.
        names = [info["file_name"].encode("utf-8", "surrogatepass") for info in infos]
        self._names = np.frombuffer(b"".join(names), dtype=np.uint8)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        k = range(len(self))[index]  # refuses what is out of range, counts negative ones from the end
        img_id = self._ids[k]
        name = self._names[self._ends[k - 1] if k else 0 : self._ends[k]]
        width, height = self._sizes[k].tolist()
        return {
            "id": img_id.item() if isinstance(img_id, np.generic) else img_id,
            "file_name": name.tobytes().decode("utf-8", "surrogatepass"),
            "width": width,
            "height": height,
        }


@dataclass
class CocoParserCfg:
    """How to read one COCO annotation file.

    Args:
        ann_filename: path of the json.
        include_masks: not supported; anything but False is refused.
        include_bboxes_ignore: keep crowd regions as ignore regions; the same as crowd='ignore'.
        has_labels: False for a file that lists images only; None: as the file has a list of annotations or not.
        bbox_yxyx: boxes as yxyx, which every transform here expects; False gives xyxy.
        min_img_size: leave out images with a side shorter than this, in pixels; 0 keeps all, which evaluation needs.
        ignore_empty_gt: leave out images without objects.
        crowd: 'drop' leaves crowd regions out of the targets, 'ignore' adds them as rows with cls -2.
        img_dir: where the images are: checks that they exist and reads sizes the json does not give.
        category_map: the map to label with; None labels by category id, see `effdet_category_map`.
        max_bad: with `img_dir`, images that may be absent without an error, see `check_coco`.
        keep_json: keep what was read for the first `coco_dict`, as an evaluation will ask for it.
    """

    ann_filename: str
    include_masks: bool = False
    include_bboxes_ignore: bool = False
    has_labels: bool | None = True
    bbox_yxyx: bool = True
    min_img_size: int = 32
    ignore_empty_gt: bool = False
    crowd: str = "drop"
    img_dir: str | Path | None = None
    category_map: CategoryMap | None = None
    max_bad: int | None = 0
    keep_json: bool = False


class CocoParser(Parser):
    """Hold one annotation file as plain arrays.

    Attributes:
        img_ids: image id by dataset index, ascending.
        img_infos: sequence of {'id', 'file_name', 'width', 'height'} by dataset index (an `ImageTable`).
        img_ids_invalid: ids of images left out (too small, or empty when that was asked for).
        categories: the json's categories as {'id', 'name'}, by ascending id.
        report: what the check found (`DatasetReport`).
        has_labels: the file has annotations, and they are read.
        ann_path: as configured.

    Raises:
        FileNotFoundError: no such json or image directory.
        DatasetError: errors in the data, all kinds at once.
    """

    def __init__(self, cfg: CocoParserCfg) -> None:
        # Not the base's: the lists it starts empty are made from the json here, those of categories as properties.
        if cfg.include_masks:
            raise ValueError("include_masks is not supported: only boxes are read")
        if cfg.crowd not in ("drop", "ignore"):
            raise ValueError(f"crowd {cfg.crowd!r} is unknown, choose 'drop' or 'ignore'")
        self.ann_path = Path(cfg.ann_filename)
        self.yxyx = cfg.bbox_yxyx
        keep_crowd = cfg.crowd == "ignore" or cfg.include_bboxes_ignore
        img_dir = None if cfg.img_dir is None else Path(cfg.img_dir)
        if img_dir is not None and not img_dir.is_dir():
            raise FileNotFoundError(f"image directory {img_dir} does not exist")
        with collector_paused():
            read = self._read()
            listed = not (isinstance(read, dict) and "images" in read and "annotations" not in read)
            self.has_labels = listed if cfg.has_labels is None else cfg.has_labels
            source = name_source(read, self.ann_path)
            arrays, self.report = check_coco(read, source, img_dir, self.has_labels, keep_crowd, cfg.max_bad)
            self.report.raise_if_errors()
            self._load(arrays, cfg.min_img_size, self.has_labels and cfg.ignore_empty_gt)
        self._kept = read if cfg.keep_json else None
        self._files_checked = img_dir is not None
        self._coco = None
        self._category_map = None
        self._labels = np.zeros(0, dtype=np.int64)  # there are no boxes without categories
        if cfg.category_map is not None:
            self.category_map = cfg.category_map
        elif self.categories:
            self.category_map = effdet_category_map(self.categories)

    def _read(self) -> Any:
        """Give the parsed json; parsers of other formats give what they convert to."""
        return read_json(self.ann_path)

    def _load(self, arrays: CocoArrays, min_img_size: int, skip_empty: bool) -> None:
        self.categories = arrays.categories
        self._offsets, self._boxes_yxyx = arrays.offsets, arrays.boxes_yxyx
        self._category_ids, self._is_crowd = arrays.category_ids, arrays.is_crowd
        self.img_ids, self.img_ids_invalid = [], []
        infos, rows = [], []
        for k, info in enumerate(arrays.img_infos):
            if min(info["width"], info["height"]) < min_img_size:
                self.report.add("small_image", f"image {info['id']} {info['width']}x{info['height']}")
            elif skip_empty and self._is_crowd[self._offsets[k] : self._offsets[k + 1]].all():
                self.report.add("empty_image", f"image {info['id']}")
            else:
                self.img_ids.append(info["id"])
                infos.append(info)
                rows.append(k)
                continue
            self.img_ids_invalid.append(info["id"])
        self.img_infos = ImageTable(infos)
        self._rows = np.array(rows, dtype=np.int64)

    def subset(self, indices: Sequence[int]) -> "CocoParser":
        """Return a parser of some images only, by dataset index, in the order given; an index may occur repeatedly."""
        small = copy.copy(self)
        small.img_ids = [self.img_ids[k] for k in indices]
        small.img_infos = ImageTable(self.img_infos[k] for k in indices)
        small._rows = self._rows[np.asarray(indices, dtype=np.int64)]
        return small

    @property
    def category_map(self) -> CategoryMap | None:
        """The category map in force; None for a json without categories. Setting another one relabels."""
        return self._category_map

    @category_map.setter
    def category_map(self, category_map: CategoryMap) -> None:
        unknown = sorted(set(self.cat_ids) - set(category_map.ids))
        if unknown:
            raise ValueError(
                f"{self.ann_path} has category ids {unknown[:8]} that the map does not know (it has: {category_map})"
            )
        self._category_map = category_map
        self._labels = np.where(self._is_crowd, IGNORE, category_map.to_idx(self._category_ids) + 1)

    @property
    def cat_ids(self) -> list[int]:
        """The json's category ids, ascending."""
        return [c["id"] for c in self.categories]

    @property
    def cat_names(self) -> list[str]:
        """The json's category names, by ascending id."""
        return [c["name"] for c in self.categories]

    @property
    def cat_id_to_label(self) -> dict[int, int]:
        """The target label (class_idx + 1) of each category id of the map."""
        return {} if self.category_map is None else {i: k + 1 for i, k in self.category_map.id_to_idx.items()}

    def get_ann_info(self, idx: int) -> dict[str, np.ndarray]:
        """Give the boxes of the image at a dataset index.

        Returns:
            'bbox' float32 [n, 4] yxyx in pixels of the original and 'cls' int64 [n], class_idx + 1 or -2 for an
            ignore region; n may be 0.
        """
        row = self._rows[idx]
        span = slice(self._offsets[row], self._offsets[row + 1])
        bbox = self._boxes_yxyx[span].copy()
        if not self.yxyx:
            bbox = bbox[:, [1, 0, 3, 2]]
        return {"bbox": bbox, "cls": self._labels[span].copy()}

    def box_table(self) -> dict[str, np.ndarray]:
        """Give the boxes of all images in use at once.

        Returns:
            'img_idx' int64 [n], ascending; 'bbox' float32 [n, 4] yxyx in pixels; 'category_id' [n]; 'crowd' bool [n].
        """
        counts = np.diff(self._offsets)[self._rows]
        starts = np.repeat(self._offsets[self._rows] - np.concatenate(([0], counts.cumsum()[:-1])), counts)
        rows = np.arange(len(starts)) + starts
        return {
            "img_idx": np.repeat(np.arange(len(self._rows)), counts),
            "bbox": self._boxes_yxyx[rows],
            "category_id": self._category_ids[rows],
            "crowd": self._is_crowd[rows],
        }

    def check_files(self, img_dir: str | Path) -> None:
        """Look once for every image in `img_dir`, unless that was done when the json was read.

        Raises:
            DatasetError: images are missing; names them.
        """
        if not self._files_checked:
            infos = list(self.img_infos)
            check_files(infos, Path(img_dir), self.report)
            self.report.raise_if_errors()
            self.img_infos = ImageTable(infos)
            self._files_checked = True

    def coco_dict(self) -> dict[str, Any]:
        """Return the json, read again unless it was kept, for the evaluator, in a form pycocotools takes.

        Annotations without a finite box go; `iscrowd` becomes 0 or 1 and an `area` that is no number the box's; when
        annotation ids are repeated, missing or 0 (which pycocotools takes for "unmatched") all are renumbered from 1.
        What the evaluation of boxes does not use, such as polygons, is left out.

        Returns:
            {'images', 'annotations', 'categories', ...}; 'annotations' is empty for a file without labels.
        """
        with collector_paused():
            return self._coco_dict()

    def _coco_dict(self) -> dict[str, Any]:
        data, self._kept = self._kept, None
        if data is None:
            data = self._read()
            if MENDED & self.report.noted.keys():
                mend_json(data, DatasetReport())
        listed = data.get("annotations")
        rows = [
            a
            for a in (listed if isinstance(listed, list) else [])
            if isinstance(a, dict) and four_numbers(a.get("bbox")) and all(abs(v) < 1e300 for v in a["bbox"])
        ]
        for ann in rows:
            ann["iscrowd"] = int(is_set(ann.get("iscrowd")))
            if type(ann.get("area")) not in (int, float):
                ann["area"] = ann["bbox"][2] * ann["bbox"][3]
        ids = {i for i in (a.get("id") for a in rows) if type(i) in (int, str) and i != 0}
        if len(ids) < len(rows):
            for number, ann in enumerate(rows, start=1):
                ann["id"] = number
        data["annotations"] = rows
        if not isinstance(data.get("categories"), list):
            data["categories"] = []
        names = {c["id"]: c["name"] for c in self.categories}
        for row in data["categories"]:
            row["name"] = names[row["id"]]
        self._put_infos(data["images"])
        return data

    def _put_infos(self, rows: list[dict[str, Any]]) -> None:
        """Give images of the json the names and sizes that are in use."""
        infos = {info["id"]: info for info in self.img_infos}
        for row in rows:
            row.update(infos.get(row["id"], ()))

    def _read_whole(self) -> dict[str, Any]:
        with collector_paused():
            data = read_everything(self.ann_path)
            if MENDED & self.report.noted.keys():
                mend_json(data, DatasetReport())
            self._put_infos(data["images"])
        return data

    @property
    def coco(self) -> Any:
        """The file as a pycocotools COCO object with polygons; read on first use, not carried to other processes."""
        if self._coco is None:
            from pycocotools.coco import COCO

            self._coco = COCO()
            self._coco.dataset = self._read_whole()
            with contextlib.redirect_stdout(io.StringIO()):
                self._coco.createIndex()
        return self._coco

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__, _coco=None, _kept=None)
