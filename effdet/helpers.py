"""Load weights under the names the public package effdet has for it.

Lives here: `load_pretrained` (an address or a path) and `load_checkpoint`, thin. The work is in `effdet.checkpoint`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from torch import nn

from effdet.checkpoint.download import fetch
from effdet.checkpoint.manager import (
    CheckpointError,
    KeyReport,
    extract_state_dict,
    load_checkpoint_file,
    load_state_dict_report,
)

_logger = logging.getLogger(__name__)

StateDict = dict[str, torch.Tensor]


def load_pretrained(
    model: nn.Module,
    url: str | os.PathLike[str],
    filter_fn: Callable[[StateDict], StateDict] | None = None,
    strict: bool = True,
) -> KeyReport | None:
    """Load published weights into a model, from an address or from a file; a path never touches the network.

    Averaged (EMA) weights are preferred where the file has them.

    Args:
        model: the model; changed in place.
        url: an http(s) address, kept in torch.hub's cache and checked against the hash in its name, or a local path.
        filter_fn: changes the state dict before it is fitted, for example to drop a head.
        strict: refuse weights that do not fit in every name and shape; otherwise load those that do and log the others.

    Returns:
        What was loaded and what was not; None for an empty `url` (no published weights), which is logged as a warning.

    Raises:
        CheckpointError: not downloadable, damaged, or not fitting; the text names the place to put the file by hand.
    """
    if not url:
        _logger.warning("no published weights are known for this model: it keeps its initial weights")
        return None
    address = os.fspath(url)
    parts = urlsplit(address)
    if parts.scheme in ("http", "https"):
        path = fetch(address)
    else:
        path = Path(unquote(parts.path)) if parts.scheme == "file" else Path(address).expanduser()
    return _load_into(model, path, use_ema=None, strict=strict, filter_fn=filter_fn)


def load_checkpoint(
    model: nn.Module,
    checkpoint_path: str | os.PathLike[str],
    use_ema: bool | None = None,
    device: torch.device | str = "cpu",
    strict: bool = True,
    remap: bool = False,
    filter_fn: Callable[[StateDict, nn.Module], StateDict] | None = None,
    weights_only: bool = True,
) -> KeyReport:
    """Load a checkpoint's weights into a model.

    The arguments are those of timm's function, which effdet exported under this name.

    Args:
        model: the model, bare or wrapped; changed in place.
        checkpoint_path: the file.
        use_ema: None for the averaged weights if there are any, True for the averaged ones or an error, False for the
            trained ones.
        device: where the file's tensors go before they are copied into the model.
        strict: as in `load_pretrained`.
        remap: take the file's tensors in their order, whatever their names, reshaped where only the shape differs.
        filter_fn: maps state dict and model to the state dict to load; not asked with `remap`.
        weights_only: True; a file is never read in a way that could run code.

    Returns:
        What was loaded and what was not; `missing_keys` and `unexpected_keys` too, and unpacked into these two.

    Raises:
        CheckpointError: unreadable, without the weights asked for, or not fitting.
        ValueError: `weights_only` is False.
    """
    if not weights_only:
        raise ValueError("weights_only=False would run code from the file: save the state dict alone and load that")
    convert = (lambda state: _rename_in_order(state, model)) if remap else filter_fn and (lambda s: filter_fn(s, model))
    return _load_into(model, Path(checkpoint_path), use_ema, strict, convert, device)


def _rename_in_order(state_dict: StateDict, model: nn.Module) -> StateDict:
    own = model.state_dict()
    if [tensor.numel() for tensor in state_dict.values()] != [tensor.numel() for tensor in own.values()]:
        raise CheckpointError(
            f"remap needs tensors of the same sizes in the same order; the file has {len(state_dict)} tensors, the "
            f"model {len(own)}: load by name instead."
        )
    return {key: tensor.reshape(own[key].shape) for key, tensor in zip(own, state_dict.values(), strict=True)}


def _load_into(
    model: nn.Module,
    path: Path,
    use_ema: bool | None,
    strict: bool,
    filter_fn: Callable[[StateDict], StateDict] | None = None,
    device: torch.device | str = "cpu",
) -> KeyReport:
    """Load a file's weights into a model, log what fitted, and name the file in every error."""
    payload = load_checkpoint_file(path, device)
    try:
        state_dict = extract_state_dict(payload, use_ema=use_ema)
        if filter_fn is not None:
            state_dict = filter_fn(state_dict)
        report = load_state_dict_report(model, state_dict, strict=strict)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    level = logging.INFO if report.complete else logging.WARNING
    for line in report.lines():
        _logger.log(level, "%s: %s", path, line)
    return report
