"""Small programs as users of effdet 0.4.1 write them; each returns plain values that json holds.

`test/unit/test_clients.py` runs them and compares with client_programs.json, which effdet 0.4.1 made (and with it
whole_modules.pth.gz):

    make .venv-peer && .venv-peer/bin/python test/golden/client_programs.py > test/golden/client_programs.json

Nothing but the peer and what it needs may be imported here.
"""

import gzip
import io
import json
import random
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

SIZES_WH = [(100, 60), (64, 90), (128, 128), (80, 80), (120, 50)]
BOXES = (0, 1, 3, 40, 2)  # in each image
CATEGORY_IDS = (1, 4, 7)


# ---- data ------------------------------------------------------------------------------------------------------------


def write_coco(root: Path) -> Path:
    """Write a train and a val split in COCO's layout, five images with the ids 1, 4 and 7."""
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        images, annotations = [], []
        (root / f"{split}2017").mkdir()
        for number, ((width, height), count) in enumerate(zip(SIZES_WH, BOXES, strict=True)):
            Image.new("RGB", (width, height), (40 * number, 90, 200)).save(root / f"{split}2017/{number}.png")
            images.append({"id": 10 * number + 3, "file_name": f"{number}.png", "width": width, "height": height})
            for k in range(count):
                box = [2.0 + k % 10 * 4, 3.0 + k // 10 * 4, 20.0 + k % 7, 25.0 - k % 5]
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": images[-1]["id"], "category_id": CATEGORY_IDS[k % 3]}
                    | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0}
                )
        categories = [{"id": i, "name": f"kind {i}"} for i in CATEGORY_IDS]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    return root


def write_voc(root: Path) -> Path:
    """Write a split of Pascal VOC 2012 with cats and dogs, some of them marked as difficult."""
    base = root / "VOC2012"
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (base / folder).mkdir(parents=True)
    for number in range(4):
        page = ElementTree.Element("annotation")
        size = ElementTree.SubElement(page, "size")
        for key, value in (("width", 90), ("height", 70)):
            ElementTree.SubElement(size, key).text = str(value)
        for k in range(3):
            item = ElementTree.SubElement(page, "object")
            ElementTree.SubElement(item, "name").text = ("cat", "dog")[(number + k) % 2]
            ElementTree.SubElement(item, "difficult").text = str(int((number + 2 * k) % 3 == 0))
            box = ElementTree.SubElement(item, "bndbox")
            corners = (1 + 25 * k, 5 + 3 * number, 20 + 25 * k, 40 + 5 * number)
            for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
                ElementTree.SubElement(box, key).text = str(value)
        ElementTree.ElementTree(page).write(base / f"Annotations/{number}.xml")
        Image.new("RGB", (90, 70)).save(base / f"JPEGImages/{number}.jpg")
    (base / "ImageSets/Main/val.txt").write_text("0\n1\n2\n3\n")
    return root


