"""Augmentations: boxes stay where the pixels are, labels stay with their boxes, random numbers repeat."""

from __future__ import annotations

import importlib.util
import json
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from effdet.bench import DetBenchPredict, DetBenchTrain
from effdet.config.model_config import stored_model_spec
from effdet.config.schema import DataConfig
from effdet.data import create_loader, open_coco
from effdet.data.augment import affine
from effdet.data.augment.autoaugment import POLICIES, AutoAugment, ColorJitter, run_step
from effdet.data.augment.mosaic import MosaicMixup, read_item
from effdet.data.augment.multi_scale import MultiScaleSampler
from effdet.data.augment.user_transform import UserTransform, load_transform
from effdet.data.build import build_train_transform, multi_scale_sizes
from effdet.data.transforms import Compose, RandomResizePadToNumpy, transforms_coco_train
from effdet.efficientdet import EfficientDet
from effdet.predict import gallery

BACKGROUND = (128, 128, 128)
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
INPUTS = {"input_size": (3, 96, 128), "fill_color": "mean", "mean": (0.485, 0.456, 0.406), "std": (0.2, 0.2, 0.2)}
EVERYTHING = {"aa": "v1", "color_jitter": 0.4, "mosaic": 0.5, "mixup": 0.4}


def target_of(boxes, cls=None):
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    return {"bbox": boxes, "cls": np.arange(1, len(boxes) + 1) if cls is None else np.array(cls)}


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def paint(width, height, boxes, colours=COLOURS):
    pixels = np.full((height, width, 3), BACKGROUND, dtype=np.uint8)
    for (y0, x0, y1, x1), colour in zip(boxes, colours, strict=False):
        pixels[y0:y1, x0:x1] = colour
    return Image.fromarray(pixels)


def find(pixels, colour):
    """The box yxyx around all pixels that are rather of a colour than of the background; None without any."""
    ys, xs = np.nonzero(np.linalg.norm(pixels.astype(float) - colour, axis=-1) < 100)
    return None if not len(ys) else np.array([ys.min(), xs.min(), ys.max() + 1, xs.max() + 1])


def assert_boxes_are_where_the_pixels_are(pixels, target, tolerance):
    height, width = pixels.shape[:2]
    boxes, labels = target["bbox"], target["cls"].tolist()
    assert len(boxes) == len(labels) == len(set(labels)) and boxes.dtype == np.float32
    assert (boxes >= 0).all() and (boxes <= [height, width, height, width]).all()
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    kept = dict(zip(labels, boxes, strict=True))
    for label, colour in enumerate(COLOURS, start=1):
        seen = find(pixels, colour)
        if label not in kept:
            assert seen is None or (seen[2:] - seen[:2]).min() <= tolerance, (label, seen)
        elif (kept[label][2:] - kept[label][:2]).min() >= 2 * tolerance:
            assert seen is not None and np.abs(seen - kept[label]).max() <= tolerance, (label, seen, kept[label])


