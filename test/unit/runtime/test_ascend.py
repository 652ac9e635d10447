"""What the device layer knows of Ascend chips by name; settings on a device are in test/npu/test_npu_device.py."""

import pytest

from effdet.runtime import ascend

# Names of torch_npu's table of chips (csrc/core/npu/NpuVariables.cpp, torch_npu 2.13.0).
CHIPS = {
    "910": "Ascend910PremiumA Ascend910ProA Ascend910A Ascend910ProB Ascend910B Ascend910",
    "A2": "Ascend910B1 Ascend910B2 Ascend910B2C Ascend910B3 Ascend910B4 Ascend910B4-1",
    "A3": "Ascend910_9391 Ascend910_9392 Ascend910_9381 Ascend910_9382 Ascend910_9372 Ascend910_9362 Ascend910_9363",
    "950": "Ascend950 Ascend950DT_9571 Ascend950PR_957bx Ascend950PR_9599",
    "": "Ascend310P3 Ascend310B1 Ascend910C Kirin",
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in CHIPS.items() for name in names.split()])
def test_generation(kind: str, name: str):
    assert ascend.generation(name) == kind
    assert ascend.has_half_cube(name) == (kind == "910" or name == "Ascend310P3")


@pytest.mark.parametrize("name", ["Ascend910B1", "Ascend910_9391", "Ascend950", "Ascend310P3"])
def test_the_nms_operator_is_for_the_first_generation(name: str):
    with pytest.raises(ValueError, match=f"not for {name}: leave --nms out"):
        ascend.batch_nms(name)
