"""The embedded data set: the same every time, true to COCO's layout, boxes true to the pixels."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from effdet.data.synthetic.dataset import CATEGORY_IDS, _Canvas, main, make_image, make_synthetic_dataset
from effdet.data.synthetic.shapes import KINDS, make_background, make_colours, make_patch, paint_patch

TRAIN, VAL = 60, 30


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "deep" / "set"  # the parent is to be made, too
    return make_synthetic_dataset(folder, seed=3, num_train=TRAIN, num_val=VAL)


def load(dataset: Path, split: str) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(dataset / "annotations" / f"instances_{split}2017.json"))


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def visible_mask(annotation: dict) -> np.ndarray:
    run_lengths = annotation["segmentation"]
    with warnings.catch_warnings():  # pycocotools' arrays do not know numpy 2's copy argument
        warnings.simplefilter("ignore", DeprecationWarning)
        return coco_mask.decode(coco_mask.frPyObjects(run_lengths, *run_lengths["size"])).astype(bool)


def box_xywh_of(mask: np.ndarray) -> list[int]:
    """The slow, obvious tight box: look at every pixel."""
    inside = [(x, y) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    left, top = min(x for x, _ in inside), min(y for _, y in inside)
    return [left, top, max(x for x, _ in inside) - left + 1, max(y for _, y in inside) - top + 1]


def test_pycocotools_reads_both_splits(dataset):
    for split, count in (("train", TRAIN), ("val", VAL)):
        coco = load(dataset, split)
        assert len(coco.imgs) == count
        assert {category["name"]: category["id"] for category in coco.dataset["categories"]} == CATEGORY_IDS
        assert len({annotation["id"] for annotation in coco.dataset["annotations"]}) == len(coco.anns)
        for image in coco.imgs.values():
            with Image.open(dataset / f"{split}2017" / image["file_name"]) as image:
                assert image.size == (image["width"], image["height"]) and image.mode == "RGB"


def test_category_ids_are_sparse_and_all_are_used(dataset):
    ids = sorted(CATEGORY_IDS.values())
    assert ids == [1, 3, 7, 12, 18, 44]
    assert {annotation["category_id"] for annotation in load(dataset, "train").anns.values()} == set(ids)


def test_image_ids_of_the_splits_do_not_meet(dataset):
    assert not set(load(dataset, "train").imgs) & set(load(dataset, "val").imgs)


def test_boxes_and_areas_are_those_of_the_visible_masks(dataset):
    coco = load(dataset, "val")
    for annotation in coco.anns.values():
        mask = visible_mask(annotation)
        image = coco.imgs[annotation["image_id"]]
        assert mask.shape == (image["height"], image["width"])
        assert annotation["area"] == mask.sum() > 0
        assert annotation["bbox"] == box_xywh_of(mask)


def test_masks_of_one_image_share_no_pixel_and_some_objects_are_partly_hidden(dataset):
    coco = load(dataset, "train")
    for image in coco.imgs.values():
        layers = [visible_mask(annotation) for annotation in coco.imgToAnns[image["id"]]]
        assert not layers or np.sum(layers, axis=0).max() == 1
    # a ball in full view fills pi/4 of its box; one with something in front fills clearly less
    balls = [a for a in coco.anns.values() if a["category_id"] == CATEGORY_IDS["ball"] and not a["iscrowd"]]
    fill = np.array([ball["area"] / (ball["bbox"][2] * ball["bbox"][3]) for ball in balls])
    assert np.isclose(fill, np.pi / 4, atol=0.03).any() and (fill < 0.7).any()


@pytest.mark.parametrize("kind", KINDS)
def test_mask_of_each_kind_is_where_its_pixels_are(kind):
    """Paint on black and find the object by its light alone, without looking at its geometry."""
    rng = np.random.default_rng(5)
    for radius, angle, form in ((14.3, 0.0, 0.0), (30.0, 1.1, 0.5), (61.7, 4.0, 1.0)):
        patch = make_patch(kind, radius, angle, form)
        colours = paint_patch(patch, np.array([0.9, 0.8, 0.7]), np.array([1.0, 1.0, 1.0]), rng)
        on_black = colours * patch.coverage[..., None]
        lit = on_black.max(axis=-1) > 0.02
        found, stated = box_xywh_of(lit), box_xywh_of(patch.coverage >= 0.5)
        assert np.abs(np.array(found) - stated).max() <= 2  # the antialiased rim: at most a pixel on each side
        assert stated[2] <= 2 * radius + 1 and max(stated[2:]) > 1.3 * radius


def test_shapes_have_the_area_of_the_formula():
    areas = {kind: make_patch(kind, 100.0, 0.7, 1.0).coverage.sum() / 100**2 for kind in KINDS}
    assert areas["ball"] == pytest.approx(np.pi, rel=0.01)
    assert areas["ring"] == pytest.approx(np.pi * (1 - 0.4**2), rel=0.01)
    assert areas["cross"] == pytest.approx(_cross_area(0.32, 0.9, 0.06), rel=0.01)


def _cross_area(arm: float, end: float, rounding: float) -> float:
    # polygon + a band along its outer edges, arms' ends rounded: 12 sides less what overlaps in the 4 inner corners
    polygon = 4 * arm * arm + 4 * (2 * arm) * (end - arm)
    perimeter = 8 * (end - arm) + 4 * 2 * arm
    return polygon + perimeter * rounding + 8 * np.pi / 4 * rounding**2 - 4 * rounding**2


def test_jpegs_show_the_annotated_images(dataset):
    coco = load(dataset, "val")
    for index, image in enumerate(list(coco.imgs.values())[:8]):
        made = make_image(3, "val", index)
        with Image.open(dataset / "val2017" / image["file_name"]) as saved:
            assert np.abs(np.asarray(saved, float) - made.pixels).mean() < 6
        assert [a["bbox"] for a in made.annotations] == [a["bbox"] for a in coco.imgToAnns[image["id"]]]


def test_objects_stand_out_from_what_is_behind_them():
    """Inside every mask the image differs from the same image's background, and outside it is the background."""
    for index in (0, 1, 2, 3):
        made = make_image(0, "train", index)
        rng = np.random.default_rng([0, 0, index])
        rng.integers(8)  # the size is drawn first, then the background
        plain = make_background(*made.pixels.shape[:2], rng) * 255
        change = np.abs(made.pixels - plain).max(axis=-1)
        masks = [visible_mask(annotation) for annotation in made.annotations]
        assert masks and min(np.median(change[mask]) for mask in masks) > 30
        assert np.median(change[~np.any(masks, axis=0)]) < 1


