"""Data sets, samplers, collate, erasing and loaders."""

import json
import multiprocessing
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image

from effdet.anchors import AnchorLabeler, Anchors
from effdet.data import DetectionDatset, ImageError, SkipSubset, create_loader, create_parser, open_coco
from effdet.data.batches import EvalSampler, TrainSampler, padded_instances
from effdet.data.coco.annotations import CocoParserCfg
from effdet.data.loader import DetectionFastCollate, PrefetchLoader
from effdet.data.random_erasing import RandomErasing
from effdet.runtime import distributed as processes

CPU = {"device": "cpu", "num_workers": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Eleven noise images of three sizes with 0 to 5 boxes, categories 3 and 7."""
    folder = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for k in range(11):
        width, height = [(60, 40), (40, 60), (50, 50)][k % 3]
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{k}.png")
        images.append({"id": 100 + k, "file_name": f"{k}.png", "width": width, "height": height})
        for _ in range(k % 6):
            x, y = rng.integers(0, 25, 2).tolist()
            ann = {"id": len(annotations) + 1, "image_id": 100 + k, "category_id": 3, "bbox": [x, y, 12, 10]}
            annotations.append(dict(ann, category_id=[3, 7][len(annotations) % 2]))
    data = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 7, "name": "b"}, {"id": 3, "name": "a"}],
    }
    (folder / "a.json").write_text(json.dumps(data))
    return folder


def script_loader(*args, **options):
    """Make a loader as data/build.py does; effdet's defaults are tried in unit/test_clients.py."""
    asked = {"drop_last": True, "persistent_workers": True, "seed": 0}
    if "collate_fn" not in options:
        asked["max_instances"] = None
    return create_loader(*args, **asked | options)


def dataset_of(root, split="train"):
    return open_coco(images=root, ann=root / "a.json", split=split)


def random_noise_transform(img, target):
    """A user's transform: draws from all three global generators; at module level, so that workers can import it."""
    noise = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    pixels = np.asarray(img.resize((32, 32))).transpose(2, 0, 1)
    return pixels.copy(), {"img_idx": target["img_idx"], "noise": np.array(noise)}


class Plain:
    """A data set as a user writes it: no parser, no seed, no epoch."""

    transform = None

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        target = {"img_idx": index, "bbox": np.zeros((0, 4), np.float32), "cls": np.zeros(0, np.int64)}
        return np.full((3, 8, 8), index % 256, np.uint8), target


def batches_of(loader):
    return [(images.clone(), {k: v.clone() for k, v in target.items()}) for images, target in loader]


def assert_same_batches(left, right):
    assert len(left) == len(right) > 0
    for (images_a, target_a), (images_b, target_b) in zip(left, right, strict=True):
        assert torch.equal(images_a, images_b) and target_a.keys() == target_b.keys()
        assert all(torch.equal(target_a[k], target_b[k]) for k in target_a)


# Data sets


def test_items_carry_image_boxes_and_place(root):
    dataset = dataset_of(root)
    img, target = dataset[5]
    assert img.size == (50, 50) and target["img_idx"] == 5 and target["img_size"] == (50, 50)
    assert len(target["bbox"]) == 5 and set(target["cls"].tolist()) == {1, 2}
    with pytest.raises(ValueError, match="needs a parser"):
        DetectionDatset(root)
    by_name = DetectionDatset(str(root), "coco", {"cfg": CocoParserCfg(ann_filename=str(root / "a.json"))})
    assert len(by_name) == 11 and [3, 7][target["cls"][0] - 1] == by_name[5][1]["cls"][0], (
        "labels are category ids there"
    )


def test_a_data_set_without_its_images_fails_at_the_start(root, tmp_path):
    parser = create_parser("coco", cfg=CocoParserCfg(ann_filename=str(root / "a.json")))
    with pytest.raises(ValueError, match="11 images that are not in the image directory .*image 100 0.png"):
        DetectionDatset(tmp_path, parser)


def test_a_damaged_image_is_named(root, tmp_path):
    for k in range(11):
        (tmp_path / f"{k}.png").write_bytes((root / f"{k}.png").read_bytes()[: 40 if k == 3 else None])
    loader = script_loader(
        open_coco(images=tmp_path, ann=root / "a.json", split="val"), 32, 4, **{**CPU, "num_workers": 1}
    )
    with pytest.raises(ImageError, match="3.png: cannot be read"):
        list(loader)


def test_skip_subset_takes_every_nth_and_passes_everything_on(root):
    dataset = dataset_of(root)
    subset = SkipSubset(dataset, 4)
    assert len(subset) == 3 and [subset[k][1]["img_idx"] for k in range(3)] == [0, 4, 8]
    subset.transform, subset.seed = random_noise_transform, 5
    assert dataset.transform is random_noise_transform and dataset.seed == 5 and subset.parser is dataset.parser
    first = subset[1][1]["noise"].tolist()
    subset.set_epoch(1)
    assert subset[1][1]["noise"].tolist() != first
    with pytest.raises(ValueError, match="n >= 1"):
        SkipSubset(dataset, 0)


def test_seeding_depends_on_seed_epoch_and_index_and_leaves_no_trace(root):
    dataset = dataset_of(root)
    dataset.transform = random_noise_transform

    def noise(seed, epoch, index):
        dataset.seed = seed
        dataset.set_epoch(epoch)
        return tuple(dataset[index][1]["noise"])

    base = noise(1, 0, 2)
    assert base == noise(1, 0, 2)
    assert len({base, noise(2, 0, 2), noise(1, 1, 2), noise(1, 0, 3), noise(0, 1, 2), noise(0, 2, 1)}) == 6
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    noise(1, 0, 2)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    assert noise(None, 0, 2) == pytest.approx(expected)


# Samplers


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_deals_every_image_exactly_once(world_size):
    for total in range(11):
        shards = [list(EvalSampler(range(total), rank, world_size)) for rank in range(world_size)]
        assert sorted(i for s in shards for i in s) == list(range(total))
        sizes = [len(EvalSampler(range(total), rank, world_size)) for rank in range(world_size)]
        assert sizes == [len(s) for s in shards] and max(sizes) - min(sizes) <= 1
        assert all(s == sorted(s) for s in shards)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("drop_last", [True, False])
def test_training_shares_are_equal_disjoint_and_shuffled(world_size, drop_last):
    for total in range(11):
        samplers = [TrainSampler(range(total), r, world_size, seed=3, drop_last=drop_last) for r in range(world_size)]
        shards = [list(s) for s in samplers]
        assert {len(s) for s in shards} == {len(samplers[0])}
        seen = [i for s in shards for i in s]
        if drop_last:
            assert len(seen) == len(set(seen)) == total // world_size * world_size
        else:
            assert set(seen) == set(range(total)) and len(seen) - total < world_size
    one, two, other = (TrainSampler(range(50), seed=s) for s in (3, 3, 4))
    assert list(one) == list(two) != list(other)


def test_epochs_advance_by_themselves_or_by_set_epoch():
    sampler = TrainSampler(range(30), seed=1)
    first, second = list(sampler), list(sampler)
    assert first != second and sorted(second) == list(range(30))
    sampler.set_epoch(0)
    assert list(sampler) == first and list(sampler) == second
    assert list(TrainSampler(range(30), seed=2)) != second, "runs must not share their orders one epoch apart"


def test_the_global_batch_does_not_depend_on_the_number_of_processes():
    alone = list(TrainSampler(range(40), seed=5))
    shares = [list(TrainSampler(range(40), rank, 4, seed=5)) for rank in range(4)]
    for k in range(5):
        together = sorted(i for s in shares for i in s[2 * k : 2 * k + 2])
        assert together == sorted(alone[8 * k : 8 * k + 8])


def test_a_rank_that_does_not_exist_is_refused():
    for make in (TrainSampler, EvalSampler):
        with pytest.raises(ValueError, match="rank 2 of 2"):
            make(range(4), 2, 2)


# Collate


def sample(boxes, **more):
    target = {"bbox": np.full((boxes, 4), boxes, np.float32), "cls": np.full(boxes, 3)}
    return np.full((3, 4, 6), boxes % 256, np.uint8), {**target, **more}


@pytest.mark.parametrize(
    ("boxes", "slots"),
    [(0, 32), (1, 32), (32, 32), (33, 64), (65, 128), (128, 128), (129, 256), (300, 384), (1000, 1024)],
)
def test_padding_ladder(boxes, slots):
    assert padded_instances(boxes) == slots
    images, target = DetectionFastCollate(max_instances=None)([sample(2), sample(boxes)])
    assert images.dtype == torch.uint8 and images.shape == (2, 3, 4, 6)
    assert target["bbox"].shape == (2, max(slots, 32), 4)
    assert target["bbox"].dtype == target["cls"].dtype == torch.float32
    assert (target["cls"][1] == 3).sum() == boxes and (target["cls"][1, boxes:] == -1).all()
    assert (target["bbox"][1, :boxes] == boxes).all() and (target["bbox"][1, boxes:] == -1).all()


def test_a_least_number_of_slots_is_kept_and_nothing_is_cut():
    for boxes, slots in ((3, 100), (100, 100), (101, 128), (300, 384)):
        target = DetectionFastCollate()([sample(1), sample(boxes)])[1]
        assert target["cls"].shape == (2, slots) and (target["cls"][1] > 0).sum() == boxes
    assert DetectionFastCollate(max_instances=7)([sample(3)])[1]["cls"].shape == (1, 7)
    custom = DetectionFastCollate({"bbox", "cls", "tags"}, {"tags": (5, 2)}, instance_fill=0)
    target = custom([sample(3, tags=np.ones((2, 2))), sample(1, tags=np.ones((0, 2)))])[1]
    assert target["tags"].shape == (2, 5, 2) and target["tags"].sum() == 4 and target["cls"].sum() == 12


def test_other_entries_are_stacked_by_kind():
    more = {"img_idx": 7, "img_size": (640, 480), "img_scale": 1.5, "mask": np.ones((2, 3), np.uint8)}
    _, target = DetectionFastCollate()([sample(1, **more), sample(2, **more)])
    assert target["img_idx"].dtype == torch.int64 and target["img_idx"].tolist() == [7, 7]
    assert target["img_size"].dtype == torch.int32 and target["img_size"].tolist() == [[640, 480]] * 2
    assert target["img_scale"].dtype == torch.float32 and target["img_scale"].tolist() == [1.5, 1.5]
    assert target["mask"].shape == (2, 2, 3)
    with pytest.raises(TypeError, match="'name' cannot be batched"):
        DetectionFastCollate()([sample(1, name="x")])
    with pytest.raises(TypeError, match="'pts' cannot be batched"):
        DetectionFastCollate()([sample(1, pts=np.ones(2)), sample(1, pts=np.ones(3))])
    with pytest.raises(ValueError, match=r"different shapes \[\(3, 4, 6\), \(3, 5, 5\)\]"):
        DetectionFastCollate()([sample(1), (np.zeros((3, 5, 5), np.uint8), sample(1)[1])])
    floats = DetectionFastCollate()([(torch.ones(3, 2, 2), {}), (torch.ones(3, 2, 2), {})])[0]
    assert floats.dtype == torch.float32 and floats.shape == (2, 3, 2, 2)


def test_labels_made_in_the_workers_equal_labels_made_afterwards(root):
    anchors = Anchors(3, 7, 3, [(1.0, 1.0), (1.4, 0.7), (0.7, 1.4)], 4.0, (128, 128))
    labeler = AnchorLabeler(anchors, 2)
    boxes = script_loader(dataset_of(root, "val"), 128, 4, **CPU)
    labels = script_loader(dataset_of(root, "val"), 128, 4, anchor_labeler=labeler, device="cpu", num_workers=1)
    positives = 0
    for (_, plain), (_, labelled) in zip(boxes, labels, strict=True):
        assert not {"bbox", "cls"} & labelled.keys()
        cls, box, count = labeler.batch_label_anchors(plain["bbox"], plain["cls"])
        assert torch.equal(labelled["label_num_positives"], count)
        positives += count.sum()
        for level in range(5):
            assert torch.equal(labelled[f"label_cls_{level}"], cls[level])
            assert torch.equal(labelled[f"label_bbox_{level}"], box[level])
    assert positives > 20 and "label_cls_5" not in labelled


# Random erasing


def test_erasing_stays_inside_each_image():
    random.seed(0)
    batch = torch.ones(64, 3, 40, 60)
    target = {"img_scale": torch.full((64,), 2.0), "img_size": torch.tensor([[40.0, 60.0]]).repeat(64, 1)}
    out = RandomErasing(1.0, mode="const", max_count=3)(batch, target)
    assert out is batch and (out[:, :, 30:] == 1).all() and (out[:, :, :, 20:] == 1).all()
    erased = (out[:, 0, :30, :20] == 0).float().mean(dim=(1, 2))
    assert (erased > 0).all() and erased.max() < 0.3 and 0.02 < erased.mean() < 0.25


@pytest.mark.parametrize(("mode", "values"), [("const", 1), ("rand", 3), ("pixel", 50)])
def test_erasing_modes_probability_and_splits(mode, values):
    random.seed(1), torch.manual_seed(1)
    target = {"img_scale": torch.ones(200), "img_size": torch.full((200, 2), 64.0)}
    out = RandomErasing(0.5, mode=mode, num_splits=2)(torch.full((200, 3, 64, 64), 9.0), target)
    touched = (out != 9).flatten(1).any(dim=1)
    assert not touched[:100].any() and 30 < touched[100:].sum() < 70
    first = out[100 + int(touched[100:].nonzero()[0])]
    found = first[first != 9].unique().numel()
    assert found == values if values < 50 else found > 50
    with pytest.raises(ValueError, match="'const', 'rand' or 'pixel'"):
        RandomErasing(mode="noise")


def test_the_loader_erases_in_training_only(root):
    def pixels(is_training, re_prob):
        random.seed(4), torch.manual_seed(4)
        return next(iter(script_loader(dataset_of(root), 64, 8, is_training, re_prob=re_prob, re_mode="const", **CPU)))[
            0
        ]

    clean, erased = pixels(True, 0.0), pixels(True, 1.0)
    changed = clean != erased
    assert changed.flatten(1).any(dim=1).float().mean() > 0.5 and (erased[changed] == 0).all()
    assert torch.equal(pixels(False, 1.0), pixels(False, 0.0))


# Loaders


def test_batches_have_the_agreed_form_and_normalised_pixels(root):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    dataset = dataset_of(root, "val")
    loader = script_loader(dataset, (3, 64, 96), 4, mean=mean, std=std, **CPU)
    assert len(loader) == 3 and loader.dataset is dataset
    seen = []
    for images, target in loader:
        size = len(images)
        assert images.shape == (size, 3, 64, 96) and images.dtype == torch.float32
        forms = {k: (tuple(v.shape[1:]), v.dtype) for k, v in target.items()}
        assert forms == {
            "bbox": ((32, 4), torch.float32), "cls": ((32,), torch.float32), "img_idx": ((), torch.int64),
            "img_scale": ((), torch.float32), "img_size": ((2,), torch.int32),
        }  # fmt: skip
        seen += target["img_idx"].tolist()
        for image, index, scale in zip(images, target["img_idx"], target["img_scale"], strict=True):
            info = dataset.parser.img_infos[int(index)]
            assert scale == pytest.approx(max(info["height"] / 64, info["width"] / 96))
            raw = dataset[int(index)][0] / 255
            expected = (raw - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
            np.testing.assert_allclose(image.numpy(), expected, atol=1e-5)
    assert seen == list(range(11))
    host = script_loader(dataset_of(root, "val"), (64, 96), 4, use_prefetcher=False, mean=mean, std=std, num_workers=0)
    for (images, target), (host_images, host_target) in zip(loader, host, strict=True):
        assert torch.allclose(images, host_images, atol=1e-6) and torch.equal(target["bbox"], host_target["bbox"])


def test_memory_format(root):
    images, _ = next(iter(script_loader(dataset_of(root), 64, 4, channels_last=True, **CPU)))
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_training_batches_do_not_depend_on_the_workers_nor_on_their_start(root):
    def three_epochs(**options):
        loader = script_loader(
            dataset_of(root), 48, 3, is_training=True, device="cpu", interpolation="random", seed=7, **options
        )
        return [batch for _ in range(3) for batch in batches_of(loader)]

    here = three_epochs(num_workers=0)
    assert len(here) == 9 and not torch.equal(here[0][0], here[3][0])
    assert_same_batches(here, three_epochs(num_workers=2))
    assert_same_batches(here, three_epochs(num_workers=1, persistent_workers=False))
    loader = script_loader(dataset_of(root), 48, 3, True, device="cpu", num_workers=0, interpolation="random", seed=7)
    loader.sampler.set_epoch(2)
    assert_same_batches(here[6:], batches_of(loader))
    loader = script_loader(dataset_of(root), 48, 3, True, device="cpu", num_workers=0, interpolation="random", seed=8)
    assert not torch.equal(here[0][0], next(iter(loader))[0])


def test_workers_send_the_training_recipe_as_bytes_in_the_order_it_was_resized(root):
    """One byte a value over the process boundary, and no turning round of [H, W, 3] on the way."""
    inside = script_loader(dataset_of(root), 32, 4, is_training=True, **CPU)
    worker = script_loader(dataset_of(root), 32, 4, is_training=True, device="cpu", num_workers=1)
    sent = [images for images, _ in worker.loader]
    assert len(sent) == 2
    for images in sent:
        assert images.dtype == torch.uint8 and images.is_contiguous(memory_format=torch.channels_last)
    for images, (normalised, _) in zip(sent, inside, strict=True):
        assert normalised.dtype == torch.float32 and normalised.is_contiguous()
        assert torch.equal((images - inside.mean) / inside.std, normalised)


def test_evaluation_resizes_by_pillow_alone(root, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "interpolate", lambda *args, **kwargs: pytest.fail("not exact"))
    dataset = dataset_of(root, "val")
    (images, _), *_ = script_loader(dataset, 32, 4, use_prefetcher=True, mean=(0,) * 3, std=(1 / 255,) * 3, **CPU)
    image = Image.open(root / "0.png").resize((32, 21), Image.Resampling.BILINEAR)
    assert np.array_equal(images[0, :, :21].numpy(), np.asarray(image).transpose(2, 0, 1))


def test_users_random_transforms_repeat_and_spawned_workers_see_the_epoch(root, monkeypatch):
    def noise(**options):
        loader = script_loader(
            dataset_of(root),
            32,
            5,
            is_training=True,
            use_prefetcher=False,
            transform_fn=random_noise_transform,
            **options,
        )
        return [batches_of(loader) for _ in range(2)]

    here = noise(num_workers=0)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: "spawn")
    spawned = noise(num_workers=1)
    for mine, theirs in zip(here, spawned, strict=True):
        assert_same_batches(mine, theirs)
        assert mine[0][0].dtype == torch.uint8 and mine[0][1]["noise"].shape == (5, 3)
    by_image = [
        {int(i): tuple(n.tolist()) for _, t in e for i, n in zip(t["img_idx"], t["noise"], strict=True)} for e in here
    ]
    assert all(by_image[0][i] != by_image[1][i] for i in by_image[0].keys() & by_image[1].keys())


@pytest.fixture
def set_rank(monkeypatch):
    """Make this process one of several, as far as the loader can tell."""

    def put(rank, world_size):
        monkeypatch.setattr(processes, "rank", lambda: rank)
        monkeypatch.setattr(processes, "world_size", lambda: world_size)

    return put


def test_two_ranks_together_see_the_images_of_one(root, set_rank):
    def loader(rank, world_size, batch_size):
        set_rank(rank, world_size)
        return script_loader(dataset_of(root), 48, batch_size, is_training=True, distributed=True, **CPU)

    alone = batches_of(loader(0, 1, 4))
    shares = [batches_of(loader(rank, 2, 2)) for rank in range(2)]
    assert len(alone) == len(shares[0]) == len(shares[1]) == 2
    for k, (images, target) in enumerate(alone):
        both = {int(i): x for s in shares for i, x in zip(s[k][1]["img_idx"], s[k][0], strict=True)}
        assert both.keys() == set(target["img_idx"].tolist())
        assert all(torch.equal(both[int(i)], x) for i, x in zip(target["img_idx"], images, strict=True))


def test_distributed_evaluation_covers_the_set_once(root, set_rank):
    alone = script_loader(dataset_of(root, "val"), 32, 2, distributed=True, **CPU)  # no process group: one process
    assert len(alone.sampler) == 11
    seen = []
    for rank in range(3):
        set_rank(rank, 3)
        loader = script_loader(dataset_of(root, "val"), 32, 2, distributed=True, **CPU)
        seen += [i for _, t in loader for i in t["img_idx"].tolist()]
    assert sorted(seen) == list(range(11))


def test_training_drops_the_incomplete_batch_and_refuses_too_small_a_set(set_rank):
    loader = script_loader(Plain(11), 8, 4, is_training=True, transform_fn=lambda img, target: (img, target), **CPU)
    assert [len(images) for images, _ in loader] == [4, 4] and len(loader) == 2
    everything = script_loader(Plain(11), 8, 4, is_training=True, drop_last=False, **CPU)
    assert [len(images) for images, _ in everything] == [4, 4, 3]
    assert list(script_loader(Plain(0), 8, 4, **CPU)) == []
    set_rank(0, 3)
    with pytest.raises(ValueError, match=r"11 images, fewer than one global batch of 12 \(3 x 4\)"):
        script_loader(Plain(11), 8, 4, is_training=True, distributed=True, **CPU)


def test_torch_subsets_get_transform_and_epoch(root):
    subset = torch.utils.data.Subset(dataset_of(root), [5, 4, 3, 2])
    loader = script_loader(subset, 32, 4, is_training=True, interpolation="random", **CPU)
    first, second = batches_of(loader)[0], batches_of(loader)[0]
    assert sorted(first[1]["img_idx"].tolist()) == [2, 3, 4, 5] and first[0].shape == (4, 3, 32, 32)
    assert int(subset.dataset._epoch) == 1 and not torch.equal(
        first[1]["img_scale"].sort()[0], second[1]["img_scale"].sort()[0]
    )
    loader = script_loader(SkipSubset(Plain(8)), 8, 4, is_training=True, **CPU)
    assert sorted(next(iter(loader))[1]["img_idx"].tolist()) == [0, 2, 4, 6]


def test_own_collate():
    def collate(batch):
        return torch.stack([torch.from_numpy(img) for img, _ in batch]), {"n": torch.tensor(len(batch))}

    loader = script_loader(Plain(4), 8, 2, collate_fn=collate, mean=(0, 0, 0), std=(1, 1, 1), **CPU)
    assert [(images[1, 0, 0, 0].item(), int(t["n"])) for images, t in loader] == [
        (pytest.approx(1 / 255), 2), (pytest.approx(3 / 255), 2)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="belong to the default collate"):
        script_loader(Plain(4), 8, 2, collate_fn=collate, max_instances=5, **CPU)


def test_loading_leaves_the_global_random_numbers_alone(root):
    torch.manual_seed(0), random.seed(0)
    expected = torch.rand(3), random.random()
    torch.manual_seed(0), random.seed(0)
    list(script_loader(dataset_of(root), 32, 4, is_training=True, **CPU))
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]


