"""The network's parts against slow twins, the shapes it runs at, its heads, and the benches around it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from effdet.anchors import AnchorLabeler, Anchors
from effdet.bench import DetBenchPredict, DetBenchTrain, unwrap_bench
from effdet.config import get_efficientdet_config, get_fpn_config
from effdet.efficientdet import EfficientDet, HeadNet
from effdet.network.bifpn import FpnCombine
from effdet.network.layers import ResampleFeatureMap, get_activation
from effdet.ops.nms import make_detections, select_candidates

LAYOUTS = ["bifpn_fa", "bifpn_attn", "bifpn_sum", "pan_fa", "pan_sum", "qufpn_fa", "qufpn_sum"]


def build(size: tuple[int, int] = (64, 64), **changes: object) -> EfficientDet:
    """Build a small detector of 3 classes with drawn weights and batch norms that all differ."""
    config = get_efficientdet_config("tf_efficientdet_d0")
    config.update(
        backbone_name="mobilenetv3_small_050",
        backbone_args=None,
        image_size=size,
        num_classes=3,
        fpn_channels=16,
        fpn_cell_repeats=1,
        box_class_repeats=2,
    )
    config.update(changes)
    torch.manual_seed(0)
    model = EfficientDet(config, pretrained_backbone=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(std=0.1)
    return model


def make_images(size: tuple[int, int] = (64, 64), count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def make_target() -> dict[str, Tensor]:
    return {
        "bbox": torch.tensor([[[4.0, 6, 40, 44], [30, 30, 60, 62]], [[0, 0, 64, 30], [0, 0, 0, 0]]]),
        "cls": torch.tensor([[1, 3], [2, -1]]),
        "img_scale": torch.tensor([2.0, 0.5]),
        "img_size": torch.tensor([[100.0, 128.0], [32.0, 20.0]]),
    }


def assert_trains(model: EfficientDet, size: tuple[int, int]) -> None:
    """Check the heads' shapes against the anchors, then that one loss reaches every parameter."""
    bench = DetBenchTrain(model).train()
    target = {"bbox": torch.tensor([[[4.0, 6.0, 30.0, 44.0]]] * 2), "cls": torch.tensor([[1], [2]])}
    class_outputs, box_outputs = model(make_images(size))
    cells = bench.anchors.level_sizes
    assert [tuple(level.shape) for level in class_outputs] == [(2, 27, *cell) for cell in cells]
    assert [tuple(level.shape) for level in box_outputs] == [(2, 36, *cell) for cell in cells]
    loss = bench(make_images(size), target)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


# ---- layers and pyramid


def pool_slowly(x: Tensor, kind: str, output_size: tuple[int, int], same: bool) -> Tensor:
    """Pool window by window; averages count padding as zeros, as torch's and timm's pools do."""
    spans = []
    for size, count in zip(x.shape[2:], output_size, strict=True):
        stride = math.ceil(size / count)
        kernel = stride + 1 if x.shape[2:] != output_size and stride > 1 else 1
        before = max((count - 1) * stride + kernel - size, 0) // 2 if same else kernel // 2
        spans.append([range(index * stride - before, index * stride - before + kernel) for index in range(count)])
    out = torch.zeros(*x.shape[:2], *output_size)
    for row, column in itertools.product(range(output_size[0]), range(output_size[1])):
        inside = [
            x[:, :, y, z]
            for y in spans[0][row]
            for z in spans[1][column]
            if 0 <= y < x.shape[2] and 0 <= z < x.shape[3]
        ]
        window = torch.stack(inside)
        area = len(spans[0][row]) * len(spans[1][column])
        out[:, :, row, column] = window.amax(0) if kind == "max" else window.sum(0) / area
    return out


@pytest.mark.parametrize("pad_type", ["same", ""])
@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize(
    "input_size, output_size",
    [
        ((8, 8), (4, 4)),
        ((5, 5), (3, 3)),
        ((3, 23), (2, 12)),
        ((1, 8), (1, 4)),
        ((4, 1), (2, 1)),
        ((1, 3), (1, 2)),
        ((2, 1), (1, 1)),
    ],
)
def test_downsampling_equals_the_loop_over_windows(input_size, output_size, kind, pad_type):
    x = torch.randn(2, 3, *input_size, generator=torch.Generator().manual_seed(2))
    layer = ResampleFeatureMap(3, 3, input_size, output_size, pad_type, downsample=kind)
    torch.testing.assert_close(layer(x), pool_slowly(x, kind, output_size, pad_type == "same"))


