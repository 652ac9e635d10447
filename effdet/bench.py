"""The model with what a task needs around it: loss for training, post-processing for prediction."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effdet.ops.nms import (
    generate_detections,  # noqa: F401  (effdet has it here)
    make_detections,
    npu_nms,
    select_candidates,
)
from effdet.runtime import device as device_layer
from effdet.runtime.distributed import all_reduce_sum, world_size

from .anchors import AnchorLabeler, Anchors
from .loss import DetectionLoss, check_class_targets

_LOSSES = ("loss", "class_loss", "box_loss")


class _DetBench(nn.Module):
    """A model and its anchors; what the two benches share."""

    def __init__(self, model: nn.Module, nms: str, drop_empty: bool = False) -> None:
        super().__init__()
        self.drop_empty = drop_empty
        self.model = model
        config = model.config
        self.config = config
        self.num_levels = config.num_levels
        self.num_classes = config.num_classes
        self.anchors = Anchors.from_config(config)
        built_for = getattr(model, "image_size", self.anchors.image_size)
        if built_for != self.anchors.image_size:
            raise ValueError(
                f"config.image_size is {self.anchors.image_size}, but the network was built for images of "
                f"{built_for} (height, width): set image_size before building the network."
            )
        self.input_sizes = [self.anchors.image_size]  # that the network may be changed to; see head_outputs
        self.max_detection_points = config.max_detection_points
        self.max_det_per_image = config.max_det_per_image
        self.soft_nms = config.soft_nms
        self.nms = nms
        self.nms_operator: Callable[..., tuple[Tensor, ...]] | None = None
        if nms not in ("auto", "exact", "host"):
            if self.soft_nms:
                raise ValueError(f"Soft-NMS and the device's own NMS ('{nms}') exclude each other: choose one.")
            self.nms_operator = device_layer.nms_operator(nms, _device_of(model), self.max_det_per_image)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a pickled state over; one of effdet 0.4.1, which has other attributes, is built anew."""
        super().__setstate__(state)
        if "input_sizes" in state:
            return
        if isinstance(self, DetBenchTrain):
            DetBenchTrain.__init__(self, self.model, create_labeler=state["anchor_labeler"] is not None)
        else:
            DetBenchPredict.__init__(self, self.model)
        for name in ("max_detection_points", "max_det_per_image", "soft_nms"):
            setattr(self, name, state[name])
        self.to(_device_of(self.model)).train(state["training"])

    def head_outputs(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Run the model.

        Where benches share a network, it takes the input size of the one that runs it.

        Args:
            x: float [B, 3, H, W], normalised.

        Returns:
            Of each level, finest first: class logits [B, A * K, h, w], box deltas [B, A * 4, h, w].

        Raises:
            ValueError: the class head has another number of classes than the config said.
        """
        self._take_size(x)
        cls_outputs, box_outputs = self.model(x)
        channels, per_cell = cls_outputs[0].shape[1], self.anchors.get_anchors_per_location()
        if channels != per_cell * self.num_classes:
            raise ValueError(
                f"The class head gives {channels} values for each cell, but {per_cell} anchors with the "
                f"config's {self.num_classes} classes need {per_cell * self.num_classes}: before making "
                "the bench call model.reset_head(num_classes=...), or set config.num_classes (after "
                "set_config_writeable) when replacing class_net."
            )
        return cls_outputs, box_outputs

    def _take_size(self, x: Tensor) -> None:
        size = tuple(x.shape[-2:])
        if getattr(self.model, "input_size", size) != size and size in self.input_sizes:
            self.model.set_input_size(size)

    def post_process(
        self, cls_outputs: list[Tensor], box_outputs: list[Tensor], img_scale: Tensor | None, img_size: Tensor | None
    ) -> Tensor:
        """Turn head outputs into detections, in float32 also inside autocast.

        Args:
            cls_outputs: class logits [B, A * K, h, w] of each level.
            box_outputs: box deltas [B, A * 4, h, w] of each level.
            img_scale: [B] original pixels per input pixel; None leaves boxes in input pixels.
            img_size: [B, 2] original width and height to clip to; None does not clip.

        Returns:
            float32 [B, max_det_per_image, 6] as from `nms.make_detections`.
        """
        device = cls_outputs[0].device
        on_host = self.nms == "host" or (self.nms == "auto" and device_layer.few_launches_pay(device))
        with torch.autocast(device.type, enabled=False):
            logits, deltas, indices, classes = select_candidates(
                cls_outputs, box_outputs, self.num_classes, self.max_detection_points
            )
            suppress = (
                None if self.nms_operator is None else functools.partial(npu_nms, self.nms_operator, self.num_classes)
            )
            return make_detections(
                logits,
                deltas,
                self.anchors.boxes[indices],
                classes,
                img_scale,
                img_size,
                self.max_det_per_image,
                self.soft_nms,
                suppress,
                self.drop_empty,
                on_host,
            )


class DetBenchPredict(_DetBench):
    """Model and post-processing: images to detections."""

    def __init__(self, model: nn.Module, *, nms: str = "auto", drop_empty: bool = False) -> None:
        """Wrap a model.

        Args:
            model: an EfficientDet.
            nms: how overlapping boxes are suppressed, with equal results: 'exact' on the model's device; 'host' on the
                CPU, to which the candidates go in one copy and where the detections then are; 'npu' by an operator of
                Ascend's own, with the model on that device already; 'auto' is 'host' on NPUs and 'exact' elsewhere.
            drop_empty: see `nms.make_detections`; effdet keeps such boxes.

        Raises:
            ValueError: the config's image_size was changed after the network was built, an unknown `nms`, or the
                model's device has no such operator, or the operator does not take this model's settings.
        """
        super().__init__(model, nms, drop_empty)

    def forward(self, x: Tensor, img_info: Mapping[str, Tensor] | None = None) -> Tensor:
        """Detect objects.

        Args:
            x: float [B, 3, H, W], normalised.
            img_info: {'img_scale': [B] original pixels per input pixel, 'img_size': [B, 2] original (width, height)};
                without it boxes are in input pixels and not clipped.

        Returns:
            float32 [B, max_det_per_image, 6]: x_min, y_min, x_max, y_max, score, class from 1; zero rows as padding.

        Raises:
            ValueError: the class head does not have the config's number of classes.
        """
        info = img_info or {}
        return self.post_process(*self.head_outputs(x), info.get("img_scale"), info.get("img_size"))


class DetBenchTrain(_DetBench):
    """Model, labels and loss: images and ground truth to losses, with detections in eval mode."""

    def __init__(
        self,
        model: nn.Module,
        create_labeler: bool = True,
        *,
        ignore_regions: bool = False,
        input_sizes: Iterable[tuple[int, int]] = (),
        dense_targets: bool = False,
        normalize_over_ranks: bool = False,
        compile_backend: str = "",
    ) -> None:
        """Wrap a model.

        Args:
            model: an EfficientDet.
            create_labeler: make anchor labels here from boxes; otherwise the loader has put them into the target.
            ignore_regions: see `anchors.AnchorLabeler`.
            input_sizes: further (height, width) in pixels that batches may have; anchors and labels are those of the
                batch's size. They are made on the device that the model is on.
            dense_targets: see `loss.DetectionLoss`.
            normalize_over_ranks: in distributed training, normalise the loss by the positive anchors of all ranks, so
                that averaged gradients are those of one process with the whole batch.
            compile_backend: of torch.compile, such as 'inductor': compile network and loss of training steps, in one
                graph for each shape of a batch. Labels are made outside of it, and eval mode does not use it. '' does
                not compile.

        Raises:
            ValueError: the config's image_size was changed after the network was built, or there are further input
                sizes and no labeler, or the network cannot take such a size (EfficientDet.set_input_size).
        """
        super().__init__(model, "auto")
        for module in model.modules():
            if isinstance(module, nn.SiLU):
                module.inplace = False  # in place, autograd copies the input for the backward pass: one more pass
        self.anchor_labeler = (
            AnchorLabeler(self.anchors, self.num_classes, ignore_regions=ignore_regions) if create_labeler else None
        )
        self.loss_fn = DetectionLoss(model.config, dense_targets=dense_targets)
        self.normalize_over_ranks = normalize_over_ranks
        self._labels_checked = False
        self._labelers: dict[tuple[int, int], AnchorLabeler] = {}  # of further input sizes
        for size in input_sizes:
            self._add_size(size)
        if compile_backend:
            self._losses = torch.compile(self._losses, backend=compile_backend, dynamic=False)

    def _add_size(self, size: tuple[int, int]) -> None:
        if self.anchor_labeler is None:
            raise ValueError("Several input sizes need the labeler in the bench: build it with create_labeler=True.")
        base = self.anchors.image_size
        self.model.set_input_size(size)
        self.model.set_input_size(base)
        if size != base:
            anchors = Anchors.from_config(self.config, size).to(_device_of(self.model))
            self._labelers[size] = AnchorLabeler(
                anchors, self.num_classes, ignore_regions=self.anchor_labeler.ignore_regions
            )
        self.input_sizes.append(size)

    def forward(self, x: Tensor, target: Mapping[str, Any]) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            x: float [B, 3, H, W], normalised.
            target: 'bbox' float [B, M, 4] yxyx in input pixels and 'cls' [B, M] (1..K, -1 padding), or lists of each
                image's own boxes [n_i, 4] and classes [n_i]; or, without a labeler, 'label_cls_L', 'label_bbox_L' of
                each level and 'label_num_positives'. In eval mode also 'img_scale' [B] and 'img_size' [B, 2]; without
                them boxes stay in input pixels.

        Returns:
            'loss', 'class_loss', 'box_loss': scalars; in eval mode also 'detections' [B, max_det_per_image, 6].

        Raises:
            ValueError: the target lacks what is needed or has labels above num_classes, or the class head does not have
                the config's number of classes.
        """
        class_targets, box_targets, num_positives = self._labels(target, tuple(x.shape[-2:]))
        if not self._labels_checked:  # once, as an accelerator has to be waited for; on a host the loss always looks
            check_class_targets(class_targets, self.num_classes)
            self._labels_checked = True
        if self.normalize_over_ranks:
            # The loss adds 1 to the sum; ranks average their gradients, so each divides by its share of (total + 1).
            total = all_reduce_sum(num_positives.sum(dtype=torch.float32).reshape(1))
            num_positives = (total + 1) / world_size() - 1
        if self.training:
            self._take_size(x)  # a compiled graph must not change the network
            return dict(zip(_LOSSES, self._losses(x, class_targets, box_targets, num_positives), strict=True))
        cls_outputs, box_outputs = self.head_outputs(x)
        losses = self.loss_fn(cls_outputs, box_outputs, class_targets, box_targets, num_positives)
        detections = self.post_process(cls_outputs, box_outputs, target.get("img_scale"), target.get("img_size"))
        return dict(zip(_LOSSES, losses, strict=True)) | {"detections": detections}

    def _losses(
        self, x: Tensor, class_targets: Tensor, box_targets: Tensor, num_positives: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.loss_fn(*self.head_outputs(x), class_targets, box_targets, num_positives)

    def _labels(self, target: Mapping[str, Any], size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the targets of all anchors as `AnchorLabeler.assign` does, from boxes or from the loader's labels."""
        if self.anchor_labeler is not None:
            if "bbox" not in target or "cls" not in target:
                raise ValueError(f"The target needs 'bbox' and 'cls'; it has {sorted(target)}.")
            labeler = self._labelers.get(size, self.anchor_labeler)
            with torch.no_grad():
                if getattr(type(labeler), "batch_label_anchors", None) is AnchorLabeler.batch_label_anchors:
                    return labeler.assign(target["bbox"], target["cls"])
                return _join_levels(*labeler.batch_label_anchors(target["bbox"], target["cls"]))  # a user's own
        if "label_num_positives" not in target:
            raise ValueError(
                f"This bench has no labeler and the target has no labels, only {sorted(target)}: build "
                "the bench with create_labeler=True, or the loader with an anchor_labeler."
            )
        levels = range(self.num_levels)
        return _join_levels(
            [target[f"label_cls_{level}"] for level in levels],
            [target[f"label_bbox_{level}"] for level in levels],
            target["label_num_positives"],
        )


def _join_levels(
    class_targets: Sequence[Tensor], box_targets: Sequence[Tensor], num_positives: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Join the levels of `batch_label_anchors` as `AnchorLabeler.assign` has them."""
    return (
        torch.cat([level.flatten(1) for level in class_targets], 1),
        torch.cat([level.flatten(1) for level in box_targets], 1).unflatten(1, (-1, 4)),
        num_positives,
    )


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def unwrap_bench(model: Any) -> nn.Module:
    """Return the network inside a bench, an EMA or a DistributedDataParallel wrapper."""
    while True:
        if hasattr(model, "module"):
            model = model.module
        elif hasattr(model, "model"):
            model = model.model
        else:
            return model


def _post_process(
    cls_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    num_levels: int,
    num_classes: int,
    max_detection_points: int = 5000,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Select candidates: effdet's form of `nms.select_candidates`, with logits [B, k, 1]."""
    logits, deltas, indices, classes = select_candidates(
        cls_outputs[:num_levels], box_outputs[:num_levels], num_classes, max_detection_points
    )
    return logits.unsqueeze(-1), deltas, indices, classes


def _batch_detection(
    batch_size: int,
    class_out: Tensor,
    box_out: Tensor,
    anchor_boxes: Tensor,
    indices: Tensor,
    classes: Tensor,
    img_scale: Tensor | None = None,
    img_size: Tensor | None = None,
    max_det_per_image: int = 100,
    soft_nms: bool = False,
) -> Tensor:
    """Make detections of what `_post_process` returns: effdet's form of `nms.make_detections`."""
    return make_detections(
        class_out.reshape(batch_size, -1),
        box_out,
        anchor_boxes[indices],
        classes,
        img_scale,
        img_size,
        max_det_per_image,
        soft_nms,
    )