def guess(target: dict, seed: int, low: bool = False) -> torch.Tensor:
    """Return [1, 100, 6] as a bench gives for one image: the objects moved a little, mistakes, padding.

    Args:
        target: of the data set without transform.
        seed: of the draw.
        low: have more detections of scores below .001, right ones.
    """
    rng = np.random.RandomState(seed)
    boxes = np.asarray(target["bbox"], dtype=np.float32)[:30, [1, 0, 3, 2]]
    classes = np.asarray(target["cls"], dtype=np.float32)[:30]
    wrong = rng.uniform(0, 50, (3, 4)).astype(np.float32)
    wrong[:, 2:] += wrong[:, :2] + 5
    rows = np.zeros((1, 100, 6), dtype=np.float32)
    boxes = np.concatenate([boxes + rng.normal(0, 1.5, boxes.shape).astype(np.float32), wrong])
    classes = np.concatenate([classes, rng.choice(classes if len(classes) else [1.0], 3)])
    count = len(boxes)
    order = rng.permutation(count)
    scores = np.sort(rng.uniform(0.1, 1, count))[::-1].astype(np.float32)
    if low:
        scores[-(count // 2) :] = np.linspace(0.0009, 0.0001, count // 2)
    rows[0, :count, :4], rows[0, :count, 4], rows[0, :count, 5] = boxes[order], scores, classes[order]
    return torch.from_numpy(rows)


def decimals(values) -> list:
    """Return nested lists of numbers with six decimals."""
    return np.round(np.asarray(values, dtype=np.float64), 6).tolist()


# ---- programs --------------------------------------------------------------------------------------------------------


def labels_are_category_ids(folder: Path) -> dict:
    """Labels of a set with the ids 1, 4, 7, and a pycocotools loop of one's own that takes them for category ids."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    from effdet import create_dataset
    from effdet.data import create_parser
    from effdet.data.parsers import CocoParserCfg

    root = write_coco(folder)
    train, val = create_dataset("coco2017", root)
    path = str(root / "annotations/instances_val2017.json")
    parser = create_parser("coco", cfg=CocoParserCfg(ann_filename=path))
    results = []
    for index in range(len(val)):
        _, target = val[index]
        for x0, y0, x1, y1, score, label in guess(target, index)[0].tolist():
            if score > 0:
                box = [x0, y0, x1 - x0, y1 - y0]
                image_id = val.parser.img_ids[index]
                results.append({"image_id": image_id, "category_id": int(label), "bbox": box, "score": score})
    truth = COCO(path)
    run = COCOeval(truth, truth.loadRes(results), "bbox")
    run.evaluate(), run.accumulate(), run.summarize()
    return {
        "max_label": [train.parser.max_label, parser.max_label],
        "labels": [parser.get_ann_info(k)["cls"].tolist() for k in range(5)],
        "AP": decimals(run.stats[0]),
    }


def evaluators_count_what_was_predicted(folder: Path) -> dict:
    """AP of the first images only, with right detections of low scores; by classes and by names."""
    from effdet import create_dataset, create_evaluator
    from effdet.evaluator import CocoEvaluator, PascalEvaluator, TfmEvaluator

    dataset = create_dataset("coco2017", write_coco(folder), "val")
    values = {}
    for name in ("coco2017", "own set", "openimages"):
        for low in (False, True):
            evaluator = create_evaluator(name, dataset)
            for index in (1, 2, 3):
                evaluator.add_predictions(guess(dataset[index][1], index, low), {"img_idx": torch.tensor([index])})
            values[f"{name} {low}"] = decimals(evaluator.evaluate())
    evaluator = CocoEvaluator(dataset)
    for index in (1, 2):
        evaluator.add_predictions(guess(dataset[index][1], index, True), {"img_idx": torch.tensor([index])})
    rows, ids = evaluator._coco_predictions()
    values["kinds"] = [
        type(create_evaluator("own set", dataset)) is PascalEvaluator,
        issubclass(PascalEvaluator, TfmEvaluator),
    ]
    values["stacked"] = list(np.stack(evaluator.predictions).shape)
    values["rows"] = [
        [row["image_id"], row["category_id"], *decimals(row["bbox"]), decimals(row["score"])] for row in rows
    ]
    values["ids"] = [int(image_id) for image_id in ids]
    return values


def difficult_objects_count(folder: Path) -> dict:
    """MAP of Pascal VOC with objects marked as difficult, kept for training or not."""
    from effdet import create_dataset, create_evaluator
    from effdet.data import DetectionDatset, create_parser
    from effdet.data.parsers import VocParserCfg

    base = write_voc(folder) / "VOC2012"
    values = {}
    kept = create_dataset("voc2012", folder, "val")
    for keep in (True, False):
        cfg = VocParserCfg(
            split_filename=str(base / "ImageSets/Main/val.txt"),
            ann_filename=str(base / "Annotations/%s.xml"),
            img_filename="%s.jpg",
            keep_difficult=keep,
        )
        dataset = DetectionDatset(base / "JPEGImages", parser=create_parser("voc", cfg=cfg))
        evaluator = create_evaluator("voc2012", dataset)
        for index in range(4):
            evaluator.add_predictions(guess(kept[index][1], index), {"img_idx": torch.tensor([index])})
        values[str(keep)] = [decimals(evaluator.evaluate()), sum(len(dataset[index][1]["cls"]) for index in range(4))]
    return values


def loaders_of_those_who_say_nothing(folder: Path) -> dict:
    """Batches of a training loader: how many, in which order, what is in them."""
    from effdet import create_dataset, create_loader
    from effdet.data.transforms import transforms_coco_train

    dataset = create_dataset("coco2017", write_coco(folder), "train")
    transform = transforms_coco_train((64, 96), use_prefetcher=True)
    options = {"is_training": True, "use_prefetcher": False, "num_workers": 0, "transform_fn": transform}
    torch.manual_seed(3), random.seed(4), np.random.seed(5)
    loader = create_loader(dataset, (3, 64, 96), 2, **options)
    passes = [list(loader), list(loader)]
    targets = [target for batches in passes for _, target in batches]
    joined = {key: torch.cat([target[key] for target in targets]) for key in targets[0]}
    small = create_loader(dataset, (3, 64, 96), 8, **options)
    return {
        "sizes": [[len(images) for images, _ in batches] for batches in passes],
        "order": joined["img_idx"].tolist(),
        "img_scale": decimals(joined["img_scale"]),
        "boxes": [decimals(image[classes > 0]) for image, classes in zip(joined["bbox"], joined["cls"], strict=True)],
        "forms": {key: [list(value.shape[1:]), str(value.dtype)] for key, value in joined.items()},
        "small": [len(images) for images, _ in small],
        "persistent_workers": create_loader(dataset, 64, 2, **{**options, "num_workers": 1}).persistent_workers,
    }


def transforms_write_into_their_dict(folder: Path) -> dict:
    """Calls by keyword, with a dict that is looked at afterwards."""
    from effdet.data.transforms import Compose, ImageToNumpy, ImageToTensor, RandomFlip, RandomResizePad, ResizePad

    values = {}
    random.seed(0)
    for transform, names in (
        (ResizePad((32, 48)), ("img", "anno")),
        (RandomResizePad(32, (0.5, 2.0)), ("img", "anno")),
        (RandomFlip(True, True, 1.0), ("img", "annotations")),
        (ImageToNumpy(), ("pil_img", "annotations")),
        (ImageToTensor(), ("pil_img", "annotations")),
        (Compose([RandomFlip(prob=1.0), ResizePad(40)]), ("img", "annotations")),
    ):
        target = {"bbox": np.array([[4, 6, 50, 60], [90, 0, 99, 9]], dtype=np.float32), "cls": np.array([3, 8])}
        _, result = transform(**dict(zip(names, (Image.new("RGB", (80, 64)), target), strict=True)))
        form = [decimals(target["bbox"]), target["cls"].tolist(), decimals(target.get("img_scale", 0))]
        values[type(transform).__name__] = [result is target, *form]
    return values


def small_net(**settings):
    """Return a network of one cell and one head layer at 64 px."""
    from effdet import EfficientDet, get_efficientdet_config

    config = get_efficientdet_config("tf_efficientdet_d0")
    config.image_size = (64, 64)
    config.num_classes, config.fpn_cell_repeats, config.box_class_repeats = 3, 1, 1
    for key, value in settings.items():
        setattr(config, key, value)
    return EfficientDet(config, pretrained_backbone=False)


def heads_and_labelers_of_ones_own(folder: Path) -> dict:
    """A head of a plain object, a new head, a labeler with an own method, in the bench and in the loader's collate."""
    from effdet import DetBenchTrain
    from effdet.anchors import AnchorLabeler
    from effdet.data.loader import DetectionFastCollate
    from effdet.efficientdet import HeadNet

    called = []

    class Counting(AnchorLabeler):
        def batch_label_anchors(self, gt_boxes, gt_classes, filter_valid=True):
            called.append(("batch", filter_valid))
            return super().batch_label_anchors(gt_boxes, gt_classes, filter_valid)

        def label_anchors(self, gt_boxes, gt_classes, filter_valid=True):
            called.append((list(gt_boxes.shape), gt_classes.tolist(), filter_valid))
            return super().label_anchors(gt_boxes, gt_classes, filter_valid)

    config = SimpleNamespace(
        num_levels=5, fpn_channels=16, box_class_repeats=1, separable_conv=True, pad_type="", redundant_bias=False,
        act_type="swish", aspect_ratios=[(1.0, 1.0)], num_scales=1, norm_layer=None, norm_kwargs=None,
    )  # fmt: skip
    head = HeadNet(config, num_outputs=4)
    net = small_net().eval()
    net.reset_head(num_classes=2)
    training = [net.backbone.training, net.class_net.training, net.box_net.training]
    bench = DetBenchTrain(net, create_labeler=True)
    bench.anchor_labeler = Counting(bench.anchors, 2, match_threshold=0.5)
    box = np.array([[8, 8, 40, 50]], dtype=np.float32)
    bench.train()
    boxes = torch.from_numpy(box).repeat(2, 1, 1)
    output = bench(torch.zeros(2, 3, 64, 64), {"bbox": boxes, "cls": torch.ones(2, 1)})
    in_bench = list(called)
    called.clear()
    image = np.zeros((3, 64, 64), dtype=np.uint8)
    targets = [{"bbox": box[:n], "cls": np.full(n, 2), "img_size": (64, 64), "img_idx": n} for n in (1, 0)]
    _, target = DetectionFastCollate(anchor_labeler=bench.anchor_labeler)([(image, one) for one in targets])
    return {
        "head": sorted(name for name, _ in head.named_parameters()),
        "training": training,
        "bench": in_bench,
        "finite": bool(output["loss"].isfinite()),
        "collate": called,
        "positives": target["label_num_positives"].tolist(),
        "forms": {key: [list(value.shape), str(value.dtype)] for key, value in sorted(target.items())},
    }


def checkpoints_by_timms_function(folder: Path) -> dict:
    """What load_checkpoint returns, with a filter, and in order instead of by name."""
    from effdet.helpers import load_checkpoint

    def make(*names):
        return (
            torch.nn.Sequential(*[torch.nn.Linear(2, 2)])
            if not names
            else torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in names})
        )

    source = make("a", "b")
    path = str(folder / "weights.pth")
    torch.save({"state_dict": source.state_dict()}, path)
    partly = load_checkpoint(make("b", "c"), path, strict=False)
    seen = []

    def drop(state_dict, model):
        seen.append(type(model).__name__)
        return {key: value for key, value in state_dict.items() if not key.startswith("a")}

    filtered = make("b")
    load_checkpoint(filtered, path, filter_fn=drop)
    renamed = make("x", "y")
    load_checkpoint(renamed, path, remap=True)
    return {
        "missing": list(partly.missing_keys),
        "unexpected": list(partly.unexpected_keys),
        "seen": seen,
        "filtered": torch.equal(filtered["b"].weight, source["b"].weight),
        "renamed": torch.equal(renamed["y"].weight, source["b"].weight),
    }


