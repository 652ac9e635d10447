"""Checkpoints: what is written, what survives a crash, what is read, refused, kept and fitted. With real files."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import math
import os
import pickle
import random
import re
import signal
import struct
import subprocess
import sys
import textwrap
import time
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from effdet.checkpoint import manager as ck
from effdet.helpers import load_checkpoint, load_pretrained

REPO = Path(__file__).resolve().parents[3]


def small_model(classes: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), head=nn.Conv2d(4, classes, 1)))


class Bench(nn.Module):
    """The key layout of a DetBench: the model under `model.`, its own buffers beside it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.anchors = nn.Module()
        self.anchors.register_buffer("boxes", torch.zeros(5, 4))


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def payload_of(value: float = 1.0) -> dict:
    return {"version": 1, "state_dict": {"weight": torch.full((3,), value)}, "epoch": 0}


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_saved_file_reads_back_equal_and_with_plain_torch(tmp_path):
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    payload = {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "category_map": {5: "a", 1000: "b"},
        "image_size": [128, 256],
        "betas": (0.9, 0.99),
        "nothing": None,
        "raw": b"\x00\xff",
        "metric": math.inf,
        "weight": nn.Parameter(torch.ones(2)),
    }
    path = tmp_path / "new" / "folder" / "a.pth.tar"
    ck.save_checkpoint(path, payload)

    for read in (ck.load_checkpoint_file(path), torch.load(path, weights_only=True)):
        assert same_weights(read["state_dict"], dict(model.state_dict()))
        saved = optimizer.state_dict()
        assert read["optimizer"]["param_groups"] == saved["param_groups"]
        assert torch.equal(read["optimizer"]["state"][0]["momentum_buffer"], saved["state"][0]["momentum_buffer"])
        rest = {key: read[key] for key in ("category_map", "image_size", "betas", "nothing", "raw", "metric")}
        assert rest == {key: payload[key] for key in rest}
        assert type(read["weight"]) is torch.Tensor and not read["weight"].requires_grad
    assert [entry.name for entry in path.parent.iterdir()] == ["a.pth.tar"]


@pytest.mark.parametrize(
    ("payload", "where"),
    [
        ({"args": argparse.Namespace(lr=1)}, r"payload\['args'\] is a argparse.Namespace"),
        ({"best": {"log": [1.0, np.float64(0.5)]}}, r"payload\['best'\]\['log'\]\[1\] is a numpy.float64"),
        ({"config": {"root": Path("data")}}, r"payload\['config'\]\['root'\] is a pathlib"),
        ({"names": {"a", "b"}}, r"payload\['names'\] is a set"),
        ({"ids": {np.int64(5): "cat"}}, r"payload\['ids'\] has the key .*numpy.int64"),
        ({"model": nn.Linear(1, 1)}, r"payload\['model'\] is a torch.nn.modules.linear.Linear"),
    ],
)
def test_other_types_are_refused_with_their_place_and_nothing_is_written(tmp_path, payload, where):
    path = tmp_path / "a.pth.tar"
    ck.save_checkpoint(path, payload_of(1.0))
    with pytest.raises(TypeError, match=where):
        ck.save_checkpoint(path, {**payload_of(2.0), **payload})
    assert torch.equal(ck.load_checkpoint_file(path)["state_dict"]["weight"], torch.full((3,), 1.0))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pth.tar"]


def test_saved_file_has_the_permissions_of_an_ordinary_file(tmp_path):
    (tmp_path / "ordinary").write_text("")
    ck.save_checkpoint(tmp_path / "a.pth.tar", payload_of())
    assert (tmp_path / "a.pth.tar").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def run_python(code: str, *arguments: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_while_writing_leaves_the_old_file_whole(tmp_path):
    """Kill a real process between the first bytes of the new file and its renaming."""
    path = tmp_path / "last.pth.tar"
    ck.save_checkpoint(path, payload_of(1.0))
    process = run_python(
        """
        import sys, time, torch
        from effdet.checkpoint import io
        real_save = torch.save
        def slow_save(tree, file):
            real_save(tree, file)
            file.seek(file.tell() // 2)
            file.truncate()
            file.flush()
            print("half written", flush=True)
            time.sleep(60)
        torch.save = slow_save
        io.save_checkpoint(sys.argv[1], {"state_dict": {"weight": torch.full((3,), 2.0)}})
        """,
        path,
    )
    assert process.stdout.readline() == "half written\n", process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)

    leftovers = [entry for entry in tmp_path.iterdir() if entry.name != path.name]
    assert len(leftovers) == 1 and leftovers[0].stat().st_size > 0  # it was in the middle
    assert torch.equal(ck.load_checkpoint_file(path)["state_dict"]["weight"], torch.full((3,), 1.0))
    assert ck.find_newest_checkpoint(tmp_path) == path

    ck.save_checkpoint(path, payload_of(3.0))
    assert leftovers[0].exists()  # young: could belong to a writer that lives
    os.utime(leftovers[0], (0, 0))
    ck.save_checkpoint(path, payload_of(3.0))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def save_epochs_for_ever(folder: Path, first: int) -> None:
    manager = ck.CheckpointManager(folder, keep_best=2)
    if first:
        manager.load_state_dict(ck.load_checkpoint_file(ck.find_resumable(folder))["best"])
    for epoch in range(first, 10**6):
        manager.save_recovery({**payload_of(epoch), "optimizer": {}, "epoch": epoch - 1, "step": 2 * epoch + 1})
        manager.save({**payload_of(epoch), "optimizer": {}, "step": 2 * epoch + 2}, epoch, float(epoch % 3))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_any_moment_a_run_can_go_on(tmp_path, kills):
    """Each child goes on where the files say; a SIGKILL at a random moment may only ever cost what was not saved."""
    chance, reached, steps = random.Random(kills), 0, -1
    for _ in range(kills):
        pid = os.fork()
        if pid == 0:
            try:
                save_epochs_for_ever(tmp_path, reached)
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0.0, 0.3))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        path = ck.find_resumable(tmp_path)
        if path is None:
            assert reached == 0 and not list(tmp_path.glob("*.pth.tar"))
            continue
        payload = ck.load_checkpoint_file(path)
        assert payload["step"] >= steps, "it never falls behind what was there"
        assert weight_in(path) == payload["step"] // 2 - (payload["step"] % 2 == 0)
        steps, reached = payload["step"], payload["epoch"] + 1
    assert reached > 1, "it got forward between the kills"
    assert len(list(tmp_path.glob(".*.tmp"))) <= 1, "what was half written does not pile up"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of written files")
