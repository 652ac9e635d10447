"""The findings of a data set check: the kinds of defects, what happens to each, and the report that counts them.

Finding them is the business of `check.py` and the files it calls.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

MAX_EXAMPLES = 3  # cases shown of each kind
_MAX_SHOWN = 200  # characters of a text that comes from the data
MIN_BOX_PX = 1.0  # the published recipe trains on no box narrower or lower than this

# kind: (what the log says, what happens or what to do). The dict a kind is in says what it means.
DROPPED = {
    "no_bbox": ("annotations without a bbox of four numbers", "dropped"),
    "bad_bbox": ("boxes with NaN or infinite numbers", "dropped"),
    "empty_bbox": ("boxes with zero or negative width or height", "dropped"),
    "outside_bbox": ("boxes entirely outside their image", "dropped"),
    "tiny_bbox": (f"boxes under {MIN_BOX_PX:g} px wide or high inside their image", "dropped"),
    "crowd": (
        "crowd regions (iscrowd or ignore set)",
        "dropped from the targets; crowd='ignore' keeps them as ignore regions",
    ),
    "small_image": ("images smaller than min_img_size", "left out of training"),
    "empty_image": ("images without objects", "left out because ignore_empty_gt is set"),
}
NOTED = {
    "clipped_bbox": ("boxes partly outside their image", "clipped to it"),
    "crowd_ignored": ("crowd regions (iscrowd or ignore set)", "ignored in the loss"),
    "size_from_file": ("images without a valid width and height", "size read from the files"),
    "renamed_image": ("images that are in the image directory under another name", "read from there"),
    "outside_image": ("file names that lead out of the image directory to files there are", "read from there"),
    "name_from_url": ("images without a file_name", "named by their coco_url, path or url"),
    "respelled_id": ("ids written as a text or with a decimal point", "read as the whole numbers they are"),
    "numbered_category": ("category ids that are no numbers", "numbered from 1 in the order of the list"),
    "repeated_category": ("categories listed again with the same id and name", "taken once"),
    "placeholder_category": ('classes without boxes whose supercategory is "none"', "left out"),
    "text_size": ("images with a width and height written as text", "read as the numbers they are"),
    "text_bbox": ("boxes written as text or as an object", "read as the four numbers they are"),
    "polygon_bbox": ("annotations with polygons or a mask and no bbox", "the box around them is taken"),
    "rotated_bbox": ("boxes with a rotation in their attributes", "read as they stand, not rotated"),
    "repeated_bbox": (
        "boxes given twice, with the same image, class and numbers",
        "kept; a detector finds an object once, so each of them counts as missed: remove them",
    ),
    "listed_again": ("files listed under several ids with the same boxes", "each id is an image of its own"),
    "duplicate_annotation_id": ("annotation ids used twice or missing", "boxes kept; renumbered for the evaluation"),
}
WARNED = {
    "absent_image": ("images that are not in the image directory", "treated as images that cannot be read"),
    "unsized_image": (
        "images whose size is neither in the json nor readable from the file",
        "treated as images that cannot be read",
    ),
    "split_boxes": (
        "files listed under several ids whose boxes are not the same",
        "merge the ids of a file into one: under each, the objects of the others are trained as background",
    ),
    "odd_area": ('boxes whose width times height is not their "area"', "used as they stand"),
    "shared_name": (
        "class names that several ids have",
        "the model keeps them apart; merge them if they are one class",
    ),
}
ERRORS = {
    "category_fields": ("categories without an integer id", "give each category an integer id"),
    "duplicate_category_id": ("category ids used twice", "give each category its own id"),
    "no_categories": ("the list of categories is empty", 'list the classes under "categories"'),
    "image_fields": ("images without an id or file_name", "give each image both"),
    "duplicate_image_id": (
        "image ids used twice",
        "give each image its own id (after merging files, renumber one of them)",
    ),
    "escaping_file_name": (
        "file names that leave the image directory",
        'use names relative to the image directory, without ".."',
    ),
    "missing_image": (
        "images that are not in the image directory",
        "add the files, take the images out of the json, correct the image directory, or allow so many with "
        "--max-bad-images",
    ),
    "no_size": (
        "images without a valid width and height",
        "add them to the json, or name the image directory so that they can be read",
    ),
    "unreadable_image": ("images whose size is neither in the json nor readable from the file", "replace the files"),
    "lfs_pointer": ("images that are Git LFS pointers, short texts in place of the files", "run: git lfs pull"),
    "relative_bbox": (
        "boxes lie within 0..1, as most of them do",
        "they look relative to the image's size; multiply x and width by its width, y and height by its height",
    ),
    "annotation_fields": (
        "annotations whose image_id or category_id is no id",
        'give each annotation an "image_id" and a "category_id", written as in "images" and "categories"',
    ),
    "unknown_category": (
        'annotations with a category_id that is not in "categories"',
        "add the category or remove the annotations",
    ),
    "orphan_annotation": (
        'annotations of an image_id that is not in "images"',
        "add the images or remove the annotations",
    ),
}


def shown(text: str) -> str:
    """Return a text of the data as messages show it: in one short line, without what no terminal or file can take."""
    text = text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
    return text if text.isprintable() else ascii(text)[1:-1]


class DatasetError(ValueError):
    """A data set that cannot be used as it is. The text lists every kind of error found."""


class Cases(dict[str, int]):
    """Kind of defect -> how many cases of it; `examples` has the first few of each."""

    def __init__(self) -> None:
        super().__init__()
        self.examples: dict[str, list[str]] = {}

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Count one case (or `count`) of a kind."""
        self[kind] = self.get(kind, 0) + count
        examples = self.examples.setdefault(kind, [])
        if example and len(examples) < MAX_EXAMPLES:
            examples.append(shown(example))

    def line(self, kind: str, what: str, action: str) -> str:
        """Say how many there are of what, with examples, and what happens or what to do; empty: nothing."""
        examples = list(self.examples[kind])
        if examples and self[kind] > len(examples):
            examples.append("...")
        cases = f" ({', '.join(examples)})" if examples else ""
        return f"{self[kind]} {what}{cases}" + (f": {action}" if action else "")