def test_nothing_is_placed_where_it_would_hide_another_or_leave_the_image():
    rng = np.random.default_rng(0)
    canvas = _Canvas(200, 200, rng)
    ball = make_patch("ball", 40.0, 0.0, 0.0)
    canvas.objects.append(("ball", False, canvas.paint(ball, 100, 100, 0, rng, shadow=0)))
    assert canvas.objects[0][2] == pytest.approx(np.pi * 40**2, rel=0.01)
    # a disc moved by its radius keeps 60.9 % of the other in view, by its diameter everything
    assert not canvas.fits(ball, 100, 100, 0.01)
    assert canvas.fits(ball, 140, 100, 0.60) and not canvas.fits(ball, 140, 100, 0.62)
    canvas.objects.append(("ball", False, canvas.paint(ball, 140, 100, 1, rng, shadow=0)))
    assert not canvas.fits(ball, 60, 100, 0.4)  # one from each side would leave it 21.8 %
    assert canvas.fits(ball, 30, 30, 0.9) and not canvas.fits(ball, 0, 30, 0.0)  # 65 % must be in the image


def test_colours_are_drawn_far_from_what_is_behind():
    rng = np.random.default_rng(0)
    behind = np.array([0.2, 0.5, 0.3])
    drawn = {kind: [make_colours(kind, behind, rng)[0] for _ in range(200)] for kind in KINDS}
    for colours in drawn.values():
        assert min(np.abs(colour - behind).sum() for colour in colours) >= 0.4
        assert np.std(colours, axis=0).min() > 0.1  # not always the same one
    usual = [np.median(colours, axis=0) for colours in drawn.values()]
    assert min(np.abs(a - b).sum() for i, a in enumerate(usual) for b in usual[:i]) > 0.15  # kinds have a tendency


def test_empty_and_crowd_images_exist_in_both_splits(dataset):
    for split in ("train", "val"):
        coco = load(dataset, split)
        empty = [image for image in coco.imgs if not coco.imgToAnns[image]]
        crowds = [annotation for annotation in coco.anns.values() if annotation["iscrowd"]]
        assert len(empty) >= len(coco.imgs) // 20 and len(empty) <= len(coco.imgs) // 10
        assert len(crowds) >= len(coco.imgs) // 25 and len(crowds) <= len(coco.imgs) // 10
        for crowd in crowds:  # one annotation of many tiny objects: far from filling its box
            assert crowd["area"] > 500 and crowd["area"] < 0.6 * crowd["bbox"][2] * crowd["bbox"][3]


