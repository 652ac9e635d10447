"""create_model: published weights, local weights, checkpoints, padding, and the options that reach the bench.

Weights come over HTTP from a server of this process or from files; nothing here asks another machine.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import logging
import socket
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from timm.utils import CheckpointSaver, ModelEmaV2
from torch import nn

from effdet import create_model, get_efficientdet_config, unwrap_bench
from effdet.checkpoint.manager import CheckpointError, CheckpointNotFoundError, save_checkpoint
from effdet.config.model_config import efficientdet_model_param_dict
from effdet.efficientdet import EfficientDet
from effdet.factory import create_model_from_config

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import weights  # noqa: E402  (test/golden/weights.py)

SAME_LAYERS = (Conv2dSame, MaxPool2dSame, AvgPool2dSame)


def tiny_entry(url: str = "", **differences) -> dict:
    entry = {
        "name": "tiny", "backbone_name": "mobilenetv3_small_050", "image_size": (64, 64), "fpn_channels": 16,
        "fpn_cell_repeats": 1, "box_class_repeats": 1, "pad_type": "", "redundant_bias": False, "num_classes": 5,
        "backbone_args": {}, "url": url}  # fmt: skip
    return {**entry, **differences}


@pytest.fixture
def tiny(monkeypatch):
    """Add a small model of 5 classes to the table; calling the result changes its entry."""

    def set_entry(**differences) -> None:
        monkeypatch.setitem(efficientdet_model_param_dict, "tiny", tiny_entry(**differences))

    set_entry()
    return set_entry


@pytest.fixture
def no_sockets(monkeypatch):
    """Make every attempt to open a connection fail the test that made it."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def make_tiny(**options) -> EfficientDet:
    return weights.fill(create_model("tiny", pretrained_backbone=False, **options))


def assert_weights(model: nn.Module, expected: dict[str, torch.Tensor], but: tuple[str, ...] = ()) -> None:
    """Compare all weights, except those whose names start with `but`: they must differ somewhere."""
    state = unwrap_bench(model).state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state if not key.startswith(but or ("\0",)))
    for prefix in but:
        own = {key: value for key, value in state.items() if key.startswith(prefix)}
        assert own and not all(torch.equal(v, expected[k]) for k, v in own.items() if v.shape == expected[k].shape)


# ---- published weights -----------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve tmp_path/site; `requests` lists what was asked for. torch.hub's cache is at tmp_path/home."""

    class Recorder(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            httpd.requests.append(self.path)
            super().do_GET()

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "site").mkdir()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Recorder, directory=str(tmp_path / "site")))
    httpd.requests = []
    httpd.base = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def publish(folder: Path, state: dict[str, torch.Tensor], digest: str | None = None) -> str:
    """Write weights under the name their hash (or `digest`) gives them; return the name."""
    torch.save(state, folder / "weights")
    content = (folder / "weights").read_bytes()
    (folder / "weights").unlink()
    name = f"tiny-{digest or hashlib.sha256(content).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(content)
    return name


def test_pretrained_fetches_the_published_weights_once(tiny, server, tmp_path):
    published = make_tiny().state_dict()
    name = publish(tmp_path / "site", published)
    tiny(url=f"{server.base}/{name}")
    assert_weights(create_model("tiny", pretrained=True), published)
    assert server.requests == [f"/{name}"]
    cached = tmp_path / "home" / "hub" / "checkpoints" / name
    assert cached.read_bytes() == (tmp_path / "site" / name).read_bytes()
    assert_weights(create_model("tiny", "predict", None, 1), published)  # any true value, as in effdet
    assert server.requests == [f"/{name}"], "the second model took the cached file"


def test_another_class_count_resets_the_class_head_after_the_published_weights(tiny, server, tmp_path):
    published = make_tiny().state_dict()
    tiny(url=f"{server.base}/{publish(tmp_path / 'site', published)}")
    model = create_model("tiny", num_classes=3, pretrained=True)
    state = model.state_dict()
    kept = [key for key in published if not key.startswith("class_net.")]
    assert len(kept) > 100 and all(torch.equal(state[key], published[key]) for key in kept)
    assert model.config.num_classes == 3 and state["class_net.predict.conv_pw.weight"].shape[0] == 27
    inner = "class_net.conv_rep.0.conv_pw.weight"
    assert state[inner].shape == published[inner].shape and not torch.equal(state[inner], published[inner])
    torch.testing.assert_close(state["class_net.predict.conv_pw.bias"], torch.full((27,), -float(np.log(99))))
    assert_weights(create_model("tiny", num_classes=5, pretrained=True), published)


