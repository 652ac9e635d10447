"""Images in, detections in their pixels out: against the steps done by hand, and on awkward images."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import effdet
from effdet.bench import DetBenchPredict
from effdet.checkpoint.manager import CheckpointError, load_checkpoint_file, save_checkpoint
from effdet.commands.clean import clean_checkpoint
from effdet.config.model_config import efficientdet_model_param_dict
from effdet.data.coco.categories import CategoryMap
from effdet.factory import create_model
from effdet.predict.predictor import Predictor

CPU = torch.device("cpu")
HEIGHT, WIDTH = 96, 64
NUM_CLASSES = 3


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """A D0 whose scores spread over 0..1, so that their order does not hang on the last bits."""
    torch.manual_seed(0)
    network = create_model(
        "tf_efficientdet_d0",
        num_classes=NUM_CLASSES,
        image_size=(HEIGHT, WIDTH),
        pretrained_backbone=False,
        max_det_per_image=20,
    )
    for module in network.modules():  # an initial network's norm layers let next to nothing through
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.5
    with torch.no_grad():
        network.train()(torch.randn(4, 3, HEIGHT, WIDTH))
        network.class_net.predict.conv_pw.weight.normal_(std=3.0)
    return network.eval()


def make_image(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def predictor(model) -> Predictor:
    return Predictor(model, CPU)


def predict_by_hand(model: torch.nn.Module, image: Image.Image) -> np.ndarray:
    """Letterbox and normalise one image by hand; the bench brings boxes back to its pixels (before NMS, clipped).

    A bench that keeps boxes without area, with room for all of them, stands in for one that drops them first.
    """
    scale = min(HEIGHT / image.height, WIDTH / image.width)
    resized = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BILINEAR)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    canvas = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    canvas[:] = np.rint(255 * mean)
    canvas[: resized.height, : resized.width] = np.asarray(resized)
    images = torch.from_numpy((canvas / 255 - mean) / std).float().permute(2, 0, 1)[None]
    info = {"img_scale": torch.tensor([1 / scale]), "img_size": torch.tensor([[image.width, image.height]])}
    with torch.no_grad():
        bench = DetBenchPredict(copy.deepcopy(model)).eval()
        bench.max_det_per_image = 1000
        rows = bench(images, info)[0].numpy()
    rows = rows[(rows[:, 4] > 0) & (rows[:, 2] > rows[:, 0]) & (rows[:, 3] > rows[:, 1])]
    return rows[:20] - np.array([0, 0, 0, 0, 0, 1])


def rows_of(predictor, images, score_threshold=0.0) -> list[np.ndarray]:
    """Return each image's detections as float32 [n, 6]: box, score, class_idx."""
    ids = [predictor.category_id_of(idx) for idx in range(predictor.num_classes)]
    return [
        np.column_stack([found.boxes_xyxy, found.scores, [ids.index(one) for one in found.category_ids]]).astype("f4")
        for found in predictor.predict(images, score_threshold)
    ]


@pytest.mark.parametrize(("width", "height"), [(64, 96), (200, 120), (31, 77)])
def test_detections_are_those_of_the_steps_done_by_hand(model, predictor, width, height):
    image = make_image(width, height)
    (rows,) = rows_of(predictor, [image])
    expected = predict_by_hand(model, image)
    assert rows.dtype == np.float32 and rows.shape == expected.shape == (20, 6)
    np.testing.assert_allclose(rows[:, 4], expected[:, 4], rtol=1e-3)
    np.testing.assert_array_equal(rows[:, 5], expected[:, 5])
    np.testing.assert_allclose(rows[:, :4], expected[:, :4], rtol=1e-3, atol=0.05)
    assert (np.diff(rows[:, 4]) <= 0).all()
    assert set(rows[:, 5]) <= set(range(NUM_CLASSES)) and len(set(rows[:, 5])) > 1


