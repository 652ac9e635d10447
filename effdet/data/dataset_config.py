"""Where COCO, Pascal VOC and Open Images keep their splits: the only home of these paths.

The dataclasses and their keys are effdet's, and may be subclassed. `splits` maps a split's name to paths relative to
the data set's root. Classes for segmentation exist for their names alone: nothing here reads masks.
"""

from dataclasses import dataclass, field
from typing import Any

Splits = dict[str, dict[str, Any]]


def _coco(year: str) -> Splits:
    files = {
        "train": "instances_train",
        "val": "instances_val",
        "test": "image_info_test",
        "testdev": "image_info_test-dev",
    }
    return {
        name: {
            "ann_filename": f"annotations/{file}{year}.json",
            "img_dir": f"{name.removesuffix('dev')}{year}",
            "has_labels": file.startswith("instances"),
        }
        for name, file in files.items()
    }


def _voc(year: str, name: str) -> dict[str, Any]:
    return {
        "split_filename": f"VOC{year}/ImageSets/Main/{name}.txt",
        "ann_filename": f"VOC{year}/Annotations/%s.xml",
        "img_dir": f"VOC{year}/JPEGImages",
    }


def _open_images(name: str, boxes: str, labels: str) -> dict[str, Any]:
    return {
        "img_dir": name,
        "img_info": f"annotations/{name}-info.csv",
        "has_labels": True,
        "prefix_levels": int(name == "train"),
        "ann_bbox": f"annotations/{boxes}",
        "ann_img_label": f"annotations/{labels}",
    }


def _open_images_v5() -> Splits:
    names = {"train": "train", "val": "validation", "test": "test"}
    return {
        split: _open_images(name, f"{name}-annotations-bbox.csv", f"{name}-annotations-human-imagelabels-boxable.csv")
        for split, name in names.items()
    }


def _open_images_2019() -> Splits:
    prefix = "challenge-2019/challenge-2019"
    splits = {
        split: _open_images(
            name, f"{prefix}-{name}-detection-bbox.csv", f"{prefix}-{name}-detection-human-imagelabels.csv"
        )
        for split, name in {"train": "train", "val": "validation"}.items()
    }
    splits["test"] = {
        "img_dir": "challenge2019",
        "img_info": "annotations/challenge-2019/challenge2019-info",
        "has_labels": False,
        "prefix_levels": 0,
        "ann_bbox": "",
        "ann_img_label": "",
    }
    return splits


def _no_paths() -> Splits:
    return {"train": {}, "val": {}, "test": {}}


@dataclass
class CocoCfg:
    """COCO's layout, of any year."""

    variant: str | None = None
    parser: str = "coco"
    num_classes: int = 80
    splits: Splits | None = None


@dataclass
class Coco2017Cfg(CocoCfg):
    """COCO 2017."""

    variant: str = "2017"
    splits: Splits = field(default_factory=lambda: _coco("2017"))


@dataclass
class Coco2014Cfg(CocoCfg):
    """COCO 2014."""

    variant: str = "2014"
    splits: Splits = field(default_factory=lambda: _coco("2014"))


@dataclass
class VocCfg:
    """Pascal VOC's layout, of any year. A split may list several files of names, annotations and image folders."""

    variant: str | None = None
    parser: str = "voc"
    num_classes: int = 80  # effdet's number, for those who build models by it; VOC has 20 classes
    img_filename: str = "%s.jpg"
    splits: Splits | None = None


@dataclass
class Voc2007Cfg(VocCfg):
    """Pascal VOC 2007."""

    variant: str = "2007"
    splits: Splits = field(default_factory=lambda: {name: _voc("2007", name) for name in ("train", "val")})


@dataclass
class Voc2012Cfg(VocCfg):
    """Pascal VOC 2012."""

    variant: str = "2012"
    splits: Splits = field(default_factory=lambda: {name: _voc("2012", name) for name in ("train", "val")})


def _voc_0712() -> Splits:
    first, second = _voc("2007", "trainval"), _voc("2012", "trainval")
    return {"train": {key: [first[key], second[key]] for key in first}, "val": _voc("2007", "test")}


@dataclass
class Voc0712Cfg(VocCfg):
    """Pascal VOC 2007 and 2012 together, tested on 2007's test set."""

    variant: str = "0712"
    splits: Splits = field(default_factory=_voc_0712)


@dataclass
class OpenImagesCfg:
    """Open Images' layout, of any version."""

    variant: str | None = None
    parser: str = "openimages"
    num_classes: int | None = None
    img_filename = "%s.jpg"  # without a type, so no field: as in effdet, whose order of fields stays
    splits: Splits | None = None


@dataclass
class OpenImagesObjCfg(OpenImagesCfg):
    """Open Images, boxes."""

    num_classes: int = 601
    categories_map: str = "annotations/class-descriptions-boxable.csv"


@dataclass
class OpenImagesSegCfg(OpenImagesCfg):
    """Open Images, masks; not read."""

    num_classes: int = 350
    categories_map: str = "annotations/classes-segmentation.txt"


@dataclass
class OpenImagesObjV5Cfg(OpenImagesObjCfg):
    """Open Images V5, boxes."""

    splits: Splits = field(default_factory=_open_images_v5)


@dataclass
class OpenImagesObjChallenge2019Cfg(OpenImagesObjCfg):
    """The Open Images challenge of 2019, boxes; its test split has no labels."""

    num_classes: int = 500
    categories_map: str = "annotations/challenge-2019/challenge-2019-classes-description-500.csv"
    splits: Splits = field(default_factory=_open_images_2019)


@dataclass
class OpenImagesSegV5Cfg(OpenImagesSegCfg):
    """Open Images V5, masks; not read."""

    num_classes: int = 300
    splits: Splits = field(default_factory=_no_paths)


@dataclass
class OpenImagesSegChallenge2019Cfg(OpenImagesSegCfg):
    """The Open Images challenge of 2019, masks; not read."""

    num_classes: int = 300
    ann_class_map: str = "annotations/challenge-2019/challenge-2019-classes-description-segmentable.csv"
    splits: Splits = field(default_factory=_no_paths)
