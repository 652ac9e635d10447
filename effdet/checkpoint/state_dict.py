"""Find the weights in a loaded checkpoint and fit them to a model.

Lives here: state dicts in memory. Files are in `effdet/checkpoint/io.py`; making models is in `effdet/factory.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .io import CheckpointError

_RAW_KEYS = ("state_dict", "model", "model_state_dict")  # names trainers store weights under, the first found counts
_EMA_KEYS = ("state_dict_ema", "model_ema")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")  # DistributedDataParallel, torch.compile, a DetBench
_BENCH_PREFIXES = ("anchors.", "anchor_labeler.")  # a DetBench's own buffers: computed from the config, never loaded


def _is_weights(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(item, torch.Tensor) for item in value.values())


def _unwrapped(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Strip the prefixes of wrappers and drop a bench's own buffers; also return the prefixes, outermost first."""
    state = dict(state_dict)
    prefixes: list[str] = []
    while True:
        state = {key: value for key, value in state.items() if not key.startswith(_BENCH_PREFIXES)}
        prefix = next((p for p in _WRAPPER_PREFIXES if state and all(key.startswith(p) for key in state)), None)
        if prefix is None:
            return state, prefixes
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        prefixes.append(prefix)


def extract_state_dict(payload: Mapping[str, Any], use_ema: bool | None = False) -> dict[str, torch.Tensor]:
    """Find the weights in a loaded checkpoint, under the bare model's names.

    Args:
        payload: what `load_checkpoint_file` returned: a trainer's checkpoint, or the weights themselves.
        use_ema: False for the trained weights, True for the averaged ones, None for the averaged ones if there are any.

    Returns:
        name -> tensor, without the prefixes "module.", "_orig_mod." and "model.", without a bench's anchors.

    Raises:
        CheckpointError: the kind asked for is not there; says what is.
    """
    raw = next((key for key in _RAW_KEYS if _is_weights(payload.get(key))), None)
    ema = next((key for key in _EMA_KEYS if _is_weights(payload.get(key))), None)
    if raw is None and ema is None and _is_weights(payload):
        if use_ema:
            raise CheckpointError(
                f"The file is a plain set of {len(payload)} weights without averaged (EMA) ones; load without use_ema."
            )
        return _unwrapped(payload)[0]
    chosen = (ema or raw) if use_ema is None else ema if use_ema else raw
    if chosen is None:
        wanted = f"averaged (EMA) weights ({', '.join(_EMA_KEYS)})" if use_ema else f"weights ({', '.join(_RAW_KEYS)})"
        there = ", ".join(map(str, list(payload)[:12])) or "nothing"
        remedy = "load it without use_ema" if raw else "load it with use_ema=True" if ema else "give one that has them"
        raise CheckpointError(f"The checkpoint holds no {wanted}, it holds: {there}; {remedy}.")
    return _unwrapped(payload[chosen])[0]


def extract_score_threshold(payload: Mapping[str, Any], use_ema: bool | None = None) -> dict[str, Any] | None:
    """Return the recommended score thresholds of a loaded checkpoint (see manager.py); arguments as above.

    None where there are none, or where they are those of the averaged weights and the trained ones are asked for.
    """
    of_others = use_ema is False and any(key in payload for key in _EMA_KEYS)
    return None if of_others else payload.get("score_threshold")


def explain_bare_backbone(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Say what the file of an image classifier is and which flag takes it; empty for weights of a detector."""
    if any(key.startswith(("backbone.", "fpn.", "class_net.", "box_net.")) for key in state_dict):
        return ""
    takes_images = any(value.dim() == 4 and value.shape[1] == 3 for value in state_dict.values())
    return (
        f"the file holds the weights of a bare backbone ({len(state_dict)} tensors such as {next(iter(state_dict))}), "
        "not of a detector: give it by --pretrained-backbone FILE"
        if takes_images
        else ""
    )


@dataclass(frozen=True)
class KeyReport:
    """Say which tensors of a file went into a model and which did not.

    `loaded`, `missing` (in the model only) and `unexpected` (in the file only) are names; `mismatched` are
    (name, shape in the file, shape in the model).
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Return True when file and model have the same tensors."""
        return not (self.missing or self.unexpected or self.mismatched)

    @property
    def missing_keys(self) -> list[str]:
        """Torch's name of `missing`."""
        return self.missing

    @property
    def unexpected_keys(self) -> list[str]:
        """Torch's name of `unexpected`."""
        return self.unexpected

    def __iter__(self) -> Iterator[list[str]]:
        """Unpack as torch's result of load_state_dict does: missing, unexpected."""
        return iter((self.missing, self.unexpected))

    def differences(self, limit: int = 3) -> list[str]:
        """Word each kind of difference with its count and first `limit` names; empty when there is none."""
        shapes = [f"{key}: file {_shape(in_file)}, model {_shape(own)}" for key, in_file, own in self.mismatched]
        kinds = (
            ("of another shape", shapes),
            ("missing in the file", self.missing),
            ("unknown to the model", self.unexpected),
        )
        return [f"{len(n)} {what} ({'; '.join(n[:limit])}{'; ...' * (len(n) > limit)})" for what, n in kinds if n]

    def lines(self, limit: int = 10) -> list[str]:
        """Return the report for a log: the count of tensors loaded, then a line for each kind of difference."""
        return [f"{len(self.loaded)} tensors loaded", *self.differences(limit)]


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def load_state_dict_report(model: nn.Module, state_dict: Mapping[str, torch.Tensor], strict: bool = True) -> KeyReport:
    """Copy weights into a model by name and shape and report what fitted.

    Wrappers (DistributedDataParallel, torch.compile, DetBench) are looked through on both sides. BatchNorm's
    `num_batches_tracked`, which old files lack, may be missing: it keeps the model's value and is not reported.

    Args:
        model: the model, on any device; changed in place.
        state_dict: name -> tensor.
        strict: refuse any difference before anything is copied; if False load every tensor that fits.

    Returns:
        The report; `complete` under strict.

    Raises:
        CheckpointError: strict and something differs, or nothing at all fits; counts, first names and the remedy.
    """
    source, _ = _unwrapped(state_dict)
    for prefix in _unwrapped(model.state_dict())[1]:
        model = getattr(model, prefix.rstrip("."))
    target = model.state_dict()
    both = [key for key in target if key in source]
    fits = {key: source[key] for key in both if target[key].shape == source[key].shape}
    report = KeyReport(
        loaded=list(fits),
        missing=[key for key in target if key not in source and not key.endswith("num_batches_tracked")],
        unexpected=[key for key in source if key not in target],
        mismatched=[(key, tuple(source[key].shape), tuple(target[key].shape)) for key in both if key not in fits],
    )
    if (strict and not report.complete) or (target and not fits):
        if hasattr(model, "backbone") and (bare := explain_bare_backbone(source)):
            raise CheckpointError(f"The weights do not fit the model: {bare}.")
        partly = f" or load only the {len(fits)} tensors that fit with strict=False" if strict and fits else ""
        raise CheckpointError(
            f"The weights do not fit the model: {', '.join(report.differences()) or 'the file holds none'}. "
            f"Make the model with the name, class count and options the weights were made with{partly}."
        )
    model.load_state_dict(fits, strict=False)
    return report
