"""Keep of a checkpoint what prediction needs: `python -m effdet.commands.clean FILE --out FILE`."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effdet.checkpoint.io import ensure_writable
from effdet.checkpoint.manager import CheckpointError, extract_state_dict, load_checkpoint_file, save_checkpoint
from effdet.checkpoint.state_dict import extract_score_threshold
from effdet.runtime.console import add_ema_argument, make_tool_parser, one_line_errors

from .average import describe_model

_logger = logging.getLogger(__name__)
_HASH_LENGTH = 8


def clean_checkpoint(path: str, use_ema: bool | None = None) -> dict[str, Any]:
    """Reduce a checkpoint to one set of weights and what it says about its model: classes, input size, configuration.

    Args:
        path: the file.
        use_ema: True for the averaged weights, False for the trained ones, None for the averaged ones if there are any.

    Returns:
        The checkpoint, without the optimizer's and the run's state and without file paths.

    Raises:
        CheckpointError: unreadable, or without the weights asked for.
    """
    payload = load_checkpoint_file(path)
    cleaned = {**describe_model(payload), "state_dict": extract_state_dict(payload, use_ema)}
    threshold = extract_score_threshold(payload, use_ema)
    return cleaned if threshold is None else {**cleaned, "score_threshold": threshold}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = make_tool_parser(
        "effdet.commands.clean",
        "Keep of a checkpoint what prediction needs.",
        "model_best.pth.tar --out detector.pth --hash",
    )
    parser.add_argument("checkpoint", help="a checkpoint of train.py, or of effdet's or timm's trainer")
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--weights-only",
        action="store_true",
        help="a plain state dict without class names and configuration, as published files are",
    )
    parser.add_argument(
        "--hash", action="store_true", help="put the start of the file's SHA-256 into its name, for checking a download"
    )
    add_ema_argument(parser)
    args = parser.parse_args(arguments)
    path = Path(args.out)
    with one_line_errors("effdet.commands.clean"):
        ensure_writable(args.out, "--out")
        if path.exists() and path.samefile(args.checkpoint):
            raise CheckpointError(
                f"{path} is the checkpoint itself, whose training state would be lost: name another --out"
            )
        cleaned = clean_checkpoint(args.checkpoint, args.ema)
        save_checkpoint(path, cleaned["state_dict"] if args.weights_only else cleaned)
        if args.hash:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:_HASH_LENGTH]
            stem, suffixes = path.name.partition(".")[::2]
            named = path.with_name(f"{stem}-{digest}.{suffixes}" if suffixes else f"{stem}-{digest}")
            os.replace(path, named)
            path = named
    before, after = (Path(file).stat().st_size / 1e6 for file in (args.checkpoint, path))
    _logger.info("%s: %.1f MB of %.1f MB", path, after, before)


if __name__ == "__main__":
    main()
