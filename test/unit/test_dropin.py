"""The promise to users of effdet 0.4.1: the names and signatures they call, and their programs, run unchanged.

First the public surface as data, then programs as such users write them: a notebook, a Lightning-style module, an own
model, the validation and training loops. Expected numbers were computed with effdet 0.4.1, or follow by hand.
"""

from __future__ import annotations

import ast
import gzip
import importlib
import inspect
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf.errors import ReadonlyConfigError
from PIL import Image
from torch import nn

import effdet
from effdet import (
    DetBenchPredict,
    DetBenchTrain,
    EfficientDet,
    SkipSubset,
    create_dataset,
    create_evaluator,
    create_loader,
    create_model,
    create_parser,
    get_efficientdet_config,
    load_checkpoint,
    unwrap_bench,
)
from effdet import anchors as effdet_anchors
from effdet import loss as effdet_loss
from effdet.anchors import AnchorLabeler, Anchors
from effdet.config import set_config_writeable
from effdet.config.model_config import efficientdet_model_param_dict
from effdet.data import resolve_input_config
from effdet.data.parsers import CocoParserCfg
from effdet.efficientdet import HeadNet
from effdet.evaluation.detection_evaluator import PascalDetectionEvaluator
from effdet.soft_nms import batched_soft_nms, pairwise_iou, soft_nms

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

# ---- the surface -----------------------------------------------------------------------------------------------------

MODULES = {
    "effdet": (
        "CocoEvaluator DetBenchPredict DetBenchTrain DetectionDatset EfficientDet OpenImagesEvaluator PascalEvaluator "
        "SkipSubset create_dataset create_evaluator create_loader create_model create_model_from_config create_parser "
        "default_detection_model_configs get_efficientdet_config load_checkpoint load_pretrained unwrap_bench"
    ),
    "effdet.anchors": (
        "AnchorLabeler Anchors MIN_CLASS_SCORE clip_boxes_xyxy decode_box_outputs generate_detections get_feat_sizes"
    ),
    "effdet.bench": "DetBenchPredict DetBenchTrain unwrap_bench",
    "effdet.config": (
        "default_detection_model_configs default_detection_train_config get_efficientdet_config get_fpn_config "
        "set_config_readonly set_config_writeable"
    ),
    "effdet.config.model_config": (
        "default_detection_model_configs efficientdet_model_param_dict get_efficientdet_config"
    ),
    "effdet.config.fpn_config": "bifpn_config get_fpn_config panfpn_config qufpn_config",
    "effdet.config.train_config": "default_detection_train_config",
    "effdet.config.config_utils": "set_config_readonly set_config_writeable",
    "effdet.data": (
        "Compose DetectionDatset IMAGENET_DEFAULT_MEAN IMAGENET_DEFAULT_STD IMAGENET_INCEPTION_MEAN "
        "IMAGENET_INCEPTION_STD ImageToNumpy ImageToTensor RandomFlip RandomResizePad ResizePad SkipSubset "
        "clip_boxes clip_boxes_ create_dataset create_loader create_parser resolve_fill_color "
        "resolve_input_config transforms_coco_eval transforms_coco_train"
    ),
    "effdet.data.loader": (
        "DetectionFastCollate IMAGENET_DEFAULT_MEAN IMAGENET_DEFAULT_STD IMAGENET_INCEPTION_MEAN "
        "IMAGENET_INCEPTION_STD MAX_NUM_INSTANCES PrefetchLoader create_loader"
    ),
    "effdet.data.dataset": "DetectionDatset SkipSubset",
    "effdet.data.dataset_factory": "create_dataset",
    "effdet.data.input_config": "IMAGENET_DEFAULT_MEAN IMAGENET_DEFAULT_STD resolve_input_config",
    "effdet.data.transforms": (
        "Compose IMAGENET_DEFAULT_MEAN IMAGENET_DEFAULT_STD IMAGENET_INCEPTION_MEAN IMAGENET_INCEPTION_STD "
        "ImageToNumpy ImageToTensor RandomFlip RandomResizePad ResizePad clip_boxes clip_boxes_ "
        "resolve_fill_color transforms_coco_eval transforms_coco_train"
    ),
    "effdet.data.random_erasing": "RandomErasing",
    "effdet.data.parsers.parser_factory": "CocoParserCfg OpenImagesParserCfg VocParserCfg create_parser",
    "effdet.efficientdet": (
        "BiFpn BiFpnLayer ConvBnAct2d EfficientDet Fnode FpnCombine HeadNet Interpolate2d ResampleFeatureMap "
        "SeparableConv2d SequentialList get_feature_info"
    ),
    "effdet.evaluator": ("CocoEvaluator Evaluator OpenImagesEvaluator PascalEvaluator TfmEvaluator create_evaluator"),
    "effdet.factory": "create_model create_model_from_config",
    "effdet.helpers": "load_checkpoint load_pretrained",
    "effdet.loss": "DetectionLoss focal_loss_legacy huber_loss loss_fn new_focal_loss one_hot smooth_l1_loss",
    "effdet.soft_nms": "batched_soft_nms pairwise_iou soft_nms",
    "effdet.version": "__version__",
}