def test_full_disk_leaves_the_old_file_whole_and_says_so(tmp_path):
    path = tmp_path / "last.pth.tar"
    ck.save_checkpoint(path, payload_of(1.0))
    process = run_python(
        """
        import resource, sys, torch
        from effdet.checkpoint.io import save_checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        try:
            save_checkpoint(sys.argv[1], {"state_dict": {"weight": torch.zeros(100000)}})
        except OSError as error:
            print(error)
        """,
        path,
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Could not write" in out and "free space" in out and "untouched" in out
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert torch.equal(ck.load_checkpoint_file(path)["state_dict"]["weight"], torch.full((3,), 1.0))


# ---- reading ---------------------------------------------------------------------------------------------------------


def old_style_payload(model: nn.Module) -> dict:
    """What effdet's training script writes: parsed arguments and a numpy metric beside the weights."""
    return {
        "epoch": np.int64(7),
        "arch": "tf_efficientdet_d0",
        "state_dict": model.state_dict(),
        "state_dict_ema": OrderedDict((f"module.{key}", value + 1) for key, value in model.state_dict().items()),
        "args": argparse.Namespace(lr=0.16, model="tf_efficientdet_d0", opt_betas=None, decay=np.float32(0.5)),
        "metric": np.float64(0.25),
        "history": {"ap": [np.float64(0.125)], "curve": np.arange(3.0)},
        "done": np.bool_(True),
        "version": 2,
    }


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
def test_files_of_the_old_trainer_load_with_plain_values(tmp_path, archive):
    model, path = small_model(), tmp_path / "old.pth.tar"
    torch.save(old_style_payload(model), path, _use_new_zipfile_serialization=archive)
    read = ck.load_checkpoint_file(path)
    assert read["args"] == {"lr": 0.16, "model": "tf_efficientdet_d0", "opt_betas": None, "decay": 0.5}
    assert (read["metric"], type(read["metric"])) == (0.25, float)
    assert (read["epoch"], type(read["epoch"])) == (7, int)
    assert read["done"] is True and read["history"]["ap"] == [0.125]
    assert read["history"]["curve"].tolist() == [0.0, 1.0, 2.0]
    assert same_weights(ck.extract_state_dict(read), dict(model.state_dict()))


class OldNpuTensor:
    """Pickles as torch_npu before 2.1 pickled a tensor: a call of its own function with a number for the format."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self):
        tensor = self.tensor
        return sys.modules["torch_npu.utils.storage"]._rebuild_npu_tensor, (
            tensor.storage(),
            tensor.storage_offset(),
            tuple(tensor.size()),
            tensor.stride(),
            False,
            OrderedDict(),
            2,
        )


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
def test_a_file_of_the_ascend_port_loads_without_its_device(tmp_path, monkeypatch, archive):
    """Tensors as an NPU of that time wrote them, under DDP, with parsed arguments and a metric."""
    model, path = small_model(), tmp_path / "last.pth.tar"
    state = OrderedDict((f"module.{key}", OldNpuTensor(value)) for key, value in model.state_dict().items())
    old = types.ModuleType("torch_npu.utils.storage")

    def _rebuild_npu_tensor():
        raise AssertionError("only its name is in the file")

    _rebuild_npu_tensor.__module__, _rebuild_npu_tensor.__qualname__ = old.__name__, "_rebuild_npu_tensor"
    old._rebuild_npu_tensor = _rebuild_npu_tensor
    with monkeypatch.context() as patch:
        for name in ("torch_npu", "torch_npu.utils"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, old.__name__, old)
        torch.save(
            {**old_style_payload(model), "state_dict": state, "amp": {"loss_scaler0": {"loss_scale": 128.0}}},
            path,
            _use_new_zipfile_serialization=archive,
        )
    read = ck.load_checkpoint_file(path)
    assert same_weights(ck.extract_state_dict(read), dict(model.state_dict()))
    assert (read["args"]["lr"], read["metric"], read["amp"]["loss_scaler0"]["loss_scale"]) == (0.16, 0.25, 128.0)
    target = small_model(seed=3)
    assert load_checkpoint(target, path, use_ema=False).complete and torch.equal(target.stem.weight, model.stem.weight)


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"], ids=["numpy1", "numpy2"])
def test_numpy_scalars_load_under_the_module_path_of_either_numpy(tmp_path, module):
    written, path = tmp_path / "written.pth", tmp_path / "a.pth"
    torch.save({"metric": np.float64(0.75)}, written)
    with zipfile.ZipFile(written) as source, zipfile.ZipFile(path, "w") as target:
        renamed = 0
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                for spelling in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
                    renamed += content.count(spelling)
                    content = content.replace(spelling, b"@").replace(b"@", module)
            target.writestr(name, content)
    assert renamed >= 1
    assert ck.load_checkpoint_file(path) == {"metric": 0.75}


def test_safetensors_load(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="needs the package safetensors")
    model = small_model()
    safetensors.save_file(dict(model.state_dict()), tmp_path / "a.safetensors")
    assert same_weights(ck.load_checkpoint_file(tmp_path / "a.safetensors"), dict(model.state_dict()))
    content = (tmp_path / "a.safetensors").read_bytes()
    assert content[8:9] == b"{"
    damages = {
        "cut": content[:50],
        "short": content[:-4],
        "longer": content + b"1234",
        "page": b"<html>404</html>",
        "header": content[:8] + b"[" + content[9:],
        "length": b"\xff" + content[1:],
        "pickle": pickle.dumps(Malicious(tmp_path / "pwned")),
    }
    for name, damaged in damages.items():
        (tmp_path / f"{name}.safetensors").write_bytes(damaged)
        with pytest.raises(ck.CheckpointError, match=rf"{name}.safetensors \(\d+ bytes\) .*damaged") as caught:
            ck.load_checkpoint_file(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()
    wrapped = {f"module.model.{key}": value for key, value in model.state_dict().items()}
    safetensors.save_file(wrapped, tmp_path / "wrapped.safetensors")
    assert load_checkpoint(small_model(seed=2), tmp_path / "wrapped.safetensors").complete


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
def test_truncated_at_any_offset_is_one_clear_error(tmp_path, archive):
    whole, path = tmp_path / "whole.pth", tmp_path / "cut.pth"
    torch.save({"state_dict": small_model().state_dict()}, whole, _use_new_zipfile_serialization=archive)
    content = whole.read_bytes()
    size = len(content)
    for offset in [1, 2, 4, 10, 64, 100, size // 4, size // 2, size * 3 // 4, size - 100, size - 22, size - 1]:
        path.write_bytes(content[:offset])
        with pytest.raises(ck.CheckpointError, match="damaged") as caught:
            ck.load_checkpoint_file(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_flipped_bit_anywhere_is_found_or_harmless(tmp_path):
    """torch.load alone does not notice: it hands over the changed weights."""
    path = tmp_path / "a.pth.tar"
    payload = {"state_dict": small_model().state_dict(), "step": 3}
    ck.save_checkpoint(path, payload)
    content, chance, found, silent_torch = path.read_bytes(), random.Random(0), 0, 0
    for _ in range(150):
        position = chance.randrange(len(content))
        flipped = bytearray(content)
        flipped[position] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        try:
            loaded = ck.load_checkpoint_file(path)
        except ck.CheckpointError as error:
            found += 1
            assert str(path) in str(error) and "\n" not in str(error)
            with contextlib.suppress(Exception):
                silent_torch += bool(torch.load(path, weights_only=True))
        else:
            assert loaded["step"] == 3 and same_weights(loaded["state_dict"], payload["state_dict"])
    assert found > 10 and silent_torch > 0


def test_damage_is_told_from_an_archive_of_something_else(tmp_path):
    path = tmp_path / "a.pth.tar"
    ck.save_checkpoint(path, {"state_dict": {"weight": torch.full((1000,), 3.0)}})
    content = path.read_bytes()
    place = content.index(struct.pack("<f", 3.0) * 4)
    path.write_bytes(content[:place] + b"\x01" + content[place + 1 :])
    with pytest.raises(ck.CheckpointError, match=r"is damaged: a checksum does not fit \(\S+/data/0\); copy it again"):
        ck.load_checkpoint_file(path)
    with zipfile.ZipFile(tmp_path / "photos.pth", "w") as archive:
        archive.writestr("a.txt", "hello")
    with pytest.raises(ck.CheckpointError, match="is an undamaged archive, but not a checkpoint"):
        ck.load_checkpoint_file(tmp_path / "photos.pth")


def test_truncated_archive_is_told_from_a_file_of_another_kind(tmp_path):
    torch.save(payload_of(), tmp_path / "a.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:300])
    with pytest.raises(ck.CheckpointError, match="is truncated or damaged"):
        ck.load_checkpoint_file(tmp_path / "cut.pth")
    (tmp_path / "page.pth").write_text("<html>404 Not Found</html>")
    with pytest.raises(ck.CheckpointError, match="not a checkpoint"):
        ck.load_checkpoint_file(tmp_path / "page.pth")


def test_absent_empty_and_folder_are_told_apart(tmp_path):
    ck.save_checkpoint(tmp_path / "last.pth.tar", payload_of())
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(ck.CheckpointError, match=r"empty.pth is empty \(0 bytes\)"):
        ck.load_checkpoint_file(tmp_path / "empty.pth")
    with pytest.raises(FileNotFoundError, match=r"lats.pth.tar; .*there: empty.pth, last.pth.tar"):
        ck.load_checkpoint_file(tmp_path / "lats.pth.tar")
    with pytest.raises(ck.CheckpointError, match="No checkpoint at"):
        ck.load_checkpoint_file(tmp_path / "no" / "such" / "folder.pth")
    with pytest.raises(ck.CheckpointError, match=r"is a folder.*there: empty.pth, last.pth.tar"):
        ck.load_checkpoint_file(tmp_path)


@pytest.mark.parametrize("content", [torch.zeros(2), [1, 2], "text", 3])
def test_a_file_without_a_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ck.CheckpointError, match="not a dict of weights"):
        ck.load_checkpoint_file(tmp_path / "a.pth")


class Malicious:
    """Pickles as a call that makes a file: loading it with pickle would run the call."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle0", "pickle2", "pickle4"])