def test_published_weights_with_the_wrong_hash_are_refused(tiny, server, tmp_path):
    tiny(url=f"{server.base}/{publish(tmp_path / 'site', make_tiny().state_dict(), digest='0badc0de')}")
    with pytest.raises(CheckpointError, match="Could not download.*hash"):
        create_model("tiny", pretrained=True)
    assert not list((tmp_path / "home" / "hub" / "checkpoints").iterdir()), "the refused file was kept"


def test_published_weights_of_another_model_are_refused(tiny, server, tmp_path):
    tiny(url=f"{server.base}/{publish(tmp_path / 'site', make_tiny(num_classes=7).state_dict())}")
    with pytest.raises(CheckpointError, match="class_net.predict.conv_pw.weight: file 63x16x1x1, model 45x16x1x1"):
        create_model("tiny", pretrained=True)


def test_offline_the_error_names_the_address_and_where_to_put_the_file(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as unused:  # bound but not listening: connections are refused
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/tiny-0123abcd.pth"
        tiny(url=url)
        with pytest.raises(CheckpointError) as caught:
            create_model("tiny", pretrained=True)
    text = str(caught.value)
    assert url in text and str(tmp_path / "hub" / "checkpoints" / "tiny-0123abcd.pth") in text and "local file" in text


@pytest.mark.parametrize("without", ["an empty address", "no address"])
def test_a_model_without_published_weights_says_so(tiny, no_sockets, monkeypatch, caplog, without):
    if without == "no address":
        entry = tiny_entry()
        del entry["url"]
        monkeypatch.setitem(efficientdet_model_param_dict, "tiny", entry)
    with caplog.at_level(logging.WARNING):
        model = create_model("tiny", pretrained=True)
    assert "no published weights" in caplog.text and model.config.num_classes == 5


# ---- local weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path, Path.as_uri], ids=["str", "Path", "file address"])
def test_a_path_never_asks_the_network(tiny, no_sockets, tmp_path, caplog, kind):
    source = make_tiny().state_dict()
    torch.save(source, tmp_path / "w.pth")
    tiny(url="https://example.invalid/tiny-0123abcd.pth")
    with caplog.at_level(logging.INFO):
        assert_weights(create_model("tiny", pretrained=kind(tmp_path / "w.pth")), source)
    assert f"{len(source)} tensors loaded" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_path_loads_what_fits_and_lists_the_rest(tiny, no_sockets, tmp_path, caplog):
    source = make_tiny().state_dict()
    source["extra.weight"] = torch.zeros(2)
    del source["fpn.cell.0.fnode.0.combine.edge_weights"]
    torch.save(source, tmp_path / "w.pth")
    with caplog.at_level(logging.WARNING):
        model = create_model("tiny", num_classes=3, pretrained=str(tmp_path / "w.pth"))
    for line in (
        f"{len(source) - 3} tensors loaded",
        "class_net.predict.conv_pw.weight: file 45x16x1x1, model 27x16x1x1",
        "class_net.predict.conv_pw.bias: file 45, model 27",
        "1 missing in the file (fpn.cell.0.fnode.0.combine.edge_weights)",
        "1 unknown to the model (extra.weight)",
    ):
        assert line in caplog.text
    state = model.state_dict()
    shared = [key for key in state if key in source and state[key].shape == source[key].shape]
    assert len(shared) == len(source) - 3 and all(torch.equal(state[key], source[key]) for key in shared)
    torch.testing.assert_close(state["class_net.predict.conv_pw.bias"], torch.full((27,), -float(np.log(99))))


def test_a_path_with_the_models_own_class_count_keeps_its_head(tiny, no_sockets, tmp_path):
    """A file of 3 classes for a model of the table with 5: the head is reset to 3 first, so that it fits."""
    source = make_tiny(num_classes=3).state_dict()
    torch.save(source, tmp_path / "w.pth")
    assert_weights(create_model("tiny", num_classes=3, pretrained=tmp_path / "w.pth"), source)


def test_a_path_that_is_not_there_is_an_error(tiny, no_sockets, tmp_path):
    for option in ("pretrained", "checkpoint_path"):
        with pytest.raises(CheckpointNotFoundError, match="No checkpoint at .*absent.pth"):
            create_model("tiny", **{option: str(tmp_path / "absent.pth")})


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def averaged(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value * 0.5 if value.is_floating_point() else value for key, value in state.items()}


def test_a_checkpoint_of_the_trainer(tiny, no_sockets, tmp_path):
    source = make_tiny(num_classes=3)
    state = source.state_dict()
    payload = {"version": 1, "arch": "tiny", "state_dict": state, "state_dict_ema": averaged(state), "epoch": 4,
               "step": 10, "metric": 0.25, "optimizer": {}, "config": {"lr": 0.1}, "image_size": [64, 64],
               "category_map": {"ids": [2, 5, 9]}}  # fmt: skip
    path = tmp_path / "last.pth.tar"
    save_checkpoint(path, payload)
    assert_weights(create_model("tiny", num_classes=3, checkpoint_path=str(path)), state)
    assert_weights(create_model("tiny", "predict", 3, False, path, True), averaged(state))
    with pytest.raises(CheckpointError, match=r"last.pth.tar: .*file 27x16x1x1, model 45x16x1x1"):
        create_model("tiny", checkpoint_path=path)


def test_a_checkpoint_that_timm_saved_for_the_old_trainer(tiny, no_sockets, tmp_path):
    """timm's saver, with what effdet's train.py gave it: arguments, optimiser, EMA, a numpy metric."""
    bench = create_model("tiny", bench_task="train", num_classes=3, pretrained_backbone=False, bench_labeler=True)
    weights.fill(bench.model)
    average = ModelEmaV2(bench)
    average.module.model.load_state_dict(averaged(bench.model.state_dict()))
    saver = CheckpointSaver(
        bench, torch.optim.SGD(bench.parameters(), lr=0.1, momentum=0.9), model_ema=average,
        args=argparse.Namespace(model="tiny", num_classes=3, resume=None), checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path), unwrap_fn=unwrap_bench)  # fmt: skip
    saver.save_checkpoint(0, metric=np.float64(0.125))
    path = tmp_path / "model_best.pth.tar"
    with pytest.raises(Exception, match="[Ww]eights.only"):
        torch.load(path, weights_only=True)  # the file has what plain torch refuses
    state = bench.model.state_dict()
    assert_weights(create_model("tiny", num_classes=3, checkpoint_path=str(path)), state)
    assert_weights(create_model("tiny", num_classes=3, checkpoint_path=str(path), checkpoint_ema=True), averaged(state))
    assert_weights(create_model("tiny", num_classes=3, pretrained=str(path)), averaged(state))


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model."])
def test_weights_of_wrapped_models_load(tiny, no_sockets, tmp_path, prefix):
    state = make_tiny().state_dict()
    wrapped = {prefix + key: value for key, value in state.items()}
    wrapped[prefix.removesuffix("model.") + "anchors.boxes"] = torch.zeros(4, 4)
    if prefix == "module.":
        del wrapped["module.anchors.boxes"]
    torch.save(wrapped, tmp_path / "w.pth")
    assert_weights(create_model("tiny", checkpoint_path=str(tmp_path / "w.pth")), state)