# Parameters with their defaults; for a class those of its constructor. "Class.name" without brackets is a property or
# a field. load_checkpoint is timm's, which effdet exported; of its parameters the ones after `strict` are left out.
SIGNATURES = """
AnchorLabeler(anchors, num_classes, match_threshold=0.5)
AnchorLabeler.batch_label_anchors(self, gt_boxes, gt_classes, filter_valid=True)
AnchorLabeler.label_anchors(self, gt_boxes, gt_classes, filter_valid=True)
Anchors(min_level, max_level, num_scales, aspect_ratios, anchor_scale, image_size)
Anchors.from_config(config)
Anchors.get_anchors_per_location(self)
BiFpn(config, feature_info)
BiFpn.forward(self, x)
BiFpnLayer(feature_info, feat_sizes, fpn_config, fpn_channels, num_levels=5, pad_type='', downsample=None,
    upsample=None, norm_layer=nn.BatchNorm2d, act_layer=nn.SiLU, apply_resample_bn=False, pre_act=True,
    separable_conv=True, redundant_bias=False)
BiFpnLayer.forward(self, x)
CocoEvaluator(dataset, distributed=False, pred_yxyx=False)
CocoEvaluator.evaluate(self, output_result_file='')
CocoEvaluator.reset(self)
CocoParserCfg(ann_filename, include_masks=False, include_bboxes_ignore=False, has_labels=True, bbox_yxyx=True,
    min_img_size=32, ignore_empty_gt=False)
CocoParserCfg.bbox_yxyx
CocoParserCfg.has_labels
CocoParserCfg.ignore_empty_gt
CocoParserCfg.include_bboxes_ignore
CocoParserCfg.include_masks
CocoParserCfg.min_img_size
Compose(transforms)
ConvBnAct2d(in_channels, out_channels, kernel_size, stride=1, dilation=1, padding='', bias=False,
    norm_layer=nn.BatchNorm2d, act_layer=nn.SiLU)
ConvBnAct2d.forward(self, x)
DetBenchPredict(model)
DetBenchPredict.forward(self, x, img_info=None)
DetBenchTrain(model, create_labeler=True)
DetBenchTrain.forward(self, x, target)
DetectionDatset(data_dir, parser=None, parser_kwargs=None, transform=None)
DetectionDatset.parser
DetectionDatset.transform
DetectionFastCollate(instance_keys=None, instance_shapes=None, instance_fill=-1, max_instances=100,
    anchor_labeler=None)
DetectionLoss(config)
DetectionLoss.forward(self, cls_outputs, box_outputs, cls_targets, box_targets, num_positives)
EfficientDet(config, pretrained_backbone=True, alternate_init=False)
EfficientDet.forward(self, x)
EfficientDet.reset_head(self, num_classes=None, aspect_ratios=None, num_scales=None, alternate_init=False)
EfficientDet.toggle_head_bn_level_first(self)
Evaluator(distributed=False, pred_yxyx=False)
Evaluator.add_predictions(self, detections, target)
Evaluator.evaluate(self, output_result_file='')
Evaluator.save(self, result_file)
Fnode(combine, after_combine)
Fnode.forward(self, x)
FpnCombine(feature_info, fpn_channels, inputs_offsets, output_size, pad_type='', downsample=None, upsample=None,
    norm_layer=nn.BatchNorm2d, apply_resample_bn=False, redundant_bias=False, weight_method='attn')
FpnCombine.forward(self, x)
HeadNet(config, num_outputs)
HeadNet.forward(self, x)
HeadNet.toggle_bn_level_first(self)
ImageToNumpy()
ImageToTensor(dtype=torch.float32)
Interpolate2d(size=None, scale_factor=None, mode='nearest', align_corners=False)
Interpolate2d.forward(self, input)
OpenImagesEvaluator(dataset, distributed=False, pred_yxyx=False)
OpenImagesParserCfg(categories_filename, img_info_filename, bbox_filename, img_label_filename='', masks_filename='',
    img_filename='%s.jpg', task='obj', prefix_levels=1, add_background=True, has_labels=True, bbox_yxyx=True,
    min_img_size=32, ignore_empty_gt=False)
PascalEvaluator(dataset, distributed=False, pred_yxyx=False)
PrefetchLoader(loader, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), re_prob=0.0, re_mode='pixel',
    re_count=1)
PrefetchLoader.dataset
PrefetchLoader.sampler
RandomErasing(probability=0.5, min_area=0.02, max_area=0.25, min_aspect=0.3, max_aspect=None, mode='const',
    min_count=1, max_count=None, num_splits=0, device='cuda')
RandomFlip(horizontal=True, vertical=False, prob=0.5)
RandomResizePad(target_size, scale=(0.1, 2.0), interpolation='random', fill_color=(0, 0, 0))
ResampleFeatureMap(in_channels, out_channels, input_size, output_size, pad_type='', downsample=None, upsample=None,
    norm_layer=nn.BatchNorm2d, apply_bn=False, redundant_bias=False)
ResizePad(target_size, interpolation='bilinear', fill_color=(0, 0, 0))
SeparableConv2d(in_channels, out_channels, kernel_size=3, stride=1, dilation=1, padding='', bias=False,
    channel_multiplier=1.0, pw_kernel_size=1, norm_layer=nn.BatchNorm2d, act_layer=nn.SiLU)
SeparableConv2d.forward(self, x)
SequentialList(*args)
SequentialList.forward(self, x)
SkipSubset(dataset, n=2)
SkipSubset.parser
SkipSubset.transform
TfmEvaluator(dataset, distributed=False, pred_yxyx=False, evaluator_cls=PascalDetectionEvaluator)
VocParserCfg(split_filename, ann_filename, img_filename='%.jpg', keep_difficult=True, classes=None, add_background=True,
    has_labels=True, bbox_yxyx=True, min_img_size=32, ignore_empty_gt=False)
batched_soft_nms(boxes, scores, idxs, method_gaussian=True, sigma=0.5, iou_threshold=0.5, score_threshold=0.001)
bifpn_config(min_level, max_level, weight_method=None)
clip_boxes(boxes, img_size)
clip_boxes_(boxes, img_size)
clip_boxes_xyxy(boxes, size)
create_dataset(name, root, splits=('train', 'val'))
create_evaluator(name, dataset, distributed=False, pred_yxyx=False)
create_loader(dataset, input_size, batch_size, is_training=False, use_prefetcher=True, re_prob=0.0, re_mode='pixel',
    re_count=1, interpolation='bilinear', fill_color='mean', mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    num_workers=1, distributed=False, pin_mem=False, anchor_labeler=None, transform_fn=None, collate_fn=None)
create_model(model_name, bench_task='', num_classes=None, pretrained=False, checkpoint_path='', checkpoint_ema=False,
    **kwargs)
create_model_from_config(config, bench_task='', num_classes=None, pretrained=False, checkpoint_path='',
    checkpoint_ema=False, **kwargs)
create_parser(name, **kwargs)
decode_box_outputs(rel_codes, anchors, output_xyxy=False)
default_detection_model_configs()
default_detection_train_config()
focal_loss_legacy(logits, targets, alpha, gamma, normalizer)
generate_detections(cls_outputs, box_outputs, anchor_boxes, indices, classes, img_scale, img_size,
    max_det_per_image=100, soft_nms=False)
get_efficientdet_config(model_name='tf_efficientdet_d1')
get_feat_sizes(image_size, max_level)
get_feature_info(backbone)
get_fpn_config(fpn_name, min_level=3, max_level=7)
huber_loss(input, target, delta=1.0, weights=None, size_average=True)
load_checkpoint(model, checkpoint_path, use_ema=True, device='cpu', strict=True)
load_pretrained(model, url, filter_fn=None, strict=True)
loss_fn(cls_outputs, box_outputs, cls_targets, box_targets, num_positives, num_classes, alpha, gamma, delta,
    box_loss_weight, label_smoothing=0.0, legacy_focal=False)
new_focal_loss(logits, targets, alpha, gamma, normalizer, label_smoothing=0.01)
one_hot(x, num_classes)
pairwise_iou(boxes1, boxes2)
panfpn_config(min_level, max_level, weight_method=None)
qufpn_config(min_level, max_level, weight_method=None)
resolve_fill_color(fill_color, img_mean=(0.485, 0.456, 0.406))
resolve_input_config(args, model_config=None, model=None)
set_config_readonly(conf)
set_config_writeable(conf)
smooth_l1_loss(input, target, beta=0.1111111111111111, weights=None, size_average=True)
soft_nms(boxes, scores, method_gaussian=True, sigma=0.5, iou_threshold=0.5, score_threshold=0.005)
transforms_coco_eval(img_size=224, interpolation='bilinear', use_prefetcher=False, fill_color='mean',
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
transforms_coco_train(img_size=224, interpolation='random', use_prefetcher=False, fill_color='mean',
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
unwrap_bench(model)
"""