def test_malicious_file_is_refused_and_does_not_run(tmp_path, form):
    target, path = tmp_path / "pwned", tmp_path / "evil.pth.tar"
    payload = {"state_dict": {"weight": torch.zeros(1)} if form in ("zip", "legacy") else {}, "args": Malicious(target)}
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(payload, int(form[-1])))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ck.CheckpointError) as caught:
        ck.load_checkpoint_file(path)
    assert not target.exists()
    if form in ("zip", "legacy"):
        assert "mkdir" in str(caught.value) and "could run code" in str(caught.value)
        torch.load(path, weights_only=False)  # the payload is real: a trusting reader runs it
        assert target.is_dir()


@pytest.mark.parametrize("where", ["namespace", "array", "scalar", "reduce"])
def test_a_payload_behind_an_allowed_type_does_not_run(tmp_path, where):
    """The types that older files need must not open a way around the refusal."""
    target, path = tmp_path / "pwned", tmp_path / "evil.pth"
    evil = Malicious(target)
    hidden = {
        "namespace": argparse.Namespace(lr=evil),
        "array": np.array([evil], dtype=object),
        "scalar": np.array([evil], dtype=object).reshape(()),
        "reduce": {"w": OrderedDict(torch.nn.Linear(1, 1).state_dict()), "x": (evil,)},
    }[where]
    torch.save({"state_dict": {"w": torch.zeros(1)}, "args": hidden}, path)
    with pytest.raises(ck.CheckpointError) as caught:
        ck.load_checkpoint_file(path)
    assert not target.exists() and "\n" not in str(caught.value) and "could run code" in str(caught.value)
    torch.load(path, weights_only=False)
    assert target.is_dir(), "the payload is real"