@pytest.mark.parametrize(
    "input_size, output_size",
    [((2, 2), (4, 4)), ((3, 3), (5, 5)), ((1, 4), (1, 8)), ((2, 12), (3, 23)), ((3, 3), (3, 3))],
)
def test_upsampling_takes_the_nearest_cell(input_size, output_size):
    x = torch.randn(2, 3, *input_size, generator=torch.Generator().manual_seed(3))
    out = ResampleFeatureMap(3, 3, input_size, output_size)(x)
    for row, column in itertools.product(range(output_size[0]), range(output_size[1])):
        source = row * input_size[0] // output_size[0], column * input_size[1] // output_size[1]
        assert torch.equal(out[:, :, row, column], x[:, :, source[0], source[1]])


@pytest.mark.parametrize("method", ["attn", "fastattn", "sum"])
def test_combine_by_hand(method):
    info = [{"num_chs": 4, "size": (4, 4)}] * 3
    combine = FpnCombine(info, 4, (0, 2), (4, 4), weight_method=method)
    maps = [torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    shares = [1.0, 1.0]
    if method == "sum":
        assert combine.edge_weights is None
    else:
        combine.edge_weights.data = torch.tensor([0.7, -0.3])
        shares = (
            [0.7 / 0.7001, 0.0]
            if method == "fastattn"
            else [math.exp(value) / (math.exp(0.7) + math.exp(-0.3)) for value in (0.7, -0.3)]
        )
    torch.testing.assert_close(combine(maps), maps[0] * shares[0] + maps[2] * shares[1])
    with pytest.raises(ValueError, match="choose attn, fastattn or sum"):
        FpnCombine(info, 4, (0, 2), (4, 4), weight_method="mean")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_train(name):
    model = build(fpn_name=name)
    assert_trains(model, (64, 64))
    learned = [key for key in model.state_dict() if "edge_weights" in key]
    # The last five nodes of a Quad-FPN join its two halves with learned weights also in the 'sum' layout.
    assert len(learned) == (5 if name == "qufpn_sum" else 0 if name.endswith("sum") else len(model.fpn.cell[0].fnode))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="bifpn_fa, pan_sum"):
        get_fpn_config("bifpn")
    with pytest.raises(ValueError, match="Unknown activation 'swoosh'"):
        get_activation("swoosh")


@pytest.mark.parametrize("pad_type", ["same", ""])
@pytest.mark.parametrize("size", [(32, 256), (96, 736), (320, 320), (32, 32)], ids=str)
def test_sizes_train(size, pad_type):
    assert_trains(build(size, pad_type=pad_type), size)


def test_other_input_size_is_refused():
    model = build((64, 96))
    with pytest.raises(ValueError, match=r"\(64, 96\) \(height, width\) and got \(96, 64\)"):
        model(make_images((96, 64)))


def test_size_off_the_stride_is_refused():
    with pytest.raises(ValueError, match=r"\(480, 480\) and \(512, 512\)"):
        build((500, 500))


def test_fewer_levels():
    """Levels 3..5 are the backbone's own: no extra level is made."""
    model = build(max_level=5, num_levels=3).eval()
    assert len(model.fpn.resample) == 0
    outputs, _ = model(make_images())
    assert [tuple(level.shape[2:]) for level in outputs] == [(8, 8), (4, 4), (2, 2)]


# ---- backbones


def test_backbone_by_name():
    model = build(backbone_name="resnet18", backbone_indices=(2, 3, 4), pad_type="")
    assert any(isinstance(module, nn.MaxPool2d) for module in model.backbone.modules())
    assert_trains(model, (64, 64))


def test_backbone_with_maps_at_other_strides_is_refused():
    with pytest.raises(ValueError, match=r"'resnet18' has feature maps at strides \[4, 8, 16\].*need \[8, 16, 32\]"):
        build(backbone_name="resnet18", backbone_indices=(1, 2, 3))


def test_drop_path_acts_in_training_only():
    images = make_images()
    for rate in (0.0, 0.8):
        model = build(backbone_args={"drop_path_rate": rate})
        for training in (True, False):
            model.train(training)
            torch.manual_seed(3)
            first = model(images)[0][0]
            second = model(images)[0][0]
            assert torch.equal(first, second) == (rate == 0 or not training)


# ---- heads


