"""The learning rate over a run.

Lives here: the schedule's shape (timm's classes), warm-up, noise, and what of it survives a restart. Everything is
stepped by optimizer updates, so that runs of a few epochs warm up smoothly; timm's own default, which `per_epoch` asks
for, changes the rate once per epoch.

Source: timm.scheduler, whose formulas, noise and meaning of the arguments are kept.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler as TimmScheduler

from effdet.config.options import nearest

_logger = logging.getLogger(__name__)

# Name -> the schedule of timm's that gives its shape. 'none' and 'plateau' are constant to timm: warm-up, then the full
# rate.
_SHAPES = {
    "cosine": "cosine",
    "tanh": "tanh",
    "poly": "poly",
    "step": "step",
    "multistep": "multistep",
    "plateau": "step",
    "constant": "step",
    "none": "step",
}
SCHEDULES = tuple(_SHAPES)


@dataclass
class Noise:
    """Random factors on the learning rate, one for each epoch of a span, equal on every rank and in every run.

    Source: timm.scheduler.scheduler.Scheduler (the same numbers from the same seed).
    """

    first_epoch: float  # on in epochs e with first_epoch <= e < last_epoch
    last_epoch: float
    limit: float  # draws whose magnitude is not below this are drawn again
    std: float
    seed: int  # the run's, without the rank

    def at(self, epoch: int) -> float:
        """Return the relative change in an epoch: 0.25 means a quarter more, 0.0 outside the span."""
        if not self.first_epoch <= epoch < self.last_epoch:
            return 0.0
        generator = torch.Generator().manual_seed(self.seed + epoch)
        while True:
            value = torch.randn(1, generator=generator).item() * self.std
            if abs(value) < self.limit:
                return value


@dataclass
class Plateau:
    """Lower the rate by a factor when the metric has not risen for some epochs.

    Source: torch.optim.lr_scheduler.ReduceLROnPlateau with threshold 1e-4 relative and no cooldown.
    """

    rate: float
    patience: int
    min_lr: float
    best: float | None = None
    bad_epochs: int = 0
    reductions: int = 0

    def observe(self, metric: float) -> None:
        """Take one epoch's metric into account; a NaN counts as no improvement."""
        best = self.best
        better = best is None or math.isnan(best) or metric > best + 1e-4 * abs(best)
        self.bad_epochs = 0 if better else self.bad_epochs + 1
        if better:
            self.best = metric
        if self.bad_epochs > self.patience:
            self.reductions += 1
            self.bad_epochs = 0

    def apply(self, lr: float) -> float:
        """Return the lowered rate, never below min_lr by this lowering."""
        return lr if self.reductions == 0 else max(lr * self.rate**self.reductions, min(self.min_lr, lr))


