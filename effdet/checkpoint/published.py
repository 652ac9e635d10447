"""What the published weights are said to reach on COCO val2017, for comparison with one's own evaluation of them."""

from __future__ import annotations

COCO_VAL_IMAGES = 5000

# Source: table "Models", column "mAP (val2017)", in the README of github.com/rwightman/efficientdet-pytorch: its own
# evaluations of the same files, with normal NMS. Weights without a row there are absent.
AP_VAL2017 = {
    "cspdarkdet53m": 0.452,
    "cspresdet50": 0.432,
    "cspresdext50pan": 0.412,
    "efficientdet_d0": 0.336,
    "efficientdet_d1": 0.394,
    "efficientdet_q0": 0.357,
    "efficientdet_q1": 0.409,
    "efficientdet_q2": 0.431,
    "efficientdetv2_ds": 0.501,
    "efficientdetv2_dt": 0.461,
    "resdet50": 0.416,
    "tf_efficientdet_d0": 0.342,
    "tf_efficientdet_d0_ap": 0.348,
    "tf_efficientdet_d1": 0.401,
    "tf_efficientdet_d1_ap": 0.408,
    "tf_efficientdet_d2": 0.434,
    "tf_efficientdet_d2_ap": 0.442,
    "tf_efficientdet_d3": 0.471,
    "tf_efficientdet_d3_ap": 0.477,
    "tf_efficientdet_d4": 0.492,
    "tf_efficientdet_d4_ap": 0.502,
    "tf_efficientdet_d5": 0.512,
    "tf_efficientdet_d5_ap": 0.521,
    "tf_efficientdet_d6": 0.520,
    "tf_efficientdet_d7": 0.531,
    "tf_efficientdet_d7x": 0.543,
    "tf_efficientdet_lite0": 0.271,
    "tf_efficientdet_lite1": 0.322,
    "tf_efficientdet_lite2": 0.359,
    "tf_efficientdet_lite3": 0.396,
    "tf_efficientdet_lite3x": 0.436,
    "tf_efficientdet_lite4": 0.442,
}


def compare_with_published(name: str, ap: float, image_count: int) -> str | None:
    """Return a line with the published AP beside one's own; None for weights without a published one."""
    published = AP_VAL2017.get(name)
    if published is None:
        return None
    other = (
        "" if image_count == COCO_VAL_IMAGES else f", but these are {image_count} images and not its {COCO_VAL_IMAGES}"
    )
    return f"published AP of {name} on COCO val2017: {published:.3f}, here {ap:.3f} ({ap - published:+.3f}){other}"
