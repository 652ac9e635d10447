"""Average the weights of several checkpoints of one model: `python -m effdet.commands.average A B --out FILE`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from effdet.checkpoint.io import ensure_writable
from effdet.checkpoint.manager import CheckpointError, extract_state_dict, load_checkpoint_file, save_checkpoint
from effdet.runtime.console import add_ema_argument, make_tool_parser, one_line_errors

_logger = logging.getLogger(__name__)

# What a checkpoint says about its model, as far as prediction and fine-tuning need it.
DESCRIPTION_KEYS = ("version", "arch", "model_config", "category_map", "image_size")


def describe_model(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a loaded checkpoint that says which model it is and what its classes are."""
    return {key: payload[key] for key in DESCRIPTION_KEYS if key in payload}


def average_checkpoints(
    paths: Sequence[str], weights: Sequence[float] | None = None, use_ema: bool | None = None
) -> dict[str, Any]:
    """Average the weights of checkpoints.

    Args:
        paths: files of one model with the same classes.
        weights: one positive number for each file; None: all count the same.
        use_ema: True for the averaged (EMA) weights of each, False for the trained ones, None for the averaged ones if
            there are any.

    Returns:
        A checkpoint with the average as `state_dict` and the first file's description of the model. Whole numbers (the
        batch counters of batch norm) are the first file's.

    Raises:
        CheckpointError: unreadable files, or files of different models; ValueError: weights that do not fit.
    """
    weights = [1.0] * len(paths) if weights is None else list(weights)
    if not paths or len(weights) != len(paths) or not all(math.isfinite(w) and w > 0 for w in weights):
        raise ValueError(
            f"{len(paths)} checkpoints with the weights {weights}: give at least one file and one "
            "positive weight for each"
        )
    total = sum(weights)
    result: dict[str, Any] = {}
    average: dict[str, torch.Tensor] = {}
    for path, weight in zip(paths, weights, strict=True):
        payload = load_checkpoint_file(path)
        state = extract_state_dict(payload, use_ema)
        if not average:
            result = describe_model(payload)
            average = {key: value.double() * 0 if value.is_floating_point() else value for key, value in state.items()}
            dtypes = {key: value.dtype for key, value in state.items()}
        _check_same_model(path, paths[0], payload, result, state, average)
        for key, value in state.items():
            if value.is_floating_point():
                average[key] += value.double() * (weight / total)
    return {
        **result,
        "state_dict": {key: value.to(dtypes[key]) for key, value in average.items()},
        "averaged_from": [str(path) for path in paths],
        "averaging_weights": weights,
    }


def _check_same_model(
    path: str,
    first: str,
    payload: Mapping[str, Any],
    description: Mapping[str, Any],
    state: Mapping[str, torch.Tensor],
    average: Mapping[str, torch.Tensor],
) -> None:
    other = sorted(set(state) ^ set(average))
    other += [key for key in state if key in average and state[key].shape != average[key].shape]
    if other:
        raise CheckpointError(
            f"{path} is of another model than {first}: {len(other)} tensors differ in name or shape, "
            f"such as {other[0]}. Average checkpoints of one model only."
        )
    for key in ("category_map", "arch"):
        if payload.get(key) != description.get(key):
            raise CheckpointError(
                f"{path} has another {key} than {first}: {payload.get(key)} and "
                f"{description.get(key)}. Average checkpoints of one data set only."
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = make_tool_parser(
        "effdet.commands.average",
        "Average the weights of checkpoints of one model.",
        "a.pth.tar b.pth.tar --weights 2 1 --out average.pth.tar\nrun/checkpoint-*.pth.tar --best 3 --out avg.pth.tar",
    )
    parser.add_argument("checkpoints", nargs="+", help="files of one model with the same classes")
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--weights", type=float, nargs="+", metavar="X", help="one for each file (default: equal)")
    parser.add_argument("--best", type=int, metavar="N", help="only the N with the best stored metric")
    add_ema_argument(parser)
    args = parser.parse_args(arguments)
    with one_line_errors("effdet.commands.average"):
        ensure_writable(args.out, "--out")
        paths = args.checkpoints
        if args.best is not None:
            paths = _best(paths, args.best, args.weights)
        payload = average_checkpoints(paths, args.weights, args.ema)
        save_checkpoint(args.out, payload)
    for path, weight in zip(paths, payload["averaging_weights"], strict=True):
        _logger.info("%g x %s", weight, path)
    _logger.info("%s: the average", args.out)


def _best(paths: Sequence[str], count: int, weights: Sequence[float] | None) -> list[str]:
    if weights is not None or count < 1:
        raise ValueError("--best N, from 1, chooses the files by itself: leave out --weights")
    metrics = {path: load_checkpoint_file(path).get("metric") for path in paths}
    unknown = [path for path, metric in metrics.items() if metric is None]
    if unknown:
        raise ValueError(f"{unknown[0]} holds no metric to rank by: leave out --best or that file")
    return sorted(metrics, key=lambda path: -metrics[path])[:count]


if __name__ == "__main__":
    main()