class Schedule:
    """Set the learning rate of all parameter groups; made by `build_schedule`.

    The rate is a function of the number of updates done (and, for 'plateau', of the metrics seen), so a resumed run
    needs no more than `load_state_dict`, and a run resumed with more epochs follows the longer schedule.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        shape: TimmScheduler,
        updates_per_epoch: int,
        warmup_epochs: float,
        noise: Noise | None = None,
        plateau: Plateau | None = None,
        per_epoch: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.updates = 0
        self._shape = shape
        self.updates_per_epoch = updates_per_epoch
        self._warmup_epochs = warmup_epochs
        self._noise = noise
        self._plateau = plateau
        self._per_epoch = per_epoch
        self._noise_of_epoch = (-1, 0.0)
        self.step_update(0)

    @property
    def lr(self) -> float:
        """The learning rate of the first parameter group, as the next update will use it."""
        return self.optimizer.param_groups[0]["lr"]

    def step_update(self, num_updates: int) -> None:
        """Set the rate for the next update; call it after each optimizer update.

        Args:
            num_updates: updates done since the start of the whole run (a skipped step counts).
        """
        self.updates = num_updates
        epoch = num_updates // self.updates_per_epoch
        self._shape.step_update(epoch * self.updates_per_epoch if self._per_epoch else num_updates)
        factor = 1.0 + self._noise_now(epoch)
        if self._plateau is None and factor == 1.0:
            return
        for group in self.optimizer.param_groups:
            lr = group["lr"] if self._plateau is None else self._plateau.apply(group["lr"])
            group["lr"] = lr * factor

    def step(self, epoch: int, metric: float | None = None) -> None:
        """Tell the schedule that epochs 0 to epoch - 1 are done; only 'plateau' listens.

        Args:
            epoch: number of finished epochs.
            metric: the epoch's validation metric, equal on all ranks; None where it was not evaluated. Metrics of
                the warm-up are not counted.
        """
        if self._plateau is None or metric is None or epoch <= self._warmup_epochs:
            return
        self._plateau.observe(float(metric))
        self.step_update(self.updates)

    def _noise_now(self, epoch: int) -> float:
        if self._noise is None:
            return 0.0
        if self._noise_of_epoch[0] != epoch:
            self._noise_of_epoch = (epoch, self._noise.at(epoch))
        return self._noise_of_epoch[1]

    def skip_to(self, epoch: int) -> int:
        """Set the rate of an epoch's first update, and return the number of updates before it."""
        self.step_update(epoch * self.updates_per_epoch)
        return self.updates

    def state_dict(self) -> dict[str, Any]:
        """Return the counters; the shape is the configuration's and is not stored."""
        state: dict[str, Any] = {"updates": self.updates}
        if self._plateau is not None:
            state["plateau"] = {key: getattr(self._plateau, key) for key in ("best", "bad_epochs", "reductions")}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counters and set the rate they mean; call it after the optimizer's load_state_dict."""
        if self._plateau is not None:
            for key, value in state.get("plateau", {}).items():
                setattr(self._plateau, key, value)
        self.step_update(int(state["updates"]))


