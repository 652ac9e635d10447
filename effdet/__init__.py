"""EfficientDet in PyTorch: models, anchors, loss, post-processing, data and evaluation.

Names are imported at their first use: a program that only loads a data set does not wait for timm.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import timm_patches  # noqa: F401  (before anything imports timm: timm_patches/torchvision_ops.py says why)

from .runtime.installation import check_installation
from .version import __version__

_IS_EFFDET_ASCEND = True  # what the package of effdet 0.4.1 does not say
check_installation()

if TYPE_CHECKING:
    from effdet.commands.train import TrainedRun, train
    from effdet.config import default_detection_model_configs, get_efficientdet_config
    from effdet.data import DetectionDatset, SkipSubset, create_dataset, create_loader, create_parser
    from effdet.predict.load import load
    from effdet.predict.predictor import Detections, Predictor

    from .bench import DetBenchPredict, DetBenchTrain, unwrap_bench
    from .efficientdet import EfficientDet
    from .evaluator import CocoEvaluator, OpenImagesEvaluator, PascalEvaluator, create_evaluator
    from .factory import create_model, create_model_from_config
    from .helpers import load_checkpoint, load_pretrained

_HOMES = {
    "commands.train": ("TrainedRun", "train"),
    "bench": ("DetBenchPredict", "DetBenchTrain", "unwrap_bench"),
    "predict.load": ("load",),
    "config": ("default_detection_model_configs", "get_efficientdet_config"),
    "data": ("DetectionDatset", "SkipSubset", "create_dataset", "create_loader", "create_parser"),
    "efficientdet": ("EfficientDet",),
    "evaluator": ("CocoEvaluator", "OpenImagesEvaluator", "PascalEvaluator", "create_evaluator"),
    "factory": ("create_model", "create_model_from_config"),
    "helpers": ("load_checkpoint", "load_pretrained"),
    "predict.predictor": ("Detections", "Predictor"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CocoEvaluator",
    "DetBenchPredict",
    "DetBenchTrain",
    "DetectionDatset",
    "Detections",
    "EfficientDet",
    "OpenImagesEvaluator",
    "PascalEvaluator",
    "Predictor",
    "SkipSubset",
    "TrainedRun",
    "__version__",
    "create_dataset",
    "create_evaluator",
    "create_loader",
    "create_model",
    "create_model_from_config",
    "create_parser",
    "default_detection_model_configs",
    "get_efficientdet_config",
    "load",
    "load_checkpoint",
    "load_pretrained",
    "train",
    "unwrap_bench",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")  # as `effdet.anchors` after a plain `import effdet`
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
