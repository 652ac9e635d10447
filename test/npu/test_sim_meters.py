"""The meters count what happens, and strict mode raises and names the operator."""

from __future__ import annotations

import npu_sim
import pytest
import torch
import torch.nn.functional as F
from npu_sim.meters import OUTSIDE


@pytest.fixture
def x(device):
    return torch.tensor([[1.0, -2.0, 3.0], [0.5, 4.0, -1.0]]).to(device)


def pinned() -> torch.Tensor:
    return torch.zeros(3).pin_memory()


# What one call costs: waits, copies to the host.
COSTS = {
    "aten::_local_scalar_dense": (lambda x: x[0, 0].item(), 1, 1),
    "aten::nonzero": (lambda x: (x > 0).nonzero(), 1, 0),
    "aten::index.Tensor": (lambda x: x[x > 0], 1, 0),
    "aten::masked_select": (lambda x: x.masked_select(x > 0), 1, 0),
    "aten::_unique2": (lambda x: x.unique(), 1, 0),
    "aten::one_hot": (lambda x: F.one_hot(x.abs().long()), 1, 1),
    "aten::copy_": (lambda x: torch.empty(2, 3).copy_(x), 1, 1),
}
FREE = {
    "gather": lambda x: x.gather(1, (x > 0).long()),
    "index by integers": lambda x: x[(x[:, 0] > 0).long()],
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 0, 1.0),
    "topk": lambda x: x.topk(2),
    "sort": lambda x: x.sort(),
    "scatter": lambda x: torch.zeros_like(x).scatter_(1, (x > 0).long(), 1.0),
    "one_hot of a given width": lambda x: F.one_hot((x > 0).long(), 2),
    "arithmetic with numbers": lambda x: (x * 0.5 + 1).clamp(min=0).sum(),
    "copy from pinned memory": lambda x: pinned().to(x.device, non_blocking=True),
    "view": lambda x: x.t().reshape(3, 2)[1:],
}


@pytest.mark.parametrize("name", COSTS)
def test_a_costly_call_is_counted_once(name, x):
    call, waits, copies = COSTS[name]
    with npu_sim.count_waits() as meters:
        call(x)
    assert dict(meters.waits) == {name: waits}
    assert dict(meters.copies_to_host) == ({name: copies} if copies else {})
    assert meters.calls[name] == 1


@pytest.mark.parametrize("name", COSTS)
def test_strict_names_the_costly_operator(name, x):
    with npu_sim.strict(), pytest.raises(RuntimeError, match=f"{name} makes the host wait"):
        COSTS[name][0](x)
    COSTS[name][0](x)  # and only inside the block


@pytest.mark.parametrize("name", FREE)
def test_a_free_call_costs_nothing(name, x):
    with npu_sim.count_waits() as meters, npu_sim.strict():
        FREE[name](x)
    assert not meters.waits and not meters.copies_to_host and not meters.float64 and not meters.mismatches


@pytest.mark.parametrize(
    "upload",
    [
        lambda device: torch.zeros(3).to(device),
        lambda device: torch.zeros(3).to(device, non_blocking=True),  # not pinned: it cannot be asynchronous
        lambda device: pinned().to(device),
        lambda device: torch.tensor([1.0, 2.0], device=device),
    ],
    ids=["blocking", "not pinned", "pinned but blocking", "torch.tensor"],
)
def test_an_upload_that_blocks_is_a_wait(upload, device):
    with npu_sim.count_waits() as meters:
        upload(device)
    assert meters.waits.total() == 1 and not meters.copies_to_host
    with npu_sim.strict(), pytest.raises(RuntimeError, match="makes the host wait"):
        upload(device)


def test_assigning_by_mask_waits(x):
    with npu_sim.count_waits() as meters:
        x[x > 0] = 1.0
    assert meters.waits["aten::index_put_"] == 1


def test_copies_alone_can_be_forbidden(x):
    with npu_sim.strict(waits=False), pytest.raises(RuntimeError, match="aten::_to_copy copies from the NPU"):
        x.cpu()
    with npu_sim.strict(waits=False, copies=False), npu_sim.count_waits() as meters:
        x.cpu()
    assert meters.copies_to_host == {"aten::_to_copy": 1}