CONSTANTS = {
    "IMAGENET_DEFAULT_MEAN": (0.485, 0.456, 0.406),
    "IMAGENET_DEFAULT_STD": (0.229, 0.224, 0.225),
    "IMAGENET_INCEPTION_MEAN": (0.5, 0.5, 0.5),
    "IMAGENET_INCEPTION_STD": (0.5, 0.5, 0.5),
    "MAX_NUM_INSTANCES": 100,
    "MIN_CLASS_SCORE": -5.0,
}

# Not part of the promise: names with an underscore, effdet.distributed (the insides of the old trainer), and these.
ABSENT: dict[str, str] = {}
OTHER_DEFAULTS = {
    ("RandomErasing", "device"): (None, "the images' own device instead of one vendor's"),
    ("VocParserCfg", "img_filename"): ("%s.jpg", "0.4.1 has '%.jpg', which no name can be put into"),
    ("load_checkpoint", "use_ema"): (None, "averaged weights if there are any, as before; True insists on them"),
}


def _entries() -> list[tuple[str, ast.arguments | None]]:
    entries = []
    for line in SIGNATURES.strip().replace("\n    ", " ").splitlines():
        name, bracket, _ = line.partition("(")
        entries.append(
            (name, ast.parse(f"lambda {line[len(name) + 1 : -1]}: 0").body[0].value.args if bracket else None)
        )
    return entries


def _places(name: str) -> list[tuple[str, str]]:
    return [(module, name) for module, names in MODULES.items() if name in names.split()]


ALL_NAMES = [(module, name) for module, names in MODULES.items() for name in names.split()]


def test_the_lists_cover_each_other():
    listed = {name.partition(".")[0] for name, _ in _entries()} | set(CONSTANTS) | set(ABSENT)
    named = {name for _, name in ALL_NAMES}
    assert named - listed == {"efficientdet_model_param_dict", "__version__"} and listed <= named


@pytest.mark.parametrize(("module", "name"), ALL_NAMES)
def test_every_public_name_is_where_it_was(module, name):
    if name in ABSENT:
        with pytest.raises(AttributeError):
            getattr(importlib.import_module(module), name)
        with pytest.raises(ImportError, match=name):
            exec(f"from {module} import {name}")
        return
    found = getattr(importlib.import_module(module), name)
    assert all(getattr(importlib.import_module(other), name) is found for other, _ in _places(name))
    if name in CONSTANTS:
        assert found == CONSTANTS[name]


@pytest.mark.parametrize(("name", "expected"), _entries(), ids=[name for name, _ in _entries()])
def test_every_signature_takes_the_same_calls(name, expected):
    """Same parameters, order and defaults; what is new comes after them and has a default."""
    owner, _, member = name.partition(".")
    module, _ = _places(owner)[0]
    found = getattr(importlib.import_module(module), owner)
    if expected is None:
        assert isinstance(inspect.getattr_static(found, member), property) or member in found.__dataclass_fields__
        return
    found = getattr(found, member) if member else found
    parameters = list(inspect.signature(found).parameters.values())
    known = {"nn": nn, "torch": torch, "PascalDetectionEvaluator": PascalDetectionEvaluator}
    defaults = [eval(ast.unparse(node), known) for node in expected.defaults]
    required = [inspect.Parameter.empty] * (len(expected.args) - len(defaults))
    for argument, default in zip(expected.args, required + defaults, strict=True):
        parameter = parameters.pop(0)
        assert parameter.name == argument.arg and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        assert parameter.default == OTHER_DEFAULTS.get((name, argument.arg), (default,))[0], argument.arg
    kinds = {parameter.kind for parameter in parameters}
    assert not expected.vararg or inspect.Parameter.VAR_POSITIONAL in kinds
    assert not expected.kwarg or inspect.Parameter.VAR_KEYWORD in kinds
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    assert all(p.default is not p.empty for p in parameters if p.kind not in variadic), "a new required parameter"


