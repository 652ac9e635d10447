"""The published APs are those of models that have published weights."""

from __future__ import annotations

from effdet.checkpoint.published import AP_VAL2017, COCO_VAL_IMAGES, compare_with_published
from effdet.config.model_config import efficientdet_model_param_dict


def test_each_has_published_weights():
    published = {name for name, row in efficientdet_model_param_dict.items() if row.get("url")}
    assert set(AP_VAL2017) == published
    assert all(0.2 < ap < 0.6 for ap in AP_VAL2017.values())


def test_the_line_has_both_numbers_and_says_when_the_images_are_others():
    line = compare_with_published("tf_efficientdet_d0", 0.3405, COCO_VAL_IMAGES)
    assert "0.342" in line and "0.341" in line and "-0.002" in line and "images" not in line
    assert "72 images" in compare_with_published("tf_efficientdet_d0", 0.5, 72)
    assert compare_with_published("efficientdet_d5", 0.5, 72) is None