def test_the_same_images_give_the_same_bits(model):
    images = [make_image(100, 80), make_image(50, 90, seed=1), make_image(64, 64, seed=2)]
    predictor = Predictor(model, CPU, batch_size=2)
    first = rows_of(predictor, images)
    again = rows_of(Predictor(copy.deepcopy(model), CPU, batch_size=2), [image.copy() for image in images])
    for rows, others, repeated in zip(first, again, rows_of(predictor, images), strict=True):
        assert rows.tobytes() == others.tobytes() == repeated.tobytes()
        assert len(rows) == 20
    assert first[0].tobytes() != first[1].tobytes()


def test_batches_keep_the_order_of_the_images(model, predictor):
    images = [make_image(60 + 10 * seed, 80, seed) for seed in range(3)]
    together = rows_of(Predictor(model, CPU, batch_size=2), images)
    for rows, image in zip(together, images, strict=True):
        (alone,) = rows_of(predictor, [image])
        np.testing.assert_allclose(rows[:, 4], alone[:, 4], rtol=1e-4)
        np.testing.assert_allclose(rows[0], alone[0], rtol=1e-3, atol=1e-2)


def test_a_gray_image_is_its_rgb_version(predictor):
    gray = make_image(70, 90).convert("L")
    (rows,), (expected,) = rows_of(predictor, [gray]), rows_of(predictor, [gray.convert("RGB")])
    assert rows.tobytes() == expected.tobytes() and len(rows) == 20


@pytest.mark.parametrize(("width", "height"), [(4000, 40), (40, 4000), (1, 1), (3000, 2)])
def test_boxes_stay_in_a_image_of_any_shape(predictor, width, height):
    (rows,) = rows_of(predictor, [make_image(width, height)])
    assert len(rows) > 0 and np.isfinite(rows).all()
    assert (rows[:, :4] >= 0).all()
    assert (rows[:, [0, 2]] <= width).all() and (rows[:, [1, 3]] <= height).all()
    assert (rows[:, :2] <= rows[:, 2:4]).all()
    assert rows[:, 2].max() > 0.5 * width, "boxes are in the image's pixels, not the network's"


def test_detections_below_the_threshold_are_left_out(predictor):
    image = make_image(90, 90)
    (rows,) = rows_of(predictor, [image])
    threshold = float(rows[7, 4])
    (kept,) = rows_of(predictor, [image], threshold)
    assert kept.tobytes() == rows[rows[:, 4] >= threshold].tobytes() and len(kept) == 8
    (none,) = rows_of(predictor, [image], 1.0)
    assert none.shape == (0, 6) and none.dtype == np.float32


def test_no_images_give_no_results(predictor):
    assert rows_of(predictor, []) == []


def test_classes_have_the_names_and_ids_of_the_category_map(model):
    categories = CategoryMap((3, 44, 1000), ("cup", "dog", "kite"), NUM_CLASSES)
    named = Predictor(model, CPU, categories)
    assert [named.name_of(idx) for idx in range(3)] == ["cup", "dog", "kite"]
    assert [named.category_id_of(idx) for idx in range(3)] == [3, 44, 1000]
    bare = Predictor(model, CPU)
    assert [bare.name_of(idx) for idx in range(2)] == ["class 1", "class 2"]
    assert [bare.category_id_of(idx) for idx in range(2)] == [1, 2]


def test_a_checkpoint_is_loaded_and_predicts_from_paths_images_and_arrays(small_checkpoint, synthetic_images):
    detector = effdet.load(small_checkpoint, device="cpu", batch_size=2)
    paths = synthetic_images[:3]
    images = [Image.open(path).convert("RGB") for path in paths]
    results = detector.predict(paths, score_threshold=0.3)
    assert len(results) == 3 and min(map(len, results)) > 0
    for kind in (images, [str(path) for path in paths], [np.asarray(image) for image in images]):
        for found, expected in zip(detector.predict(kind, 0.3), results, strict=True):
            assert found.boxes_xyxy.tobytes() == expected.boxes_xyxy.tobytes()
            assert found.scores.tobytes() == expected.scores.tobytes() and found.names == expected.names
    ids = {"ball": 3, "box": 7, "star": 12}
    for found in results:
        assert found.boxes_xyxy.dtype == found.scores.dtype == np.float32
        assert found.boxes_xyxy.shape == (len(found), 4) and (found.scores >= np.float32(0.3)).all()
        assert found.category_ids.tolist() == [ids[name] for name in found.names]
    for one in (str(paths[0]), images[0], np.asarray(images[0])):  # a single image is a list of one
        (found,) = detector.predict(one, 0.3)
        assert found.names == results[0].names and len(found)
    (none,) = detector.predict(paths[0], 1.0)
    assert len(none) == 0 and none.names == [] and none.boxes_xyxy.shape == (0, 4)
    assert none.category_ids.shape == (0,) and none.category_ids.dtype == np.int64