def build_schedule(
    optimizer: torch.optim.Optimizer,
    sched: str = "cosine",
    epochs: int = 300,
    warmup_epochs: float = 5,
    warmup_lr: float = 1e-4,
    min_lr: float = 1e-5,
    cooldown_epochs: int = 10,
    lr_noise: float | Sequence[float] | None = None,
    lr_noise_pct: float = 0.67,
    lr_noise_std: float = 1.0,
    cycle_mul: float = 1.0,
    cycle_limit: int = 1,
    decay_epochs: float = 30,
    decay_milestones: Sequence[int] = (90, 180, 270),
    decay_rate: float = 0.1,
    patience: int = 10,
    seed: int = 42,
    *,
    updates_per_epoch: int,
    per_epoch: bool = False,
) -> tuple[Schedule, int]:
    """Build the learning-rate schedule of a run; build it before any optimizer state is loaded.

    Args:
        optimizer: its groups' 'lr' is the rate at the top of the schedule.
        sched: 'cosine', 'tanh', 'poly', 'step', 'multistep', 'plateau', or 'constant' (also 'none': warm-up, then no
            change).
        epochs: length of one cycle, warm-up included, cooldown not.
        warmup_epochs: rise linearly from warmup_lr; a fraction is allowed, 0 turns it off.
        warmup_lr: rate of the very first update.
        min_lr: where cosine, tanh and poly end and what plateau does not go below.
        cooldown_epochs: epochs at min_lr after the last cycle ('cosine', 'tanh' and 'poly' only, as in timm).
        lr_noise: fraction of the epochs from which the rate is noisy, or a pair (from, to); None for no noise. One draw
            for each epoch.
        lr_noise_pct: limit of the relative noise.
        lr_noise_std: its standard deviation before the limit.
        cycle_mul: growth of the cycle length ('cosine', 'tanh', 'poly').
        cycle_limit: number of cycles ('cosine', 'tanh', 'poly').
        decay_epochs: epochs between drops ('step').
        decay_milestones: epochs at whose start the rate drops ('multistep').
        decay_rate: factor of a drop ('step', 'multistep', 'plateau'), or the exponent of 'poly'.
        patience: epochs without improvement before a drop ('plateau').
        seed: of the noise: the run's seed without the rank, so that all ranks agree.
        updates_per_epoch: optimizer updates in one epoch, >= 1.
        per_epoch: keep the rate of an epoch's first update throughout the epoch, as timm does by default; the first
            epoch of a warm-up is then trained at `warmup_lr`.

    Returns:
        The schedule, with the rate of the first update already set, and the number of epochs to train in all.

    Raises:
        ValueError: unknown name or a setting out of range.
    """
    base_lr = max(group["lr"] for group in optimizer.param_groups)
    _check(sched, epochs, updates_per_epoch, warmup_epochs, warmup_lr, min_lr, base_lr)
    shape, total_epochs = create_scheduler_v2(
        optimizer,
        sched=_SHAPES[sched],
        num_epochs=epochs,
        warmup_epochs=warmup_epochs,  # type: ignore[arg-type]  # timm says int and computes with any number
        warmup_lr=warmup_lr,
        min_lr=min_lr,
        cooldown_epochs=cooldown_epochs,
        cycle_mul=cycle_mul,
        cycle_decay=0.1,
        cycle_limit=cycle_limit,
        decay_epochs=decay_epochs,
        decay_milestones=list(decay_milestones),
        decay_rate=decay_rate if sched in ("step", "multistep", "poly") else 1.0,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    noise = None if lr_noise is None else _build_noise(lr_noise, epochs, lr_noise_pct, lr_noise_std, seed)
    plateau = Plateau(decay_rate, patience, min_lr) if sched == "plateau" else None
    if warmup_epochs >= epochs:
        _logger.warning(
            "The warm-up of %g epochs takes the whole schedule of %d: the learning rate never reaches %g. "
            "Set a shorter --warmup-epochs (0.5 is allowed).",
            warmup_epochs,
            epochs,
            base_lr,
        )
    return Schedule(optimizer, shape, updates_per_epoch, warmup_epochs, noise, plateau, per_epoch), int(total_epochs)


def _build_noise(span: float | Sequence[float], epochs: int, limit: float, std: float, seed: int) -> Noise:
    """Turn fractions of the run into epochs."""
    ends = [float(span)] if isinstance(span, (int, float)) else [float(end) for end in span]
    if len(ends) not in (1, 2) or ends != sorted(ends) or ends[0] < 0 or ends[-1] > 1:
        raise ValueError(
            f"lr_noise must be one or two fractions of the run in ascending order, such as 0.4 0.9; got {span}."
        )
    if not limit > 0 or not std >= 0:
        raise ValueError(f"lr_noise_pct must be above 0 and lr_noise_std at least 0; got {limit} and {std}.")
    return Noise(ends[0] * epochs, ends[1] * epochs if len(ends) == 2 else math.inf, limit, std, seed)


def _check(
    sched: str,
    epochs: int,
    updates_per_epoch: int,
    warmup_epochs: float,
    warmup_lr: float,
    min_lr: float,
    base_lr: float,
) -> None:
    """Refuse what would train with a rate nobody meant."""
    if sched not in _SHAPES:
        raise ValueError(
            f"Unknown schedule '{sched}'{nearest(sched, SCHEDULES) or '.'} Choose from {', '.join(SCHEDULES)}."
        )
    if epochs < 1 or updates_per_epoch < 1:
        raise ValueError(
            f"A schedule needs at least 1 epoch of 1 update, got {epochs} epochs of {updates_per_epoch} "
            "updates: check --epochs, and that the data set fills one batch."
        )
    if warmup_epochs < 0 or warmup_lr < 0 or min_lr < 0:
        raise ValueError(
            f"warmup_epochs, warmup_lr and min_lr must be 0 or more, got {warmup_epochs}, {warmup_lr} and {min_lr}."
        )
    for name, value, used in (
        ("min_lr", min_lr, sched in ("cosine", "tanh", "poly", "plateau")),
        ("warmup_lr", warmup_lr, warmup_epochs > 0),
    ):
        if used and value > base_lr:
            raise ValueError(
                f"{name} {value:g} is above the rate {base_lr:g}: the rate would go the wrong way. "
                f"Set --{name.replace('_', '-')} to at most {base_lr:g}."
            )
