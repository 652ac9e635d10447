"""What a training step and a prediction ask of the NPU: no waits, no copies to the host, no float64, known dtypes."""

from __future__ import annotations

from types import SimpleNamespace

import npu_sim
import pytest
import torch
from torch.testing import assert_close

from effdet.bench import DetBenchPredict, DetBenchTrain
from effdet.data.loader import PrefetchLoader
from effdet.factory import create_model, place_model
from effdet.training.amp import Precision
from effdet.training.ema import ModelEma
from effdet.training.engine import Training, evaluate, train_one_epoch
from effdet.training.optim import build_optimizer
from effdet.training.schedule import build_schedule

SIZE = (64, 96)
CPU = torch.device("cpu")
PRECISIONS = {
    "float32": {"enabled": False},
    "float16, static scale": {"loss_scale": 128.0},
    "float16, dynamic scale": {"init_scale": 128.0},
    "float16 weights": {"opt_level": "O2", "loss_scale": 128.0},
}

# What torch_npu 2.13 documents, by operator: dtypes an operator takes.
# Source: Ascend/pytorch, docs/zh/api/native_api/pytorch_2-13-0 (torch, torch.nn, torch.nn.functional, torch.Tensor).
_HALF_AND_FLOAT = {"float16", "float32"}
_FLOATS = {"bfloat16", "float16", "float32"}
_INDEXED = {"int16", "int32", "int64", "bool"}
DOCUMENTED_DTYPES = {
    "convolution": _FLOATS,
    "convolution_backward": _FLOATS,
    "convolution_overrideable": _FLOATS,
    "convolution_backward_overrideable": _FLOATS,
    "npu_conv2d": _FLOATS,
    "npu_conv2d_backward": _FLOATS,
    "silu": _HALF_AND_FLOAT,
    "silu_": _HALF_AND_FLOAT,
    "silu_backward": _HALF_AND_FLOAT,
    "native_batch_norm": _HALF_AND_FLOAT,
    "native_batch_norm_backward": _HALF_AND_FLOAT,
    "max_pool2d_with_indices": _FLOATS,
    "upsample_nearest2d": _FLOATS,
    "upsample_nearest2d_backward": _FLOATS,
    "topk": _FLOATS | {"int32", "int64"},
    "sort": _HALF_AND_FLOAT | {"int32", "int64"},
    "argsort": _HALF_AND_FLOAT | {"int32", "int64"},
    "max": _FLOATS | {"int64", "bool"},
    "amax": _FLOATS | {"int64", "bool"},
    "argmax": _FLOATS | {"int32", "int64"},
    "clamp": _FLOATS | {"int32", "int64"},
    "gather": _HALF_AND_FLOAT | _INDEXED,
    "sigmoid": _HALF_AND_FLOAT,
    "masked_fill": _FLOATS | {"int8", "int32", "int64", "bool"},
    "masked_fill_": _FLOATS | {"int8", "int32", "int64", "bool"},
}
# Operators that make the host wait, fall back to the CPU or change shape with the data.
NEVER = {
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "huber_loss",
    "nonzero_static",
    "repeat_interleave",
    "bincount",
    "_assert_async",
}


class Batches(list):
    """A loader of ready batches."""

    sampler = SimpleNamespace()


def make_batches(device: torch.device, count: int) -> Batches:
    generator = torch.Generator().manual_seed(1)
    batches = Batches()
    for _ in range(count):
        corners = torch.rand(2, 4, 2, generator=generator) * 30
        boxes = torch.cat((corners, corners + 6 + torch.rand(2, 4, 2, generator=generator) * 30), -1)
        batches.append(
            (
                torch.randn(2, 3, *SIZE, generator=generator).to(device),
                {"bbox": boxes.to(device), "cls": torch.randint(1, 4, (2, 4), generator=generator).float().to(device)},
            )
        )
    return batches


def make_run(device: torch.device, keys: dict, opt: str = "fusedmomentum", log_interval: int = 1000) -> Training:
    torch.manual_seed(0)
    model = place_model(
        create_model("tf_efficientdet_d0", num_classes=3, image_size=SIZE, pretrained_backbone=False), device
    )
    ema = ModelEma(model)
    precision = Precision(device, **keys)
    precision.prepare_model(model)
    optimizer = build_optimizer(model, opt, lr=1e-3, masters=precision.master_parameters(model))
    bench = DetBenchTrain(model).to(device)
    schedule, _ = build_schedule(optimizer, "cosine", 10, updates_per_epoch=10)
    return Training(
        bench, model, optimizer, schedule, precision, device, ema, (10.0, "norm"), log_interval=log_interval
    )


def train_steps(run: Training, batches: Batches) -> None:
    """Do what train_one_epoch does for a batch, without its log lines."""
    from effdet.training.engine import _update

    run.bench.train()
    for images, target in batches:
        with run.precision.autocast(run.cast_together):
            output = run.bench(images, target)
        run.precision.backward(output["loss"])
        _update(run)


@pytest.mark.parametrize("keys", PRECISIONS.values(), ids=PRECISIONS.keys())
def test_a_training_step_waits_for_nothing(device, keys):
    run = make_run(device, keys)
    warm_up, measured = make_batches(device, 2), make_batches(device, 1)
    train_steps(run, warm_up)
    before = [parameter.detach().cpu() for parameter in run.model.parameters()]
    with npu_sim.count_waits() as meters, npu_sim.strict():
        train_steps(run, measured)
    for counter in (meters.waits, meters.copies_to_host, meters.float64, meters.mismatches):
        assert not counter, counter
    check_operators(meters)
    half = {name for name, dtypes in meters.dtypes.items() if "float16" in dtypes}
    assert bool(half) == (keys.get("enabled") is not False)
    assert meters.calls.total() > 1000 and run.updates == 3
    assert run.precision.skipped() == 0
    moved = [not torch.equal(old, new.detach().cpu()) for old, new in zip(before, run.model.parameters(), strict=True)]
    assert sum(moved) > 0.7 * len(moved)  # biases before a batch norm have no gradient