# ---- functions called by position ------------------------------------------------------------------------------------


def assert_near(actual, expected):
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-5, atol=1e-6)


def test_loss_functions_by_position():
    x, targets = torch.tensor([-2.0, 2.0, 1.5]), torch.tensor([1.0, 0.5, 0.0])  # the second is a soft target
    assert_near(effdet_loss.new_focal_loss(x, targets, 0.25, 1.5, 2.0, 0.1), [0.2094412, 0.0996073, 0.4508719])
    assert_near(effdet_loss.new_focal_loss(x, targets, 0.25, 1.5, 2.0), [0.2187409, 0.0996073, 0.4695841])
    assert_near(effdet_loss.focal_loss_legacy(x, targets, 0.25, 1.5, 2.0), [0.2197742, 0.0779470, 0.4716633])
    x = torch.tensor([-2.0, 0.0, 1.5])
    assert_near(effdet_loss.huber_loss(x, targets, 0.5, torch.tensor([1.0, 0.0, 2.0]), False), 2.625)
    assert_near(effdet_loss.huber_loss(x, targets), 1.2083334)
    assert_near(effdet_loss.smooth_l1_loss(x, targets, 0.5, None, True), 1.4166666)
    assert_near(effdet_loss.smooth_l1_loss(x, targets), 1.6111110)
    assert effdet_loss.one_hot(torch.tensor([1, -1, 0]), 2).tolist() == [[0, 1], [0, 0], [1, 0]]


def test_anchor_functions_by_position():
    """A grid of five anchors on a 16 px image, one object over the first of them."""
    anchors = Anchors(3, 4, 1, [(1.0, 1.0)], 1.0, (16, 16))
    assert anchors.boxes.tolist() == [
        [0, 0, 8, 8], [0, 8, 8, 16], [8, 0, 16, 8], [8, 8, 16, 16], [0, 0, 16, 16]]  # fmt: skip
    assert effdet_anchors.get_feat_sizes((500, 333), 3) == [(500, 333), (250, 167), (125, 84), (63, 42)]

    labeler = AnchorLabeler(anchors, 3, 0.5)
    box = torch.tensor([[1.0, 1.0, 9.0, 7.0]])
    classes, deltas, num_positives = labeler.label_anchors(box, torch.tensor([2]), True)
    assert [level.flatten().tolist() for level in classes] == [[1, -1, -1, -1], [-1]] and num_positives == 1
    # Centre (5, 4) against (4, 4) in sides of 8; height as the anchor's, width 6 of 8: log(6 / 8).
    assert_near(deltas[0][0, 0], [0.125, 0.0, 0.0, -0.2876821])

    cls_outputs = [torch.full((1, 3, 2, 2), -1.0), torch.full((1, 3, 1, 1), 0.5)]
    box_outputs = [torch.full((1, 4, 2, 2), 0.1), torch.full((1, 4, 1, 1), -0.1)]
    labels = labeler.batch_label_anchors(box[None], torch.tensor([[2]]), True)
    for smoothing, legacy, expected in (
        (0.1, False, [1.0450490, 0.8320445, 0.0042601]),
        (0.0, True, [1.0340016, 0.8209971, 0.0042601]),
    ):
        losses = effdet_loss.loss_fn(cls_outputs, box_outputs, *labels, 3, 0.25, 1.5, 0.1, 50.0, smoothing, legacy)
        assert_near(torch.stack(losses), expected)


def test_detection_functions_by_position():
    anchors = Anchors(3, 4, 1, [(1.0, 1.0)], 1.0, (16, 16)).boxes
    deltas = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.25, 0.0, 0.0, 0.5]])
    boxes = effdet_anchors.decode_box_outputs(deltas, anchors[[4, 1]], True)
    # The second: centre (y 4 + 2, x 12), height 8, width 8 e^0.5 = 13.18977.
    assert_near(boxes, [[0.0, 0.0, 16.0, 16.0], [5.4051151, 2.0, 18.5948849, 10.0]])
    clipped = effdet_anchors.clip_boxes_xyxy(boxes, torch.tensor([15.0, 9.0]))
    assert_near(clipped, [[0.0, 0.0, 15.0, 9.0], [5.4051151, 2.0, 15.0, 9.0]])
    detections = effdet_anchors.generate_detections(
        torch.tensor([[0.0], [2.0]]), deltas, anchors, torch.tensor([4, 1]), torch.tensor([0, 2]), torch.tensor(2.0),
        torch.tensor([30.0, 32.0]), 3, False)  # fmt: skip
    assert_near(detections, [[10.8102303, 4, 30, 20, 0.8807970, 3], [0, 0, 30, 32, 0.5, 1], [0, 0, 0, 0, 0, 0]])


def slow_soft_nms(boxes, scores, classes, gaussian, sigma, iou_threshold, score_threshold):
    """Soft-NMS as the paper writes it, on Python numbers."""
    left = dict(enumerate(scores.tolist()))
    order = []
    while left:
        best = max(left, key=left.get)
        order.append((best, left.pop(best)))
        for other in list(left):
            a, b = boxes[best].tolist(), boxes[other].tolist()
            width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
            overlap = max(0.0, width) * max(0.0, height) if classes[best] == classes[other] else 0.0
            areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
            iou = overlap / (areas - overlap) if overlap else 0.0
            left[other] *= np.exp(-iou * iou / sigma) if gaussian else 1 - iou if iou > iou_threshold else 1.0
            if left[other] <= score_threshold:
                del left[other]
    return order


