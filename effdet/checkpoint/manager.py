"""Say what a checkpoint holds, keep the best ones of a run, find the newest one, capture the random state.

Lives here: the format (below), which files a run keeps, the state of random generators; plus, by re-export, the two
parts underneath: `effdet/checkpoint/io.py` (files) and `effdet/checkpoint/state_dict.py` (fitting weights to a model).
Must not live here: building models (`effdet.factory`), a device's random generator (`effdet.runtime.device`).

A checkpoint is one file written by `torch.save` that holds a dict of tensors and plain types only (None, bool, int,
float, str, bytes, list, tuple, dict), so `torch.load(path, weights_only=True)` reads it without this package. The
trainer's has these keys; readers treat all but `state_dict` as optional:

    version         int, the format: CHECKPOINT_VERSION
    arch            str, the model's name, such as "tf_efficientdet_d0"
    state_dict      dict, name -> tensor: the trained weights, named as in the bare model
    state_dict_ema  dict, name -> tensor: the averaged weights; absent when none are kept
    ema             dict, the averager's counters
    optimizer, schedule, scaler   dict, their `state_dict()`
    ranks           list of a dict for each process: `rng` is its `rng_state()`, and more; see `effdet.training.resume`
    epoch           int, the last epoch that is complete in this file, from 0; training goes on at epoch + 1
    progress        dict, in recovery.pth.tar: how far epoch + 1 has come; see `effdet.training.resume`
    step            int, optimiser steps done so far
    metric          float or None, that epoch's ranking metric
    score_threshold dict or None, with the best F1 in that epoch's evaluation: `all` classes, and `classes` in their
                    order, None where that of all holds; absent when there was no evaluation
    best            dict, `CheckpointManager.state_dict()` including that epoch
    config          dict, the resolved training configuration
    model_config    dict, the model's configuration (classes, padding, anchors, ...)
    initial_weights str, what the run started from, in a line
    category_map    dict, the data set's category ids and names, in class order
    image_size      list of two int, height and width of the network's input in pixels
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .io import (
    CHECKPOINT_NAME,
    CheckpointError,
    CheckpointNotFoundError,
    load_checkpoint_file,
    remove_leftovers,
    replacing,
    save_checkpoint,
)
from .state_dict import KeyReport, extract_state_dict, load_state_dict_report

__all__ = [
    "CHECKPOINT_VERSION",
    "CheckpointError",
    "CheckpointManager",
    "CheckpointNotFoundError",
    "KeyReport",
    "extract_state_dict",
    "find_newest_checkpoint",
    "find_resumable",
    "load_checkpoint_file",
    "load_state_dict_report",
    "restore_rng_state",
    "rng_state",
    "save_checkpoint",
]

_logger = logging.getLogger(__name__)

CHECKPOINT_VERSION = 1
LAST_NAME = "last.pth.tar"
BEST_NAME = "model_best.pth.tar"
RECOVERY_NAME = "recovery.pth.tar"


class CheckpointManager:
    """Keep a run's checkpoints: the last, the best k, every n-th, and a name for the very best.

    Each epoch is written once; further names are hard links to it (copies where the file system has no links), and each
    name changes atomically. `last.pth.tar` changes last: a run killed in between resumes from the previous epoch with a
    record that agrees with it.

    Args:
        output_dir: the run's folder; made at the first save. What killed processes left half written is removed.
        keep_best: how many of the best epochs (the largest metrics) stay as `checkpoint-EPOCH.pth.tar`; 0 keeps none.
        save_every: also keep every epoch for which epoch + 1 is a multiple of this; 0 for none.

    Raises:
        ValueError: a negative count.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        keep_best: int = 10,
        save_every: int = 0,
    ) -> None:
        if keep_best < 0 or save_every < 0:
            raise ValueError(f"keep_best={keep_best} and save_every={save_every} must be 0 (none) or more.")
        self.output_dir = Path(output_dir)
        self.keep_best = keep_best
        self.save_every = save_every
        remove_leftovers(self.output_dir)
        self._best: tuple[float, int] | None = None  # stays when its epoch's own file goes: model_best remains
        self._ranking: list[tuple[float, int]] = []  # best first; (metric, epoch) of the files kept for their metric

    @property
    def best(self) -> tuple[float | None, int | None]:
        """Return the best (metric, epoch) so far; (None, None) before the first metric."""
        return self._best or (None, None)

    def path_of(self, epoch: int) -> Path:
        """Return the name under which an epoch is kept, whether it is or not."""
        return self.output_dir / f"checkpoint-{epoch}.pth.tar"

    def save(
        self, payload: Mapping[str, Any], epoch: int, metric: float | None = None
    ) -> tuple[float | None, int | None]:
        """Write the epoch's checkpoint under the names it earns and remove those that fell out of the best.

        Only files of this manager's own ranking, and the recovery file, are ever removed.

        Args:
            payload: as in the module's docstring; `epoch`, `metric` and `best` are filled in here.
            epoch: the epoch just completed, from 0.
            metric: its ranking metric; None when there was no evaluation. A NaN or an infinity is never among the best.

        Returns:
            The best (metric, epoch) including this one; (None, None) while there was no metric yet.

        Raises:
            TypeError, OSError: as `save_checkpoint`; the record of the best is then as before.
        """
        metric = None if metric is None else float(metric)
        ranked = None if metric is None or not math.isfinite(metric) else (metric, epoch)
        if metric is not None and ranked is None:
            _logger.warning("epoch %d has the metric %s: saved, but not ranked among the best", epoch, metric)

        ranking = [(m, e) for m, e in self._ranking if e != epoch and self.path_of(e).exists()]
        if ranked is not None:
            ranking.append(ranked)
            # A stable sort with the newest last: of two equal epochs the earlier stays ahead.
            ranking.sort(key=lambda entry: -entry[0])
        ranking, dropped = ranking[: self.keep_best], ranking[self.keep_best :]
        is_best = ranked is not None and (self._best is None or ranked[0] > self._best[0])
        best = ranked if is_best else self._best
        keep = self._is_regular(epoch) or any(e == epoch for _, e in ranking)

        record = self._record(best, ranking)
        first = self.path_of(epoch) if keep else self.output_dir / (BEST_NAME if is_best else LAST_NAME)
        save_checkpoint(first, {**payload, "epoch": epoch, "metric": metric, "best": record})
        for name, wanted in ((BEST_NAME, is_best), (LAST_NAME, True)):
            if wanted and first.name != name:
                _link(first, self.output_dir / name)

        stale = {e for _, e in dropped} | ({epoch} if any(e == epoch for _, e in self._ranking) and not keep else set())
        self._best, self._ranking = best, ranking
        gone = [self.path_of(old) for old in stale if not self._is_regular(old)]
        for path in [*gone, self.output_dir / RECOVERY_NAME]:  # a state within an epoch that is complete now
            with contextlib.suppress(OSError):
                path.unlink()
        return self.best

    def save_recovery(self, payload: Mapping[str, Any]) -> Path:
        """Write the state within an epoch, replacing the one before; the next complete epoch removes it.

        Args:
            payload: as in the module's docstring, with `epoch` and `progress`; `metric` and `best` are filled in here.

        Raises:
            TypeError, OSError: as `save_checkpoint`.
        """
        path = self.output_dir / RECOVERY_NAME
        save_checkpoint(path, {**payload, "metric": None, "best": self.state_dict()})
        return path

    def _is_regular(self, epoch: int) -> bool:
        return self.save_every > 0 and (epoch + 1) % self.save_every == 0

    def _record(self, best: tuple[float, int] | None, ranking: list[tuple[float, int]]) -> dict[str, Any]:
        return {"best": None if best is None else list(best), "ranking": [list(entry) for entry in ranking]}

    def state_dict(self) -> dict[str, Any]:
        """Return the record of the best as plain types, to be kept in the checkpoint as `best`."""
        return self._record(self._best, self._ranking)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the record of the best of the run that is resumed.

        Files that are gone, or in another folder, drop out of the ranking at the next save; the best metric stays.

        Args:
            state: what `state_dict` returned.

        Raises:
            CheckpointError: not such a record.
        """
        try:
            best = None if state["best"] is None else (float(state["best"][0]), int(state["best"][1]))
            ranking = [(float(metric), int(epoch)) for metric, epoch in state["ranking"]]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"The checkpoint's record of the best epochs is unusable ({error!r}); resume from another checkpoint."
            ) from error
        self._best, self._ranking = best, ranking


def _link(source: Path, target: Path) -> None:
    """Make `target` another name of `source`, or a copy where links are not supported, replacing it atomically."""
    with replacing(target, sync=True) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            with open(source, "rb") as reader, open(temporary, "xb") as writer:
                shutil.copyfileobj(reader, writer)
                writer.flush()
                os.fsync(writer.fileno())


def find_resumable(folder: str | os.PathLike[str]) -> Path | None:
    """Find the checkpoint of a run's folder that has come furthest and is whole.

    What counts is what the files say of themselves, since copying a folder mixes up their times.

    Args:
        folder: the run's; folders below it are not looked into.

    Returns:
        The path, or None when the folder has no checkpoint or is not there. Files that are passed over are logged
        with what is wrong with them.

    Raises:
        CheckpointError: there are checkpoints, but none can be resumed.
    """
    preference = {name: number for number, name in enumerate((BEST_NAME, RECOVERY_NAME, LAST_NAME))}
    files: dict[int, Path] = {}  # one name for each file: several names are links to one
    for path in sorted(Path(folder).glob("*"), key=lambda path: (preference.get(path.name, -1), path.name)):
        if CHECKPOINT_NAME.search(path.name) and path.is_file():
            files[path.stat().st_ino] = path
    candidates, problems = [], []
    for path in files.values():
        try:
            payload = load_checkpoint_file(path, skim=True)
            if "optimizer" not in payload or "epoch" not in payload:
                raise CheckpointError(f"{path} holds weights, but no optimizer and epoch to go on from.")
            candidates.append((int(payload.get("step", 0)), int(payload["epoch"]), path))
        except (CheckpointError, TypeError, ValueError) as error:
            problems.append(str(error))
    for problem in problems:
        _logger.warning("passed over: %s", problem)
    for _, _, path in sorted(candidates, reverse=True):
        try:
            extract_state_dict(load_checkpoint_file(path), use_ema=False)
        except CheckpointError as error:
            _logger.warning("passed over: %s", error)
            problems.append(str(error))
        else:
            return path
    if problems:
        raise CheckpointError(
            f"None of the {len(problems)} checkpoint(s) in {folder} can be resumed. The first: "
            f"{problems[0]} To train anew, use another --experiment or remove them."
        )
    return None


def find_newest_checkpoint(dirs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Path | None:
    """Find the newest readable checkpoint with weights under the folders, at any depth.

    Args:
        dirs: one folder or several; those that do not exist are passed over.

    Returns:
        The path with the latest modification time; where one file has several names, model_best before last before any
        other. None when there is no such file.
    """
    folders = [dirs] if isinstance(dirs, (str, os.PathLike)) else dirs
    preference = {BEST_NAME: 0, LAST_NAME: 1}
    found = []
    for path in {p for folder in folders for p in Path(folder).rglob("*") if CHECKPOINT_NAME.search(p.name)}:
        with contextlib.suppress(OSError):  # removed meanwhile, or a dangling link
            found.append((-path.stat().st_mtime_ns, preference.get(path.name, 2), path))
    for _, _, path in sorted(found):
        try:
            extract_state_dict(load_checkpoint_file(path), use_ema=None)
        except CheckpointError as error:
            _logger.warning("passed over %s: %s", path, error)
        else:
            return path
    return None


def rng_state() -> dict[str, Any]:
    """Capture the random generators of Python, numpy (the global one) and torch's CPU as plain types and a tensor.

    Returns:
        The keys `python`, `numpy` and `torch`, for `restore_rng_state`.
    """
    version, words, gauss = random.getstate()
    global_numpy = np.random.get_state(legacy=False)
    twister = global_numpy["state"]
    return {
        "python": [version, list(words), gauss],
        "numpy": [
            global_numpy["bit_generator"],
            twister["key"].tolist(),
            int(twister["pos"]),
            int(global_numpy["has_gauss"]),
            float(global_numpy["gauss"]),
        ],
        "torch": torch.get_rng_state(),
    }


def restore_rng_state(state: Mapping[str, Any]) -> None:
    """Put back the generators captured by `rng_state`; those whose key is absent are left alone.

    Args:
        state: what `rng_state` returned, also after a checkpoint was loaded.

    Raises:
        CheckpointError: a state that a generator does not take.
    """
    try:
        if "python" in state:
            version, words, gauss = state["python"]
            random.setstate((version, tuple(words), gauss))
        if "numpy" in state:
            name, key, position, has_gauss, cached = state["numpy"]
            np.random.set_state((name, np.array(key, dtype=np.uint32), position, has_gauss, cached))
        if "torch" in state:
            torch.set_rng_state(state["torch"].cpu())
    except (TypeError, ValueError, LookupError, RuntimeError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"The checkpoint's random state is unusable ({error}); resume from another checkpoint or start anew."
        ) from error
