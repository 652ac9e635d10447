"""The suppression of overlapping boxes as standard ONNX operators, appended to a graph of candidates.

NonMaxSuppression returns as many rows as it keeps. A mask over the candidates brings them back to a fixed shape: what
is not kept gets the score -1, and TopK takes a fixed number of the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .nms import IOU_THRESHOLD


def append_nms(model: Any, num_classes: int, max_det: int) -> None:
    """Replace a graph's outputs `boxes`, `scores`, `classes` by one output `detections`.

    Args:
        model: onnx.ModelProto with the outputs boxes float [B, k, 4] xyxy, scores float [B, k] above 0, classes int64
            [B, k] from 0; changed in place. k must be at least `max_det`.
        num_classes: K.
        max_det: rows of the result.

    The new output is float [B, max_det, 6]: x_min, y_min, x_max, y_max, score, class from 1; zero rows as padding.
    """
    from onnx import NodeProto, TensorProto, helper, numpy_helper

    graph = model.graph
    batch = graph.output[0].type.tensor_type.shape.dim[0]
    batch_size = batch.dim_param or batch.dim_value
    nodes: list[NodeProto] = []
    constants: list[TensorProto] = []

    def constant(name: str, value: Any, dtype: type = np.int64) -> str:
        constants.append(numpy_helper.from_array(np.array(value, dtype=dtype), f"nms_{name}"))
        return f"nms_{name}"

    def node(operator: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        named = [output if output == "detections" else f"nms_{output}" for output in outputs]
        nodes.append(helper.make_node(operator, inputs, named, name=f"nms_node_{len(nodes)}", **attributes))
        return named[0]

    axis_1, axis_2 = constant("axis_1", [1]), constant("axis_2", [2])
    zero, minus_one = constant("zero", 0.0, np.float32), constant("minus_one", -1.0, np.float32)
    # Scores by class [B, K, k], 0 where a candidate is of another class: those never reach the threshold.
    same = node(
        "Equal",
        [
            node("Unsqueeze", ["classes", axis_1], "classes_row"),
            constant("class_numbers", np.arange(num_classes).reshape(1, -1, 1)),
        ],
        "same_class",
    )
    by_class = node("Where", [same, node("Unsqueeze", ["scores", axis_1], "scores_row"), zero], "scores_by_class")
    selected = node(
        "NonMaxSuppression",
        [
            "boxes",
            by_class,
            constant("max_det", [max_det]),
            constant("iou", [IOU_THRESHOLD], np.float32),
            constant("min_score", [0.0], np.float32),
        ],
        "selected",
    )  # [n, 3]
    where = node("Gather", [selected, constant("columns", [0, 2])], "kept_at", axis=1)
    nothing = node("Expand", [minus_one, node("Shape", ["scores"], "scores_shape")], "nothing_kept")
    kept = node("ScatterND", [nothing, where, node("GatherND", ["scores", where], "kept_values")], "kept_scores")
    best = node("TopK", [kept, constant("row_count", [max_det])], "best_scores", "best_index", axis=1)
    at = node("Unsqueeze", ["nms_best_index", axis_2], "best_index_column")
    best_boxes = node("GatherND", ["boxes", at], "best_boxes", batch_dims=1)
    best_classes = node("GatherElements", ["classes", "nms_best_index"], "best_classes", axis=1)
    numbers = node(
        "Cast",
        [node("Add", [best_classes, constant("one", 1)], "class_from_1")],
        "class_column_flat",
        to=TensorProto.FLOAT,
    )
    score_column = node("Unsqueeze", [best, axis_2], "score_column")
    rows = node(
        "Concat", [best_boxes, score_column, node("Unsqueeze", [numbers, axis_2], "class_column")], "rows", axis=2
    )
    node("Where", [node("Greater", [score_column, zero], "is_kept"), rows, zero], "detections")

    graph.node.extend(nodes)
    graph.initializer.extend(constants)
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("detections", TensorProto.FLOAT, [batch_size, max_det, 6]))