def test_sizes_of_objects_suit_a_small_detector(dataset):
    boxes = [a["bbox"] for a in load(dataset, "train").anns.values() if not a["iscrowd"]]
    side = np.sqrt([box[2] * box[3] for box in boxes])
    per_image = len(boxes) / TRAIN
    assert 3 < per_image < 6 and np.mean(side >= 32) > 0.75 and side.max() > 110 and side.min() < 32


def test_the_same_seed_makes_the_same_files_and_another_seed_others(dataset, tmp_path):
    again = make_synthetic_dataset(tmp_path / "again", seed=3, num_train=TRAIN, num_val=VAL)
    assert digest(again) == digest(dataset)
    other = make_synthetic_dataset(tmp_path / "other", seed=4, num_train=2, num_val=1)
    name = "train2017/000000000001.jpg"
    assert digest(other)[name] != digest(dataset)[name]


def test_a_image_does_not_depend_on_how_many_are_made(dataset, tmp_path):
    small = digest(make_synthetic_dataset(tmp_path / "small", seed=3, num_train=2, num_val=1))
    images = {name: value for name, value in small.items() if name.endswith(".jpg")}
    assert len(images) == 3 and images.items() <= digest(dataset).items()


def test_a_complete_set_is_returned_at_once_and_untouched(dataset):
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}
    start = time.perf_counter()
    assert make_synthetic_dataset(dataset, seed=3, num_train=TRAIN, num_val=VAL) == dataset
    assert time.perf_counter() - start < 1  # making it takes several seconds
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*")} == before


def test_what_is_already_there_is_refused_and_kept(dataset, tmp_path):
    with pytest.raises(FileExistsError, match="'seed': 3.*asked was.*'seed': 9.*move this one away"):
        make_synthetic_dataset(dataset, seed=9, num_train=TRAIN, num_val=VAL)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not a synthetic data set"):
        make_synthetic_dataset(mine, num_train=1, num_val=1)
    with pytest.raises(FileExistsError, match="not a synthetic data set"):
        make_synthetic_dataset(mine / "thesis.txt", num_train=1, num_val=1)
    assert digest(tmp_path) == {"mine/thesis.txt": hashlib.sha256(b"years of work").hexdigest()}


def test_a_damaged_set_is_named(tmp_path):
    made = make_synthetic_dataset(tmp_path / "set", num_train=2, num_val=1)
    next((made / "train2017").glob("*.jpg")).unlink()
    with pytest.raises(FileExistsError, match="1 of 2 train images"):
        make_synthetic_dataset(made, num_train=2, num_val=1)


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        make_synthetic_dataset(tmp_path / "set", num_train=2, num_val=1)
    assert list(tmp_path.iterdir()) == []


def test_two_makers_at_once_leave_one_whole_set(tmp_path):
    done: list[Path] = []
    makers = [
        threading.Thread(target=lambda: done.append(make_synthetic_dataset(tmp_path / "set", num_train=3, num_val=1)))
        for _ in range(2)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert done == [tmp_path / "set"] * 2 and [path.name for path in tmp_path.iterdir()] == ["set"]
    assert len(list((tmp_path / "set" / "train2017").iterdir())) == 3


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"num_train": 0}, {"num_val": 0}])
def test_parameters_out_of_range_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="allowed are seed >= 0 and 1 or more images"):
        make_synthetic_dataset(tmp_path / "set", **wrong)
    with pytest.raises(ValueError, match="'blimp'; the kinds are ball, box"):
        make_patch("blimp", 10, 0, 0)


def test_the_command_line_makes_the_set_and_its_marker_counts_it(tmp_path):
    main(["--out", str(tmp_path / "set"), "--seed", "1", "--num-train", "9", "--num-val", "2"])
    marker = json.loads((tmp_path / "set" / "synthetic.json").read_text())
    assert marker["parameters"] == {"version": 2, "seed": 1, "num_train": 9, "num_val": 2}
    annotations = load(tmp_path / "set", "train").dataset["annotations"]
    assert marker["counts"]["train"] == {"images": 9, "empty": 1, "annotations": len(annotations), "crowds": 1}