def test_waits_outside_operators_are_found(x):
    with npu_sim.count_waits() as meters:
        torch.npu.synchronize()
        event = torch.npu.Event()
        event.record()
        event.synchronize()
    assert dict(meters.waits) == {OUTSIDE: 2}
    with pytest.raises(RuntimeError, match="outside operators"), npu_sim.strict():
        torch.npu.synchronize()


def test_float64_is_found_where_it_arrives_and_where_it_computes(device):
    with npu_sim.strict(waits=False), pytest.raises(RuntimeError, match="aten::_to_copy has float64"):
        torch.zeros(3, dtype=torch.float64).to(device)
    wide = torch.zeros(3, dtype=torch.float64).to(device)
    with npu_sim.strict(), pytest.raises(RuntimeError, match="aten::add.Tensor has float64"):
        wide + 1
    with npu_sim.count_waits() as meters, npu_sim.strict(float64=False):
        wide + 1
    assert meters.float64["aten::add.Tensor"] > 0
    with npu_sim.strict():
        torch.ones(3, device=device) * 2.0  # a Python number is no float64 tensor


def test_an_operator_without_npu_kernel_raises(x):
    with pytest.raises(RuntimeError, match="huber_loss.*CPU"):
        F.huber_loss(x, x)


def test_an_operator_the_simulation_does_not_know_raises(x):
    import torch_npu

    with pytest.raises(NotImplementedError, match="no reference implementation of npu::npu_fast_gelu"):
        torch_npu.npu_fast_gelu(x)
    with pytest.raises(NotImplementedError, match="aten::bincount"):
        torch.bincount(x[0].abs().long())


def test_calls_tell_dtypes_and_dimensions(device):
    with npu_sim.count_waits() as meters:
        torch.zeros(2, 1, 3, device=device) + torch.ones(3, device=device, dtype=torch.float16)
        torch.ones(3, device=device) + 1
    assert meters.calls["aten::add.Tensor"] == 2
    assert meters.dtypes["aten::add.Tensor"] == {"float32", "float16"}
    assert meters.max_dims["aten::add.Tensor"] == 3


def test_what_a_kernel_calls_in_turn_is_not_the_programs_call(device):
    image, weight = torch.ones(1, 2, 4, 4, device=device), torch.ones(2, 2, 3, 3, device=device)
    with npu_sim.count_waits() as meters:
        F.conv2d(image, weight)
    assert list(meters.calls) == ["aten::convolution"]


def test_blocks_nest_and_the_process_meters_see_all(x):
    npu_sim.meters.reset()
    with npu_sim.count_waits() as outer:
        x[0, 0].item()
        with npu_sim.count_waits() as inner:
            x[0, 0].item()
    assert (outer.waits.total(), inner.waits.total(), npu_sim.meters.waits.total()) == (2, 1, 2)
    assert npu_sim.meters.as_dict()["waits"] == {"aten::_local_scalar_dense": 2}
    npu_sim.meters.reset()
    assert not npu_sim.meters.calls and not npu_sim.meters.waits


def test_a_result_of_another_shape_is_a_mismatch(device):
    torch.npu.set_compile_mode(jit_compile=True)  # then torch_npu returns the mean as [4], the CPU as [4, 1]
    try:
        with npu_sim.count_waits() as meters:
            F.layer_norm(torch.ones(4, 6, device=device), (6,))
    finally:
        torch.npu.set_compile_mode(jit_compile=False)
    assert meters.mismatches["aten::native_layer_norm: result has shape (4,), on the CPU (4, 1)"] == 2


def test_loading_again_needs_the_same_settings(soc):
    devices = torch.npu.device_count()
    npu_sim.load(devices=devices, soc=soc)
    with pytest.raises(RuntimeError, match=f"loaded as {devices} x {soc}.*a process of its own"):
        npu_sim.load(devices=devices + 1, soc=soc)
