"""20 training steps and the predictions of their weights, through the scripts, against the stored trace."""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "golden"))
import loss_trace  # noqa: E402  (test/golden/loss_trace.py)


def test_the_trace_is_the_stored_one():
    stored = json.loads(loss_trace.STORED.read_text())
    fresh = loss_trace.run_trace(loss_trace.REPO, loss_trace.STABLE)
    np.testing.assert_allclose(fresh["losses"], stored["losses"], rtol=1e-5)
    np.testing.assert_allclose(fresh["detections"], stored["detections"], rtol=1e-5, atol=2e-3)  # boxes: 3 decimals
    assert abs(fresh["AP"] - stored["AP"]) < 1e-5
