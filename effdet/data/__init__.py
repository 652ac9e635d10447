"""Data: annotation files, images, transforms and loaders."""

from .augment.autoaugment import AutoAugment, ColorJitter
from .augment.mosaic import MosaicMixup
from .augment.user_transform import UserTransform, load_transform
from .coco.annotations import CocoParser, coco_paths
from .coco.categories import CategoryMap, resolve_category_map
from .coco.report import DatasetError, DatasetReport
from .dataset import DetectionDatset, SkipSubset
from .dataset_factory import create_dataset, open_coco
from .images import ImageError
from .input_config import resolve_input_config
from .loader import create_loader
from .parsers import CocoParserCfg, create_parser
from .transforms import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    Compose,
    ImageToNumpy,
    ImageToTensor,
    Normalize,
    RandomFlip,
    RandomResizePad,
    ResizePad,
    clip_boxes,
    clip_boxes_,
    resolve_fill_color,
    transforms_coco_eval,
    transforms_coco_train,
)

__all__ = [
    "AutoAugment",
    "CategoryMap",
    "CocoParser",
    "CocoParserCfg",
    "ColorJitter",
    "Compose",
    "DatasetError",
    "DatasetReport",
    "DetectionDatset",
    "IMAGENET_DEFAULT_MEAN",
    "IMAGENET_DEFAULT_STD",
    "IMAGENET_INCEPTION_MEAN",
    "IMAGENET_INCEPTION_STD",
    "ImageToNumpy",
    "ImageToTensor",
    "MosaicMixup",
    "Normalize",
    "ImageError",
    "RandomFlip",
    "RandomResizePad",
    "ResizePad",
    "SkipSubset",
    "UserTransform",
    "clip_boxes",
    "clip_boxes_",
    "coco_paths",
    "create_dataset",
    "create_loader",
    "create_parser",
    "load_transform",
    "open_coco",
    "resolve_category_map",
    "resolve_fill_color",
    "resolve_input_config",
    "transforms_coco_eval",
    "transforms_coco_train",
]
