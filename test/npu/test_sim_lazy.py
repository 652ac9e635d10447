"""The lazy mode: what does not wait reads too early, and what waits as it must gives the same values."""

from __future__ import annotations

import itertools

import npu_sim
import pytest
import torch

SEEDS = range(8)


def values_under_seeds(work) -> list[list[float]]:
    """Return what `work` gives in lazy mode under several orders of the streams."""
    results = []
    for seed in SEEDS:
        with npu_sim.lazy(seed):
            results.append(work())
        torch.npu.synchronize()
    return results


def read_back(x: torch.Tensor, wait: bool) -> list[float]:
    host = torch.zeros(x.shape).pin_memory()
    host.copy_(x * 2, non_blocking=True)
    if wait:
        torch.npu.current_stream().synchronize()
    return host.tolist()


def test_a_copy_to_the_host_must_be_waited_for(device):
    x = torch.ones(3, device=device)
    assert values_under_seeds(lambda: read_back(x, wait=True)) == [[2.0] * 3] * len(SEEDS)
    assert values_under_seeds(lambda: read_back(x, wait=False)) == [[0.0] * 3] * len(SEEDS)


def upload_twice(device: torch.device, wait: bool) -> list[float]:
    host = torch.ones(3).pin_memory()
    first = host.to(device, non_blocking=True)
    if wait:
        torch.npu.current_stream().synchronize()
    host.fill_(7.0)  # the next batch, in the same buffer
    second = host.to(device, non_blocking=True)
    return [*first.cpu().tolist(), *second.cpu().tolist()]


def test_a_pinned_buffer_must_not_be_written_anew_before_it_was_read(device):
    assert values_under_seeds(lambda: upload_twice(device, wait=True)) == [[1.0] * 3 + [7.0] * 3] * len(SEEDS)
    assert values_under_seeds(lambda: upload_twice(device, wait=False)) == [[7.0] * 6] * len(SEEDS)


def test_a_pinned_buffer_that_is_given_up_is_kept_until_it_was_read(device):
    """torch_npu's allocator of pinned memory asks an event before it gives a buffer out again."""

    def work() -> list[float]:
        on_device = torch.ones(1000).pin_memory().to(device, non_blocking=True)
        torch.full((1000,), 7.0).pin_memory()
        return on_device.cpu().unique().tolist()

    assert values_under_seeds(work) == [[1.0]] * len(SEEDS)


def use_side_stream(number: int, x: torch.Tensor, wait_before: bool, wait_after: bool) -> bool:
    """Tell whether the result is right; the number is another each time, as memory holds what the last call left."""
    side, main = torch.npu.Stream(), torch.npu.current_stream()
    x = x + number
    if wait_before:
        side.wait_stream(main)
    with torch.npu.stream(side):
        y = x * 10
    if wait_after:
        main.wait_stream(side)
    result = (y + 1).cpu().tolist()
    torch.npu.synchronize()
    return result == [number * 10 + 1] * 2


@pytest.mark.parametrize("missing", [None, "before", "after"])
def test_streams_must_wait_for_each_other(device, missing):
    x, numbers = torch.zeros(2, device=device), itertools.count(1)
    right = values_under_seeds(lambda: use_side_stream(next(numbers), x, missing != "before", missing != "after"))
    assert all(right) == (missing is None), right


def test_an_event_says_when_it_is_over(device):
    def work() -> tuple[bool, bool]:
        event = torch.npu.Event()
        y = torch.ones(3, device=device) * 2
        event.record()
        early = event.query()
        event.synchronize()
        return early, event.query(), y.sum().item()

    assert values_under_seeds(work) == [(False, True, 6.0)] * len(SEEDS)


def test_values_that_the_host_needs_are_computed_first(device):
    def work() -> list:
        x = torch.arange(6, device=device) - 2
        x[1:3] += 10
        return [x.nonzero().flatten().tolist(), x[x > 0].tolist(), x.max().item(), torch.equal(x, x), x.cpu().tolist()]

    expected = [[0, 1, 2, 3, 4, 5], [9, 10, 1, 2, 3], 10, True, [-2, 9, 10, 1, 2, 3]]
    assert values_under_seeds(work) == [expected] * len(SEEDS)


def test_an_error_of_an_operator_comes_at_the_wait(device):
    index = torch.tensor([5]).to(device)
    x = torch.zeros(3, device=device)
    with pytest.raises((RuntimeError, IndexError), match="out of (range|bounds)"), npu_sim.lazy():
        x.index_select(0, index)


def test_a_training_step_and_a_prediction_wait_for_what_they_use(device, is_910a):
    if is_910a:
        pytest.skip("runs once, as Ascend910B1: reading the overflow flag empties the queues")
    from test_npu_step import make_batches, make_run, train_steps

    from effdet.bench import DetBenchPredict

    def work() -> list[torch.Tensor]:
        run = make_run(device, {"loss_scale": 128.0})
        train_steps(run, make_batches(device, 2))
        weights = [value.detach().flatten().cpu() for value in run.ema.module.state_dict().values()]
        bench = DetBenchPredict(run.model).to(device).eval()
        images = make_batches(device, 1)[0][0]
        info = {"img_scale": torch.ones(2).to(device), "img_size": torch.full((2, 2), 64.0).to(device)}
        with torch.no_grad(), torch.autocast("npu", torch.float16):
            return [*weights, bench(images, info).flatten().cpu()]

    expected = work()
    with npu_sim.lazy(3):
        got = work()
    assert len(got) == len(expected) > 300
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
