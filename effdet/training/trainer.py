"""A training run from top to bottom: what to continue, data, network, optimisation, then epoch by epoch.

`prepare` makes everything, in order, and refuses what cannot work; `fit` trains. What they call is in build.py (config
to objects), recipe.py (settings that suit the data), engine.py (the two loops), resume.py (what a run continues from),
run.py and recorder.py (what it leaves behind).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import sys
import time
from typing import IO

import torch

from effdet.bench import DetBenchPredict
from effdet.checkpoint.manager import BEST_NAME, LAST_NAME, CheckpointManager, load_checkpoint_file
from effdet.config.load import dump_yaml, replace_settings, split_over_devices, workers_per_device
from effdet.config.recipe import Parse
from effdet.config.schema import RunConfig
from effdet.data.corrupt import BadImagesError
from effdet.predict.gallery import write_comparisons
from effdet.report.log import EvalStats, setup_logging
from effdet.runtime import device as device_layer
from effdet.runtime import distributed, memory, progress, seeding, signals

from . import auto_batch, build, footprint, initial_weights, overfit, resume
from .amp import check_precision
from .build import (
    Placement,
    build_loaders,
    build_step,
    build_training,
    log_start,
    open_data,
    uneven_models,
)
from .engine import NonFiniteError, Progress, Training, evaluate, train_one_epoch
from .optim import check_optimizer, freeze_bn_statistics
from .postmortem import explain_divergence
from .profiling import StepProfiler
from .recipe import apply_recipe, fit_to_data, keep_recipe, name_backbone
from .recorder import RunRecorder, trackers_of
from .run import Run, Start, finish_epoch, save_recovery
from .run_dir import check_space, choose_output_dir, discard_if_refused, hold_run_folder
from .trackers import check_trackers

_logger = logging.getLogger("effdet.train")


# ---- before the first step -------------------------------------------------------------------------------------------


def prepare(cfg: RunConfig, device: torch.device, parse: Parse | None = None) -> Run:
    """Choose the recipe, find what to continue, make the run's folder and its log, and build the run.

    Args:
        cfg: of the run.
        device: where it takes place.
        parse: makes the config with other defaults; None: there is no recipe to choose.

    Raises:
        ValueError, OSError, RuntimeError: the run cannot work as asked for; a new folder is removed again.
    """
    if distributed.is_primary():
        progress.watch(sys.stdout)  # the folder with the log comes after the first look at the data
    cfg, recipe = (cfg, None) if parse is None else apply_recipe(cfg, device, parse)
    check_trackers(trackers_of(cfg))
    check_optimizer(cfg.optim.opt, cfg.optim.opt_eps, device)
    amp = cfg.amp
    check_precision(device, amp.enabled, amp.opt_level, amp.dtype, amp.loss_scale)
    auto_batch.check_device(cfg, device)
    if cfg.run.compile:
        device_layer.check_compile(device)
    source = cfg.run.resume
    # A machine that joins a group anew counts no restart; all processes must read the same file.
    wants_newest = any(distributed.all_gather_object(source == resume.AUTO or resume.is_restart()))
    payload = {} if wants_newest or not source else load_checkpoint_file(source)
    output_dir = choose_output_dir(cfg, wants_newest)
    with discard_if_refused(output_dir), contextlib.ExitStack() as unless_built:
        lock = hold_run_folder(output_dir)
        if lock is not None:
            unless_built.callback(lock.close)
        setup_logging(output_dir, distributed.rank(), cfg.run.json)
        if wants_newest:
            source = resume.find_checkpoint(output_dir, otherwise="" if source == resume.AUTO else source)
            payload = load_checkpoint_file(source) if source else {}
        if parse is not None:
            cfg = keep_recipe(cfg, recipe, parse, payload)
            cfg = name_backbone(cfg, parse)
        run = build_run(cfg, device, Start(output_dir, payload, source), lock)
        unless_built.pop_all()
    return run


def build_run(cfg: RunConfig, device: torch.device, start: Start, lock: IO[str] | None = None) -> Run:
    """Build everything a run consists of, in the order of events."""
    started, payload, world = time.time(), start.payload, distributed.world_size()
    if cfg.run.batch_size == auto_batch.AUTO and "config" in payload:  # a run goes on as it was
        stored = payload["config"]
        cfg = replace_settings(
            cfg, optim={"lr": stored["optim"]["lr"], "lr_batch": None}, run={"batch_size": stored["run"]["batch_size"]}
        )
    if isinstance(cfg.run.batch_size, int):
        split_over_devices(cfg.run.batch_size, world)  # refused before the data are opened
    channels_last = device_layer.use_channels_last(device, cfg.run.channels_last)
    place = Placement(device, world, workers_per_device(cfg.data.workers, world), channels_last)
    log_start(cfg, place, start.output_dir)
    origin, backbone = initial_weights.find_initial_weights(cfg.model, payload)

    seeding.seed_everything(cfg.run.seed)  # the same initial weights on every rank
    cfg = build.settle_config(cfg, start.output_dir, start.source if payload else "")
    data = open_data(cfg, payload.get("category_map"))
    if cfg.model.anchors == "auto":
        cfg = fit_to_data(cfg, data.train_set.parser) if not payload else resume.keep_anchors(cfg, payload)
    if cfg.run.batch_size == auto_batch.AUTO:
        cfg = auto_batch.choose_batch_size(cfg, place, data.train_set.parser, data.categories.num_classes)
    batch_size = cfg.run.batch_size
    assert isinstance(batch_size, int)  # 'auto' has been answered
    fits = None
    if device_layer.is_host(device) and not cfg.run.overfit:
        fits = footprint.warn_of_size(cfg, place, data.categories.num_classes, batch_size // world)
    step = build_step(cfg, place, data.categories.num_classes, payload, start.source, backbone)
    evaluated = step.ema.module if step.ema else step.model
    eval_bench = DetBenchPredict(evaluated, nms=cfg.model.nms, drop_empty=True).to(device)
    loaders = build_loaders(cfg, place, data, step.model.config, split_over_devices(batch_size, world))
    training, epochs = build_training(cfg, place, step, len(loaders.train))
    seeding.seed_everything(cfg.run.seed + distributed.rank())

    check_space(start.output_dir, training)
    manager = CheckpointManager(start.output_dir, cfg.run.keep_best, cfg.run.save_every)
    position = resume.Position(cfg.sched.start_epoch or 0)
    if payload:
        resume.restore(payload, start.source, training, manager, uneven_models(cfg, place, training), cfg)
        if cfg.sched.start_epoch is None:
            position = resume.read_position(payload, batch_size, len(data.train_set), cfg.optim.grad_accum)
        within = f", batch {position.batches}" if position.batches else ""
        _logger.info("resumed %s: continuing with epoch %d%s", start.source, position.epoch, within)
    if cfg.sched.start_epoch is not None:
        training.updates = training.schedule.skip_to(cfg.sched.start_epoch)
    recorder = RunRecorder(cfg, start.output_dir, training, loaders.train, data.val_set, loaders.evaluator, origin)
    recorder.describe(epochs, place.channels_last)
    finished = training.is_finished and not position.batches  # else its evaluation is missing
    if position.epoch >= epochs or finished:
        raise ValueError(
            f"nothing is left to train: the next epoch would be {position.epoch}, and the run ends after "
            f"{epochs}; {training.steps} steps are done. Give more --epochs or --max-steps, or evaluate "
            "with validate.py."
        )
    return Run(
        cfg,
        place,
        start.output_dir,
        data,
        loaders,
        training,
        eval_bench,
        fits,
        epochs,
        position,
        manager,
        recorder,
        started,
        lock,
        StepProfiler(device, start.output_dir, cfg.run.profile)
        if cfg.run.profile and distributed.is_primary()
        else None,
    )


# ---- epoch by epoch --------------------------------------------------------------------------------------------------


def fit(run: Run) -> int:
    """Train and evaluate epoch by epoch, then say where everything is.

    Returns:
        The exit status: 0, or that of a failed --overfit.

    Raises:
        StopRequested: on all ranks, when a signal came; the state is saved then.
        BadImagesError: on all ranks, when too many images cannot be read.
        DivergedError: gradients stay inf or NaN; the batch is written down.
    """
    if distributed.is_primary():
        (run.output_dir / "config.yaml").write_text(dump_yaml(run.cfg), encoding="utf-8")
    run.recorder.begin(run.position.epoch, run.position.batches)
    losses, position = [], run.position
    for epoch in range(run.position.epoch, run.epochs):
        try:
            is_last, loss = run_epoch(run, dataclasses.replace(position, epoch=epoch))
        except RuntimeError as error:
            if not memory.is_out_of_memory(error):
                raise
            is_last = None  # explained outside, where the error no longer holds on to the step's tensors
        if is_last is None:
            run.training.optimizer.zero_grad()
            classes, batch_size = run.data.categories.num_classes, run.loaders.batch_size
            raise footprint.explain_out_of_memory(run.cfg, run.place, classes, batch_size, run.fits)
        position = resume.Position()
        losses.append(loss)
        if is_last:
            break
        votes = distributed.all_gather_object((signals.requested(), is_tired(run, epoch)))
        signum = max(vote for vote, _ in votes)
        if signum:
            raise signals.StopRequested(signum)
        if any(tired for _, tired in votes):
            break
    finish(run)
    status = overfit.report(run, losses) if run.cfg.run.overfit else 0
    distributed.barrier()
    return status


def is_tired(run: Run, epoch: int) -> bool:
    """Tell, on rank 0, whether --patience evaluations in a row were no better than the best."""
    patience, (_, best) = run.cfg.run.patience, run.manager.best
    if not patience or best is None or (epoch - best) // run.cfg.run.val_interval < patience:
        return False
    _logger.info("stopped: no better AP in %d evaluations since epoch %d (--patience)", patience, best)
    return True


def run_epoch(run: Run, start: resume.Position) -> tuple[bool, float]:
    """Train, evaluate and save an epoch, or what is left of it; return whether it was the last, and its mean loss."""
    training, epoch = run.training, start.epoch
    totals = None if start.totals is None else torch.tensor(start.totals, device=run.place.device)
    state = EpochState(run, epoch, Progress(start.batches, totals))
    run.data.train_set.set_epoch(epoch)
    if start.batches < len(run.loaders.train):
        run.loaders.train.sampler.start = start.batches * run.loaders.batch_size
    if epoch == max(run.epochs - run.cfg.model.freeze_bn_epochs, run.position.epoch):
        freeze_statistics(training)
    try:
        with run.recorder.show_epoch(epoch, len(run.loaders.train), run.loaders.batch_size * run.place.world):
            stats = train_one_epoch(
                training, run.loaders.train, epoch, state.progress, state.after_update, run.recorder
            )
    except NonFiniteError as error:
        raise explain_divergence(error, training, run.data.train_set, run.output_dir) from None
    if not start.trained:
        share_batch_norm(run)
    is_last = epoch + 1 == run.epochs or training.is_finished
    evaluation = None
    if is_last or (epoch + 1) % run.cfg.run.val_interval == 0:
        try:
            evaluation = evaluate_weights(run, epoch)
        except (signals.StopRequested, BadImagesError):
            save_recovery(run, epoch, state.progress, trained=True)
            raise
    training.schedule.step(epoch + 1, None if evaluation is None else evaluation.metric)
    finish_epoch(run, stats, evaluation)
    return is_last, stats.loss


class EpochState:
    """How far an epoch has come, and what is due after an update."""

    def __init__(self, run: Run, epoch: int, progress: Progress) -> None:
        self.run, self.epoch, self.progress = run, epoch, progress

    def after_update(self, progress: Progress) -> None:
        """Save the state within the epoch when it is due, and stop there when a signal asked any rank to.

        Ranks agree by a reduction on the hosts whose result is read one update later, so nobody waits for it.
        """
        self.progress = progress
        if self.run.profiler is not None:
            self.run.profiler.step()
        self.run.data.bad_images.look()
        signum = self.run.vote(signals.requested())
        interval = self.run.cfg.run.recovery_interval
        if signum or (interval and self.run.training.updates % interval == 0):
            save_recovery(self.run, self.epoch, progress)
        if signum:
            raise signals.StopRequested(signum)


def freeze_statistics(training: Training) -> None:
    """Fix the batch-norm statistics for the rest of the run; they are equal on all ranks after every epoch."""
    layers = freeze_bn_statistics(training.model)
    _logger.info("batch-norm statistics fixed from here on: %d layers", layers, extra=progress.IN_LINES)
    if training.ema is not None:
        training.ema.copy_buffers(training.model)


def share_batch_norm(run: Run) -> None:
    """Bring the batch-norm statistics of all processes together, for the evaluation and for the checkpoint."""
    for model in uneven_models(run.cfg, run.place, run.training).values():
        distributed.distribute_bn(model, run.cfg.dist.dist_bn)


def evaluate_weights(run: Run, epoch: int) -> EvalStats:
    """Evaluate the averaged weights, or the trained ones where there is no average; the metric is COCO's AP."""
    ema = run.training.ema
    if ema is not None and ema.updates > 0 and ema.is_cold():
        _logger.warning(
            "the averaged (EMA) weights are still %.0f %% initial weights: their metric will be low until "
            "more steps are done (for short runs: --no-model-ema, a smaller --model-ema-decay)",
            100 * ema.share_of_init(),
        )
    with progress.bar("Evaluating", len(run.loaders.val), "img", run.loaders.batch_size * run.place.world) as on_batch:
        autocast = functools.partial(run.training.precision.autocast, run.eval_bench.model)
        found = evaluate(run.eval_bench, run.loaders.val, run.loaders.evaluator, autocast, on_batch=on_batch)
    _logger.info(
        "Eval: %d  AP: %.5f  AP50: %.5f  AP75: %.5f  (%s weights)",
        epoch,
        found.metric,
        found.scores["AP50"],
        found.scores["AP75"],
        "EMA" if ema else "trained",
    )
    return found


def finish(run: Run) -> None:
    """Draw predictions, and say what came out and where it is."""
    if not distributed.is_primary():
        return
    metric, epoch = run.manager.best
    with run.training.precision.autocast(run.eval_bench.model):  # without an EMA the weights may be in half precision
        drawn = write_comparisons(run.eval_bench.model, run.data.val_set, run.place.device, run.output_dir / "images")
    # A run continued in another folder may not have bettered the metric it started from.
    best = run.output_dir / BEST_NAME
    run.recorder.end(
        {
            "model": run.cfg.model.name,
            "processes": run.place.world,
            "batch_size": run.cfg.run.batch_size,
            "first_epoch": run.position.epoch,
            "steps": run.training.steps,
            "best_AP": metric,
            "best_epoch": epoch,
            "checkpoint": str(best if best.exists() else run.output_dir / LAST_NAME),
        },
        time.time() - run.started,
        drawn,
    )
