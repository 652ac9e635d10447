"""Write files atomically; read checkpoints, also those of other trainers, without running code from them.

Lives here: bytes on disk. What the keys mean and which files are kept is in `manager.py`, fitting weights to a model in
`state_dict.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import tempfile
import time
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from effdet.runtime.ascend import old_tensor_globals

CHECKPOINT_NAME = re.compile(r"^[^.].*\.(pth\.tar|pth|pt|safetensors)$")
_TEMPORARY_NAME = re.compile(r"^\.(?P<name>.+)\.(?P<pid>\d+)\.tmp$")
_LEFTOVER_AGE_S = 3600.0  # a temporary file this old belongs to a process that was killed, not to one that is writing


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, does not fit, or lacks what was asked for; the text says what to do."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No file at the given path."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], sync: bool = False) -> Iterator[Path]:
    """Yield a temporary name beside `path` that takes its place if the block ends well and vanishes if it does not.

    Args:
        path: the file; its folder is made if absent.
        sync: have the new name on the disk when this returns. What is in the file the block must sync itself.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        yield temporary
        os.replace(temporary, path)
    finally:
        # Also after success: renaming a file onto another hard link of itself does nothing and leaves the old name.
        temporary.unlink(missing_ok=True)
    if sync and os.name != "nt":
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network file systems refuse to sync a folder
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def ensure_writable(path: Path | str, flag: str) -> None:
    """Find out, before work whose result goes into a file, that it can be written. Nothing is left on the disk.

    Args:
        path: the file; neither it nor its folder need be there.
        flag: what names the file on the command line, for the message.

    Raises:
        OSError: it is a folder or a device, or no file can be made where it goes.
    """
    path = Path(path)
    folder = next(above for above in path.absolute().parents if os.path.lexists(above))
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is a folder" if path.is_dir() else "it is no regular file")
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is no folder")
        with tempfile.TemporaryFile(dir=folder):  # permission bits do not tell: root, read-only mounts, full disks
            pass
    except OSError as error:
        where = f" in {folder}" if error.strerror else ""
        raise OSError(
            f"{path} cannot be written ({error.strerror or error}{where}): name a place that can be with {flag}"
        ) from error


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write a json file that is either complete or not there, making its folder.

    Raises:
        ValueError: the content has a number that json does not know, NaN or inf.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, allow_nan=False)


def save_checkpoint(path: str | os.PathLike[str], payload: Mapping[str, Any]) -> None:
    """Write a checkpoint so that at every moment `path` holds either the whole old file or the whole new one.

    Tensors are moved to the CPU first, so the file loads on a host without the training device.

    Args:
        path: the file; its folder is made if absent.
        payload: keys as in the docstring of `effdet.checkpoint.manager`; tensors and plain types only, nested freely.

    Raises:
        TypeError: for any other type in the payload, with the path of keys to it; nothing is written.
        OSError: when the disk does not take it; the old file is untouched.
    """
    path = Path(path)
    tree = _plain(dict(payload), "payload")
    with replacing(path, sync=True) as temporary:
        try:
            with open(temporary, "xb") as file:
                torch.save(tree, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch's archive writer reports a full disk as a RuntimeError
            if "DataLoader worker" in str(error):  # one died meanwhile: torch's signal handler raises anywhere
                raise
            raise OSError(
                f"Could not write {path} ({error}); the old file, if any, is untouched. Check the disk's free space."
            ) from error
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_AGE_S:
                leftover.unlink()


def _plain(value: Any, where: str) -> Any:
    """Return `value` with its tensors on the CPU, or raise a TypeError that names the first part of another type.

    Types are compared exactly: numpy's float64 is a float to isinstance, but pickles as a numpy object.
    """
    kind = type(value)
    if kind in (torch.Tensor, nn.Parameter):
        return value.detach().cpu()
    if value is None or kind in (bool, int, float, str, bytes):
        return value
    if kind in (list, tuple):
        return kind(_plain(item, f"{where}[{index}]") for index, item in enumerate(value))
    if kind in (dict, OrderedDict):
        for key in value:
            if type(key) not in (str, int, float, bool):
                raise TypeError(f"{where} has the key {key!r} of type {_type_name(key)}; keys must be str or numbers.")
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    raise TypeError(
        f"{where} is a {_type_name(value)}; a checkpoint holds tensors and plain types only (None, bool, int, float, "
        "str, bytes, list, tuple, dict). Convert it first, for example with float(), list(), vars() or .state_dict()."
    )


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote; for the one process that writes here.

    Those of a process that lives on this machine are left alone.
    """
    for path in folder.glob(".*.tmp"):
        match = _TEMPORARY_NAME.match(path.name)
        if match and not _is_alive(int(match["pid"])):
            with contextlib.suppress(OSError):
                path.unlink()


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # the number of an earlier process, come round: this one is not writing now
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def load_checkpoint_file(path: str | os.PathLike[str], map_location: Any = "cpu", skim: bool = False) -> dict[str, Any]:
    """Read a checkpoint without running code from it.

    Reads this package's files, those of effdet and timm, plain state dicts and .safetensors. Archives of torch.save
    carry a CRC-32 of each of their parts, which torch itself does not compare; here damage is told from a misfit by it.

    Args:
        path: the file; one named *.safetensors is read with that package, any other by `torch.load(weights_only=True)`.
        map_location: where tensors go, as in `torch.load`.
        skim: for a look at the numbers beside the tensors: checksums are not compared, and tensors stay on the disk
            where the format allows it.

    Returns:
        The file's dict. Parsed arguments come as dicts and numpy scalars as Python numbers, whoever wrote them.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointError: a folder, or an empty, truncated, foreign or unsafe file.
    """
    path = Path(path)
    _check_is_file(path)
    try:
        if path.suffix == ".safetensors":
            payload = _load_safetensors(path, map_location)
        else:
            archive = zipfile.is_zipfile(path)
            if archive and not skim:
                _check_sums(path)
            with torch.serialization.safe_globals(_allowed_globals()):
                payload = torch.load(path, map_location=map_location, weights_only=True, mmap=archive and skim)
        payload = _from_old_types(payload)
    except (CheckpointError, MemoryError):
        raise
    except PermissionError as error:
        raise CheckpointError(f"{path} may not be read by this user; change its permissions.") from error
    except Exception as error:  # what damaged bytes raise depends on where the damage is
        raise CheckpointError(_explain_load_failure(path, str(error))) from error
    if not isinstance(payload, dict):
        raise CheckpointError(f"{path} holds a {_type_name(payload)}, not a dict of weights; use another file.")
    return payload


def _check_sums(path: Path) -> None:
    """Raise a CheckpointError when a part of an archive does not fit its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
        OverflowError,
    ) as error:
        damaged = str(error)
    if damaged is not None:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is damaged: a checksum does not fit ({damaged}); "
            "copy it again or use another checkpoint."
        )


