"""The detector on the NPU against itself on the CPU: outputs, labels, losses, gradients, detections, padding."""

from __future__ import annotations

import copy

import npu_sim
import pytest
import torch
from torch.testing import assert_close

from effdet.bench import DetBenchPredict, DetBenchTrain
from effdet.factory import create_model, place_model
from effdet.runtime.device import one_hot
from effdet.training.ema import ModelEma

CPU = torch.device("cpu")
MODELS = ["tf_efficientdet_d0", "tf_efficientdet_lite0"]
SIZE = (96, 128)

pytestmark = pytest.mark.usefixtures("exact_products")  # what the chips' rounding does to a loss: test_sim_rounding.py


def make_model(name: str = "tf_efficientdet_d0", num_classes: int = 5) -> torch.nn.Module:
    torch.manual_seed(0)
    model = create_model(name, num_classes=num_classes, image_size=SIZE, pretrained_backbone=False)
    for module in model.modules():  # statistics other than 0 and 1, so that eval mode computes something
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.8, 1.2)
            torch.nn.init.normal_(module.running_mean, std=0.05)
    return model


def make_batch(batch: int = 2) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, *SIZE, generator=generator)
    corners = torch.rand(batch, 6, 2, generator=generator) * 60
    boxes = torch.cat((corners, corners + 8 + torch.rand(batch, 6, 2, generator=generator) * 50), -1)
    classes = torch.randint(1, 6, (batch, 6), generator=generator)
    classes[1, 3:] = -1  # padding
    return images, {
        "bbox": boxes,
        "cls": classes,
        "img_scale": torch.tensor([1.5, 0.7])[:batch],
        "img_size": torch.tensor([[190.0, 140.0], [80.0, 60.0]])[:batch],
    }