def test_soft_nms_by_hand_and_by_position():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [20, 20, 30, 30]])  # the second covers half of the first
    scores = torch.tensor([0.9, 0.8, 0.7])
    assert_near(pairwise_iou(boxes, boxes[:2]), [[1.0, 0.5], [0.5, 1.0], [0.0, 0.0]])
    index, lowered = soft_nms(boxes, scores)
    assert index.tolist() == [0, 2, 1] and index.dtype == torch.int64 and lowered.dtype == torch.float32
    assert_near(lowered, [0.9, 0.7, 0.8 * np.exp(-0.25 / 0.5)])
    assert_near(soft_nms(boxes, scores, False, 0.5, 0.3, 0.005)[1], [0.9, 0.7, 0.4])
    assert soft_nms(boxes, scores, False, 0.5, 0.3, 0.5)[0].tolist() == [0, 2]
    assert soft_nms(boxes, scores, True, 0.5, 0.5, 0.95)[0].tolist() == [0], "the best box stays, whatever its score"
    assert batched_soft_nms(boxes, scores, torch.tensor([0, 1, 0]))[0].tolist() == [0, 1, 2]
    for kept in (soft_nms(boxes[:0], scores[:0]), batched_soft_nms(boxes[:0], scores[:0], torch.zeros(0))):
        assert [t.shape for t in kept] == [(0,), (0,)] and [t.dtype for t in kept] == [torch.int64, torch.float32]