def errors(folder: Path) -> dict:
    """Which errors programs catch."""
    from effdet import DetBenchTrain, get_efficientdet_config

    try:
        get_efficientdet_config("new")
    except KeyError:
        unknown = "KeyError"
    bench = DetBenchTrain(small_net(), create_labeler=True)
    target = {"bbox": torch.tensor([[[8.0, 8, 40, 50]]] * 2), "cls": torch.tensor([[9.0]] * 2)}
    try:
        bench(torch.zeros(2, 3, 64, 64), target)
        label = "none"
    except (RuntimeError, ValueError):
        label = "an error"
    return {"unknown": unknown, "label above num_classes": label}


def write_whole_modules() -> None:
    """Pickle a training and a prediction bench over one small network, as torch.save(bench) does."""
    from effdet import DetBenchPredict, DetBenchTrain

    settings = {"backbone_name": "mobilenetv3_small_050", "backbone_args": {}, "fpn_channels": 8, "pad_type": ""}
    net = small_net(**settings, redundant_bias=False, max_detection_points=50)
    for key, value in net.state_dict().items():  # one number for each tensor, so that the file packs well
        if value.is_floating_point():
            value.fill_(1.0 if "running_var" in key else (zlib.crc32(key.encode()) % 1000 / 1000 - 0.5) / 4)
    net.toggle_head_bn_level_first()
    train, predict = DetBenchTrain(net, create_labeler=True), DetBenchPredict(net).eval()
    train.train()
    net.eval()
    predict.max_det_per_image = 7
    file = io.BytesIO()
    torch.save([train, predict], file)
    (Path(__file__).parent / "whole_modules.pth.gz").write_bytes(gzip.compress(file.getvalue(), 9, mtime=0))