def with_threshold(checkpoint: Path, threshold: dict | None, path: Path) -> Path:
    """Write a checkpoint again, with recommended score thresholds."""
    save_checkpoint(path, {**load_checkpoint_file(checkpoint), "score_threshold": threshold})
    return path


def test_the_recommended_threshold_is_the_checkpoints(small_checkpoint, synthetic_images, tmp_path):
    threshold = {"all": 0.3, "classes": [None, 0.6, 0.9]}
    path = with_threshold(small_checkpoint, threshold, tmp_path / "model.pth.tar")
    detector = effdet.load(path, device="cpu", batch_size=2)
    rows = np.concatenate(rows_of(detector, synthetic_images[:3]))
    lowest = np.array([0.3, 0.6, 0.9])[rows[:, 5].astype(int)]
    expected = rows[rows[:, 4] >= lowest]
    assert 0 < len(expected) < len(rows), "without a threshold everything comes"
    found = np.concatenate(rows_of(detector, synthetic_images[:3], score_threshold="recommended"))
    np.testing.assert_array_equal(found, expected)
    assert detector.threshold_to_show(None)[0] == "recommended" and detector.threshold_to_show(0.0)[0] == 0.0
    with pytest.raises(ValueError, match="give a number"):
        detector.predict(synthetic_images[0], "best")

    cleaned = clean_checkpoint(str(path))
    assert cleaned["score_threshold"] == threshold
    assert "score_threshold" not in clean_checkpoint(str(path), use_ema=False), "they are those of other weights"
    for other in (
        effdet.load(path, device="cpu", use_ema=False),
        effdet.load(with_threshold(small_checkpoint, None, tmp_path / "none.pth.tar"), device="cpu"),
        effdet.load(small_checkpoint, device="cpu"),
    ):
        assert other.threshold_to_show(None)[0] == 0.4
        with pytest.raises(ValueError, match="recommend no score threshold"):
            other.predict(synthetic_images[0], "recommended")


def test_an_array_of_images_is_a_batch(predictor):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
    results, alone = predictor.predict(pixels), [predictor.predict(one)[0] for one in pixels]
    assert [found.scores.tobytes() for found in results] == [found.scores.tobytes() for found in alone]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 40, 50), np.uint8), r"uint8 \[3, 40, 50\]: give uint8 \[height, width, 3\]"),
        (np.zeros((40, 50, 3), np.float32), r"float32 \[40, 50, 3\]"),
        (np.zeros((0, 50, 3), np.uint8), r"\[0, 50, 3\]"),
        (torch.zeros(40, 50, 3), "an image is a Tensor: give a path"),
        ("nothing.jpg", "nothing.jpg: no such file"),
    ],
)
def test_what_is_no_image_is_refused(predictor, image, message):
    with pytest.raises((TypeError, ValueError), match=message):
        predictor.predict([image])


def test_load_takes_other_settings_and_says_what_is_missing(small_checkpoint, synthetic_images, tmp_path, monkeypatch):
    few = effdet.load(small_checkpoint, device="cpu", max_det=5, image_size=(128, 256))
    assert few.bench.anchors.image_size == (128, 256) and len(few.predict(synthetic_images[0])[0]) == 5
    torch.save(torch.load(small_checkpoint, weights_only=True)["state_dict"], tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="does not say of which model"):
        effdet.load(tmp_path / "weights.pth", device="cpu")
    monkeypatch.setitem(efficientdet_model_param_dict, "pocket", dict(few.bench.config))
    bare = effdet.load(tmp_path / "weights.pth", device="cpu", model="pocket", image_size=(128, 256))
    assert bare.predict(synthetic_images[0])[0].names[0].startswith("class ")
