"""What the simulator says of operators by chip, and of the bytes copied to make tensors contiguous."""

from __future__ import annotations

import npu_sim
import pytest
import torch
from npu_sim import chips


@pytest.mark.parametrize(
    ("chip", "name", "dtypes", "said"),
    [
        ("Ascend910B1", "aclnnScatter", ("int64", "int64", "int64", "int64"), "aclnnScatter: int64 on the AI CPU"),
        ("Ascend910_9391", "aclnnScatter", ("int64", "int64", "int64", "int64"), "aclnnScatter: int64 on the AI CPU"),
        ("Ascend910B1", "aclnnScatter", ("int32", "int64", "int32", "int32"), None),
        ("Ascend950", "aclnnScatter", ("int64", "int64", "int64", "int64"), None),
        ("Ascend910B1", "aclnnDivMods", ("int64", "int64"), "aclnnDivMods: int64 on the AI CPU"),
        ("Ascend950", "aclnnDivMods", ("int64", "int64"), None),
        ("Ascend910A", "aclnnAdd", ("bfloat16", "bfloat16", "bfloat16"), "aclnnAdd: bfloat16 on the AI CPU"),
        ("Ascend910B1", "aclnnMul", ("float32", "bool", "float32"), None),
        ("Ascend910A", "aclnnConvolution", ("float16",), "aclnnConvolution: not supported"),
        ("Ascend910A", "aclnnForeachNorm", ("float32",), "aclnnForeachNorm: not supported"),
        ("Ascend910_9391", "aclnnForeachCopy", ("int64",), "aclnnForeachCopy: not supported"),
        ("Ascend910B1", "aclnnForeachCopy", ("int64",), None),
        ("Ascend910B1", "aclnnBatchNormStats", ("bfloat16", "float32"), "aclnnBatchNormStats: bfloat16 refused"),
        ("Ascend950", "aclnnBatchNormStats", ("bfloat16", "float32"), None),
        ("Ascend910B1", "aclnnErfinv", ("float32", "float32"), "aclnnErfinv: unknown"),
        ("Ascend910B1", "HcclAllReduce", (), None),
    ],
)
def test_a_chips_table(chip, name, dtypes, said):
    assert chips.concern(chip, name, dtypes) == said


def test_the_table_covers_the_simulated_chips():
    table = chips._table()
    assert set(table["generations"]) == set(npu_sim.SOCS)
    for kernel in table["ai_core"]:
        assert set(kernel["dtypes"]) == set(table["generations"].values()) and kernel["source"], kernel["kernel"]


def test_a_scatter_of_int64_is_told_and_one_of_int32_is_not(device, soc):
    index = torch.zeros(2, 1, dtype=torch.int64, device=device)
    said = {}
    for dtype in (torch.int64, torch.int32):
        labels, values = torch.zeros(2, 5, dtype=dtype, device=device), torch.ones(2, 1, dtype=dtype, device=device)
        with npu_sim.count_launches() as launches:
            labels.scatter_(1, index, values)
        said[dtype] = {text for text in launches.concerns if "int64" in text}
        assert launches.total() == 1
    if soc == "Ascend910B1":
        assert said == {torch.int64: {"aclnnInplaceScatter: int64 on the AI CPU"}, torch.int32: set()}


def copied(work) -> int:
    with npu_sim.count_launches() as launches:
        work()
    return launches.copied.total()


def test_a_gather_along_another_axis_than_the_last_is_transposed(device):
    x = torch.ones(2, 8, 50, device=device)
    index = torch.zeros(2, 1, 50, dtype=torch.int64, device=device)
    # x, the index and the result, all once: 4 bytes a float, 8 an index
    assert copied(lambda: x.gather(1, index)) == 4 * 800 + 8 * 100 + 4 * 100
    assert copied(lambda: x.gather(2, index[..., :9])) == 0 + 8 * 18  # the last axis: only the sliced index is copied
    assert copied(lambda: x.gather(-1, index)) == 0


def test_a_gather_along_a_long_axis_is_not_on_a2(device, is_910a):
    x = torch.ones(2, 400, 50, device=device)
    index = torch.zeros(2, 16, 50, dtype=torch.int64, device=device)
    assert (copied(lambda: x.gather(1, index)) > 0) == is_910a


def test_a_scatter_along_another_axis_than_the_last_is_transposed_there_and_back(device):
    x = torch.zeros(2, 8, 5, device=device)
    index = torch.zeros(2, 1, 5, dtype=torch.int64, device=device)
    source = torch.ones(2, 1, 5, device=device)
    assert copied(lambda: x.scatter_add(1, index, source)) == 2 * 4 * 80 + 8 * 10 + 4 * 10
    assert copied(lambda: x.flatten(1).scatter_add(1, index.flatten(1), source.flatten(1))) == 0


def test_a_tensor_that_is_not_contiguous_is_copied_before_arithmetic(device):
    x = torch.ones(4, 6, device=device)
    assert copied(lambda: x + x) == 0
    assert copied(lambda: x.t().sum(1)) == 4 * 24
    assert copied(lambda: x.t().contiguous()) == 0  # a copy that was asked for