def _allowed_globals() -> list[Any]:
    """List what older files need besides torch's own safe types: parsed arguments, numpy's numbers, an NPU's tensors.

    None of these runs code from the file: a Namespace is a bag of attributes, numpy's rebuild a number or an array from
    bytes. numpy 2 moved its functions, so each is allowed under both module paths, whichever numpy wrote the file.
    """
    multiarray: Any = importlib.import_module("numpy._core.multiarray")  # numpy 1.26 has this path, too
    functions = (multiarray.scalar, multiarray._reconstruct)
    both_paths = [(f, f"numpy.{folder}.multiarray.{f.__name__}") for f in functions for folder in ("core", "_core")]
    number_types = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}  # numbers only: objects could be anything
    return [argparse.Namespace, np.ndarray, np.dtype, *number_types, *both_paths, *old_tensor_globals()]


def _check_is_file(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a checkpoint; name a file in it{_checkpoints_in(path)}.")
    if not path.exists():
        raise CheckpointNotFoundError(f"No checkpoint at {path}; check the path{_checkpoints_in(path.parent)}.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes), as a broken copy leaves it; copy it again or use another.")


def _checkpoints_in(folder: Path) -> str:
    """Return " (there: ...)" naming up to five checkpoints in the folder, or nothing."""
    try:
        names = sorted(entry.name for entry in folder.iterdir() if CHECKPOINT_NAME.search(entry.name))
    except OSError:
        return ""
    return f" (there: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""


def _load_safetensors(path: Path, map_location: Any) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(f"{path} needs a package; install it with: pip install safetensors") from error
    return load_file(path, device=str(map_location))


def _from_old_types(value: Any) -> Any:
    """Return `value` with argparse.Namespace as dict and numpy scalars as Python numbers, at any depth."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (dict, OrderedDict):
        return {_from_old_types(key): _from_old_types(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_from_old_types(item) for item in value)
    return value


def _explain_load_failure(path: Path, reason: str) -> str:
    """Word the failure of a file that torch or safetensors would not read."""
    refused = re.search(r"(?:GLOBAL |but got <class ')([\w.]+)", reason)
    if refused:
        return (
            f"{path} holds Python objects ({refused[1].rstrip('.')}) whose loading could run code, so it was refused; "
            "if you trust its source, re-save only the weights where it was made: torch.save(model.state_dict(), FILE)."
        )
    if "TorchScript" in reason:
        return f"{path} is an exported TorchScript model, not a checkpoint; give the checkpoint it was exported from."
    if zipfile.is_zipfile(path):
        return (
            f"{path} is an undamaged archive, but not a checkpoint that torch {torch.__version__} reads "
            f"({reason.splitlines()[0] if reason else 'no reason given'}); use another file, or "
            "the torch that wrote it."
        )
    with open(path, "rb") as file:
        damaged = file.read(4) == b"PK\x03\x04"  # what torch.save's archives start with
    what = "is truncated or damaged" if damaged else "is damaged, or not a checkpoint (torch.save's or .safetensors)"
    return f"{path} ({path.stat().st_size} bytes) {what}; check the path, copy it again or use another checkpoint."
