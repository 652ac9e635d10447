"""The calls that published programs make of effdet 0.4.1, with the results they expect.

petrel-det 0.2.2 passes 20 of its 26 tests under effdet 0.4.1 and torch 2.13, and those and one more under this package
(stand-in weights; the other five pass an argument that torch has dropped, or compare image sizes given as a tuple).
What its modules call is here, with numbers computed with effdet 0.4.1 on the same input.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from effdet import DetBenchTrain, create_model_from_config, get_efficientdet_config
from effdet.bench import DetBenchPredict
from effdet.evaluation.detection_evaluator import PascalDetectionEvaluator

NAME = "tf_efficientdet_lite0"


class TrainOnly(DetBenchTrain):
    """A training bench that computes losses alone, also in evaluation; the config is passed as a second argument."""

    def __init__(self, model, config):
        super().__init__(model, config)

    def forward(self, x, target):
        class_out, box_out = self.model(x)
        labels = self.anchor_labeler.batch_label_anchors(target["bbox"], target["cls"])
        loss, class_loss, box_loss = self.loss_fn(class_out, box_out, *labels)
        return {"loss": loss, "class_loss": class_loss, "box_loss": box_loss}


def load(tmp_path, task, image_size=(64, 64), num_classes=3, **options):
    """Load a model as petrel's `load_edet` does: sizes and limits set on the config and given as arguments too."""
    config = get_efficientdet_config(NAME)
    config.image_size = [image_size, image_size] if isinstance(image_size, int) else image_size
    config.max_det_per_image = options.get("max_det_per_image", 1000)
    config.soft_nms = options.get("soft_nms", False)
    checkpoint = tmp_path / "weights.pth"
    if not checkpoint.exists():
        torch.manual_seed(0)
        model = create_model_from_config(
            get_efficientdet_config(NAME), pretrained=False, pretrained_backbone=False, num_classes=num_classes
        )
        torch.save(model.state_dict(), checkpoint)
    return create_model_from_config(
        config,
        pretrained=False,
        bench_task=task,
        max_det_per_image=config.max_det_per_image,
        num_classes=num_classes,
        soft_nms=config.soft_nms,
        checkpoint_path=str(checkpoint),
        bench_labeler=True,
    )


@pytest.mark.parametrize("image_size", [64, (64, 64), (64, 96)])
def test_a_bench_has_what_its_config_says(image_size, tmp_path):
    bench = load(tmp_path, "train", image_size, max_det_per_image=70, soft_nms=True)
    assert bench.__class__ == DetBenchTrain
    assert (bench.num_classes, bench.num_levels, bench.max_det_per_image) == (3, 5, 70)
    assert bench.max_detection_points == 5000 and bench.soft_nms
    assert list(bench.config.image_size) == list(bench.model.config.image_size)
    assert list(bench.config.image_size) == ([image_size] * 2 if isinstance(image_size, int) else list(image_size))
    predict = load(tmp_path, "predict", image_size)
    assert predict.__class__ == DetBenchPredict and predict.max_det_per_image == 1000 and not predict.soft_nms


def test_a_bench_of_ones_own_gives_the_losses_of_the_one_it_extends(tmp_path):
    bench = load(tmp_path, "train").train()
    own = TrainOnly(bench.model, bench.config).train()
    assert own.config is bench.model.config and own.num_classes == 3
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    boxes = [torch.tensor([[8.0, 8, 40, 50], [20, 30, 60, 60]]), torch.zeros(0, 4)]
    target = {"bbox": boxes, "cls": [torch.tensor([1.0, 3]), torch.zeros(0)]}
    with torch.no_grad():
        want = bench(images, target)
        statistics = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
        got = own(images, target)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=0)
    assert not torch.equal(
        statistics["backbone.bn1.running_mean"], bench.model.state_dict()["backbone.bn1.running_mean"]
    )


def test_predictions_by_image_as_arrays(tmp_path):
    bench = load(tmp_path, "predict", max_det_per_image=20).eval()
    with torch.no_grad():
        found = bench(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).float())
    assert found.shape == (2, 20, 6)
    scores, labels = found[0][:, 4].numpy(), found[0][:, 5].numpy().astype(int)
    assert (np.diff(scores) <= 0).all() and set(labels) <= {1, 2, 3}


# mAP, a, b, c at each threshold, by effdet 0.4.1
EXPECTED = {
    0.50: (0.310602, 0.179798, 0.209150, 0.542857),
    0.55: (0.160999, 0.138131, 0.209150, 0.135714),
    0.60: (0.160999, 0.138131, 0.209150, 0.135714),
    0.65: (0.118515, 0.138131, 0.081699, 0.135714),
    0.70: (0.054497, 0.050000, 0.063492, 0.050000),
    0.75: (0.036420, 0.050000, 0.009259, 0.050000),
    0.80: (0.019444, 0.008333, 0.000000, 0.050000),
    0.85: (0.016667, 0.000000, 0.000000, 0.050000),
    0.90: (0.000000, 0.000000, 0.000000, 0.000000),
}


def test_pascal_evaluators_at_other_thresholds_side_by_side():
    evaluators = {
        iou: PascalDetectionEvaluator(
            categories=[{"id": 1, "name": "a"}, {"id": 2, "name": "b"}, {"id": 3, "name": "c"}],
            matching_iou_threshold=iou,
        )
        for iou in np.round(np.arange(0.5, 0.95, 0.05), 2)
    }
    rng = np.random.default_rng(0)
    for image in range(12):
        count = rng.integers(1, 6)
        corners = rng.uniform(0, 200, (count, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(10, 60, (count, 2))], 1).astype(np.float32)
        labels = rng.integers(1, 4, count)
        near = rng.integers(0, count + 1)
        found = boxes[:near] + rng.normal(0, 5, (near, 4)).astype(np.float32)
        further = rng.integers(0, 3)
        corners = rng.uniform(0, 200, (further, 2))
        found = np.concatenate([found, np.concatenate([corners, corners + 30], 1).astype(np.float32)])
        found_labels = np.concatenate([labels[:near], rng.integers(1, 4, further)])
        scores = rng.uniform(0, 1, len(found))
        for evaluator in evaluators.values():
            evaluator.add_single_ground_truth_image_info(image, {"cls": labels, "bbox": boxes})
            evaluator.add_single_detected_image_info(image, {"cls": found_labels, "bbox": found, "score": scores})
    for iou, evaluator in evaluators.items():
        metrics = evaluator.evaluate()
        assert list(metrics) == [
            f"PascalBoxes_Precision/mAP@{iou}IOU",
            *(f"PascalBoxes_PerformanceByCategory/AP@{iou}IOU/{name}" for name in "abc"),
        ]
        assert tuple(metrics.values()) == pytest.approx(EXPECTED[float(iou)], abs=1e-6)
