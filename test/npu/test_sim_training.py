"""What training needs works on the simulated NPU: autocast, optimizers, loading data, torch_npu's own operators."""

from __future__ import annotations

import copy
import io

import npu_sim
import pytest
import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch_npu.npu.amp import GradScaler


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 8, 3, 1, 1, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
    )


def make_batch(step: int = 0) -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, device, steps: int = 3) -> list[Tensor]:
    for step in range(steps):
        optimizer.zero_grad()
        model(make_batch(step).to(device)).square().mean().backward()
        optimizer.step()
    return [parameter.detach().cpu() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p, npu: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True),
        lambda p, npu: torch.optim.AdamW(p, lr=1e-3),
        lambda p, npu: (torch_npu.optim.NpuFusedSGD if npu else torch.optim.SGD)(
            p, lr=0.1, momentum=0.9, weight_decay=1e-4
        ),
    ],
    ids=["SGD", "AdamW", "NpuFusedSGD"],
)
def test_three_steps_are_the_cpus(exact_products, make_optimizer, device):
    model = make_model()
    on_npu = copy.deepcopy(model).to(device)
    expected = train(model, make_optimizer(model.parameters(), npu=False), torch.device("cpu"))
    got = train(on_npu, make_optimizer(on_npu.parameters(), npu=True), device)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_the_trap_of_the_fused_sgd_is_there(device):
    model = make_model().to(device)
    optimizer = torch_npu.optim.NpuFusedSGD(model.parameters(), lr=0.1)
    train(model, optimizer, device, steps=1)
    with pytest.raises(ValueError, match="set_to_none"):
        optimizer.zero_grad(set_to_none=True)


def test_autocast_rounds_once_after_a_convolution(device):
    x, weight = make_batch(), make_model()[0].weight.detach()
    with torch.autocast("npu", dtype=torch.float16), npu_sim.count_waits() as meters:
        result = F.conv2d(x.to(device), weight.to(device), padding=1)
        loss = result.float().mean()
    assert (result.dtype, loss.dtype) == (torch.float16, torch.float32)
    assert meters.dtypes["aten::convolution"] == {"float16"}
    in_float32 = F.conv2d(x.half().float(), weight.half().float(), padding=1)
    assert torch.equal(result.cpu(), in_float32.half())


def test_a_mixed_precision_step_waits_for_nothing(device):
    model = make_model().to(device)
    optimizer = torch_npu.optim.NpuFusedSGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = GradScaler(init_scale=128.0, dynamic=False)
    batch = make_batch().to(device)
    losses = []
    for step in range(3):
        with npu_sim.strict(waits=step > 0, copies=step > 0), npu_sim.count_waits() as meters:
            optimizer.zero_grad()
            with torch.autocast("npu", dtype=torch.float16):
                loss = model(batch).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
    assert not meters.waits and not meters.mismatches and meters.calls.total() > 20
    assert losses[2].item() < losses[0].item()


def test_synchronised_batch_norm_alone_is_batch_norm(device):
    x = make_batch()
    norm = nn.BatchNorm2d(3)
    fused = copy.deepcopy(norm).to(device)
    expected = norm(x)
    mean, invstd = torch.batch_norm_stats(x.to(device), norm.eps)
    mean, invstd = torch.batch_norm_gather_stats_with_counts(
        x.to(device),
        mean[None],
        invstd[None],
        fused.running_mean,
        fused.running_var,
        0.1,
        norm.eps,
        torch.tensor([2.0 * 16 * 16]).to(device),
    )
    result = torch.batch_norm_elemt(x.to(device), fused.weight, fused.bias, mean, invstd, norm.eps)
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused.running_var.cpu(), norm.running_var)


def test_loader_workers_and_pinned_memory(device):
    loader = DataLoader(TensorDataset(torch.arange(8.0)), batch_size=4, num_workers=2, pin_memory=True)
    sums = []
    for (batch,) in loader:
        assert batch.is_pinned()
        with npu_sim.strict():
            sums.append(batch.to(device, non_blocking=True).sum())
    assert [value.item() for value in sums] == [6.0, 22.0]


def test_a_state_dict_moves_between_devices(device):
    model = make_model().to(device)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["0.weight"].device.type == "npu"
    file.seek(0)
    on_cpu = make_model()
    on_cpu.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    for one, other in zip(model.state_dict().values(), on_cpu.state_dict().values(), strict=True):
        assert torch.equal(one.cpu(), other)


