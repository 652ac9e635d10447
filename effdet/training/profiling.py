"""A trace of a few training steps: which operators run when, on the host and on the device.

Which profiler a device has is in runtime/device.py; when it starts and where its file goes is here.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from effdet.runtime import device as device_layer

_logger = logging.getLogger(__name__)

FOLDER = "profile"  # in the run's folder
SKIPPED = 5  # updates before the profiler starts: the first ones compile, allocate and fill caches


class StepProfiler:
    """Trace some updates of a run, once, and write a file that Perfetto and MindStudio Insight open.

    Args:
        device: where the run computes.
        output_dir: the run's folder; the trace is written into `profile` within it.
        updates: how many to trace; the first `SKIPPED` of the run, and one for the profiler itself, are left out.
    """

    def __init__(self, device: torch.device, output_dir: Path, updates: int) -> None:
        self._device, self._folder, self._updates = device, output_dir / FOLDER, updates
        self._done = 0
        self._profiler: Any = None
        self._ended = False

    def step(self) -> None:
        """Take note of an update that was just launched: start, go on or end."""
        if self._ended:
            return
        self._done += 1
        if self._done == SKIPPED:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._profiler = device_layer.make_profiler(self._device, self._folder, self._updates)
            self._profiler.start()  # the next update warms the profiler up, those behind it are traced
        elif self._profiler is not None:
            is_last = self._done == SKIPPED + 1 + self._updates
            if is_last:
                device_layer.synchronize(self._device)  # so that the trace holds what was launched
            self._profiler.step()
            if is_last:
                self.close()

    def close(self) -> None:
        """Write what was traced; say so where the run ended before anything was."""
        if self._ended:
            return
        self._ended = True
        traced = self._done - SKIPPED - 1
        if self._profiler is not None:
            device_layer.synchronize(self._device)
            self._profiler.stop()
        if traced > 0:
            _logger.info("profile: %d updates in %s", traced, self._folder)
        else:
            _logger.warning(
                "--profile: nothing was traced: %d updates were done, of %d needed", self._done, SKIPPED + 2
            )