@pytest.mark.parametrize("gaussian", [True, False], ids=["gaussian", "linear"])
@pytest.mark.parametrize("seed", range(4))
def test_soft_nms_against_a_slow_twin(gaussian, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(40, 2, generator=generator) * 30
    boxes = torch.cat((corner, corner + torch.rand(40, 2, generator=generator) * 30), 1)
    scores, classes = torch.rand(40, generator=generator), torch.randint(0, 3, (40,), generator=generator)
    given, settings = scores.clone(), (gaussian, 0.4, 0.3, 0.15)
    for (index, lowered), groups in (
        (soft_nms(boxes, scores, *settings), [0] * 40),
        (batched_soft_nms(boxes, scores, classes, *settings), classes.tolist()),
    ):
        expected = slow_soft_nms(boxes, scores, groups, *settings)
        assert 1 < len(expected) < 40 and index.tolist() == [row for row, _ in expected]
        torch.testing.assert_close(lowered, torch.tensor([float(score) for _, score in expected]), rtol=1e-4, atol=1e-6)
    assert torch.equal(scores, given), "the caller's scores stay as they are"


def test_load_checkpoint_prefers_averaged_weights_and_takes_timms_positions(tmp_path):
    source, averaged = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save({"state_dict": source.state_dict(), "state_dict_ema": averaged.state_dict()}, tmp_path / "a.pth.tar")
    model = nn.Linear(2, 2)
    load_checkpoint(model, str(tmp_path / "a.pth.tar"))
    assert torch.equal(model.weight, averaged.weight)
    load_checkpoint(model, str(tmp_path / "a.pth.tar"), False, "cpu", False)
    assert torch.equal(model.weight, source.weight)


# ---- a notebook ------------------------------------------------------------------------------------------------------


def small_config(name="tf_efficientdet_d0", **settings):
    """A published model with one cell and one head layer, at 128 px: settings a user may change, and fast."""
    config = get_efficientdet_config(name)
    config.image_size = [128, 128]
    config.fpn_cell_repeats = config.box_class_repeats = 1
    for key, value in settings.items():
        config[key] = value
    return config


def images(count=2, seed=0):
    return torch.randn(count, 3, 128, 128, generator=torch.Generator().manual_seed(seed))


BOXES = [torch.tensor([[10.0, 20.0, 60.0, 90.0]]), torch.tensor([[5.0, 5, 40, 40], [30, 60, 120, 100], [0, 0, 9, 9]])]


def test_notebook_settings_before_building():
    config = small_config()
    config.num_classes = 1
    config.norm_kwargs = dict(eps=0.001, momentum=0.01)
    net = EfficientDet(config, pretrained_backbone=False)
    net.class_net = HeadNet(config, num_outputs=config.num_classes)
    bench = DetBenchTrain(net, config)  # older code passed the config where the labeler's switch is
    assert bench.anchor_labeler is not None and net.class_net.bn_rep[0][0].bn.momentum == 0.01

    optimizer = torch.optim.AdamW(bench.parameters(), lr=1e-3)
    target = {
        "bbox": BOXES,
        "cls": [torch.ones(len(boxes)) for boxes in BOXES],
        "img_scale": torch.ones(2),
        "img_size": torch.full((2, 2), 128.0),
    }
    losses = []
    for _ in range(3):
        output = bench(images(), target)
        assert_near(output["loss"], output["class_loss"] + 50 * output["box_loss"])
        output["loss"].backward()
        torch.nn.utils.clip_grad_norm_(bench.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output["loss"].item())
    assert losses[2] < losses[0]

    bench.eval()
    with torch.no_grad():
        output = bench(images(), target)
    assert output["detections"].shape == (2, 100, 6)
    found = output["detections"][..., 4] > 0
    assert found.any() and (output["detections"][..., 5][found] == 1).all()

    net.eval()
    torch.testing.assert_close(DetBenchPredict(net)(images(), target), output["detections"])


def test_notebook_settings_after_building():
    """The config is read-only once a network has it; code that changes it all the same says so first."""
    config = small_config()
    net = EfficientDet(config, pretrained_backbone=False)
    with pytest.raises(ReadonlyConfigError):
        config.num_classes = 1
    with pytest.raises(ReadonlyConfigError):
        net.config.image_size = (256, 256)
    set_config_writeable(config)
    config.num_classes = 1
    net.class_net = HeadNet(config, num_outputs=config.num_classes)
    bench = DetBenchTrain(net, config)
    output = bench(images(), {"bbox": BOXES, "cls": [torch.ones(len(boxes)) for boxes in BOXES]})
    assert bench.num_classes == 1 and output["loss"].isfinite()

    config.image_size = (256, 256)
    for bench in (DetBenchTrain, DetBenchPredict):
        with pytest.raises(ValueError, match=r"\(256, 256\).*built for images of \(128, 128\)"):
            bench(net)


@pytest.mark.parametrize("task", ["train", "predict"])
def test_a_head_that_does_not_fit_the_class_count_is_refused(task):
    """The published 90 classes left in the config beside a head for 10: 90 channels look like one anchor's logits."""
    config = small_config()
    net = EfficientDet(config, pretrained_backbone=False)
    net.class_net = HeadNet(config, num_outputs=10)
    with pytest.raises(ValueError, match="gives 90 values for each cell, but 9 anchors with .* 90 classes need 810"):
        if task == "train":
            DetBenchTrain(net)(images(), {"bbox": BOXES, "cls": [torch.ones(len(boxes)) for boxes in BOXES]})
        else:
            DetBenchPredict(net.eval())(images())


def test_one_number_is_a_square_image():
    bench = create_model("tf_efficientdet_d0", "predict", pretrained_backbone=False, image_size=128)
    assert tuple(bench.config.image_size) == (128, 128) == bench.anchors.image_size
    config = small_config()
    config.image_size = 128
    net = EfficientDet(config, pretrained_backbone=False)
    assert tuple(config.image_size) == (128, 128)
    assert torch.equal(DetBenchPredict(net).anchors.boxes, bench.anchors.boxes)
    assert torch.equal(Anchors(3, 7, 3, config.aspect_ratios, 4.0, 128).boxes, bench.anchors.boxes)
    with pytest.raises(ReadonlyConfigError):
        config.image_size = 256
    with pytest.raises(ValueError, match=r"\(100, 100\).*nearest valid sizes are \(96, 96\) and \(128, 128\)"):
        create_model("tf_efficientdet_d0", pretrained_backbone=False, image_size=100)


@pytest.mark.parametrize("filter_valid", [True, False])
def test_lists_of_boxes_get_the_labels_of_each_image_by_itself(filter_valid):
    anchors = Anchors(3, 7, 3, [(1.0, 1.0), (1.4, 0.7), (0.7, 1.4)], 4.0, (128, 128))
    labeler = AnchorLabeler(anchors, 3)
    boxes = [*BOXES, torch.zeros(0, 4)]
    classes = [torch.tensor([2]), torch.tensor([1, 3, 2]), torch.zeros(0, dtype=torch.int64)]
    together = labeler.batch_label_anchors(boxes, classes, filter_valid)
    assert together[2][2] == 0 and (together[2][:2] >= torch.tensor([1, 3])).all()
    for image, (own_boxes, own_classes) in enumerate(zip(boxes, classes, strict=True)):
        alone = labeler.label_anchors(own_boxes, own_classes, filter_valid)
        assert alone[2] == together[2][image]
        for level in range(5):
            assert torch.equal(alone[0][level], together[0][level][image])
            assert torch.equal(alone[1][level], together[1][level][image])
    arrays = labeler.batch_label_anchors(tuple(b.double().numpy() for b in boxes), [c.float() for c in classes],
                                         filter_valid)  # fmt: skip
    for level in range(5):
        assert torch.equal(arrays[0][level], together[0][level]) and torch.equal(arrays[1][level], together[1][level])
    with pytest.raises(ValueError, match=r"\[1, 3\] boxes and \[1, 2\] classes"):
        labeler.batch_label_anchors(BOXES, [torch.tensor([2]), torch.tensor([1, 3])])


# ---- a Lightning-style module ----------------------------------------------------------------------------------------


class LightningStyle(nn.Module):
    """What a LightningModule does with effdet, without the package."""

    def __init__(self):
        super().__init__()
        self.model = create_model(
            "tf_efficientdet_d0",
            bench_task="train",
            num_classes=3,
            pretrained=False,
            pretrained_backbone=False,
            bench_labeler=True,
            image_size=(128, 128),
            max_det_per_image=20,
        )

    def training_step(self, batch):
        inputs, target = batch
        return self.model(inputs, target)["loss"]


def test_lightning_style_module_and_its_weights_in_a_predictor(tmp_path):
    torch.manual_seed(0)
    module = LightningStyle()
    target = {"bbox": torch.full((2, 4, 4), -1.0), "cls": torch.full((2, 4), -1.0)}
    for image, boxes in enumerate(BOXES):
        target["bbox"][image, : len(boxes)], target["cls"][image, : len(boxes)] = boxes, 2
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    before = module.model.model.class_net.predict.conv_pw.bias.clone()
    loss = module.training_step((images(), target))
    listed = module.model.anchor_labeler.batch_label_anchors(BOXES, [torch.full((len(b),), 2) for b in BOXES])
    padded = module.model.anchor_labeler.batch_label_anchors(target["bbox"], target["cls"])
    assert all(torch.equal(a, b) for a, b in zip(listed[0] + listed[1], padded[0] + padded[1], strict=True))
    loss.backward()
    optimizer.step()
    assert not torch.equal(before, module.model.model.class_net.predict.conv_pw.bias)

    net = unwrap_bench(module.model)
    assert isinstance(net, EfficientDet) and net.config.num_classes == 3
    assert unwrap_bench(nn.DataParallel(module.model)) is net
    predictor = DetBenchPredict(net).eval()
    with torch.no_grad():
        expected = predictor(images())
    assert expected.shape == (2, 20, 6)

    torch.save({"state_dict": predictor.state_dict()}, tmp_path / "bench.pth")
    fresh = create_model(
        "tf_efficientdet_d0", bench_task="predict", num_classes=3, pretrained_backbone=False, image_size=(128, 128),
        max_det_per_image=20)  # fmt: skip
    fresh.load_state_dict(torch.load(tmp_path / "bench.pth")["state_dict"], strict=True)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(images()), expected)


