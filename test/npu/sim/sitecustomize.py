"""Run an unmodified script on the simulated NPU: python imports this file at start when its folder is on PYTHONPATH.

    PYTHONPATH=test/npu/sim NPU_SIM=1 NPU_SIM_DEVICES=2 NPU_SIM_SOC=Ascend910A python train.py --device npu

Does nothing unless NPU_SIM is set. Nothing is loaded before the script imports torch_npu, which torch does by itself
where autoloading is on. NPU_SIM_REPORT=FILE writes the meters as JSON to FILE.RANK, or FILE.pPID, at exit.
"""

import os

if os.environ.get("NPU_SIM", "0") not in ("", "0"):
    from npu_sim import hook

    hook.install()