@pytest.mark.parametrize("level_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_toggle_keeps_the_function(level_first, training):
    model = build(head_bn_level_first=level_first).train(training)
    keys, images = list(model.state_dict()), make_images()
    before = [level.clone() for part in model(images) for level in part]
    model.toggle_head_bn_level_first()
    # The other order's names are those of a model built that way.
    assert set(model.state_dict()) == set(build(head_bn_level_first=not level_first).state_dict()) != set(keys)
    for one, other in zip((level for part in model(images) for level in part), before, strict=True):
        assert torch.equal(one, other)
    model.toggle_head_bn_level_first()
    assert list(model.state_dict()) == keys


def test_norms_are_per_level_and_convolutions_shared():
    """The same map at each level gives other outputs, and the same ones once the norms agree."""
    model = build().eval()
    head = model.class_net
    features = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(4))
    outputs = head([features] * 5)
    assert not any(torch.equal(outputs[0], other) for other in outputs[1:])
    for repeat in head.bn_rep:
        for level in repeat[1:]:
            level.load_state_dict(repeat[0].state_dict())
    outputs = head([features] * 5)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("alternate", [True, False])
def test_untrained_heads_predict_the_prior(separable, alternate):
    model = build(separable_conv=separable)
    model.reset_head(num_classes=4, num_scales=3, alternate_init=alternate)
    for head, expected in ((model.class_net, 0.01), (model.box_net, 0.5)):
        bias = (head.predict.conv_pw if separable else head.predict.conv).bias
        assert bias.sigmoid().tolist() == pytest.approx([expected] * len(bias), rel=1e-4)
        inner = [value for name, value in head.conv_rep.named_parameters() if name.endswith("bias")]
        assert len(inner) == 2 and all((value == 0).all() for value in inner)


def test_reset_head_of_classes():
    model = build()
    box_net, old = model.box_net, model.class_net
    model.reset_head(num_classes=7)
    assert model.config.num_classes == 7 and model.box_net is box_net and model.class_net is not old
    class_outputs, box_outputs = model(make_images())
    assert class_outputs[0].shape[1] == 9 * 7 and box_outputs[0].shape[1] == 9 * 4
    with pytest.raises(Exception, match="read-only"):
        model.config.num_classes = 3


def test_reset_head_of_anchors_replaces_both():
    model = build()
    model.reset_head(aspect_ratios=[1.0, 3.0], num_scales=1)
    class_outputs, box_outputs = model(make_images())
    assert class_outputs[0].shape[1] == 2 * 3 and box_outputs[0].shape[1] == 2 * 4
    assert DetBenchTrain(model).anchors.boxes.shape == (2 * (64 + 16 + 4 + 1 + 1), 4)
    model.reset_head()  # nothing asked for, nothing done
    assert model(make_images())[0][0].shape[1] == 2 * 3


def test_anchor_settings_set_the_channels():
    model = build(aspect_ratios=[1.0, 2.0, 0.5, 3.0], num_scales=2)
    class_outputs, box_outputs = model(make_images())
    assert class_outputs[-1].shape[1] == 8 * 3 and box_outputs[-1].shape[1] == 8 * 4


def test_class_head_replaced_by_the_user():
    config = get_efficientdet_config("tf_efficientdet_d0")
    config.update(fpn_channels=16, box_class_repeats=1, num_classes=5)
    outputs = HeadNet(config, num_outputs=5)([torch.zeros(1, 16, 2, 2)] * 5)
    assert len(outputs) == 5 and outputs[0].shape == (1, 45, 2, 2)


# ---- benches


def test_bench_in_training_and_in_eval_mode():
    bench = DetBenchTrain(build(max_det_per_image=20, max_detection_points=500))
    training = bench.train()(make_images(), make_target())
    assert list(training) == ["loss", "class_loss", "box_loss"]
    assert all(value.shape == () and value.dtype == torch.float32 for value in training.values())
    with torch.no_grad():
        output = bench.eval()(make_images(), make_target())
    assert list(output) == ["loss", "class_loss", "box_loss", "detections"]
    detections = output["detections"]
    assert detections.shape == (2, 20, 6) and (detections[..., 4].diff() <= 0).all()
    assert output["loss"].item() == pytest.approx(output["class_loss"].item() + 50 * output["box_loss"].item())
    assert detections[0, :, 2].max() <= 100 and detections[1, :, 3].max() <= 20


def test_training_copies_no_activation():
    """SiLU in place would: autograd keeps a copy of its input. The gradients stay the same, bit for bit."""
    gradients, copies = [], []
    for in_place in (True, False):
        model = build(backbone_name="efficientnet_b0").train()
        bench = DetBenchTrain(model)
        if in_place:
            for module in model.modules():
                if isinstance(module, nn.SiLU):
                    module.inplace = True
        torch.manual_seed(0)
        with Copies() as seen:
            bench(make_images(), make_target())["loss"].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        copies.append(seen.elements)
    assert all(map(torch.equal, *gradients))
    assert copies[0] > 1_000_000 and copies[1] < copies[0] / 20


