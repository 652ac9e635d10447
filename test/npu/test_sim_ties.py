"""Ties by lot: what the simulation draws, and what of it labels and predictions may depend on."""

from __future__ import annotations

import npu_sim
import pytest
import torch

from effdet.anchors import AnchorLabeler, Anchors
from effdet.bench import DetBenchPredict
from effdet.factory import create_model
from effdet.ops.boxes import pairwise_iou

SEEDS = range(6)
X = torch.tensor([[3.0, 7.0, 7.0, 1.0, 7.0], [2.0, 2.0, 2.0, 2.0, 2.0]])


def drawn(work) -> set[tuple]:
    results = set()
    for seed in SEEDS:
        with npu_sim.random_ties(seed):
            results.add(tuple(work().flatten().tolist()))
    return results


@pytest.mark.parametrize(
    "places",
    [
        lambda x: x.topk(2, dim=1).indices,
        lambda x: x.max(1).indices[:, None],
        lambda x: (-x).min(1, keepdim=True).indices,
        lambda x: x.argmax(1, keepdim=True),
        lambda x: x.sort(dim=1, descending=True).indices[:, :2],
    ],
)
def test_any_of_several_equal_values_may_be_meant(places, device):
    x = X.to(device)
    found = drawn(lambda: places(x))
    assert len(found) > 1
    for row in found:
        where = torch.tensor(row).view(2, -1)
        assert torch.equal(X.gather(1, where), X.amax(1, keepdim=True).expand_as(where))


def test_what_has_one_answer_has_it(device):
    x = torch.tensor([4.0, 9.0, -1.0, 5.0]).to(device)
    assert drawn(lambda: x.topk(3).indices) == {(1, 3, 0)} and drawn(lambda: x.argmax()) == {(1,)}
    assert drawn(lambda: x.max()) == {(9.0,)} and drawn(lambda: torch.max(x, -x)) == {(4.0, 9.0, 1.0, 5.0)}
    tied = X.to(device)
    assert len(drawn(lambda: tied.sort(dim=1, descending=True, stable=True).indices)) == 1


def make_labeler(device: torch.device) -> AnchorLabeler:
    return AnchorLabeler(Anchors(3, 7, 3, [(1.0, 1.0)], 4.0, (64, 64)).to(device), num_classes=3)


def test_an_object_within_several_anchors_gets_one_of_the_best(device):
    box = torch.tensor([[[21.0, 27.0, 27.0, 33.0]]])  # the smallest anchors have 32 pixels
    labeler = make_labeler(device)
    found = drawn(lambda: labeler.assign(box.to(device), torch.tensor([[1.0]]).to(device))[0])
    iou = pairwise_iou(labeler.anchors.boxes.cpu(), box[0])[:, 0]
    assert len(found) > 1
    for row in found:
        (positive,) = (torch.tensor(row) >= 0).nonzero().flatten().tolist()
        assert iou[positive] == iou.max()


def test_two_objects_in_one_place_give_an_anchor_to_either(device):
    boxes = torch.tensor([[[8.0, 8.0, 40.0, 40.0]] * 2]).to(device)
    found = drawn(lambda: make_labeler(device).assign(boxes, torch.tensor([[1.0, 3.0]]).to(device))[0])
    assert len(found) > 1 and all(set(row) <= {-1, 0, 2} for row in found)


@pytest.mark.parametrize("nms", ["auto", "exact"])
def test_a_prediction_with_equal_scores_is_the_same_set(nms, device):
    model = (
        create_model(
            "tf_efficientdet_d0",
            num_classes=3,
            image_size=(64, 96),
            pretrained_backbone=False,
            max_detection_points=500,
        )
        .to(device)
        .eval()
    )
    bench = DetBenchPredict(model, nms=nms).to(device)
    generator = torch.Generator().manual_seed(3)
    heads = [
        [torch.randn(1, channels, *size, generator=generator) for size in bench.anchors.level_sizes]
        for channels in (27, 36)
    ]
    for level in heads[0]:
        level.copy_(level.mul(4).round().div(4))  # many equal scores

    def work() -> torch.Tensor:
        outputs = [[level.to(device) for level in levels] for levels in heads]
        return bench.post_process(*outputs, torch.ones(1).to(device), None).cpu()

    expected = work()[0, :, 4]
    for seed in (0, 1):
        with npu_sim.random_ties(seed):
            scores = work()[0, :, 4]
        assert (scores[:-1] >= scores[1:]).all() and (scores > 0).sum() == (expected > 0).sum()