def test_allow_list_does_not_leak_into_other_loads(tmp_path):
    torch.save({"args": argparse.Namespace(a=1)}, tmp_path / "a.pth")
    ck.load_checkpoint_file(tmp_path / "a.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pth", weights_only=True)


def test_pickled_whole_model_is_refused_with_the_remedy(tmp_path):
    torch.save(small_model(), tmp_path / "model.pth")
    with pytest.raises(ck.CheckpointError, match=r"torch.nn.modules\S+\).*torch.save\(model.state_dict\(\)"):
        ck.load_checkpoint_file(tmp_path / "model.pth")


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "_orig_mod.module.model."])
@pytest.mark.parametrize("key", ["state_dict", "model", None])
def test_weights_are_found_under_any_key_and_wrapper(prefix, key):
    plain = dict(small_model().state_dict())
    wrapped = {prefix + name: value for name, value in plain.items()}
    if "model." in prefix:
        outer = prefix.removesuffix("model.")
        wrapped |= {f"{outer}{name}.boxes": torch.zeros(9, 4) for name in ("anchors", "anchor_labeler.anchors")}
    payload = wrapped if key is None else {"epoch": 3, key: wrapped}
    assert same_weights(ck.extract_state_dict(payload), plain)


def test_weights_whose_names_only_partly_share_a_prefix_keep_them():
    state = {"model.a": torch.zeros(1), "head.b": torch.zeros(1)}
    assert ck.extract_state_dict({"state_dict": state}).keys() == state.keys()