class Copies(TorchDispatchMode):
    """Counts the elements that are cloned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.clone.default:
            self.elements += args[0].numel()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("soft", [False, True], ids=["nms", "soft_nms"])
def test_benches_are_the_steps_one_by_one(soft):
    model = build(soft_nms=soft, max_det_per_image=30).eval()
    target, images = make_target(), make_images()
    with torch.no_grad():
        logits, deltas, indices, classes = select_candidates(*model(images), 3)
        anchors = Anchors.from_config(model.config).boxes[indices]
        scaled = make_detections(logits, deltas, anchors, classes, target["img_scale"], target["img_size"], 30, soft)
        plain = make_detections(logits, deltas, anchors, classes, max_det=30, soft_nms=soft)
        predict, train = DetBenchPredict(model), DetBenchTrain(model).eval()
        info = {key: target[key] for key in ("img_scale", "img_size")}
        assert torch.equal(predict(images, info), scaled) and torch.equal(train(images, target)["detections"], scaled)
        assert torch.equal(predict(images), plain) and not torch.equal(plain, scaled)
        without = {key: target[key] for key in ("bbox", "cls")}
        assert torch.equal(train(images, without)["detections"], plain)


def test_labels_made_before_equal_labels_made_in_the_bench():
    model = build().eval()
    inside, outside = DetBenchTrain(model).eval(), DetBenchTrain(model, create_labeler=False).eval()
    assert outside.anchor_labeler is None
    target = make_target()
    labels = AnchorLabeler(Anchors.from_config(model.config), 3).batch_label_anchors(target["bbox"], target["cls"])
    made = {f"label_cls_{level}": part for level, part in enumerate(labels[0])}
    made |= {f"label_bbox_{level}": part for level, part in enumerate(labels[1])}
    made["label_num_positives"] = labels[2]
    expected, actual = inside(make_images(), target), outside(make_images(), made)
    for key in ("loss", "class_loss", "box_loss"):
        assert torch.equal(actual[key], expected[key]) and actual[key] > 0
    assert actual["detections"].shape == (2, 100, 6), "no img_scale in this target: boxes in input pixels"


@pytest.mark.parametrize(
    "labeler, keys, words",
    [
        (True, ["bbox", "img_scale"], r"needs 'bbox' and 'cls'; it has \['bbox', 'img_scale'\]"),
        (True, ["cls"], r"needs 'bbox' and 'cls'; it has \['cls'\]"),
        (False, ["bbox", "cls"], r"no labels, only \['bbox', 'cls'\].*create_labeler=True.*anchor_labeler"),
    ],
)
def test_missing_targets_are_named(labeler, keys, words):
    bench = DetBenchTrain(build(), create_labeler=labeler)
    with pytest.raises(ValueError, match=words):
        bench(make_images(), {key: make_target()[key] for key in keys})


@pytest.mark.parametrize("empty", [False, True])
def test_normalising_over_ranks_changes_nothing_in_one_process(empty):
    model, target = build(), make_target()
    if empty:
        target["cls"].fill_(-1)
    expected = DetBenchTrain(model).eval()(make_images(), target)
    for key, value in DetBenchTrain(model, normalize_over_ranks=True).eval()(make_images(), target).items():
        assert torch.equal(value, expected[key]) and torch.isfinite(value).all()
    assert (expected["box_loss"] == 0) == empty


@pytest.mark.parametrize(
    "soft, nms, words",
    [(False, "npu", "this run is on cpu"), (False, "fast", "Unknown NMS"), (True, "npu", "exclude each other")],
)
def test_an_nms_that_is_not_to_be_had_is_refused_when_the_bench_is_built(soft, nms, words):
    with pytest.raises(ValueError, match=words):
        DetBenchPredict(build(soft_nms=soft), nms=nms)


def test_bench_inside_autocast():
    """Losses and detections are fp32, and those of the half-precision heads' own numbers."""
    model = build().eval()
    bench = DetBenchTrain(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(make_images())
        output = bench(make_images(), make_target())
    assert outputs[0][0].dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 for value in output.values())
    labels = bench.anchor_labeler.batch_label_anchors(make_target()["bbox"], make_target()["cls"])
    expected = bench.loss_fn(*([level.float() for level in part] for part in outputs), *labels)
    assert output["loss"].item() == pytest.approx(expected[0].item(), rel=1e-5)


def test_unwrap():
    model = build()
    wrapped = nn.Module()
    wrapped.module = DetBenchTrain(model)
    for outer in (wrapped, wrapped.module, DetBenchPredict(model), model):
        assert unwrap_bench(outer) is model