@dataclass
class DatasetReport:
    """What the check of one annotation file found.

    `dropped`, `noted`, `warned` and `errors` count the kinds of DROPPED, NOTED, WARNED, ERRORS; `remarks` has sentences
    about kinds. `hidden_images` have no boxes of their own, but boxes under another id.
    """

    source: str = ""
    num_images: int = 0
    num_annotations: int = 0
    num_boxes: int = 0
    num_images_without_boxes: int = 0
    num_categories: int = 0
    hidden_images: int = 0
    dropped: Cases = field(default_factory=Cases)
    noted: Cases = field(default_factory=Cases)
    warned: Cases = field(default_factory=Cases)
    errors: Cases = field(default_factory=Cases)
    remarks: dict[str, str] = field(default_factory=dict)
    suspicious: set[str] = field(default_factory=set)  # kinds that are notes elsewhere and warnings here

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Count one case (or `count`) of a kind."""
        next(cases for _, cases, texts in self._tables() if kind in texts).add(kind, example, count)

    def add_all(self, kind: str, examples: Sequence[str]) -> None:
        """Count a case for each example."""
        for example in examples:
            self.add(kind, example)

    def _tables(self) -> Iterator[tuple[str, Cases, dict[str, tuple[str, str]]]]:
        yield "error", self.errors, ERRORS
        yield "warning", self.dropped, DROPPED
        yield "warning", self.warned, WARNED
        yield "note", self.noted, NOTED

    def entries(self) -> list[tuple[str, str, str]]:
        """Give each kind found as (level, sentence, kind); level is 'error', 'warning' or 'note'."""
        return [
            (
                "warning" if kind in self.suspicious else level,
                cases.line(kind, *texts[kind]) + (f". {self.remarks[kind]}" if kind in self.remarks else ""),
                kind,
            )
            for level, cases, texts in self._tables()
            for kind in cases
        ]

    def lines(self) -> list[str]:
        """Give the report as lines for the log: the totals, then one line for each kind found."""
        total = (
            f"{self.source}: {self.num_images} images ({self.num_images_without_boxes} without objects), "
            f"{self.num_annotations} annotations, {self.num_boxes} boxes used, {self.num_categories} categories"
        )
        return [total] + [f"  {'error: ' if level == 'error' else ''}{text}" for level, text, _ in self.entries()]

    def log(self, logger: logging.Logger) -> None:
        """Log `lines`, those that somebody should look at as warnings."""
        alarming = {f"  {text}" for _, text, kind in self.entries() if kind in self.suspicious or kind in self.warned}
        for line in self.lines():
            logger.log(logging.WARNING if line in alarming else logging.INFO, line)

    def reasons(self) -> list[str]:
        """Say briefly what was dropped ('3 boxes with zero or negative width or height') and what it may be."""
        return [
            f"{count} {DROPPED[kind][0]}" + (f" ({self.remarks[kind]})" if kind in self.remarks else "")
            for kind, count in self.dropped.items()
        ]

    def raise_if_errors(self) -> None:
        """Raise DatasetError naming every kind of error found; do nothing when there is none."""
        if self.errors:
            found = "\n".join(f"  {text}" for level, text, _ in self.entries() if level == "error")
            raise DatasetError(f"{self.source} cannot be used:\n{found}")