@st.composite
def scenes(draw_value, most=200):
    width, height = draw_value(st.integers(60, most)), draw_value(st.integers(60, most))
    boxes = []
    for k in range(4):  # one in each quarter, so that none hides another
        top, left = (k // 2) * (height // 2), (k % 2) * (width // 2)
        y0, x0 = draw_value(st.integers(0, height // 2 - 16)), draw_value(st.integers(0, width // 2 - 16))
        y1, x1 = draw_value(st.integers(y0 + 12, height // 2 - 1)), draw_value(st.integers(x0 + 12, width // 2 - 1))
        boxes.append([top + y0, left + x0, top + y1, left + x1])
    return width, height, boxes, draw_value(st.integers(0, 10**6))


# AutoAugment


def test_the_published_policies():
    assert {name: len(lists) for name, lists in POLICIES.items()} == {"v0": 5, "v1": 20, "v2": 15, "v3": 15}
    assert {name: sum(map(len, lists)) for name, lists in POLICIES.items()} == {"v0": 10, "v1": 40, "v2": 44, "v3": 30}
    assert POLICIES["v1"][:5] == POLICIES["v0"]
    # Sums over all steps: an accidental change of any number shows.
    sums = {
        name: (
            round(sum(p for steps in lists for _, p, _ in steps), 1),
            sum(level for steps in lists for _, _, level in steps),
        )
        for name, lists in POLICIES.items()
    }
    assert sums == {"v0": (6.0, 56), "v1": (21.8, 250), "v2": (21.8, 272), "v3": (18.6, 198)}
    assert POLICIES["v3"][0] == [("Posterize", 0.8, 2), ("TranslateX_BBox", 1.0, 8)]
    with pytest.raises(ValueError, match="'v9' is unknown, choose one of v0, v1, v2, v3"):
        AutoAugment("v9")


WHOLE = (
    "AutoContrast",
    "Equalize",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "Cutout",
    "BBox_Cutout",
)
MOVING = ("TranslateX_BBox", "TranslateY_BBox", "ShearX_BBox", "ShearY_BBox", "Rotate_BBox")
INSIDE = (
    "TranslateX_Only_BBoxes",
    "TranslateY_Only_BBoxes",
    "ShearX_Only_BBoxes",
    "ShearY_Only_BBoxes",
    "Rotate_Only_BBoxes",
    "Flip_Only_BBoxes",
    "Solarize_Only_BBoxes",
    "Equalize_Only_BBoxes",
    "Cutout_Only_BBoxes",
)


def test_every_step_of_every_policy_is_an_operation():
    used = {step[0] for lists in POLICIES.values() for steps in lists for step in steps}
    assert used <= {*WHOLE, *MOVING, *INSIDE}
    with pytest.raises(ValueError, match="no operation 'Blur'"):
        run_step(("Blur", 1.0, 3), noise(30, 30), {})


@pytest.mark.parametrize("operation", MOVING)
@given(scene=scenes(), level=st.integers(0, 10))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_operations_that_move_the_image_move_its_boxes(operation, scene, level):
    width, height, boxes, seed = scene
    random.seed(seed)
    if operation.startswith("Translate"):
        level = level / 3  # else next to nothing of so small an image would be left
    img, target = run_step((operation, 1.0, level), paint(width, height, boxes), target_of(boxes))
    assert img.size == (width, height)
    # A corner that is turned or sheared ends in a point, whose last pixel is mixed with the background.
    assert_boxes_are_where_the_pixels_are(np.asarray(img), target, 1.5 if operation.startswith("Tr") else 3)


@pytest.mark.parametrize("operation", WHOLE)
def test_operations_on_pixels_leave_boxes_alone(operation):
    img, target = noise(90, 70), target_of([[10, 10, 50, 60]])
    changed = []
    for level in (0, 5, 10):
        for seed in range(3):
            random.seed(seed)
            out, same = run_step((operation, 1.0, level), img, target)
            assert out.size == img.size and out.mode == "RGB" and same["bbox"].tolist() == [[10, 10, 50, 60]]
            changed.append(out.tobytes() != img.tobytes())
    assert any(changed) or operation == "AutoContrast"  # noise has all values already
    assert run_step((operation, 0.0, 10), img, target)[0] is img
    assert run_step((operation, 1.0, 10), img, {})[0].size == img.size  # an image without labels


def test_what_the_levels_mean():
    img = paint(60, 60, [[0, 0, 60, 60]], [(100, 100, 100)])
    color_of = lambda step: run_step((*step, 10), img, {})[0].getpixel((30, 30))  # noqa: E731
    assert color_of(("SolarizeAdd", 1.0)) == (210,) * 3  # 100 + 110
    assert color_of(("Brightness", 1.0)) == (190,) * 3  # x 1.9
    assert run_step(("Solarize", 1.0, 3), img, {})[0].getpixel((0, 0)) == (155,) * 3  # threshold 76
    assert run_step(("Posterize", 1.0, 5), paint(9, 9, [[0, 0, 9, 9]], [(200, 100, 70)]), {})[0].getpixel((0, 0)) == (
        192,
        64,
        64,
    )  # two bits
    assert run_step(("Posterize", 1.0, 2), noise(30, 30), {})[0].getextrema() == ((0, 128),) * 3  # one bit, not none
    random.seed(0)
    cut = np.asarray(run_step(("Cutout", 1.0, 1), noise(60, 60), {})[0])
    assert (cut == 128).all(-1).sum() in range(10 * 10, 20 * 20 + 1)  # half a side is 10 pixels
    random.seed(1)
    turned = run_step(("Rotate_BBox", 1.0, 10), img, target_of([[20, 20, 40, 40]]))[1]["bbox"][0]
    side = 20 * (np.cos(np.pi / 6) + np.sin(np.pi / 6))
    np.testing.assert_allclose(turned, [30 - side / 2, 30 - side / 2, 30 + side / 2, 30 + side / 2], rtol=1e-5)
    shifted = run_step(("TranslateX_BBox", 1.0, 1), img, target_of([[20, 26, 40, 34]]))[1]["bbox"][0]
    assert shifted.tolist() in ([20, 1, 40, 9], [20, 51, 40, 59])  # 25 pixels, either way


def test_a_turned_box_is_cut_before_its_extent_is_taken():
    """Corners outside say nothing about the part inside: the extent of the corners would be too large."""
    boxes, keep = affine.warp_boxes(
        np.float32([[0, 0, 40, 100], [0, 0, 4, 4]]), affine.rotation(45, (100, 100)), (100, 100)
    )
    seen = find(
        np.asarray(affine.warp_image(paint(100, 100, [[0, 0, 40, 100]]), affine.rotation(45, (100, 100)), BACKGROUND)),
        COLOURS[0],
    )
    assert keep.tolist() == [True, False]
    np.testing.assert_allclose(boxes[0], seen, atol=1.5)
    empty, none = affine.warp_boxes(np.zeros((0, 4), np.float32), affine.shear_x(0.2), (10, 10))
    assert empty.shape == (0, 4) and none.shape == (0,)


@pytest.mark.parametrize("operation", INSIDE)
def test_operations_inside_boxes_change_nothing_else(operation):
    img, boxes = noise(90, 70), [[5, 5, 35, 40], [30.5, 50.2, 69.7, 89], [60, 0, 70, 9]]
    inside = np.zeros((70, 90), dtype=bool)
    inside[5:35, 5:40] = inside[30:70, 50:89] = True
    touched = 0
    for seed in range(12):
        random.seed(seed)
        target = target_of(boxes, [1, 2, -2])  # the last is an ignore region
        out, same = run_step((operation, 1.0, 5), img, target)
        differs = (np.asarray(out) != np.asarray(img)).any(-1)
        assert not differs[~inside].any() and same["bbox"] is target["bbox"]
        touched += differs.any()
    assert 1 <= touched < 12, "a third of the probability for each box"


def test_colour_jitter_stays_around_the_image_and_moves_nothing():
    img, means = noise(40, 40), []
    for seed in range(20):
        random.seed(seed)
        out, target = ColorJitter(0.3)(img, target_of([[1, 2, 3, 4]]))
        means.append(np.asarray(out).mean() / np.asarray(img).mean())
        assert target["bbox"].tolist() == [[1, 2, 3, 4]]
    assert 0.65 < min(means) < 0.9 and 1.1 < max(means) < 1.35
    random.seed(0)
    assert ColorJitter(0.0)(img, {})[0].tobytes() == img.tobytes()


# Mosaic and mixup


class Painted:
    """A data set of images that hold one box each, image k's in colour k and with label k + 1."""

    def __init__(self, scenes):
        self.scenes = scenes

    def __len__(self):
        return len(self.scenes)

    def read(self, k):
        width, height, box = self.scenes[k]
        target = {**target_of([box], [k + 1]), "img_idx": k, "img_size": (width, height)}
        return paint(width, height, [box], [COLOURS[k]]), target


@given(
    st.lists(st.tuples(st.integers(24, 200), st.integers(24, 200)), min_size=4, max_size=4),
    st.tuples(st.integers(64, 160), st.integers(64, 160)),
    st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_mosaic_boxes_are_where_the_pixels_are(sizes, out_hw, seed):
    data = Painted([(w, h, [h // 5, w // 5, h - h // 6, w - w // 7]) for w, h in sizes])
    transform = MosaicMixup(Compose([RandomResizePadToNumpy(out_hw, (0.5, 1.5), "bilinear", BACKGROUND)]), data, 1.0)
    random.seed(seed)
    order = [1, 2, 3]
    transform._read_another = lambda: data.read(order.pop(0))  # each colour once
    pixels, target = transform(*data.read(0))
    assert pixels.shape == (3, *out_hw) and pixels.dtype == np.uint8
    assert target["img_size"] == out_hw[::-1] and target["img_scale"] == 1.0 and target["img_idx"] == 0
    largest = max(1.5 * min(out_hw[0] / h, out_hw[1] / w) for w, h in sizes)
    assert_boxes_are_where_the_pixels_are(pixels.transpose(1, 2, 0), target, 2 + largest)


def test_mosaic_fills_the_input_unless_a_image_is_too_thin():
    for size, full in (((100, 60), True), ((1000, 2), False)):
        data = Painted([(*size, [0, 0, size[1], size[0]])] * 2)
        random.seed(3)
        pixels, _ = MosaicMixup(Compose([RandomResizePadToNumpy(64, fill_color=BACKGROUND)]), data, 1.0)(*data.read(0))
        assert ((pixels != 128).any(0).mean() == 1) == full


def test_mixup_keeps_all_boxes_and_blends_the_pixels():
    data = Painted([(40, 40, [0, 0, 40, 40]), (40, 40, [10, 5, 30, 25])])
    data.read(1)[1]["cls"][:] = -2
    plain = Compose([RandomResizePadToNumpy(40, (1.0, 1.0), "bilinear", BACKGROUND)])
    transform = MosaicMixup(plain, data, mixup=1.0)
    transform._read_another = lambda: (data.read(1)[0], dict(data.read(1)[1], cls=np.array([-2])))
    random.seed(0)
    pixels, target = transform(*data.read(0))
    assert target["cls"].tolist() == [1, -2] and target["bbox"].tolist() == [[0, 0, 40, 40], [10, 5, 30, 25]]
    red, green, _ = pixels[:, 20, 15].astype(int)  # red of one, green of the other
    assert 60 < red < 195 and abs(red + green - 255) <= 1
    with pytest.raises(ValueError, match="ends in RandomResizePadToNumpy"):
        MosaicMixup(Compose([AutoAugment("v0")]), data)


# The whole, through the loader


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Twelve images of three sizes with 1 to 4 boxes and a crowd region each."""
    folder = tmp_path_factory.mktemp("set")
    images, annotations = [], []
    for k in range(12):
        width, height = [(80, 60), (60, 80), (70, 70)][k % 3]
        noise(width, height, k).save(folder / f"{k}.png")
        images.append({"id": k + 1, "file_name": f"{k}.png", "width": width, "height": height})
        for n in range(k % 4 + 2):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": k + 1,
                    "category_id": n % 2 + 1,
                    "area": 600,
                    "bbox": [5 * n, 4 * n, 30, 20],
                    "iscrowd": int(n == 0),
                    **({"segmentation": {"size": [height, width], "counts": [0]}} if n == 0 else {}),
                }
            )
    categories = [{"id": 1, "name": "ball"}, {"id": 2, "name": "box"}]
    (folder / "a.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return folder


def loader_of(root, workers=0, sizes=(), subset=None, whole=None, **settings_given):
    dataset = open_coco(images=root, ann=root / "a.json", crowd="ignore")
    served = dataset if subset is None else torch.utils.data.Subset(dataset, subset)
    transform = whole or build_train_transform(served, DataConfig(**settings_given), INPUTS)
    return create_loader(
        served,
        INPUTS["input_size"],
        3,
        is_training=True,
        num_workers=workers,
        device="cpu",
        seed=5,
        transform_fn=transform,
        multi_scale=sizes,
    )


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for (images_a, target_a), (images_b, target_b) in zip(left, right, strict=True):
        assert torch.equal(images_a, images_b) and target_a.keys() == target_b.keys()
        assert all(torch.equal(target_a[key], target_b[key]) for key in target_a)


def test_defaults_are_the_recipe_as_before(root):
    dataset = open_coco(images=root, ann=root / "a.json")
    made = build_train_transform(dataset, DataConfig(), INPUTS)
    known = transforms_coco_train((96, 128), "random", True, "mean")
    assert [type(t) for t in made.transforms] == [type(t) for t in known.transforms] and made.draws_standard_only
    for seed in range(3):
        random.seed(seed)
        one = made(*dataset.read(4))
        random.seed(seed)
        other = known(*dataset.read(4))
        assert np.array_equal(one[0], other[0]) and np.array_equal(one[1]["bbox"], other[1]["bbox"])


def test_with_everything_on_batches_depend_on_seed_and_epoch_alone(root):
    sizes = [(96, 128), (72, 96), (48, 64)]
    alone = loader_of(root, 0, sizes, **EVERYTHING)
    first = list(alone)
    second = list(alone)
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True) if a[0].shape == b[0].shape)
    with_workers = loader_of(root, 2, sizes, **EVERYTHING)
    assert_same(first, list(with_workers))
    assert_same(second, list(with_workers))
    alone.sampler.set_epoch(0)
    alone.sampler.start = 6  # as a run that is continued within an epoch
    assert_same(first[2:], list(alone))
    for images, target in first:
        assert images.dtype == torch.float32 and target["bbox"].shape[1] >= 32
        real = target["cls"] != -1
        assert (target["bbox"][real][:, 2:] > target["bbox"][real][:, :2]).all()
        limits = torch.tensor([*images.shape[-2:]] * 2)
        assert (target["bbox"][real] >= 0).all() and (target["bbox"][real] <= limits).all()
    assert any((target["cls"] == -2).any() for _, target in first), "crowd regions come along"
    assert len({images.shape[-2:] for images, _ in first + second}) > 1


def test_mosaic_takes_images_of_the_subset_only(root):
    loader = loader_of(root, subset=[1, 4, 7], mosaic=1.0)
    transform = loader.dataset.dataset.transform
    assert [read_item(transform.dataset, k)[1]["img_idx"] for k in range(3)] == [1, 4, 7]
    assert len(next(iter(loader))[0]) == 3


def test_sizes_of_batches_are_the_same_on_every_rank():
    sizes = [(96, 128), (192, 256), (288, 384)]
    alone = MultiScaleSampler(range(64), 0, 1, 3, True, sizes, 8)
    seen = [size for _, size in alone]
    assert all(len(set(seen[k : k + 8])) == 1 for k in range(0, 64, 8)) and len(set(seen)) == 3
    for rank in range(2):
        shared = list(MultiScaleSampler(range(64), rank, 2, 3, True, sizes, 4))
        assert [size for _, size in shared[::4]] == seen[::8]
        assert [index for index, _ in shared] == [
            index for index, _ in MultiScaleSampler(range(64), 0, 1, 3, True, sizes, 8)
        ][rank::2]
    assert [size for _, size in alone] != seen, "another epoch, other sizes"


def test_sizes_have_the_shape_of_the_image_size():
    assert multi_scale_sizes(DataConfig(multi_scale=[256, 512]), (384, 512)) == [(192, 256), (384, 512)]
    assert multi_scale_sizes(DataConfig(multi_scale=[96]), (512, 512)) == [(96, 96)]
    assert multi_scale_sizes(DataConfig(multi_scale=[448]), (384, 512)) == [(320, 448)]  # 336 is no multiple of 32
    with pytest.raises(ValueError, match=r"--multi-scale 300: .*multiple of 32"):
        multi_scale_sizes(DataConfig(multi_scale=[300]), (384, 512))
    with pytest.raises(ValueError, match="leave anchor_labeler out"):
        create_loader([], 64, 1, is_training=False, multi_scale=[(64, 64)])


# Several input sizes in the network


def small_network(size):
    torch.manual_seed(0)
    plain = {
        "name": "pocket",
        "backbone_name": "mobilenetv3_small_050",
        "image_size": size,
        "fpn_channels": 16,
        "fpn_cell_repeats": 2,
        "box_class_repeats": 1,
        "pad_type": "same",
        "num_classes": 3,
        "backbone_args": {"pad_type": "same"},
    }
    return EfficientDet(stored_model_spec(plain), pretrained_backbone=False)


def test_a_network_of_another_size_is_the_one_built_for_it():
    sizes = [(128, 128), (96, 160), (224, 96)]  # with maps of odd sides
    networks = {size: small_network(size).eval() for size in sizes}
    network = networks[128, 128]
    images = {size: torch.randn(1, 3, *size) for size in sizes}
    before = network(images[128, 128])
    for size in sizes[1:]:
        network.set_input_size(size)
        for one, other in zip(network(images[size]), networks[size](images[size]), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        with pytest.raises(ValueError, match="built for images of"):
            network(images[128, 128])
    network.set_input_size((128, 128))
    assert all(torch.equal(a, b) for a, b in zip(before[0], network(images[128, 128])[0], strict=True))
    assert network.image_size == (128, 128)
    with pytest.raises(ValueError, match="more than 64"):
        network.set_input_size((64, 128))
    with pytest.raises(ValueError, match="multiple of 32"):
        network.set_input_size((100, 128))


def test_a_bench_labels_and_trains_at_each_size_like_one_built_for_it():
    sizes = [(128, 128), (96, 160)]
    native = {size: DetBenchTrain(small_network(size), ignore_regions=True) for size in sizes}
    bench = DetBenchTrain(small_network((128, 128)), ignore_regions=True, input_sizes=sizes)
    assert not any(key.startswith("_") for key in bench.state_dict())
    for size in [*sizes, *sizes]:
        target = {
            "bbox": torch.tensor([[[5.0, 6, 60, 70], [10, 20, 90, 90], [0, 0, 50, 96]]]),
            "cls": torch.tensor([[1, 3, -2]]),
        }
        target = {key: torch.cat([value, value.flip(1)]) for key, value in target.items()}
        images = torch.randn(2, 3, *size)
        torch.manual_seed(1)
        ours = bench(images, target)
        torch.manual_seed(1)
        theirs = native[size](images, target)
        assert all(torch.equal(ours[key], theirs[key]) for key in ("loss", "class_loss", "box_loss"))
    predict = DetBenchPredict(bench.model).eval()  # the network is still at the last size of training
    assert predict(torch.zeros(1, 3, 128, 128)).shape == (1, predict.max_det_per_image, 6)
    with pytest.raises(ValueError, match="built for images of"):
        predict(torch.zeros(1, 3, 96, 160))
    with pytest.raises(ValueError, match="create_labeler=True"):
        DetBenchTrain(small_network((128, 128)), create_labeler=False, input_sizes=sizes)


# Users' own transforms

OWN = """
import numpy as np
from PIL import ImageOps
from helper_of_mine import NUMBER

def mirror(img, target):
    y0, x0, y1, x1 = target["bbox"].T
    flipped = np.stack([y0, img.width - x1, y1, img.width - x0], 1)
    return ImageOps.mirror(img), dict(target, bbox=flipped)

def jitter(img, target):
    return img, dict(target, bbox=target["bbox"] + np.random.rand() + NUMBER)

lost_label = lambda img, target: (img, dict(target, cls=target["cls"][:-1]))
no_tuple = lambda img, target: img
gray = lambda img, target: (img.convert("L"), target)
half = lambda img, target: (np.asarray(img)[:, : img.width // 2], target)
number = 3
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "helper_of_mine.py").write_text("NUMBER = 0.5\n")
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path / 'own.py'}:"


def test_a_users_callable_runs_and_is_checked(own, root):
    img, target = noise(60, 40), target_of([[1, 2, 8, 12], [0, 50, 40, 60]])
    mirror = load_transform(own + "mirror")
    out, flipped = mirror(img, target)
    assert np.array_equal(out, np.asarray(img)[:, ::-1])
    assert flipped["bbox"].tolist() == [[1, 48, 8, 58], [0, 0, 40, 10]] and flipped["img_size"] == (60, 40)
    again = pickle.loads(pickle.dumps(mirror))
    assert again(img, target)[1]["bbox"].tolist() == flipped["bbox"].tolist()
    out, cut = load_transform(own + "half")(img, target)  # an array is fine; boxes outside go
    assert out.size == (30, 40) and cut["bbox"].tolist() == [[1, 2, 8, 12]] and cut["img_size"] == (30, 40)
    for name, message in (("lost_label", "2 boxes and 1 labels"), ("no_tuple", "returned Image"), ("gray", "mode RGB")):
        with pytest.raises(ValueError, match=message):
            load_transform(own + name)(img, target)
    for spec, message in (
        (own + "absent", "nothing called 'absent'"),
        (own + "number", "is 3; needed is a callable"),
        ("own.py:x", "there is no file"),
        ("no_such_module:x", "No module named 'no_such_module'"),
        ("mirror", "give FILE.py:NAME"),
    ):
        with pytest.raises(ValueError, match=message):
            load_transform(spec)
    with pytest.raises(ValueError, match="2 boxes and 1 labels"):
        loader_of(root, transform=own + "lost_label")  # before any batch
    assert load_transform("effdet.data.transforms:clip_boxes").transform.__name__ == "clip_boxes"
    assert_same(list(loader_of(root, 0, transform=own + "jitter")), list(loader_of(root, 2, transform=own + "jitter")))


@pytest.mark.skipif(importlib.util.find_spec("albumentations") is None, reason="albumentations is not installed")
def test_an_albumentations_pipeline(root, monkeypatch, tmp_path):
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations as A

    params = A.BboxParams(format="pascal_voc", label_fields=["cls"])
    img, target = noise(60, 40), target_of([[1, 2, 8, 12], [0, 50, 40, 60]], [4, -2])
    out, flipped = UserTransform(A.Compose([A.HorizontalFlip(p=1.0)], bbox_params=params))(img, target)
    assert np.array_equal(out, np.asarray(img)[:, ::-1]) and flipped["cls"].tolist() == [4, -2]
    np.testing.assert_allclose(flipped["bbox"], [[1, 48, 8, 58], [0, 0, 40, 10]], atol=1e-4)
    _, empty = UserTransform(A.Compose([A.HorizontalFlip(p=1.0)], bbox_params=params))(img, target_of([]))
    assert empty["bbox"].shape == (0, 4) and empty["cls"].shape == (0,)
    pipeline = A.Compose(
        [A.Rotate(limit=20, p=1.0, fill=BACKGROUND), A.RandomBrightnessContrast(0.05, 0.05)], bbox_params=params
    )
    boxes = [[10, 12, 45, 50], [20, 100, 60, 140], [70, 20, 110, 60], [75, 90, 110, 150]]
    for seed in range(5):
        random.seed(seed)
        out, moved = UserTransform(pipeline)(paint(170, 130, boxes), target_of(boxes))
        for label, box in zip(moved["cls"], moved["bbox"], strict=True):
            # Albumentations' boxes of turned ones hold an ellipse, not the corners.
            assert np.abs(find(np.asarray(out), COLOURS[label - 1]) - box).max() < 12
    for bad in (
        A.Compose([A.HorizontalFlip()]),
        A.HorizontalFlip(),
        A.Compose([], bbox_params=A.BboxParams(format="coco", label_fields=["cls"])),
    ):
        with pytest.raises(ValueError, match="bbox_params=BboxParams"):
            UserTransform(bad)
    (tmp_path / "pipeline.py").write_text(
        "import albumentations as A\nmine = A.Compose([A.RandomRotate90(), A.GaussNoise(), A.Affine(rotate=(-9, 9))], "
        "bbox_params=A.BboxParams(format='pascal_voc', label_fields=['cls']))\n"
    )
    spec = f"{tmp_path / 'pipeline.py'}:mine"
    batches = list(loader_of(root, 0, transform=spec))
    assert_same(batches, list(loader_of(root, 2, transform=spec)))
    whole = A.Compose([A.LongestMaxSize(96), A.PadIfNeeded(96, 128), A.HorizontalFlip()], bbox_params=params)
    images, labels = next(iter(loader_of(root, 2, whole=whole)))
    assert images.shape == (3, 3, 96, 128) and (labels["cls"] > 0).any()


def test_a_drawn_batch_shows_pixels_and_boxes(root, monkeypatch):
    monkeypatch.setattr(gallery, "_BATCH_CELL_PX", 128)
    loader = loader_of(root, mosaic=1.0)
    images, target = next(iter(loader))
    target["bbox"][0, 0], target["cls"][0, 0] = torch.tensor([20.0, 30, 80, 100]), 2
    target["cls"][0, 1:] = -1
    sheet = gallery.draw_training_batch(images, target, ("ball", "box"), loader.mean, loader.std, num_images=1)
    gap = (sheet.width - 128) // 2
    drawn = np.asarray(sheet)[gap : gap + 96, gap : gap + 128].astype(int)
    shown = (images[0] * loader.std[0] + loader.mean[0]).permute(1, 2, 0).round().numpy()
    same = (np.abs(drawn - shown) <= 1).all(-1)
    assert same[85:].all() and same[:, :25].all() and same[35:75, 40:90].all()
    assert not same[40, 28:34].all() and not same[77:82, 60].all()
