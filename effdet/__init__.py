"""EfficientDet in PyTorch: models, anchors, loss, post-processing, data and evaluation."""
import timm_patches  # noqa: F401  (before anything imports timm: timm_patches/torchvision_ops.py says why)

from .bench import DetBenchPredict, DetBenchTrain, unwrap_bench
from .build import load
from .config import default_detection_model_configs, get_efficientdet_config
from .data import DetectionDatset, SkipSubset, create_dataset, create_loader, create_parser
from .efficientdet import EfficientDet
from .evaluator import CocoEvaluator, OpenImagesEvaluator, PascalEvaluator, create_evaluator
from .factory import create_model, create_model_from_config
from .helpers import load_checkpoint, load_pretrained
from .predictor import Detections, Predictor
from .version import __version__

__all__ = ["CocoEvaluator", "DetBenchPredict", "DetBenchTrain", "DetectionDatset", "Detections", "EfficientDet",
           "OpenImagesEvaluator", "PascalEvaluator", "Predictor", "SkipSubset",
           "__version__", "create_dataset", "create_evaluator", "create_loader", "create_model",
           "create_model_from_config", "create_parser", "default_detection_model_configs", "get_efficientdet_config",
           "load", "load_checkpoint", "load_pretrained", "unwrap_bench"]
