"""What every annotation parser offers, ours and users' own: effdet's base class.

It is not in data/parsers, where effdet has it and where its name still is: that folder imports the parsers.
"""

from typing import Any


class Parser:
    """Base of annotation parsers: a subclass fills the lists and defines `get_ann_info(idx)`.

    Attributes:
        cat_names: names of the categories.
        cat_ids: their ids, in the same order.
        cat_id_to_label: target label, from 1, of each category id; empty where the ids are the labels.
        img_ids: image id by dataset index.
        img_ids_invalid: ids of images left out.
        img_infos: {'file_name', 'width', 'height'} by dataset index.
        yxyx, has_labels, include_masks, include_bboxes_ignore, ignore_empty_gt, min_img_size: as given.
        label_offset: the first label, 1.
    """

    def __init__(
        self,
        bbox_yxyx: bool = False,
        has_labels: bool = True,
        include_masks: bool = False,
        include_bboxes_ignore: bool = False,
        ignore_empty_gt: bool = False,
        min_img_size: int = 32,
    ) -> None:
        """Keep the settings, and start with empty lists.

        Args:
            bbox_yxyx: boxes as yxyx, which every transform here expects; otherwise xyxy.
            has_labels: False for a split without annotations.
            include_masks: for the subclass; nothing here reads masks.
            include_bboxes_ignore: for the subclass: keep ignore regions.
            ignore_empty_gt: for the subclass: leave out images without objects.
            min_img_size: for the subclass: leave out images with a side shorter than this, in pixels.
        """
        self.yxyx = bbox_yxyx
        self.has_labels = has_labels
        self.include_masks = include_masks
        self.include_bboxes_ignore = include_bboxes_ignore
        self.ignore_empty_gt = ignore_empty_gt
        self.min_img_size = min_img_size
        self.label_offset = 1
        self.cat_names: list[str] = []
        self.cat_ids: list[Any] = []
        self.cat_id_to_label: dict[Any, int] = {}
        self.img_ids: list[Any] = []
        self.img_ids_invalid: list[Any] = []
        self.img_infos: list[dict[str, Any]] = []

    @property
    def cat_dicts(self) -> list[dict[str, Any]]:
        """[{'name', 'id'}] with the target label as id, for evaluators in the style of TF models."""
        labels = self.cat_id_to_label
        return [
            {"name": name, "id": labels[cat_id] if labels else cat_id}
            for name, cat_id in zip(self.cat_names, self.cat_ids, strict=True)
        ]

    @property
    def max_label(self) -> int:
        """The highest target label: the least number of classes a model needs. 0 without categories."""
        return max(self.cat_id_to_label.values() or self.cat_ids, default=0)