def test_dropout_keeps_its_mask_for_the_gradient(device):
    torch.manual_seed(0)
    x = torch.ones(20, 50, device=device, requires_grad=True)
    y = F.dropout(x, 0.25)
    y.sum().backward()
    kept = (y > 0).float().mean().item()
    assert 0.7 < kept < 0.8 and torch.equal(y.detach().cpu(), x.grad.cpu())
    assert y.detach().cpu().unique().tolist() == pytest.approx([0.0, 4 / 3])


def test_memory_nobody_wrote_shows(device):
    torch.npu.empty_cache()  # so that it is fresh, and holds the runtime's poison
    assert torch.empty(4_000_000, device=device)[123].item() == -26711958.0


def test_a_frozen_batch_norm_has_gradients(device):
    x = make_batch().to(device).requires_grad_()
    norm = nn.BatchNorm2d(3).to(device).eval()
    with npu_sim.count_waits() as meters:
        norm(x).sum().backward()
    torch.testing.assert_close(x.grad.cpu(), torch.full_like(x.grad.cpu(), 1 / (1 + norm.eps) ** 0.5))
    assert not meters.mismatches


# ---- torch_npu's own operators, by examples small enough to check by eye


def test_npu_one_hot(device):
    classes = torch.tensor([2, -1, 0, 7]).to(device)
    result = torch_npu.npu_one_hot(classes, -1, 3, 0.75, 0.25)
    assert result.dtype == torch.float32
    assert result.tolist() == [[0.25, 0.25, 0.75], [0.25] * 3, [0.75, 0.25, 0.25], [0.25] * 3]


def test_npu_batch_nms(device):
    # One class. The second box overlaps the first by 90/110; the third by exactly 1/3 (kept: not above the threshold);
    # the fourth has no area, the fifth no score.
    boxes = [[0, 0, 10, 10], [0, 1, 10, 11], [0, 5, 10, 15], [3, 3, 3, 9], [20, 20, 30, 30]]
    scores = [0.9, 0.8, 0.7, 0.6, 0.1]
    got = torch_npu.npu_batch_nms(
        torch.tensor(boxes, dtype=torch.float32).view(1, 5, 1, 4).to(device),
        torch.tensor(scores).view(1, 5, 1).to(device),
        0.1,
        1 / 3,
        10,
        3,
    )
    kept, kept_scores, classes, count = (tensor.cpu() for tensor in got)
    assert kept.tolist() == [[boxes[0], boxes[2], [0, 0, 0, 0]]]
    assert kept_scores.tolist() == [pytest.approx([0.9, 0.7, 0.0])]
    assert classes.tolist() == [[0, 0, 0]] and count.tolist() == [2] and count.dtype == torch.int32


def test_npu_batch_nms_takes_each_class_alone_and_then_the_best(device):
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]]).view(1, 2, 1, 4).to(device)
    scores = torch.tensor([[0.5, 0.6], [0.9, 0.2]]).view(1, 2, 2).to(device)
    _, kept_scores, classes, count = (t.cpu() for t in torch_npu.npu_batch_nms(boxes, scores, 0.0, 0.5, 5, 4))
    assert kept_scores.tolist() == [pytest.approx([0.9, 0.6, 0, 0])] and classes.tolist() == [[0, 1, 0, 0]]
    assert count.tolist() == [2]
    _, kept_scores, classes, count = (t.cpu() for t in torch_npu.npu_batch_nms(boxes, scores, 0.0, 0.5, 5, 1))
    assert kept_scores.tolist() == [pytest.approx([0.9])] and count.tolist() == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores_dtype": torch.float16}, "the same for both"),
        ({"max_total": 1001}, "1 to 1000 boxes"),
        ({"iou": 1.5}, "IoU threshold"),
    ],
)
def test_npu_batch_nms_refuses_what_its_documentation_excludes(change, message, device):
    boxes, scores = torch.zeros(1, 2, 1, 4).to(device), torch.zeros(1, 2, 1).to(device)
    with pytest.raises(RuntimeError, match=message):
        torch_npu.npu_batch_nms(
            boxes,
            scores.to(change.get("scores_dtype", torch.float32)),
            0.1,
            change.get("iou", 0.5),
            10,
            change.get("max_total", 10),
        )
