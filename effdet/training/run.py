"""What a training run consists of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from effdet.bench import DetBenchPredict
from effdet.checkpoint.manager import CheckpointManager
from effdet.config.schema import RunConfig
from effdet.runtime import distributed

from .build import Data, Loaders, Placement
from .engine import Training
from .profiling import StepProfiler
from .recorder import RunRecorder
from .resume import Position


@dataclass(frozen=True)
class Start:
    """What a run starts from."""

    output_dir: Path
    payload: dict[str, Any]  # the checkpoint that it continues; empty for a new run
    source: str  # the file it came from


@dataclass(frozen=True)
class Run:
    """A run that is ready to train."""

    cfg: RunConfig
    place: Placement
    output_dir: Path
    data: Data
    loaders: Loaders
    training: Training
    eval_bench: DetBenchPredict
    fits: int | None  # images a step that the memory is likely to hold, where that was estimated
    epochs: int  # with the cooldown
    position: Position  # where it starts
    manager: CheckpointManager
    recorder: RunRecorder
    started: float  # time.time()
    lock: IO[str] | None  # holds the folder as long as it is open
    profiler: StepProfiler | None = None  # of the first process, with --profile
    vote: distributed.LateMax = field(default_factory=distributed.LateMax)  # on signals, see EpochState.after_update

    def close(self) -> None:
        """End the loader processes, write what was traced, and give the folder up."""
        if self.profiler is not None:
            self.profiler.close()
        self.loaders.close()
        if self.lock is not None:
            self.lock.close()
