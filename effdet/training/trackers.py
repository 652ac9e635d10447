"""Services and viewers that a run's numbers also go to: TensorBoard, Weights & Biases, SwanLab; one small class each.

What lives here: all that is known of their packages, which are imported where they are asked for. What must not: which
numbers there are (recorder.py). None of them may end a run, or be missed by one: what they get is in metrics.jsonl too.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from effdet.checkpoint.io import write_json

_logger = logging.getLogger("effdet.train")

IDS_NAME = "trackers.json"
"""By service the id that it knows the run by, so that a resumed run goes on there, too."""
_PROJECT = "effdet"
_STEP = "global_step"


class Tracker(Protocol):
    """What a service is to a run; every method may raise anything."""

    def __init__(self, folder: Path, run_id: str, settings: Mapping[str, Any], done: int) -> None:
        """Begin, or go on.

        Args:
            folder: the run's; its name is the run's.
            run_id: the same whenever this run is begun.
            settings: of the run, in sections.
            done: steps done before; what is known of later ones is void.
        """

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take numbers by name."""

    def flush(self) -> None:
        """Put what was taken where it can be seen."""

    def close(self) -> None:
        """End."""


class TensorBoard:
    """Event files in the run's folder. They cannot be cut, so it hides what lies behind a resumed step (purge_step)."""

    def __init__(self, folder: Path, run_id: str, settings: Mapping[str, Any], done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each chart."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write to disk."""
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()


class _Service:
    """What those share that send by themselves; `run` is their package's."""

    run: Any

    def flush(self) -> None:
        """Do nothing: it sends by itself."""

    def close(self) -> None:
        """Send the rest."""
        self.run.finish()


class Wandb(_Service):
    """Weights & Biases; WANDB_MODE=offline keeps everything in the run's folder for `wandb sync`."""

    def __init__(self, folder: Path, run_id: str, settings: Mapping[str, Any], done: int) -> None:
        import wandb

        self.run = wandb.init(
            project=_PROJECT,
            dir=str(folder),
            id=run_id,
            name=folder.name,
            config=dict(settings),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),  # log.txt has the lines
        )
        self.run.define_metric("*", step_metric=_STEP)  # its own steps may not go back, as those of a resumed run do

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send a row."""
        self.run.log({**values, _STEP: step})


class SwanLab(_Service):
    """SwanLab; SWANLAB_MODE=offline keeps everything in the run's folder for `swanlab sync`."""

    def __init__(self, folder: Path, run_id: str, settings: Mapping[str, Any], done: int) -> None:
        import swanlab

        place = folder / "swanlab"
        place.mkdir(exist_ok=True)
        self.run = swanlab.init(
            project=_PROJECT,
            log_dir=str(place),
            id=run_id,
            name=folder.name,
            config=dict(settings),
            resume="allow",
            settings=swanlab.Settings(terminal={"proxy_type": "none"}),  # log.txt has the lines
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send a row."""
        self.run.log(dict(values), step=step)


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "swanlab": SwanLab}
"""By the name of the package, which is that for --log-to."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse services whose package is not installed.

    Raises:
        ValueError: says what to install.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"--log-to {name} needs the package {name}, which is not installed: pip install {name}, or leave it "
                "out; the same numbers are in metrics.jsonl and report.html"
            )


class Trackers:
    """All services of a run; one that fails is said once and left out from then on."""

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], done: int) -> None:
        """Begin; arguments are those of Tracker, and the names of the services."""
        self.open: dict[str, Tracker] = {}
        ids = _read_ids(folder, names) if names else {}
        for name in names:
            with self._forgiven(name):
                self.open[name] = TRACKERS[name](folder, ids[name], settings, done)
        if self.open:
            atexit.register(self.close)

    def log(self, values: Mapping[str, float | None], step: int, flush: bool = False) -> None:
        """Hand numbers on; undefined ones are left out."""
        defined = {name: value for name, value in values.items() if value is not None}
        for name, tracker in list(self.open.items()):
            with self._forgiven(name):
                tracker.log(defined, step)
                if flush:
                    tracker.flush()

    def close(self) -> None:
        """End all of them; once."""
        atexit.unregister(self.close)
        while self.open:
            name, tracker = self.open.popitem()
            with self._forgiven(name):
                tracker.close()

    @contextlib.contextmanager
    def _forgiven(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is: the run is worth more than a copy of its numbers
            self.open.pop(name, None)
            text = str(error).splitlines() or [""]
            _logger.warning(
                "--log-to %s: nothing more goes there (%s: %s); the run goes on, and its numbers are in metrics.jsonl",
                name,
                type(error).__name__,
                text[0],
            )
            _logger.debug("the error came from here", exc_info=True)


def _read_ids(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return each service's id of the run; new ones are written into the folder."""
    path = folder / IDS_NAME
    ids: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        ids = json.loads(path.read_text(encoding="utf-8"))
    new = {name: secrets.token_hex(8) for name in names if name not in ids and name != "tensorboard"}
    if new:
        with contextlib.suppress(OSError):  # a full disk: then the run is another one there when it is resumed
            write_json(path, {**ids, **new})
    return {"tensorboard": "", **ids, **new}
