"""What every test shares: thread counts, import order, where the shared data lies."""

from __future__ import annotations

import logging
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.util import Finalize
from pathlib import Path

import pytest
import torch

import timm_patches.torchvision_ops  # noqa: F401  must come before anything that imports timm

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers share the cores; threads on top of that make all of them slower


# What `make check` runs, with the tests that are marked one by one: the stored numbers, the order of the rooms, and of
# each room the files that say most for their seconds.
CORE = """
    integration/test_trace.py
    unit/test_golden.py unit/test_layering.py
    unit/checkpoint/test_checkpoint.py
    unit/commands/test_checkpoint_tools.py
    unit/config/test_run_config.py
    unit/data/test_coco.py unit/data/test_formats.py unit/data/test_images.py unit/data/test_transforms.py
    unit/datacheck/test_anchor_reach.py unit/datacheck/test_data_check.py unit/datacheck/test_scan.py
    unit/metrics/test_errors.py unit/metrics/test_evaluator.py
    unit/network/test_network.py
    unit/ops/test_anchors.py unit/ops/test_boxes.py unit/ops/test_loss.py unit/ops/test_nms.py
    unit/predict/test_predictor.py
    unit/report/test_log.py unit/runtime/test_progress.py
    unit/runtime/test_device.py unit/runtime/test_distributed.py unit/runtime/test_launch.py
    unit/timm_patches/test_fused_layers.py unit/timm_patches/test_same_padding.py
    unit/training/test_amp.py unit/training/test_ema.py unit/training/test_engine.py unit/training/test_optim.py
    unit/training/test_recorder.py unit/training/test_resume.py unit/training/test_schedule.py
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the files in CORE."""
    here = Path(__file__).resolve().parent
    core = {here / name for name in CORE}
    if missing := sorted(str(path) for path in core if not path.is_file()):
        raise pytest.UsageError(f"CORE in {__file__} names files that are not there: {', '.join(missing)}")
    for item in items:
        if item.path in core:
            item.add_marker(pytest.mark.core)


def pytest_configure(config: pytest.Config) -> None:
    """Give the run a temporary folder that goes when it ends: processes that tests kill cannot clean up after them.

    pytest's own folders of failed tests and the caches of compiled code stay.
    """
    if hasattr(config, "workerinput"):  # a process of xdist, which has the environment of the one that starts it
        return
    repository = Path(__file__).resolve().parents[1]
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    for name in ("TORCHINDUCTOR_CACHE_DIR", "NPU_SIM_CACHE"):
        os.environ.setdefault(name, str(repository / ".pytest_cache" / name.lower()))
    tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="effdet-test-")
    os.chmod(tempfile.tempdir, 0o755)  # tests that give up root's rights read there too
    # After multiprocessing has removed its own folder in there, which it does with priority -100.
    Finalize(None, shutil.rmtree, [tempfile.tempdir], {"ignore_errors": True}, exitpriority=-200)
    owner = os.getpid()

    def end_as_ctrl_c_does(signum: int, _frame: object) -> None:
        if os.getpid() == owner:
            raise KeyboardInterrupt
        signal.signal(signum, signal.SIG_DFL)  # a forked child
        os.kill(os.getpid(), signum)

    for name in ("SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), end_as_ctrl_c_does)


@pytest.fixture(scope="session")
def in_terminal() -> Callable[..., tuple[int, str]]:
    """Return what runs Python with arguments in a terminal of its own and gives its status and all it was sent."""

    def run(*arguments: str) -> tuple[int, str]:
        ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
        argv = [sys.executable, *arguments]
        repository = Path(__file__).resolve().parents[1]
        with subprocess.Popen(
            argv, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=repository
        ) as process:
            os.close(theirs)
            parts = [b""]
            try:
                while part := os.read(ours, 4096):
                    parts.append(part)
            except OSError:  # Linux' way of saying that the other side is closed
                pass
        os.close(ours)
        return process.returncode, b"".join(parts).decode()

    return run


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of shared data sets beside the repository; skip the test where there is none."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the shared data sets at {folder}, which are not on this machine")
    return folder


@pytest.fixture
def no_network(monkeypatch) -> None:
    """Have every connection of this process fail, as without a network."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def restored_loggers() -> Iterator[None]:
    """Give the packages' loggers back as they were: what a test sets there is for a whole process."""
    saved = {
        name: (log := logging.getLogger(name), log.handlers[:], log.propagate, log.level)
        for name in ("effdet", "timm_patches")
    }
    for logger, *_ in saved.values():
        logger.handlers[:] = []  # what is replaced is closed, and these are to be given back
    yield
    for logger, handlers, propagate, level in saved.values():
        for handler in logger.handlers:
            handler.close()
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(scope="session")
def small_model() -> dict:
    """Return the settings of a detector of three classes that is small enough for a test of any kind."""
    return {
        "name": "pocket",
        "backbone_name": "mobilenetv3_small_050",
        "image_size": (128, 128),
        "fpn_channels": 16,
        "fpn_cell_repeats": 1,
        "box_class_repeats": 1,
        "pad_type": "same",
        "backbone_args": {"pad_type": "same"},
        "num_classes": 3,
    }


@pytest.fixture(scope="session")
def small_checkpoint(small_model, tmp_path_factory) -> Path:
    """Write a checkpoint as train.py does, of a small model whose scores spread over 0..1; EMA weights differ."""
    from effdet.checkpoint.manager import CHECKPOINT_VERSION, save_checkpoint
    from effdet.config.model_config import stored_model_spec
    from effdet.data.coco.categories import CategoryMap
    from effdet.efficientdet import EfficientDet

    torch.manual_seed(0)
    network = EfficientDet(stored_model_spec(small_model), pretrained_backbone=False)
    for module in network.modules():  # an initial network's norm layers let next to nothing through
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.5
    with torch.no_grad():
        network.train()(torch.randn(4, 3, 128, 128))
        network.class_net.predict.conv_pw.weight.normal_(std=3.0)
        network.box_net.predict.conv_pw.weight.normal_(std=0.5)
    ema = {key: value.clone() for key, value in network.state_dict().items()}
    trained = {key: value * 1.01 if value.is_floating_point() else value for key, value in ema.items()}
    path = tmp_path_factory.mktemp("small") / "model_best.pth.tar"
    save_checkpoint(
        path,
        {
            "version": CHECKPOINT_VERSION,
            "arch": network.config.name,
            "state_dict": trained,
            "state_dict_ema": ema,
            "optimizer": {"state": {}},
            "epoch": 4,
            "step": 40,
            "metric": 0.25,
            "config": {"run": {"seed": 42}},
            "model_config": network.config.to_plain(),
            "image_size": [128, 128],
            "category_map": CategoryMap((3, 7, 12), ("ball", "box", "star"), 3).to_dict(),
        },
    )
    return path


@pytest.fixture(scope="session")
def synthetic_images(tmp_path_factory) -> list[Path]:
    """Return the files of eight images of the embedded data set."""
    from effdet.data.synthetic.dataset import make_synthetic_dataset

    root = make_synthetic_dataset(tmp_path_factory.mktemp("synthetic"), num_train=1, num_val=8)
    return sorted((root / "val2017").iterdir())