def whole_modules_go_on(folder: Path) -> dict:
    """Benches that effdet 0.4.1 pickled whole: read, run, trained on."""
    packed = (Path(__file__).parent / "whole_modules.pth.gz").read_bytes()
    train, predict = torch.load(io.BytesIO(gzip.decompress(packed)), weights_only=False)
    images = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64).repeat(2, 1, 1, 1)
    target = {"bbox": torch.tensor([[[8.0, 8, 40, 50]]] * 2), "cls": torch.tensor([[2.0]] * 2)}
    flags = [train.training, predict.training, predict.model.training]
    with torch.no_grad():
        logits, deltas = predict.model(images)
        losses = train(images, target)
        detections = predict(images)
    return {
        "shared": train.model is predict.model,
        "training": flags,
        "keys": sorted(predict.state_dict())[:4],
        "sums": [decimals([level.mean(), level[0, 0, 0, 0]]) for level in (*logits, *deltas)],
        "losses": [decimals(losses[key]) for key in ("loss", "class_loss", "box_loss")],
        "detections": list(detections.shape),
        "scores": decimals(detections[0, :, 4]),
    }


PROGRAMS = [
    labels_are_category_ids,
    evaluators_count_what_was_predicted,
    difficult_objects_count,
    loaders_of_those_who_say_nothing,
    transforms_write_into_their_dict,
    heads_and_labelers_of_ones_own,
    checkpoints_by_timms_function,
    errors,
    whole_modules_go_on,
]


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import peer

    peer.prepare()
    np.float_ = np.float64  # the peer is of the time before numpy 2
    write_whole_modules()
    values = {}
    out, sys.stdout = sys.stdout, sys.stderr
    for program in PROGRAMS:
        with tempfile.TemporaryDirectory() as folder:
            values[program.__name__] = program(Path(folder))
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(found)}" for name, found in values.items())
    out.write(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
