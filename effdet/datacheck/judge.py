"""What the stats of a data set mean for a training: findings, each with a level and, where there is one, a remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from effdet.data.coco.categories import CategoryMap, find_empty_classes, resolve_category_map
from effdet.data.coco.check import boxes_of
from effdet.data.coco.report import MAX_EXAMPLES
from effdet.data.dataset_factory import SMALLEST_SIDE_PX

from .anchor_reach import Suggestion
from .scan import BROKEN, repeats_within, shared_between
from .stats import DataStats, Finding, SplitStats

_MUCH_UNREACHED = 0.2  # share of boxes without an anchor, after the best setting offered, that is a warning
_MOST_UNREACHED = 0.8  # and the share from which a training is of little use
_MUCH_PADDING = 0.5  # of the network's input
_SOME_PADDING = 0.3
_GAIN_WORTH_A_WARNING = 0.05
_GAIN_WORTH_A_COST = 0.2  # of the boxes out of reach: what a larger input has to reach to be advised
_CLASS_ERRORS = {"category_fields", "duplicate_category_id", "no_categories"}
_HARMLESS = ("crowd", "crowd_ignored", "clipped_bbox", "size_from_file", "small_image")


def judge(stats: DataStats, num_classes: int | None, match: str, max_det: int, image_size: Sequence[int]) -> None:
    """Add the findings of measured splits, and put the most serious of all first.

    Args:
        stats: of the data; gets the classes, too.
        num_classes: asked for by the user, or None.
        match: what tells which class of the training a category of val is: its 'name' or its 'id'.
        max_det: detections that the model keeps in an image.
        image_size: height and width of the model's input.
    """
    for split in stats.splits:
        stats.findings += [*judge_repeated_images(split), *judge_split(split, max_det)]
    judge_categories(stats, num_classes, match)
    judge_shared_images(stats)
    if stats.suggestion is not None:
        stats.findings += judge_anchors(stats.suggestion, image_size)
    stats.findings.sort(key=lambda finding: ("error", "warning", "note").index(finding.level))


def judge_split(split: SplitStats, max_det: int) -> Iterator[Finding]:
    """Turn what was counted in one split into findings; none of them follows from another."""
    report, infos = split.report, split.arrays.img_infos
    for level, text, kind in report.entries():
        harmless = level == "warning" and kind in _HARMLESS and kind not in report.suspicious
        if kind not in split.scan.broken:  # the same, found by reading all files
            yield Finding("note" if harmless else level, f"{split.name}: {text}")
    for kind in split.scan.broken:
        remedy = "run: git lfs pull" if kind == "lfs_pointer" else "replace them or take them out of the json"
        yield Finding("error", f"{split.name}: {split.scan.broken.line(kind, BROKEN[kind], remedy)}")
    if not len(infos) and not report.errors:
        yield Finding("error", f"{split.name}: there are no images")
    elif not len(split.sides_px) and not report.errors:
        yield Finding("error", f"{split.name}: there are no boxes")
    if len(infos) and report.dropped.get("small_image") == len(infos):
        yield Finding(
            "error",
            f"{split.name}: all {len(infos)} images are under {SMALLEST_SIDE_PX} px wide or high, too small "
            "to find something in, so none is left to train on: enlarge them",
        )
    crowded = int((split.boxes_per_image > max_det).sum())
    if crowded and split.name == "val":
        yield Finding(
            "warning",
            f"{split.name}: {crowded} images have more than {max_det} boxes, and no more are "
            f"predicted in one: give --max-det {split.boxes_per_image.max()}",
        )
    background = report.num_images_without_boxes - split.hidden
    if background > 0 and not report.errors:  # annotations may be among what the errors are about
        yield Finding(
            "note",
            f"{split.name}: {background} of {report.num_images} images have no boxes; they teach what background "
            "looks like",
        )


def judge_repeated_images(split: SplitStats) -> Iterator[Finding]:
    """Compare the boxes of images of a split that are equal, pixel by pixel, under different names."""
    arrays = split.arrays
    names = [info["file_name"] for info in arrays.img_infos]
    pairs = [(split.scanned[a], split.scanned[b]) for a, b in repeats_within(split.scan.pixel_hashes)]
    boxes = {k: boxes_of(arrays, k) for pair in pairs for k in pair}
    other = [(a, b) for a, b in pairs if names[a] != names[b]]  # the same name: the report has it
    unlike = [(a, b) for a, b in other if boxes[a] != boxes[b]]
    alike = [(a, b) for a, b in other if boxes[a] == boxes[b]]
    unseen = len({k for a, b in pairs for k in (a, b) if not boxes[k] and boxes[a] | boxes[b]})
    split.hidden = max(unseen, split.report.hidden_images)  # files that cannot be read have no pixels to compare
    for level, some, text in (
        (
            "warning",
            unlike,
            ", with other boxes: merge each pair, as the objects of one image are trained as background in the other",
        ),
        ("note", alike, ""),
    ):
        if some:
            named = _some([f"{names[a]} = {names[b]}" for a, b in some])
            yield Finding(level, f"{split.name}: {len(some)} images repeat an earlier one ({named}){text}")


def judge_categories(stats: DataStats, num_classes: int | None, match: str) -> None:
    """Settle the classes as training does, and compare those of the two splits."""
    train, val = (
        split if split is not None and not _CLASS_ERRORS & split.report.errors.keys() else None
        for split in (stats.split("train"), stats.split("val"))
    )
    base = train or val
    if base is None or not base.arrays.categories:
        return
    val_map = None
    try:
        stats.categories = resolve_category_map(base.arrays.categories, num_classes)
        if train and val and val.arrays.categories:
            val_map = resolve_category_map(val.arrays.categories, None, stats.categories, match, "the training split")
    except ValueError as error:
        stats.add("error", f"classes: {val.name if stats.categories and val else base.name}: {error}")
        return
    if val_map is not None and val:  # from here on under the ids of train
        val.arrays.category_ids = stats.categories.idx_to_id[val_map.to_idx(val.arrays.category_ids)]
        _compare_names(stats, val, val_map, match)
    if base.report.errors or (val and val.report.errors):  # boxes may be among what the errors are about
        return
    counted = {split.name: set(split.class_counts) for split in (train, val) if split}
    empty = find_empty_classes(stats.categories, set().union(*counted.values()))
    if empty:
        stats.add("note", f"classes: {len(empty)} have no boxes anywhere, and never will be found: {_some(empty)}")
    if len(counted) < 2:
        return
    names = dict(zip(stats.categories.ids, stats.categories.names, strict=True))
    only_val = [names[i] for i in names if i in counted["val"] - counted["train"]]
    only_train = [names[i] for i in names if i in counted["train"] - counted["val"]]
    if only_val:
        stats.add("warning", f"classes: {_some(only_val)}: boxes in val but none in train, so their AP will be 0")
    if only_train:
        stats.add("note", f"classes: {_some(only_train)}: boxes in train but none in val, so nothing measures them")


def _compare_names(stats: DataStats, val: SplitStats, val_map: CategoryMap, match: str) -> None:
    """Say where val gives a class another id, or with match 'id' another name."""
    theirs = stats.categories
    assert theirs is not None
    by_id = match == "id"
    level, kept, other = ("warning", "ids", "names") if by_id else ("note", "names", "ids")
    differ = []
    for row in val.arrays.categories:
        number = val_map.id_to_idx[row["id"]]
        key, ours = (row["id"], row["name"]) if by_id else (row["name"], row["id"])
        in_train = theirs.class_names[number] if by_id else int(theirs.idx_to_id[number])
        if in_train != ours:
            differ.append(f"{key!r}: {in_train!r} in train, {ours!r} in val")
    if differ:
        stats.add(
            level,
            f"classes: {len(differ)} {kept} have other {other} in val than in train: {_some(differ)}; the {kept} count",
        )


def judge_shared_images(stats: DataStats) -> None:
    """Look for images that are in train and in val."""
    train, val = stats.split("train"), stats.split("val")
    shared = shared_between(train.scan, val.scan) if train and val else []
    if shared and val:
        same = sum(equal for _, _, equal in shared)
        pairs = _some([f"{first} = {second}" for first, second, _ in shared])
        stats.add(
            "warning",
            f"{len(shared)} of {len(val.scan.names)} val images are in train too ({same} with "
            f"equal files, {len(shared) - same} with equal pixels in another file; train = val: "
            f"{pairs}): they make the AP look better than it is; take them out of one split",
        )


def judge_anchors(found: Suggestion, image_size: Sequence[int]) -> Iterator[Finding]:
    """Turn the search for better anchors into findings: how serious one is depends on what stays out of reach."""
    present, take = found.present.share, found.take
    left = 1 - (take.share if take else present)
    level = "error" if left >= _MOST_UNREACHED else "warning" if left >= _MUCH_UNREACHED else "note"
    text = f"anchors: {100 * (1 - present):.1f} % of the train boxes overlap no anchor with IoU 0.5"
    if take is not None:
        if level == "note" and take.share >= present + _GAIN_WORTH_A_WARNING:
            level = "warning"
        text += (
            f"; {take.flags} would leave {100 * left:.1f} % at equal cost (class and "
            "box heads of published weights were trained with the present anchors)"
        )
    if left >= _MUCH_UNREACHED:
        larger = [one for one in found.better if one.share - (1 - left) > _GAIN_WORTH_A_COST * left]
        enough = [one for one in larger if 1 - one.share < _MUCH_UNREACHED]
        dearer = next(iter(enough + larger[-1:]), None)  # the cheapest that is enough, else what reaches most
        if dearer is not None:
            text += f"; {dearer.flags} would leave {100 * (1 - dearer.share):.1f} % at {dearer.cost:.1f} times the cost"
        else:
            text += (
                "; no input tried reaches much more: the objects are too small or too long in it, so cut the images up"
            )
    yield Finding(level, text)
    fitting, is_much = found.fitting_size, found.padding >= _MUCH_PADDING
    is_offered = take is not None and "image_size" in take.settings
    if is_much or (fitting and not is_offered and found.padding >= _SOME_PADDING):
        offered = f"; --image-size {fitting[0]} {fitting[1]} has their shape at equal cost" if fitting else ""
        yield Finding(
            "warning" if is_much else "note",
            f"images: {100 * found.padding:.0f} % of the {image_size[0]} x {image_size[1]} (height x width) input is "
            f"padding, as the images have another shape{offered}",
        )


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:MAX_EXAMPLES]) + (f", ... ({len(texts)} in all)" if len(texts) > MAX_EXAMPLES else "")