def test_averaged_weights_that_are_not_there_are_an_error(tiny, no_sockets, tmp_path):
    torch.save({"state_dict": make_tiny().state_dict()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="no averaged .* weights.*load it without use_ema"):
        create_model("tiny", checkpoint_path=str(tmp_path / "w.pth"), checkpoint_ema=True)


# ---- padding ---------------------------------------------------------------------------------------------------------


def symmetric_by_hand(model: nn.Module) -> int:
    """Replace each SAME layer by torch's plain one with (kernel - 1) // 2 padding for odd kernels; return how many."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv2dSame):
                plain = nn.Conv2d(
                    child.in_channels,
                    child.out_channels,
                    child.kernel_size,
                    child.stride,
                    child.kernel_size[0] // 2,
                    groups=child.groups,
                    bias=child.bias is not None,
                )
                plain.load_state_dict(child.state_dict())
            elif isinstance(child, MaxPool2dSame):
                assert child.kernel_size in (3, (3, 3)) and child.stride in (2, (2, 2))
                plain = nn.MaxPool2d(3, 2, 1)
            else:
                assert not isinstance(child, AvgPool2dSame)
                continue
            setattr(parent, name, plain)
            count += 1
    return count


def same_layers(model: nn.Module) -> int:
    return sum(isinstance(module, SAME_LAYERS) for module in model.modules())


def heads(model: nn.Module, seed: int = 0) -> list[torch.Tensor]:
    x = torch.randn(1, 3, 128, 160, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        classes, boxes = model.eval()(x)
    return classes + boxes


def test_symmetric_padding_is_the_same_weights_with_other_borders():
    options = {"pretrained_backbone": False, "image_size": (128, 160)}
    same = weights.fill(create_model("tf_efficientdet_d0", **options))
    symmetric = weights.fill(create_model("tf_efficientdet_d0", pad_type="symmetric", **options))
    assert same_layers(same) > 10 and same_layers(symmetric) == 0
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (same, symmetric)]
    assert shapes[0] == shapes[1] and list(shapes[0]) == list(shapes[1])
    with_same = heads(same)
    assert symmetric_by_hand(same) > 10 and same_layers(same) == 0
    for by_hand, built, before in zip(heads(same), heads(symmetric), with_same, strict=True):
        torch.testing.assert_close(built, by_hand, rtol=1e-5, atol=1e-6)
        assert (built - before).abs().max() > 50 * (built - by_hand).abs().max(), "the borders make no difference"


def test_symmetric_padding_is_what_timm_and_the_symmetric_models_do():
    """efficientdet_d0 is symmetric by itself; with the tf_ model's backbone, biases and head it is the same network."""
    options = {"pretrained_backbone": False, "image_size": (128, 160)}
    config = get_efficientdet_config("efficientdet_d0")
    config.backbone_name = "tf_efficientnet_b0"
    config.backbone_args.pad_type = ""
    config.redundant_bias, config.head_bn_level_first = True, False
    config.aspect_ratios = [(1.0, 1.0), (1.4, 0.7), (0.7, 1.4)]
    twin = weights.fill(create_model_from_config(config, **options))
    symmetric = weights.fill(create_model("tf_efficientdet_d0", pad_type="symmetric", **options))
    twin.load_state_dict(symmetric.state_dict(), strict=True)
    for one, other in zip(heads(twin), heads(symmetric), strict=True):
        assert torch.equal(one, other)


def test_same_padding_for_a_symmetric_model():
    model = create_model("efficientdet_d0", pad_type="same", pretrained_backbone=False, image_size=(128, 128))
    twin = create_model("tf_efficientdet_d0", pretrained_backbone=False, image_size=(128, 128))
    assert same_layers(model) == same_layers(twin) and model.config.pad_type == "same"


def test_padding_that_a_backbone_does_not_have_is_refused():
    with pytest.raises(ValueError, match="'resnet50' has no SAME padding: use pad_type symmetric"):
        create_model("resdet50", pad_type="same", pretrained_backbone=False)
    with pytest.raises(ValueError, match="pad_type 'reflect' is none of same, symmetric"):
        create_model("tf_efficientdet_d0", pad_type="reflect", pretrained_backbone=False)
    model = create_model("resdet50", pad_type="symmetric", pretrained_backbone=False, image_size=(128, 128))
    assert same_layers(model) == 0


# ---- options ---------------------------------------------------------------------------------------------------------


def test_options_reach_the_config_and_the_bench(tiny):
    bench = create_model(
        "tiny", bench_task="train", pretrained_backbone=False, bench_labeler=False, soft_nms=True, max_det_per_image=7,
        label_smoothing=0.1, legacy_focal=True, jit_loss=True, redundant_bias=True, image_size=[96, 64],
        max_detection_points=50, anchor_scale=3.0)  # fmt: skip
    config = bench.config
    assert config.label_smoothing == 0.1 and config.legacy_focal and config.jit_loss and config.redundant_bias
    assert bench.anchor_labeler is None and bench.soft_nms and bench.max_detection_points == 50
    assert bench.loss_fn.label_smoothing == 0.1 and bench.loss_fn.legacy_focal
    assert bench.anchors.image_size == (96, 64) and bench.anchors.anchor_scales == [3.0] * 5
    assert bench.model.class_net.conv_rep[0].conv_pw.bias is not None
    predictor = create_model("tiny", "predict", pretrained_backbone=False, max_det_per_image=7).eval()
    assert predictor(torch.zeros(2, 3, 64, 64)).shape == (2, 7, 6)


def test_tasks_and_unknown_options(tiny):
    for no_task in ("", None):
        assert isinstance(create_model("tiny", no_task, pretrained_backbone=False), EfficientDet)
    with pytest.raises(ValueError, match="bench_task 'test' is none of"):
        create_model("tiny", "test", pretrained_backbone=False)
    with pytest.raises(TypeError, match="bogus"):
        create_model("tiny", pretrained_backbone=False, bogus=1)


def test_a_config_of_ones_own(tiny):
    config = get_efficientdet_config("tiny")
    config.num_classes = 2
    bench = create_model_from_config(config, "train", 4, pretrained_backbone=False, bench_labeler=True)
    assert bench.config is config and bench.num_classes == config.num_classes == bench.anchor_labeler.num_classes == 4
    assert get_efficientdet_config("tiny").num_classes == 5
    first = bench.model.class_net
    assert create_model_from_config(config, num_classes=4, pretrained_backbone=False).class_net is not first


def test_reset_head_replaces_what_the_new_numbers_need(tiny):
    model = make_tiny()
    box_net, state = model.box_net, {key: value.clone() for key, value in model.state_dict().items()}
    model.reset_head(num_classes=2)
    assert_weights(model, state | {k: v for k, v in model.state_dict().items() if "class_net" in k})
    assert model.box_net is box_net and model.class_net.predict.conv_pw.out_channels == 18
    model.reset_head(aspect_ratios=[(1.0, 1.0), (2.0, 0.5)], num_scales=2)
    assert model.class_net.predict.conv_pw.out_channels == 8 and model.box_net.predict.conv_pw.out_channels == 16
    classes, boxes = model.eval()(torch.zeros(1, 3, 64, 64))
    assert classes[0].shape == (1, 8, 8, 8) and boxes[0].shape == (1, 16, 8, 8)
