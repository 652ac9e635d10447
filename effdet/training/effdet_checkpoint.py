"""A checkpoint of effdet 0.4.1's trainer (timm's CheckpointSaver), put into the form that resume.py continues from.

What it has: weights, averaged weights, optimizer, epoch, the arguments of its run, the loss scale of float16. Random
numbers, the position within an epoch and the best metric so far are not in it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from effdet.checkpoint.manager import CheckpointError

from .engine import Training

_logger = logging.getLogger(__name__)

_FUSED = {"fusedmomentum": "momentum", "fusedsgd": "sgd", "nesterov": "sgd"}  # other names of the same steps


def is_effdets(payload: Mapping[str, Any]) -> bool:
    """Tell whether a checkpoint with an optimizer was written by another trainer than ours."""
    return "optimizer" in payload and "config" not in payload


def convert(payload: Mapping[str, Any], source: str, training: Training, opt: str) -> dict[str, Any]:
    """Return a checkpoint of effdet's as one of ours, as far as it goes.

    Args:
        payload: what the file holds.
        source: its name, for messages.
        training: the run that goes on with it, built.
        opt: the optimizer's name in this run.

    Raises:
        CheckpointError: the optimizer is another, or its state does not fit the model's parameters.
    """
    arguments = payload.get("args")
    stored = str((arguments if isinstance(arguments, dict) else {}).get("opt") or opt).lower()
    if _FUSED.get(stored, stored) != _FUSED.get(opt.lower(), opt.lower()):
        raise CheckpointError(
            f"{source} was trained with --opt {stored}, but this run has --opt {opt}: give --opt {stored}, or start "
            "anew with --initial-checkpoint, which takes the weights alone."
        )
    epoch = int(payload.get("epoch", -1)) + 1
    updates = epoch * training.schedule.updates_per_epoch
    ours = {
        **payload,
        "optimizer": _arrange(payload["optimizer"], source, training),
        "schedule": {"updates": updates},
        "step": updates * training.grad_accum,
    }
    if "scale" in payload.get("amp_scaler", {}):
        ours["scaler"] = {"skipped": 0, "dynamic_scale": payload["amp_scaler"]}
    if training.ema is not None and "state_dict_ema" in payload:
        past_warmup = int(10 / (1 - training.ema.decay))  # effdet's average has none, and its updates are not counted
        ours["ema"] = {"updates": past_warmup, "share_of_init": 0.0}
    _logger.warning(
        "%s is of effdet 0.4.1's trainer: weights, averages, optimizer and epoch go on; rate, schedule and batch are "
        "those of this run's flags, and random numbers and the best metric start anew",
        source,
    )
    return ours


def _arrange(stored: Any, source: str, training: Training) -> dict[str, Any]:
    """Return an optimizer's state with our groups in our order.

    timm's first group has the parameters without weight decay; without any decay it makes one group of all, in the
    model's order. Which it is shows by the groups' sizes and the shapes of what belongs to each parameter.

    Raises:
        CheckpointError: neither.
    """
    own = training.optimizer.state_dict()["param_groups"]
    indices = [index for group in own for index in group["params"]]
    parameters = [parameter for group in training.optimizer.param_groups for parameter in group["params"]]
    shapes = {index: parameter.shape for index, parameter in zip(indices, parameters, strict=True)}
    by_id = {id(parameter): index for index, parameter in zip(indices, parameters, strict=True)}
    try:
        groups = [list(group["params"]) for group in stored["param_groups"]]
        states = dict(stored["state"])
    except (KeyError, TypeError) as error:
        raise _does_not_fit(source, f"no groups of parameters: {error}") from error
    in_model = [by_id[id(parameter)] for parameter in training.model.parameters() if id(parameter) in by_id]
    for order in ([g["params"] for g in own], [g["params"] for g in reversed(own)], [in_model]):
        if [len(group) for group in groups] != [len(group) for group in order]:
            continue
        to_ours = dict(zip(sum(groups, []), sum(order, []), strict=True))
        moved = {to_ours[index]: state for index, state in states.items() if index in to_ours}
        if all(_fits(state, shapes[index]) for index, state in moved.items()):
            return {"state": moved, "param_groups": own}
    counts = " and ".join(str(len(group)) for group in groups)
    raise _does_not_fit(
        source, f"groups of {counts} parameters, here {' and '.join(str(len(g['params'])) for g in own)}"
    )


def _fits(state: Mapping[str, Any], shape: torch.Size) -> bool:
    return all(value.ndim == 0 or value.shape == shape for value in state.values() if isinstance(value, torch.Tensor))


def _does_not_fit(source: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{source} holds the optimizer of another trainer or of other weights ({what}): start anew with "
        "--initial-checkpoint, which takes the weights alone."
    )