def test_averaged_weights_are_chosen_as_asked():
    both = {"state_dict": {"w": torch.zeros(1)}, "state_dict_ema": {"module.w": torch.ones(1)}}
    assert ck.extract_state_dict(both, use_ema=False)["w"].item() == 0
    assert ck.extract_state_dict(both, use_ema=True)["w"].item() == 1
    assert ck.extract_state_dict(both, use_ema=None)["w"].item() == 1
    raw_only = {"state_dict": {"w": torch.zeros(1)}, "epoch": 1, "state_dict_ema": None}
    assert ck.extract_state_dict(raw_only, use_ema=None)["w"].item() == 0
    with pytest.raises(ck.CheckpointError, match=r"no averaged .*it holds: state_dict, epoch.*without use_ema"):
        ck.extract_state_dict(raw_only, use_ema=True)
    with pytest.raises(ck.CheckpointError, match="plain set of 1 weights without averaged"):
        ck.extract_state_dict({"w": torch.zeros(1)}, use_ema=True)
    with pytest.raises(ck.CheckpointError, match="use_ema=True"):
        ck.extract_state_dict({"state_dict_ema": {"w": torch.zeros(1)}}, use_ema=False)
    for empty in ({}, {"epoch": 1}, {"state_dict": {}}):
        with pytest.raises(ck.CheckpointError, match="holds no weights"):
            ck.extract_state_dict(empty)


def test_strict_loads_all_or_refuses_before_copying():
    source, model = small_model(seed=1), small_model(seed=2)
    report = ck.load_state_dict_report(model, source.state_dict())
    assert report.complete and sorted(report.loaded) == sorted(source.state_dict())
    assert same_weights(dict(model.state_dict()), dict(source.state_dict()))

    other = small_model(classes=5, seed=3)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    state = {**source.state_dict(), "extra.weight": torch.zeros(1)}
    del state["stem.bias"]
    with pytest.raises(ck.CheckpointError) as caught:
        ck.load_state_dict_report(other, state)
    text = str(caught.value)
    assert "2 of another shape (head.weight: file 3x4x1x1, model 5x4x1x1; head.bias: file 3, model 5)" in text
    assert "1 missing in the file (stem.bias)" in text and "1 unknown to the model (extra.weight)" in text
    assert "only the 6 tensors that fit with strict=False" in text
    assert same_weights(dict(other.state_dict()), before)


def test_not_strict_loads_what_fits_and_reports_the_rest():
    source, model = small_model(seed=1), small_model(classes=5, seed=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {**source.state_dict(), "extra.weight": torch.zeros(1)}
    del state["stem.bias"]
    report = ck.load_state_dict_report(model, state, strict=False)
    assert report.missing == ["stem.bias"] and report.unexpected == ["extra.weight"] and not report.complete
    assert report.mismatched == [("head.weight", (3, 4, 1, 1), (5, 4, 1, 1)), ("head.bias", (3,), (5,))]
    after = model.state_dict()
    assert "stem.weight" in report.loaded and len(report.loaded) == 6
    assert all(torch.equal(after[key], source.state_dict()[key]) for key in report.loaded)
    assert all(torch.equal(after[key], before[key]) for key in ("stem.bias", "head.weight", "head.bias"))
    text = "\n".join(report.lines())
    assert "6 " in text and "head.weight" in text and "3x4x1x1" in text and "5x4x1x1" in text
    assert all(name in text for name in ("head.bias", "stem.bias", "extra.weight"))
    assert "head.bias" not in "\n".join(report.lines(limit=1))


def test_nothing_that_fits_is_an_error_even_when_not_strict():
    for state in ({"other": torch.zeros(1)}, {}):
        with pytest.raises(ck.CheckpointError, match="do not fit the model"):
            ck.load_state_dict_report(small_model(), state, strict=False)


def test_batch_counter_may_be_missing_but_nothing_else():
    source, model = small_model(seed=1), small_model(seed=2)
    model.bn.num_batches_tracked.fill_(7)
    state = {key: value for key, value in source.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert ck.load_state_dict_report(model, state).complete
    assert model.bn.num_batches_tracked.item() == 7
    del state["bn.running_mean"]
    with pytest.raises(ck.CheckpointError, match=r"1 missing in the file \(bn.running_mean\)"):
        ck.load_state_dict_report(model, state)


def test_wrappers_are_looked_through_on_the_models_side():
    source = small_model(seed=1)
    bench = Bench(small_model(seed=2))
    for state in (source.state_dict(), Bench(source).state_dict()):
        bench.model.stem.weight.data.zero_()
        assert ck.load_state_dict_report(bench, state).complete
        assert same_weights(dict(bench.model.state_dict()), dict(source.state_dict()))


# ---- keeping ---------------------------------------------------------------------------------------------------------


def epochs_kept(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1].split(".")[0]) for path in folder.glob("checkpoint-*.pth.tar"))


def weight_in(path: Path) -> float:
    return ck.load_checkpoint_file(path)["state_dict"]["weight"][0].item()


def test_manager_keeps_the_best_k_against_a_sorted_list(tmp_path):
    rng = random.Random(0)
    manager = ck.CheckpointManager(tmp_path, keep_best=3)
    seen: list[tuple[float, int]] = []
    for epoch in range(12):
        metric = rng.choice([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])  # ties on purpose
        seen.append((metric, epoch))
        order = sorted(seen, key=lambda entry: (-entry[0], entry[1]))
        assert manager.save(payload_of(epoch), epoch, metric) == order[0]
        assert epochs_kept(tmp_path) == sorted(e for _, e in order[:3])
        assert weight_in(tmp_path / "model_best.pth.tar") == order[0][1]
        last = ck.load_checkpoint_file(tmp_path / "last.pth.tar")
        assert (last["epoch"], last["metric"]) == (epoch, metric)
        assert last["best"] == manager.state_dict()
    assert not list(tmp_path.glob(".*"))


