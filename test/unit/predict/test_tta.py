"""Test-time augmentation: views come back to the image's place, and fuse as worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import effdet
from effdet.config.schema import DemoModelConfig
from effdet.predict.load import build_predict_bench, load_detector
from effdet.predict.tta import TtaBench, fuse_detections

CPU = torch.device("cpu")


def test_one_view_is_itself():
    rows = torch.zeros(2, 1, 5, 6)
    rows[0, 0, 0] = torch.tensor([0.0, 0, 10, 10, 0.9, 1])
    rows[0, 0, 1] = torch.tensor([50.0, 0, 60, 10, 0.4, 2])
    torch.testing.assert_close(fuse_detections(rows), rows[:, 0])


def test_boxes_are_averaged_by_score_and_scores_over_the_views():
    rows = torch.zeros(1, 2, 3, 6)
    rows[0, 0, 0] = torch.tensor([0.0, 0, 10, 10, 0.6, 1])
    rows[0, 1, 0] = torch.tensor([2.0, 0, 12, 10, 0.3, 1])  # IoU 8 / 12: the same object
    rows[0, 0, 1] = torch.tensor([0.0, 0, 10, 10, 0.5, 2])  # another class in the same place
    rows[0, 1, 1] = torch.tensor([40.0, 0, 50, 10, 0.2, 1])  # seen by one view only
    expected = torch.zeros(1, 3, 6)
    expected[0, 0] = torch.tensor([2 / 3, 0, 10 + 2 / 3, 10, 0.45, 1])
    expected[0, 1] = torch.tensor([0.0, 0, 10, 10, 0.25, 2])
    expected[0, 2] = torch.tensor([40.0, 0, 50, 10, 0.1, 1])
    torch.testing.assert_close(fuse_detections(rows), expected)


class _Finder(torch.nn.Module):
    """Find the bright spot: its bounding box in input pixels, by the pixels themselves."""

    def __init__(self, image_size):
        super().__init__()
        self.anchors = torch.nn.Module()
        self.anchors.image_size = image_size

    def forward(self, x, img_info):
        rows = torch.zeros(len(x), 4, 6)
        for row, image in zip(rows, x, strict=True):
            y, x_ = torch.nonzero(image[0] > 0.5, as_tuple=True)
            row[0] = torch.tensor([x_.min(), y.min(), x_.max() + 1, y.max() + 1, 0.8, 1])
        return rows


def test_views_come_back_to_the_images_place_and_are_clipped_and_scaled():
    images = torch.zeros(2, 3, 64, 96)
    images[0, :, 8:24, 16:40] = 1
    images[1, :, 32:64, 64:96] = 1
    bench = TtaBench([_Finder((64, 96)), _Finder((128, 192)), _Finder((32, 48))], flip=True)
    expected = torch.tensor([[16.0, 8, 40, 24], [64, 32, 96, 64]])
    rows = bench(images)
    torch.testing.assert_close(rows[:, 0, :4], expected, atol=1.0, rtol=0)
    torch.testing.assert_close(rows[:, 0, 4:], torch.tensor([[0.8, 1.0]] * 2))
    assert (rows[:, 1:] == 0).all()
    info = {"img_scale": torch.tensor([2.0, 2.0]), "img_size": torch.tensor([[192.0, 100.0]] * 2)}
    scaled = expected * 2
    scaled[1, 3] = 100  # the image ends there
    torch.testing.assert_close(bench(images, info)[:, 0, :4], scaled, atol=2.0, rtol=0)


def test_a_real_detector_with_flip_sees_a_mirrored_image_mirrored(small_checkpoint, synthetic_images):
    detector = effdet.load(small_checkpoint, device="cpu", flip=True)
    image = Image.open(synthetic_images[0]).convert("RGB").resize((128, 128))
    found, mirrored = detector.predict([image, ImageOps.mirror(image)], 0.2)
    assert len(found) == len(mirrored) > 3
    np.testing.assert_allclose(found.scores, mirrored.scores, atol=1e-4)
    boxes = mirrored.boxes_xyxy[:, [2, 1, 0, 3]] * np.array([-1, 1, -1, 1]) + np.array([128, 0, 128, 0])
    np.testing.assert_allclose(found.boxes_xyxy[0], boxes[0], atol=0.05)


@pytest.mark.parametrize(("width", "height"), [(500, 25), (25, 500), (130, 90)])
def test_the_views_of_a_long_image_have_no_boxes_in_the_padding(small_checkpoint, width, height):
    image = Image.effect_noise((width, height), 80).convert("RGB")
    for settings in ({"flip": True}, {"flip": True, "scales": [0.5]}, {"scales": [1.5]}):
        (found,) = effdet.load(small_checkpoint, device="cpu", **settings).predict(image)
        boxes = found.boxes_xyxy
        assert len(found) > 50 and (boxes[:, 2:] > boxes[:, :2]).all() and (np.diff(found.scores) <= 0).all()


def test_a_long_image_and_its_mirror_image_are_seen_alike(small_checkpoint, synthetic_images):
    detector = effdet.load(small_checkpoint, device="cpu", flip=True)
    image = Image.open(synthetic_images[0]).convert("RGB").resize((70, 128))  # 58 columns of padding
    found, mirrored = detector.predict([image, ImageOps.mirror(image)], 0.2)
    assert len(found) == len(mirrored) > 0
    np.testing.assert_allclose(found.scores, mirrored.scores, atol=1e-4)
    boxes = mirrored.boxes_xyxy[:, [2, 1, 0, 3]] * np.array([-1, 1, -1, 1]) + np.array([70, 0, 70, 0])
    np.testing.assert_allclose(found.boxes_xyxy[0], boxes[0], atol=0.05)


def test_other_sizes_share_the_weights(small_checkpoint):
    model = load_detector(small_checkpoint, DemoModelConfig()).model
    bench = build_predict_bench(model, CPU, scales=[1.5, 0.5])
    assert [b.anchors.image_size for b in bench.benches] == [(128, 128), (192, 192), (64, 64)]
    weight = model.class_net.predict.conv_pw.weight
    assert all(b.model.class_net.predict.conv_pw.weight.data_ptr() == weight.data_ptr() for b in bench.benches)
    with torch.no_grad():
        assert bench(torch.zeros(1, 3, 128, 128)).shape == (1, 100, 6)
    with pytest.raises(ValueError, match=r"scale 1.02 of the input \(128, 128\) gives \(128, 128\)"):
        build_predict_bench(model, CPU, scales=[1.02])