def on(device: torch.device, value):
    return {key: item.to(device) for key, item in value.items()} if isinstance(value, dict) else value.to(device)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_losses_gradients_and_detections_equal_the_cpu(device, name, mode):
    results = []
    for where in (CPU, device):
        model = place_model(make_model(name), where)
        bench = DetBenchTrain(model).to(where).train(mode == "train")
        images, target = make_batch()
        output = bench(images.to(where), on(where, target))
        output["loss"].backward()
        results.append((output, {key: value.grad for key, value in model.named_parameters()}, model.state_dict()))
    (mine, gradients, state), (theirs, npu_gradients, npu_state) = results
    for key in ("loss", "class_loss", "box_loss"):
        assert theirs[key].device.type == "npu"
        assert_close(theirs[key].cpu(), mine[key], rtol=1e-5, atol=1e-6)
    norm = torch.stack([value.norm() for value in gradients.values()]).norm()
    for key, value in gradients.items():  # an untrained network's gradients span decades: relative to the whole
        assert_close(npu_gradients[key].cpu(), value, rtol=1e-3, atol=1e-5 * float(norm), msg=lambda text, key=key: key)
    for key, value in state.items():
        assert_close(npu_state[key].cpu(), value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    if mode == "eval":
        assert_close(theirs["detections"].cpu(), mine["detections"], rtol=1e-4, atol=1e-3)
        assert (mine["detections"][..., 4] > 0).all()


def test_labels_are_the_same_to_the_bit(device):
    results = []
    for where in (CPU, device):
        bench = DetBenchTrain(make_model(), ignore_regions=True).to(where)
        _, target = make_batch()
        target["cls"][0, 5] = -2  # an ignore region
        target["bbox"][0, 5] = torch.tensor([0.0, 0.0, 96.0, 128.0])
        results.append(bench.anchor_labeler.assign(*(on(where, target)[key] for key in ("bbox", "cls"))))
    for mine, theirs in zip(*results, strict=True):
        assert_close(theirs.cpu(), mine, rtol=1e-6, atol=1e-6)
    assert (results[0][0] >= 0).sum() > 5 and (results[0][0] == -2).any()
    assert torch.equal(results[0][0], results[1][0].cpu())


def test_the_averaged_weights_follow_as_on_the_cpu(device):
    averages = []
    for where in (CPU, device):
        model = make_model().to(where)
        ema = ModelEma(model, decay=0.5, warmup=False)
        with torch.no_grad():
            for _ in range(2):
                for parameter in model.parameters():
                    parameter.mul_(1.25)
                ema.update(model)
        averages.append(ema.module.state_dict())
    for key, value in averages[0].items():
        assert_close(averages[1][key].cpu(), value)


def test_layers_pad_by_themselves_on_the_npu_only(device):
    images, _ = make_batch()
    model = make_model().eval()
    expected = copy.deepcopy(model)(images)
    counts = {}
    for where, mode in ((device, "auto"), (device, "pad")):
        placed = place_model(copy.deepcopy(model), where, mode)
        with torch.no_grad(), npu_sim.count_waits() as meters:
            outputs = placed(images.to(where))
        counts[mode] = (meters.calls["aten::constant_pad_nd"], meters.max_dims["aten::constant_pad_nd"])
        for mine, theirs in zip(expected[0] + expected[1], outputs[0] + outputs[1], strict=True):
            assert_close(theirs.cpu(), mine, rtol=1e-4, atol=1e-4)
    strided = sum(
        getattr(module, "stride", 1) in ((2, 2), 2)
        for module in model.backbone.modules()
        if isinstance(module, torch.nn.Conv2d)
    )
    assert strided == 5
    # 'pad' pads every strided activation; alone, each strided convolution extends its small kernel once.
    assert counts["auto"][0] <= strided < counts["pad"][0]


@pytest.mark.parametrize("soft", [False, True], ids=["nms", "soft_nms"])
def test_post_processing_equals_the_cpu(device, soft):
    detections = []
    for where in (CPU, device):
        model = make_model()
        model.config.__dict__["_metadata"].flags["readonly"] = False
        model.config.soft_nms = soft
        bench = DetBenchPredict(place_model(model, where)).to(where).eval()
        images, target = make_batch()
        with torch.no_grad():
            detections.append(bench(images.to(where), on(where, target)).cpu())
    assert_close(detections[1], detections[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("max_det", [20, 100])
def test_every_nms_gives_the_detections_of_the_exact_one(device, is_910a, max_det):
    """Without clipping, which makes boxes empty: npu_batch_nms drops those. Its equal scores may come in any order."""
    names = ["exact", "host", "auto", *(["npu"] if is_910a else [])]  # npu is refused on the other chips
    model = create_model(
        "tf_efficientdet_d0",
        num_classes=5,
        image_size=SIZE,
        pretrained_backbone=False,
        max_det_per_image=max_det,
        max_detection_points=400,
    )
    generator = torch.Generator().manual_seed(3)
    model.to(device).eval()
    benches = {name: DetBenchPredict(model, nms=name).to(device) for name in names}
    sizes = benches["exact"].anchors.level_sizes
    heads = [
        [torch.randn(2, channels, *size, generator=generator) * scale for size in sizes]
        for channels, scale in ((9 * 5, 2.0), (36, 0.3))
    ]
    _, target = make_batch()
    exact, host, auto, *npu = (
        bench.post_process(
            [x.to(device) for x in heads[0]], [x.to(device) for x in heads[1]], target["img_scale"].to(device), None
        ).cpu()
        for bench in benches.values()
    )
    assert torch.equal(host, exact) and torch.equal(auto, exact)
    for found in npu:
        assert found.shape == exact.shape == (2, max_det, 6) and found.dtype == torch.float32
        for one, other in zip(exact, found, strict=True):
            assert_close(
                other[other[:, 4].argsort(descending=True, stable=True)],
                one[one[:, 4].argsort(descending=True, stable=True)],
                rtol=1e-5,
                atol=1e-3,
            )
    assert (exact[..., 4] > 0).sum() > max_det  # of both images: suppression left enough to compare


def test_npu_batch_nms_refuses_what_it_cannot_do(device):
    model = create_model(
        "tf_efficientdet_d0", num_classes=2, image_size=SIZE, pretrained_backbone=False, max_det_per_image=1001
    )
    with pytest.raises(ValueError, match="operator of Ascend devices, and this run is on cpu"):
        DetBenchPredict(model, nms="npu")
    model.to(device)
    with pytest.raises(ValueError, match="1 to 1000 boxes per image, but max_det is 1001"):
        DetBenchPredict(model, nms="npu")
    with pytest.raises(ValueError, match="Unknown NMS 'fast': choose one of auto, exact"):
        DetBenchPredict(model, nms="fast")


def test_dense_targets_give_the_same_loss_and_gradient(device):
    losses, gradients = [], []
    for dense in (False, True):
        model = place_model(make_model(), device)
        bench = DetBenchTrain(model, dense_targets=dense).to(device).train()
        images, target = make_batch()
        with npu_sim.count_waits() as meters:
            loss = bench(images.to(device), on(device, target))["class_loss"]
        assert meters.calls["npu::npu_one_hot"] == (5 if dense else 0)  # one for each level
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.class_net.predict.conv_pw.weight.grad.cpu())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_one_hot_rows_of_negative_indices_are_zero(device):
    rows = one_hot(device)(torch.tensor([[1, -1, 2, -2]], dtype=torch.int32, device=device), 3).cpu()
    assert torch.equal(rows, torch.tensor([[[0.0, 1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]]]))
