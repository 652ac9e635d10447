"""Whole models, labels, losses, gradients and post-processing against numbers of the public reference (test/golden)."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from effdet.anchors import Anchors
from effdet.bench import DetBenchTrain
from effdet.config import get_efficientdet_config, set_config_writeable
from effdet.efficientdet import EfficientDet
from effdet.loss import DetectionLoss
from effdet.ops.nms import make_detections, select_candidates

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import weights  # noqa: E402  (test/golden/weights.py)

MODELS = ["tf_efficientdet_d0_128x128", "efficientdet_d0_128x256", "tf_efficientdet_lite0_128x128", "resdet50_128x128"]
DETECTIONS = ["detections_tf_efficientdet_d0_512x512_90", "detections_tf_efficientdet_d0_256x384_3"]
LOSSES = {"new": {}, "smooth": {"label_smoothing": 0.1}, "legacy": {"legacy_focal": True}}


def build(name: str) -> tuple[EfficientDet, np.lib.npyio.NpzFile]:
    golden = np.load(GOLDEN / f"{name}.npz")
    config = get_efficientdet_config(name.rsplit("_", 1)[0])
    config.image_size = tuple(int(side) for side in golden["image_size"])
    return weights.fill(EfficientDet(config, pretrained_backbone=False)), golden


def assert_close(actual: torch.Tensor, expected: np.ndarray, rtol: float = 1e-4) -> None:
    """Compare with a relative tolerance, and an absolute one at the same share of the largest value."""
    np.testing.assert_allclose(
        actual.detach().double().numpy(),
        expected,
        rtol=rtol,
        atol=rtol * max(1e-12, float(np.abs(expected).max(initial=0))),
    )


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    return build(request.param)


def test_heads(case):
    model, golden = case
    with torch.no_grad():
        class_out, box_out = model(weights.make_images(*golden["image_size"]))
    for level in range(5):
        assert_close(class_out[level][:1, :90], golden[f"class_out_{level}"])
        sums = torch.stack((class_out[level].double().sum(), class_out[level].double().abs().sum()))
        assert_close(sums, golden[f"class_sum_{level}"])
        assert_close(box_out[level], golden[f"box_out_{level}"])


def test_anchors(case):
    model, golden = case
    boxes = Anchors.from_config(model.config).boxes
    np.testing.assert_array_equal(boxes[:64].numpy(), golden["anchors_head"])
    assert_close(torch.stack((boxes.double().sum(), boxes.double().abs().sum())), golden["anchors_sum"], 1e-6)


def test_labels(case):
    model, golden = case
    labeler = DetBenchTrain(model).anchor_labeler
    classes, deltas, num_positives = labeler.batch_label_anchors(
        torch.from_numpy(golden["gt_boxes_yxyx"]), torch.from_numpy(golden["gt_classes"])
    )
    for level in range(5):
        np.testing.assert_array_equal(classes[level].numpy(), golden[f"label_cls_{level}"])
        flat = deltas[level].reshape(-1, 4).numpy()
        rows = np.flatnonzero((flat != 0).any(1))
        np.testing.assert_array_equal(rows, golden[f"label_box_rows_{level}"])
        np.testing.assert_allclose(flat[rows], golden[f"label_box_vals_{level}"], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(num_positives.numpy(), golden["label_num_positives"])


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_and_gradients(case, kind):
    model, golden = case
    bench = DetBenchTrain(model)
    set_config_writeable(model.config)
    for key in ("label_smoothing", "legacy_focal"):
        model.config[key] = LOSSES[kind].get(key, 0.0 if key == "label_smoothing" else False)
    bench.loss_fn = DetectionLoss(model.config)
    model.zero_grad()
    output = bench(
        weights.make_images(*golden["image_size"]),
        {"bbox": torch.from_numpy(golden["gt_boxes_yxyx"]), "cls": torch.from_numpy(golden["gt_classes"])},
    )
    assert_close(torch.stack([output[key] for key in ("loss", "class_loss", "box_loss")]), golden[f"loss_{kind}"])
    output["loss"].backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norm = torch.stack([grad.double().square().sum() for grad in gradients.values()]).sum().sqrt()
    assert_close(norm.reshape(1), golden[f"gradnorm_{kind}"].reshape(1))
    biases = [key for key in golden.files if key.startswith(f"grad_{kind}:")]
    assert len(biases) == 2
    for key in biases:
        assert_close(gradients[key.split(":")[1]], golden[key])


@pytest.mark.parametrize("name", DETECTIONS)
@pytest.mark.parametrize("soft_nms", [False, True], ids=["nms", "soft_nms"])
@pytest.mark.parametrize("scaled", [False, True], ids=["raw", "scaled"])
def test_detections(name, soft_nms, scaled):
    golden = np.load(GOLDEN / f"{name}.npz")
    height, width = (int(side) for side in golden["image_size"])
    num_classes = int(golden["num_classes"])
    cls_outputs, box_outputs = weights.make_head_outputs(height, width, num_classes)
    config = get_efficientdet_config("tf_efficientdet_d0")
    config.image_size = (height, width)
    logits, deltas, indices, classes = select_candidates(cls_outputs, box_outputs, num_classes)
    detections = make_detections(
        logits,
        deltas,
        Anchors.from_config(config).boxes[indices],
        classes,
        torch.from_numpy(golden["img_scale"]) if scaled else None,
        torch.from_numpy(golden["img_size_wh"]) if scaled else None,
        soft_nms=soft_nms,
    )
    expected = golden[f"det_{'soft_' if soft_nms else ''}nms_{'scaled' if scaled else 'raw'}"]
    np.testing.assert_array_equal(detections[..., 5].numpy(), expected[..., 5])
    np.testing.assert_allclose(detections.numpy(), expected, rtol=1e-4, atol=1e-3)