def worker_threads(img, target):
    return np.zeros((3, 8, 8), np.uint8), {"threads": torch.get_num_threads()}


def test_workers_run_one_thread_each_and_stay(root):
    loader = script_loader(dataset_of(root), 8, 4, use_prefetcher=False, transform_fn=worker_threads, num_workers=1)
    assert all(t["threads"].tolist() == [1] * len(t["threads"]) for _, t in loader)
    assert (
        loader.persistent_workers
        and not script_loader(Plain(4), 8, 2, use_prefetcher=False, num_workers=0).persistent_workers
    )


def test_data_set_and_collate_pickle(root):
    dataset = dataset_of(root)
    script_loader(dataset, 32, 4, is_training=True, **CPU)
    again = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(again[4][0], dataset[4][0])
    assert pickle.loads(pickle.dumps(DetectionFastCollate(max_instances=7)))([sample(1)])[1]["cls"].shape == (1, 7)


def test_prefetch_loader_wraps_any_loader():
    inner = [(torch.full((2, 3, 4, 4), 255, dtype=torch.uint8), {"img_idx": torch.arange(2)})]
    loader = PrefetchLoader(inner, mean=(0, 0, 0), std=(1, 0.5, 0.25), device="cpu")
    assert len(loader) == 1
    images, target = next(iter(loader))
    assert images[0, :, 0, 0].tolist() == [1, 2, 4] and target["img_idx"].tolist() == [0, 1]
    assert list(PrefetchLoader([], device="cpu")) == []