def check_operators(meters: npu_sim.Meters) -> None:
    checked = 0
    for name in meters.calls:
        base = name.partition("::")[2].partition(".")[0]
        assert base not in NEVER, name
        assert meters.max_dims[name] <= 4, f"{name} was given {meters.max_dims[name]} dimensions"
        assert "float64" not in meters.dtypes[name], name
        if base in DOCUMENTED_DTYPES and not name.endswith(".other"):  # max.other is elementwise, not a reduction
            extra = meters.dtypes[name] - DOCUMENTED_DTYPES[base] - ({"int64", "bool"} if base != "argmax" else set())
            assert not extra, f"{name} was given {sorted(extra)}"
            checked += 1
    assert checked > 4, "the table names nothing that was called"


@pytest.mark.parametrize("drop_empty", [False, True])
@pytest.mark.parametrize("nms, reads", [("auto", 1), ("npu", 0), ("exact", 10)])
def test_a_prediction_reads_the_device_as_often_as_it_must(device, is_910a, nms, reads, drop_empty):
    """On the host: the candidates, once; on the device: a look or two for each block of 1,000 whether it is done."""
    if nms == "npu" and not is_910a:
        pytest.skip("the operator is refused on the later chips")
    model = place_model(
        create_model("tf_efficientdet_d0", num_classes=3, image_size=SIZE, pretrained_backbone=False), device
    )
    bench = DetBenchPredict(model, nms=nms, drop_empty=drop_empty).to(device).eval()
    images = make_batches(device, 1)[0][0]
    info = {"img_scale": torch.ones(2).to(device), "img_size": torch.full((2, 2), 64.0).to(device)}
    for half in (False, True):
        with torch.no_grad(), torch.autocast("npu", torch.float16, enabled=half):
            bench(images, info)
            with npu_sim.count_waits() as meters, npu_sim.strict(waits=False, copies=False):
                detections = bench(images, info)
        assert meters.waits.total() <= reads and meters.copies_to_host.total() <= reads, meters.waits
        assert not meters.float64
        if nms != "exact":  # which asks for single values, as `NEVER` has it
            check_operators(meters)
        assert detections.shape == (2, 100, 6) and detections.dtype == torch.float32
        assert detections.device.type == ("cpu" if nms == "auto" else "npu")


@pytest.mark.parametrize("keys", [{"enabled": False}, {"loss_scale": 128.0}], ids=["float32", "float16"])
def test_an_epoch_reads_the_device_once_for_each_log_line(device, keys):
    run = make_run(device, keys, log_interval=2)
    for epoch, batches in enumerate((2, 4)):
        with npu_sim.count_waits() as meters:
            train_one_epoch(run, make_batches(device, batches), epoch)
        # The lines, then the epoch's means and the count of skipped steps; of the first batch the highest label, of the
        # first update the batch norms' counters.
        assert meters.copies_to_host.total() == batches // 2 + 2 + 2 * (epoch == 0), meters.copies_to_host


def test_losses_follow_the_cpu_over_five_steps(device, is_910a):
    traces = []
    for where in (CPU, device):
        run = make_run(where, {"enabled": False})
        losses = []
        for batch in make_batches(where, 5):
            run.bench.train()
            output = run.bench(*batch)
            run.precision.backward(output["loss"])
            run.precision.step(run.optimizer, run.clip)
            run.optimizer.zero_grad()
            losses.append(output["loss"].item())
        traces.append(losses)
    # float32 noise grows from step to step in an untrained network; Ascend910A computes its products in float16
    assert traces[1][:3] == pytest.approx(traces[0][:3], rel=3e-2 if is_910a else 1e-4)
    assert traces[1] == pytest.approx(traces[0], rel=1e-1 if is_910a else 1e-2)


def test_batches_go_to_the_device_from_pinned_memory_without_waiting(device):
    images = torch.randint(0, 256, (6, 3, *SIZE), dtype=torch.uint8)
    inner = torch.utils.data.DataLoader(
        [(image, {"cls": torch.ones(2)}) for image in images], batch_size=2, pin_memory=True
    )
    loader = PrefetchLoader(inner, device=device)
    with npu_sim.count_waits() as meters, npu_sim.strict():
        batches = list(loader)
    assert not meters.waits
    mean, std = torch.tensor([0.485, 0.456, 0.406]) * 255, torch.tensor([0.229, 0.224, 0.225]) * 255
    for index, (got, target) in enumerate(batches):
        expected = (images[2 * index : 2 * index + 2].float() - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)
        assert target["cls"].device.type == "npu"


def test_an_evaluation_copies_once_for_each_batch(device):
    from effdet.evaluator import Evaluator

    class Collects(Evaluator):
        def __init__(self):
            self.rows = []

        def add_predictions(self, detections, target):
            self.rows.append(detections.cpu())

        def evaluate(self):
            return 0.5

    model = place_model(
        create_model("tf_efficientdet_d0", num_classes=3, image_size=SIZE, pretrained_backbone=False), device
    )
    with npu_sim.count_waits() as meters:
        stats = evaluate(DetBenchPredict(model).to(device), make_batches(device, 3), Collects())
    assert stats.metric == 0.5 and meters.copies_to_host.total() == 3