def test_names_of_one_epoch_share_one_file_and_change_separately(tmp_path):
    manager = ck.CheckpointManager(tmp_path, keep_best=2)
    manager.save(payload_of(0), 0, 0.5)
    names = ["checkpoint-0.pth.tar", "model_best.pth.tar", "last.pth.tar"]
    assert len({(tmp_path / name).stat().st_ino for name in names}) == 1
    manager.save(payload_of(1), 1, 0.4)
    assert weight_in(tmp_path / "model_best.pth.tar") == 0 and weight_in(tmp_path / "last.pth.tar") == 1


def test_linking_a_file_to_a_name_it_already_has_leaves_nothing_behind(tmp_path):
    ck.save_checkpoint(tmp_path / "a.pth", payload_of(1))
    for _ in range(2):  # the second time the rename is between two names of one file, which does nothing
        ck._link(tmp_path / "a.pth", tmp_path / "b.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "b.pth"] and weight_in(tmp_path / "b.pth") == 1


def test_manager_copies_where_links_are_not_supported(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError("links are not supported here")

    monkeypatch.setattr(os, "link", refuse)
    manager = ck.CheckpointManager(tmp_path, keep_best=2)
    manager.save(payload_of(4), 0, 0.5)
    names = ["checkpoint-0.pth.tar", "model_best.pth.tar", "last.pth.tar"]
    assert [weight_in(tmp_path / name) for name in names] == [4, 4, 4]
    assert len({(tmp_path / name).stat().st_ino for name in names}) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_manager_keeps_regular_epochs_beside_the_best(tmp_path):
    manager = ck.CheckpointManager(tmp_path, keep_best=1, save_every=3)
    for epoch, metric in enumerate([0.1, 0.9, 0.2, 0.3, 0.95, None, 0.99]):
        manager.save(payload_of(epoch), epoch, metric)
    assert epochs_kept(tmp_path) == [2, 5, 6]
    assert manager.best == (0.99, 6)


@pytest.mark.parametrize("metric", [math.nan, math.inf, -math.inf, None])
def test_a_metric_that_is_no_number_is_saved_but_never_best(tmp_path, metric):
    manager = ck.CheckpointManager(tmp_path, keep_best=2)
    assert manager.save(payload_of(0), 0, metric) == (None, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pth.tar"]
    assert manager.save(payload_of(1), 1, np.float64(0.5)) == (0.5, 1)
    assert manager.save(payload_of(2), 2, metric) == (0.5, 1)
    assert weight_in(tmp_path / "model_best.pth.tar") == 1 and weight_in(tmp_path / "last.pth.tar") == 2
    assert epochs_kept(tmp_path) == [1]


def test_keep_best_zero_still_marks_the_best(tmp_path):
    manager = ck.CheckpointManager(tmp_path, keep_best=0)
    for epoch, metric in enumerate([0.1, 0.5, 0.2]):
        manager.save(payload_of(epoch), epoch, metric)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pth.tar", "model_best.pth.tar"]
    assert weight_in(tmp_path / "model_best.pth.tar") == 1 and manager.best == (0.5, 1)


def test_resumed_manager_goes_on_as_if_never_stopped(tmp_path):
    metrics = [0.3, 0.8, 0.1, 0.5, 0.6, 0.2]
    straight = ck.CheckpointManager(tmp_path / "straight", keep_best=2)
    for epoch, metric in enumerate(metrics):
        straight.save(payload_of(epoch), epoch, metric)

    folder = tmp_path / "resumed"
    first = ck.CheckpointManager(folder, keep_best=2)
    for epoch, metric in enumerate(metrics[:3]):
        first.save(payload_of(epoch), epoch, metric)
    second = ck.CheckpointManager(folder, keep_best=2)
    second.load_state_dict(ck.load_checkpoint_file(folder / "last.pth.tar")["best"])
    assert second.best == (0.8, 1)
    for epoch, metric in enumerate(metrics[3:], start=3):
        second.save(payload_of(epoch), epoch, metric)
    assert second.state_dict() == straight.state_dict()
    assert epochs_kept(folder) == epochs_kept(tmp_path / "straight") == [1, 4]


def test_files_removed_by_the_user_leave_the_ranking_and_others_are_not_touched(tmp_path):
    ck.save_checkpoint(tmp_path / "checkpoint-77.pth.tar", payload_of(77))  # someone else's
    manager = ck.CheckpointManager(tmp_path, keep_best=2)
    for epoch, metric in enumerate([0.5, 0.9, 0.7]):
        manager.save(payload_of(epoch), epoch, metric)
    (tmp_path / "checkpoint-1.pth.tar").unlink()
    assert manager.save(payload_of(3), 3, 0.6) == (0.9, 1)  # the best metric is remembered
    assert epochs_kept(tmp_path) == [2, 3, 77]
    assert weight_in(tmp_path / "model_best.pth.tar") == 1


def test_failed_save_leaves_the_record_as_it_was(tmp_path):
    manager = ck.CheckpointManager(tmp_path, keep_best=1)
    manager.save(payload_of(0), 0, 0.5)
    before = manager.state_dict()
    with pytest.raises(TypeError, match=r"payload\['bad'\]"):
        manager.save({**payload_of(1), "bad": object()}, 1, 0.9)
    assert manager.state_dict() == before and epochs_kept(tmp_path) == [0]
    assert weight_in(tmp_path / "last.pth.tar") == 0


def test_manager_refuses_bad_arguments_and_records(tmp_path):
    with pytest.raises(ValueError, match="keep_best=-1"):
        ck.CheckpointManager(tmp_path, keep_best=-1)
    manager = ck.CheckpointManager(tmp_path)
    for bad in ({}, {"best": 3, "ranking": []}, {"best": None, "ranking": [[1]]}):
        with pytest.raises(ck.CheckpointError, match="record of the best"):
            manager.load_state_dict(bad)
    assert manager.best == (None, None)


def test_newest_checkpoint_is_the_newest_that_can_be_read(tmp_path, caplog):
    assert ck.find_newest_checkpoint([]) is None
    assert ck.find_newest_checkpoint(tmp_path / "absent") is None
    ck.CheckpointManager(tmp_path / "run1").save(payload_of(1), 0, 0.5)
    ck.CheckpointManager(tmp_path / "run2" / "deep").save(payload_of(2), 0, 0.5)
    for age, path in enumerate([tmp_path / "run2/deep/last.pth.tar", tmp_path / "run1/last.pth.tar"]):
        os.utime(path, (1e9 - age, 1e9 - age))  # all names of one file share its time
    assert ck.find_newest_checkpoint([tmp_path / "run1", tmp_path / "absent", str(tmp_path / "run2")]) == (
        tmp_path / "run2/deep/model_best.pth.tar"
    )
    (tmp_path / "run1" / "broken.pth").write_bytes(b"PK\x03\x04 half")
    torch.save({"no": "weights"}, tmp_path / "run1" / "other.pth")
    (tmp_path / "run1" / "dangling.pth").symlink_to(tmp_path / "nowhere")
    with caplog.at_level(logging.WARNING):
        assert ck.find_newest_checkpoint(str(tmp_path)) == tmp_path / "run2/deep/model_best.pth.tar"
    assert "broken.pth" in caplog.text and "other.pth" in caplog.text


def test_the_checkpoint_that_came_furthest_is_resumed_and_broken_ones_are_named(tmp_path, caplog):
    assert ck.find_resumable(tmp_path / "absent") is None and ck.find_resumable(tmp_path) is None
    manager = ck.CheckpointManager(tmp_path)
    for epoch in range(3):
        manager.save({**payload_of(float(epoch)), "optimizer": {}, "step": 10 * (epoch + 1)}, epoch, 0.1)
    manager.save_recovery({**payload_of(9), "optimizer": {}, "epoch": 2, "step": 34})
    for path in tmp_path.iterdir():
        os.utime(path, (1e9, 1e9))  # as a copy may leave them
    ck.save_checkpoint(tmp_path / "weights.pth", payload_of(7))
    assert ck.find_resumable(tmp_path) == tmp_path / "recovery.pth.tar"
    (tmp_path / "recovery.pth.tar").write_bytes(b"PK\x03\x04 half")
    content = (tmp_path / "last.pth.tar").read_bytes()
    place = content.index(struct.pack("<f", 2.0) * 3)
    (tmp_path / "last.pth.tar").write_bytes(content[:place] + b"\x01" + content[place + 1 :])  # checkpoint-2 as well
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert weight_in(ck.find_resumable(tmp_path)) == 1.0
    text = caplog.text
    assert re.search(r"recovery.pth.tar \(\d+ bytes\) is truncated or damaged", text)
    assert "last.pth.tar" in text and "a checksum does not fit" in text and "no optimizer" in text
    for path in tmp_path.glob("*.pth*"):
        path.write_bytes(b"")
    with pytest.raises(ck.CheckpointError, match=r"None of the \d+ checkpoint.*is empty.*another --experiment"):
        ck.find_resumable(tmp_path)


# ---- random state ----------------------------------------------------------------------------------------------------


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()]


def test_random_state_survives_a_file(tmp_path):
    draw()  # leaves a cached second gaussian in two of the generators
    ck.save_checkpoint(tmp_path / "a.pth", {"rng": ck.rng_state()})
    first = [draw() for _ in range(3)]
    assert [draw() for _ in range(3)] != first
    ck.restore_rng_state(ck.load_checkpoint_file(tmp_path / "a.pth")["rng"])
    assert [draw() for _ in range(3)] == first


@pytest.mark.parametrize(
    "bad",
    [
        {"python": [3, [1, 2], None]},
        {"numpy": ["MT19937", [1], 0, 0, 0.0]},
        {"numpy": ["MT19937"]},
        {"torch": torch.zeros(3)},
        {"torch": 1},
    ],
)
def test_unusable_random_state_is_refused(bad):
    state = ck.rng_state()
    with pytest.raises(ck.CheckpointError, match="random state is unusable"):
        ck.restore_rng_state(bad)
    ck.restore_rng_state(state)
    ck.restore_rng_state({})


# ---- helpers ---------------------------------------------------------------------------------------------------------


def test_load_checkpoint_loads_an_old_trainers_file(tmp_path, caplog):
    source = small_model(seed=1)
    torch.save(old_style_payload(source), tmp_path / "old.pth.tar")
    model = small_model(seed=2)
    with caplog.at_level(logging.INFO):
        assert load_checkpoint(model, tmp_path / "old.pth.tar", use_ema=False).complete
    assert f"{len(source.state_dict())} tensors loaded" in caplog.text
    assert same_weights(dict(model.state_dict()), dict(source.state_dict()))
    load_checkpoint(model, tmp_path / "old.pth.tar")  # as in timm, whose function effdet hands on: averaged if there
    assert torch.equal(model.stem.weight, source.stem.weight + 1)
    with pytest.raises(ck.CheckpointError, match=r"old.pth.tar: The weights do not fit.*head.weight"):
        load_checkpoint(small_model(classes=5), str(tmp_path / "old.pth.tar"))


def test_pretrained_path_never_touches_the_network(tmp_path, no_network, caplog):
    source, model = small_model(seed=1), small_model(classes=5, seed=2)
    ck.save_checkpoint(tmp_path / "a.pth", {"state_dict": source.state_dict()})
    with caplog.at_level(logging.WARNING):
        report = load_pretrained(model, str(tmp_path / "a.pth"), strict=False)
    assert [key for key, _, _ in report.mismatched] == ["head.weight", "head.bias"]
    assert torch.equal(model.stem.weight, source.stem.weight) and "head.weight: file 3x4x1x1" in caplog.text
    dropped = load_pretrained(
        model, (tmp_path / "a.pth").as_uri(), strict=False, filter_fn=lambda state: {"stem.bias": state["stem.bias"]}
    )
    assert dropped.loaded == ["stem.bias"]


def test_pretrained_without_an_address_warns_and_keeps_the_model(caplog):
    model = small_model(seed=2)
    with caplog.at_level(logging.WARNING):
        assert load_pretrained(model, "") is None
    assert "initial weights" in caplog.text
    assert same_weights(dict(model.state_dict()), dict(small_model(seed=2).state_dict()))


def test_pretrained_offline_names_address_and_place(tmp_path, no_network, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = "https://example.invalid/weights/tiny-0123abcd.pth"
    with pytest.raises(ck.CheckpointError) as caught:
        load_pretrained(small_model(), url)
    assert url in str(caught.value) and str(tmp_path / "hub/checkpoints/tiny-0123abcd.pth") in str(caught.value)
    assert "put it at" in str(caught.value) and "(--pretrained FILE)" in str(caught.value)


def test_pretrained_file_put_into_the_cache_is_checked_and_used(tmp_path, no_network, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source, model = small_model(seed=1), small_model(seed=2)
    torch.save(source.state_dict(), tmp_path / "weights")
    digest = hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()
    cached = tmp_path / "hub" / "checkpoints" / f"tiny-{digest[:8]}.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes((tmp_path / "weights").read_bytes())
    assert load_pretrained(model, f"https://example.invalid/{cached.name}").complete
    assert same_weights(dict(model.state_dict()), dict(source.state_dict()))
    cached.write_bytes(b"something else")
    with pytest.raises(ck.CheckpointError, match="SHA-256"):
        load_pretrained(model, f"https://example.invalid/{cached.name}")


def test_pretrained_downloads_from_a_real_server_and_checks_the_hash(tmp_path, monkeypatch):
    import functools
    import threading
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    site = tmp_path / "site"
    site.mkdir()
    source, model = small_model(seed=1), small_model(seed=2)
    torch.save(source.state_dict(), site / "raw")
    content = (site / "raw").read_bytes()
    good = f"tiny-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    for name in (good, "tiny-00000000.pth"):
        (site / name).write_bytes(content)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        base = f"http://127.0.0.1:{server.server_port}"
        assert load_pretrained(model, f"{base}/{good}").complete
        assert same_weights(dict(model.state_dict()), dict(source.state_dict()))
        for name, reason in (("tiny-00000000.pth", "hash"), ("absent-12345678.pth", "404")):
            with pytest.raises(ck.CheckpointError, match=f"Could not download.*{reason}"):
                load_pretrained(model, f"{base}/{name}")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert [path.name for path in (tmp_path / "home/hub/checkpoints").iterdir()] == [good]


def test_a_loading_process_that_dies_meanwhile_is_no_full_disk(tmp_path, monkeypatch):
    """Torch's signal handler raises wherever the main process is, also while it writes."""

    def save(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(RuntimeError, match="pid 7"):
        ck.save_checkpoint(tmp_path / "a.pth.tar", {"epoch": 1})
    assert not list(tmp_path.iterdir())