@pytest.mark.parametrize("task", ["train", "predict"])
def test_bench_state_dicts_have_the_published_keys(task):
    shapes = json.loads(gzip.open(GOLDEN / "state_dict_shapes.json.gz").read())["tf_efficientdet_d0"]
    bench = create_model("tf_efficientdet_d0", bench_task=task, pretrained_backbone=False, bench_labeler=True)
    expected = {"anchors.boxes": [49104, 4], **{f"model.{key}": shape for key, shape in shapes.items()}}
    assert {key: list(value.shape) for key, value in bench.state_dict().items()} == expected
    assert list(bench.state_dict())[-1] == "anchors.boxes"


# ---- an own model ----------------------------------------------------------------------------------------------------


def test_own_entry_in_the_table_of_models(monkeypatch):
    entry = dict(
        name="pocket",
        backbone_name="mobilenetv3_small_050",
        image_size=(64, 96),
        fpn_channels=16,
        fpn_cell_repeats=1,
        box_class_repeats=1,
        pad_type="",
        redundant_bias=False,
        act_type="hard_swish",
        backbone_args=dict(drop_path_rate=0.1),
    )
    monkeypatch.setitem(efficientdet_model_param_dict, "pocket", entry)
    config = get_efficientdet_config("pocket")
    assert config.num_levels == 5 and config.gamma == 1.5 and config.norm_kwargs.eps == 0.001
    config.backbone_args.drop_path_rate = 0.5
    assert entry["backbone_args"] == {"drop_path_rate": 0.1}, "the table is not the config's to change"

    bench = create_model("pocket", bench_task="predict", num_classes=4, pretrained_backbone=False)
    cls_outputs, box_outputs = bench.model.eval()(torch.zeros(1, 3, 64, 96))
    assert [tuple(level.shape) for level in cls_outputs] == [
        (1, 36, 8, 12), (1, 36, 4, 6), (1, 36, 2, 3), (1, 36, 1, 2), (1, 36, 1, 1)]  # fmt: skip
    assert all(level.shape[1] == 36 for level in box_outputs)
    assert bench.eval()(torch.zeros(1, 3, 64, 96)).shape == (1, 100, 6)
    with pytest.raises(ValueError, match="Nearest: pocket"):
        create_model("pockett", pretrained_backbone=False)


# ---- the loops of the old scripts ------------------------------------------------------------------------------------


@pytest.fixture
def coco_root(tmp_path):
    return write_coco(tmp_path, ids=(2, 7))


def write_coco(root, ids):
    """A train and a val split in COCO's layout: images of several sizes, 0 to 3 boxes in each."""
    (root / "annotations").mkdir()
    rng = np.random.default_rng(1)
    for split, count in (("train", 5), ("val", 4)):
        rows, annotations = [], []
        (root / f"{split}2017").mkdir()
        for number in range(count):
            width, height = [(100, 60), (64, 90), (128, 128)][number % 3]
            name = f"{number:012d}.jpg"
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(root / f"{split}2017" / name)
            rows.append({"id": 10 * number + 3, "file_name": name, "width": width, "height": height})
            for k in range(number % 4):
                box = [4.0 + 12 * k, 3.0 + 8 * k, 30.0 + 5 * k, 40.0 - 6 * k]
                annotations.append({
                    "id": len(annotations) + 1, "image_id": 10 * number + 3, "category_id": ids[k % len(ids)],
                    "bbox": box, "area": box[2] * box[3], "iscrowd": 0})  # fmt: skip
        content = {"images": rows, "annotations": annotations,
                   "categories": [{"id": i, "name": f"kind {i}"} for i in ids]}  # fmt: skip
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def truth_as_detections(target):
    """Turn a batch's targets into the detections a perfect model gives: original pixels, xyxy, padded with zeros."""
    rows = torch.zeros(*target["cls"].shape, 6)
    rows[..., :4] = target["bbox"][..., [1, 0, 3, 2]] * target["img_scale"].view(-1, 1, 1)
    rows[..., 4], rows[..., 5] = 0.9, target["cls"]
    rows[target["cls"] < 0] = 0
    return rows


@pytest.mark.parametrize("ids", [(1, 2), (2, 7), (5, 1000)], ids=str)
def test_the_validation_script(tmp_path, ids):
    root = write_coco(tmp_path, ids)
    args = Namespace(interpolation="bilinear", fill_color=None, mean=None, std=None, workers=0)
    dataset = create_dataset("coco", root, "val")
    bench = create_model("tf_efficientdet_d0", "predict", dataset.parser.max_label, pretrained_backbone=False,
                         image_size=(128, 128))  # fmt: skip
    input_config = resolve_input_config(args, bench.config)
    assert input_config["input_size"] == (3, 128, 128)
    loader = create_loader(
        dataset,
        input_size=input_config["input_size"],
        batch_size=2,
        use_prefetcher=True,
        interpolation=input_config["interpolation"],
        fill_color=input_config["fill_color"],
        mean=input_config["mean"],
        std=input_config["std"],
        num_workers=args.workers,
        pin_mem=False,
    )
    evaluator, perfect = create_evaluator("coco", dataset), create_evaluator("coco", dataset, False, False)
    bench.eval()
    with torch.no_grad():
        for inputs, target in loader:
            output = bench(inputs, img_info=target)
            assert output.shape == (2, 100, 6)
            evaluator.add_predictions(output, target)
            perfect.add_predictions(truth_as_detections({key: value.cpu() for key, value in target.items()}), target)
    assert 0.0 <= evaluator.evaluate() < 0.5
    assert perfect.evaluate(output_result_file=str(tmp_path / "results.json")) == pytest.approx(1.0)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["category_id"] for row in results} == set(ids) and {row["image_id"] for row in results} == {13, 23, 33}


@pytest.mark.parametrize("labels", ["in the bench", "in the loader"])
def test_the_training_script(coco_root, labels):
    """One optimiser step and a validation with the train bench; both ways to label give one loss."""
    in_bench = labels == "in the bench"
    train_set, eval_set = create_dataset("coco2017", coco_root)
    bench = create_model("tf_efficientdet_d0", bench_task="train", num_classes=7, pretrained_backbone=False,
                         image_size=(128, 128), bench_labeler=in_bench)  # fmt: skip
    labeler = AnchorLabeler(Anchors.from_config(bench.config), bench.config.num_classes, match_threshold=0.5)
    common = {"input_size": (3, 128, 128), "batch_size": 2, "use_prefetcher": False, "num_workers": 0,
              "anchor_labeler": None if in_bench else labeler}  # fmt: skip
    loader_train = create_loader(train_set, is_training=True, re_prob=0.2, **common)
    eval_set = SkipSubset(eval_set, 2)
    loader_eval = create_loader(eval_set, **common)

    optimizer = torch.optim.SGD(bench.parameters(), lr=0.01)
    inputs, target = next(iter(loader_train))
    assert inputs.shape == (2, 3, 128, 128) and inputs.dtype == torch.float32
    assert ("label_cls_0" in target) != in_bench and ("bbox" in target) == in_bench
    weight = bench.model.class_net.predict.conv_pw.weight
    before = weight.clone()
    bench(inputs, target)["loss"].backward()
    optimizer.step()
    assert not torch.equal(before, weight)

    evaluator = create_evaluator("coco", loader_eval.dataset, distributed=False, pred_yxyx=False)
    bench.eval()
    with torch.no_grad():
        for inputs, target in loader_eval:
            output = bench(inputs, target)
            evaluator.add_predictions(output["detections"], target)
    assert target["img_idx"].tolist() == [0, 2] and 0.0 <= evaluator.evaluate() <= 1.0
    if in_bench:
        made = labeler.batch_label_anchors(target["bbox"], target["cls"])
        other = DetBenchTrain(bench.model, create_labeler=False).eval()
        stored = {"label_num_positives": made[2], "img_scale": target["img_scale"], "img_size": target["img_size"]}
        for level in range(5):
            stored[f"label_cls_{level}"], stored[f"label_bbox_{level}"] = made[0][level], made[1][level]
        with torch.no_grad():
            assert_near(other(inputs, stored)["loss"], output["loss"])


def test_own_transform_and_own_collate(coco_root):
    """Transforms and batches as notebooks make them: uint8 arrays out of the transform, lists out of the collate."""
    dataset = create_dataset("coco", coco_root, ("train",))
    seen = []

    def transform(image, annotations):
        seen.append(annotations["img_idx"])
        scale = 128 / max(image.size)
        pixels = np.zeros((128, 128, 3), dtype=np.uint8)
        small = image.resize([int(side * scale) for side in image.size])
        pixels[: small.height, : small.width] = np.asarray(small)
        return pixels.transpose(2, 0, 1), dict(annotations, bbox=annotations["bbox"] * scale, img_scale=1 / scale)

    loader = create_loader(dataset, (128, 128), 3, False, False, num_workers=0, transform_fn=transform)
    inputs, target = next(iter(loader))
    assert seen == [0, 1, 2] and inputs.dtype == torch.uint8 and inputs.shape == (3, 3, 128, 128)
    assert (target["cls"] > 0).sum(1).tolist() == [0, 1, 2]
    torch.testing.assert_close(target["img_scale"], torch.tensor([100 / 128, 90 / 128, 1.0]))

    def collate(batch):
        stacked, annotations = zip(*batch, strict=True)
        boxes, classes = ([torch.from_numpy(a[key]).float() for a in annotations] for key in ("bbox", "cls"))
        return torch.from_numpy(np.stack(stacked)).float() / 255, {"bbox": boxes, "cls": classes}

    loader = create_loader(dataset, (3, 128, 128), 3, use_prefetcher=False, num_workers=0, transform_fn=transform,
                           collate_fn=collate)  # fmt: skip
    inputs, listed = next(iter(loader))
    assert [len(boxes) for boxes in listed["bbox"]] == [0, 1, 2]
    bench = create_model("tf_efficientdet_d0", "train", 7, pretrained_backbone=False, bench_labeler=True,
                         image_size=128)  # fmt: skip
    bench.model.eval()  # batch norm's running statistics stay, so that the two losses can be compared
    with torch.no_grad():
        assert_near(bench(inputs, listed)["loss"], bench(inputs, target)["loss"])


def test_labels_are_category_ids_where_effdet_users_rely_on_it(tmp_path):
    """Ids 1..N, and COCO's own 80 ids with the numbering of the published weights."""
    coco_ids = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    for ids in ((1, 2), coco_ids):
        root = tmp_path / str(len(ids))
        root.mkdir()
        path = write_coco(root, ids) / "annotations" / "instances_train2017.json"
        parser = create_parser("coco", cfg=CocoParserCfg(ann_filename=str(path)))
        assert parser.max_label == max(ids) and parser.cat_ids == list(ids)
        truth = [a["category_id"] for a in json.loads(path.read_text())["annotations"]]
        labels = [label for index in range(5) for label in parser.get_ann_info(index)["cls"].tolist()]
        assert labels == truth and len(truth) == 6


def test_the_version_is_a_later_one():
    assert tuple(int(part) for part in effdet.__version__.split(".")[:2]) > (0, 4)


def test_names_come_at_their_first_use():
    """In a process of its own: `import effdet` alone waits for neither timm nor pycocotools; every name is there."""
    code = """
import sys
import effdet
assert not {"timm", "torchvision", "pycocotools", "omegaconf"} & set(sys.modules), sorted(sys.modules)
assert set(effdet.__all__) <= set(dir(effdet))
missing = [name for name in effdet.__all__ if not hasattr(effdet, name)]
assert not missing and "timm" in sys.modules, missing
assert effdet.anchors.Anchors is effdet.bench.Anchors
try:
    effdet.no_such_name
except AttributeError as error:
    assert "no attribute 'no_such_name'" in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(effdet.__file__).parents[1], text=True, timeout=120, capture_output=True
    )
    assert done.returncode == 0, done.stderr
