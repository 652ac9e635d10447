"""One training run: its objects, built in order from the settings, and the loop over epochs."""
from __future__ import annotations

import functools
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn.parallel import DistributedDataParallel

from effdet.bench import DetBenchPredict, DetBenchTrain
from effdet.checkpoint.manager import BEST_NAME, LAST_NAME, RECOVERY_NAME, CheckpointManager, load_checkpoint_file
from effdet.checkpoint.state_dict import extract_state_dict, load_state_dict_report
from effdet.config.load import (
    dump_yaml,
    inert_settings,
    replace_settings,
    split_over_devices,
    workers_per_device,
)
from effdet.config.schema import RunConfig
from effdet.data.build import build_dataset, build_eval_loader, build_train_loader, multi_scale_sizes
from effdet.data.corrupt import BadPicturesError, BadPictureWatch
from effdet.evaluator import CocoEvaluator
from effdet.factory import build_model, place_model
from effdet.predict.gallery import write_comparisons
from effdet.report import progress as live_line
from effdet.report.log import EpochStats, EvalStats, format_best_metric, setup_logging
from effdet.runtime import device as device_layer
from effdet.runtime import distributed, seeding
from effdet.runtime import signals as stopping

from . import auto_batch, overfit
from . import resume as run_state
from .amp import Precision
from .ema import ModelEma
from .engine import NonFiniteError, Progress, Training, evaluate, train_one_epoch
from .optim import build_optimizer, freeze_backbone, freeze_bn, freeze_bn_statistics
from .postmortem import write_postmortem
from .recorder import RunRecorder, check_tensorboard
from .run_dir import check_shared_memory, check_space, choose_output_dir, hold_run_folder, kept_unless_refused
from .schedule import build_schedule

_logger = logging.getLogger("effdet.train")
T = TypeVar("T")


def open_session(cfg: RunConfig, device: torch.device) -> Session:
    """Find what to continue, make the run's folder and its log, and build the run."""
    check_tensorboard(cfg.run.tensorboard)
    auto_batch.check_device(cfg, device)
    if cfg.run.compile:
        device_layer.check_compile(device)
    source = cfg.run.resume
    # A machine that joins a group anew counts no restart; all processes must read the same file.
    wants_newest = any(distributed.all_gather_object(source == run_state.AUTO or run_state.is_restart()))
    payload = {} if wants_newest or not source else load_checkpoint_file(source)
    output_dir = choose_output_dir(cfg, wants_newest)
    with kept_unless_refused(output_dir):
        held = hold_run_folder(output_dir)
        setup_logging(output_dir, distributed.rank())
        if wants_newest:
            source = run_state.find_checkpoint(output_dir, otherwise="" if source == run_state.AUTO else source)
            payload = load_checkpoint_file(source) if source else {}
        session = Session(cfg, device, output_dir, payload, source)
    session.held = held  # as long as the run
    return session


def newest_checkpoint(output_dir: Path) -> Path:
    """Return the file to continue a stopped run from: the one within an epoch, where there is one."""
    newest = next((name for name in (RECOVERY_NAME, LAST_NAME) if (output_dir / name).exists()), LAST_NAME)
    return output_dir / newest


class Session:
    """One run: its objects, built in order, and the loop over epochs."""

    def __init__(self, cfg: RunConfig, device: torch.device, output_dir: Path, payload: dict[str, Any],
                 source: str) -> None:
        self.device, self.output_dir, self.source = device, output_dir, source
        self.started = time.time()
        self.statistics_frozen = False
        self.world = distributed.world_size()
        if cfg.run.batch_size == auto_batch.AUTO and payload:  # a run goes on as it was
            stored = payload["config"]
            cfg = replace_settings(cfg, optim={"lr": stored["optim"]["lr"], "lr_batch": None},
                                   run={"batch_size": stored["run"]["batch_size"]})
        self.cfg = cfg
        auto = cfg.run.batch_size == auto_batch.AUTO
        self.batch_size = 0 if auto else split_over_devices(cfg.run.batch_size, self.world)
        if cfg.run.overfit and self.world > 1:
            raise ValueError("--overfit trains on one device: start one process.")
        self.status, self.epoch_losses = 0, []  # exit status; mean training loss of each epoch
        self.workers = workers_per_device(cfg.data.workers, self.world)
        self.channels_last = device_layer.use_channels_last(device, cfg.run.channels_last)
        self.log_start()
        seeding.seed_everything(cfg.run.seed)  # the same initial weights on every rank
        self.build_data(payload.get("category_map"))
        if auto:
            self.cfg = cfg = auto_batch.choose_batch_size(cfg, device, lambda: self.build_step({}, alone=True),
                                                          self.train_set.parser, self.channels_last)
            self.batch_size = split_over_devices(cfg.run.batch_size, self.world)
        self.build_training(payload)
        seeding.seed_everything(cfg.run.seed + distributed.rank())
        self.manager = CheckpointManager(output_dir, cfg.run.keep_best, cfg.run.save_every)
        check_space(output_dir, self.training)
        self.vote = distributed.LateMax()
        self.progress = Progress()
        self.position = run_state.Position(cfg.sched.start_epoch or 0)
        if payload:
            run_state.restore(payload, source, self.training, self.manager, self.uneven_models(), cfg)
            if cfg.sched.start_epoch is None:
                self.position = run_state.read_position(payload, cfg.run.batch_size, len(self.train_set),
                                                        cfg.optim.grad_accum)
            within = f", batch {self.position.batches}" if self.position.batches else ""
            _logger.info("resumed %s: continuing with epoch %d%s", source, self.position.epoch, within)
        self.first_epoch = self.position.epoch
        self.recorder = RunRecorder(cfg, output_dir, self.training, self.train_loader, self.val_set, self.evaluator)
        self.recorder.describe(self.epochs, self.channels_last)
        finished = self.training.is_finished and not self.position.batches  # else its evaluation is missing
        if self.first_epoch >= self.epochs or finished:
            raise ValueError(f"nothing is left to train: the next epoch would be {self.first_epoch}, and the run ends "
                             f"after {self.epochs}; {self.training.steps} steps are done. Give more --epochs or "
                             "--max-steps, or evaluate with validate.py.")

    def log_start(self) -> None:
        """Choose the device's settings and log them, and where the run takes place."""
        lines = device_layer.tune(self.device)
        if self.cfg.run.deterministic:
            lines += device_layer.make_deterministic(self.device)
        if self.cfg.run.compile:
            lines.append("torch.compile of network and loss: the first step of each input size takes minutes")
        lines.append(f"learning rate {self.cfg.optim.lr:g} as given, for a global batch of {self.cfg.run.batch_size}: "
                     "it is not scaled with it")
        for line in lines:
            _logger.info("setting: %s", line)
        for line in inert_settings(self.cfg):
            _logger.warning("setting: %s", line)
        _logger.info("%s on %s, %d process(es), batch %s (%s each), %d loader process(es) each, output %s",
                     self.cfg.model.name, device_layer.describe(self.device), self.world, self.cfg.run.batch_size,
                     self.batch_size or auto_batch.AUTO, self.workers, self.output_dir)

    def build_data(self, stored: dict[str, Any] | None) -> None:
        """Open both splits and agree on the classes; `stored` is a checkpoint's category map."""
        cfg = self.cfg
        self.train_set = build_dataset(cfg.data, "train", cfg.model.num_classes, stored, cfg.data.crowd, cfg.run.seed)
        self.bad_pictures = BadPictureWatch(self.train_set, "training")
        self.categories = self.train_set.parser.category_map
        if cfg.run.overfit:
            self.train_set, self.val_set = overfit.choose_pictures(self.train_set, cfg)
        else:
            self.val_set = build_dataset(cfg.data, "val", stored=self.categories)
        if self.cfg.data.workers is not None and self.cfg.data.workers > len(self.train_set):
            raise ValueError(f"{self.cfg.data.workers} loader processes (-j) for {len(self.train_set)} training "
                             f"pictures: some would have nothing to do. Give at most {len(self.train_set)}.")
        _logger.info("data: %d training and %d validation pictures, %s", len(self.train_set), len(self.val_set),
                     self.categories)

    def build_step(self, payload: dict[str, Any], alone: bool = False) -> auto_batch.Step:
        """Build what one training step needs; `alone`: as if this were the only process."""
        cfg, device, world = self.cfg, self.device, 1 if alone else self.world
        model = build_model(cfg.model, cfg.loss, self.categories.num_classes)
        if cfg.dist.sync_bn and world > 1:
            model = distributed.convert_sync_batchnorm(model)
        if cfg.model.freeze_backbone:
            _logger.info("backbone frozen: %s", freeze_backbone(model))
        if cfg.model.freeze_bn:
            _logger.info("batch norms frozen: %s", freeze_bn(model))
        place_model(model, device, cfg.model.same_padding, self.channels_last)
        if payload:
            run_state.check_fits(payload, self.source, cfg.model.name, list(model.config.image_size))
            load_state_dict_report(model, extract_state_dict(payload, use_ema=False), strict=True)
        ema = ModelEma(model, cfg.ema.decay, cfg.ema.warmup) if cfg.ema.enabled else None
        precision = Precision(device, cfg.amp.enabled, cfg.amp.opt_level, cfg.amp.dtype, cfg.amp.loss_scale)
        precision.prepare_model(model)
        optimizer = build_optimizer(model, cfg.optim.opt, cfg.optim.lr, cfg.optim.momentum, cfg.optim.weight_decay,
                                    cfg.optim.opt_eps, masters=precision.master_parameters(model))
        bench = DetBenchTrain(
            model, ignore_regions=cfg.data.crowd == "ignore",
            input_sizes=multi_scale_sizes(cfg.data, model.config.image_size), dense_targets=cfg.loss.dense_targets,
            normalize_over_ranks=world > 1, compile_backend="inductor" if cfg.run.compile and not alone else "")
        return auto_batch.Step(model, ema, precision, optimizer, bench.to(device))

    def build_training(self, payload: dict[str, Any]) -> None:
        """Build network, average, optimizer, benches, schedule; `payload` is the checkpoint to go on from, or empty."""
        cfg, device = self.cfg, self.device
        model, ema, precision, optimizer, bench = self.build_step(payload)
        self.eval_bench = DetBenchPredict(ema.module if ema else model, nms=cfg.model.nms).to(device)
        self.build_loaders(model.config)
        steps_per_epoch = len(self.train_loader)
        schedule, self.epochs = build_schedule(
            optimizer, cfg.sched.sched, cfg.sched.epochs, cfg.sched.warmup_epochs, cfg.sched.warmup_lr,
            cfg.sched.min_lr, cfg.sched.cooldown_epochs, cfg.sched.lr_noise, cfg.sched.lr_noise_pct,
            cfg.sched.lr_noise_std, cycle_mul=cfg.sched.lr_cycle_mul, cycle_limit=cfg.sched.lr_cycle_limit,
            decay_epochs=cfg.sched.decay_epochs, decay_milestones=cfg.sched.decay_milestones,
            decay_rate=cfg.sched.decay_rate, patience=cfg.sched.patience_epochs, seed=cfg.run.seed,
            updates_per_epoch=-(-steps_per_epoch // cfg.optim.grad_accum))
        if self.world > 1:
            ids = None if device.type == "cpu" else [device.index]
            with warnings.catch_warnings():  # torch 2.13 has another name for it, which earlier ones do not know
                warnings.simplefilter("ignore", FutureWarning)
                bench = DistributedDataParallel(bench, device_ids=ids, broadcast_buffers=False)
        self.training = Training(
            bench, model, optimizer, schedule, precision, device, ema,
            (cfg.optim.clip_grad or None, cfg.optim.clip_mode), cfg.optim.grad_accum, cfg.run.log_interval,
            steps_per_epoch * self.epochs, cfg.run.max_steps, cfg.run.max_skipped)

    def build_loaders(self, model_config: Any) -> None:
        """Make the loaders of both splits and the evaluator."""
        cfg = self.cfg
        check_shared_memory(distributed.local_world_size(), self.workers, self.batch_size, model_config.image_size)
        if cfg.run.overfit:  # no augmentation: pictures as the evaluation sees them
            self.train_loader = build_eval_loader(self.train_set, cfg.data, model_config, self.batch_size, self.workers,
                                                  self.device, channels_last=self.channels_last)
        else:
            self.train_loader = build_train_loader(self.train_set, cfg.data, model_config, self.batch_size,
                                                   self.workers, self.device, cfg.run.seed, self.channels_last)
        self.val_loader = build_eval_loader(self.val_set, cfg.data, model_config, self.batch_size, self.workers,
                                            self.device, cfg.run.val_skip, self.channels_last)
        for loader in (self.train_loader, self.val_loader):
            loader.loader.worker_init_fn = stopping.ignore_in_worker
        self.evaluator = CocoEvaluator(self.val_loader.dataset, distributed=True,
                                       max_det=max(100, model_config.max_det_per_image))

    def close(self) -> None:
        """End the loader processes."""
        for loader in (self.train_loader, self.val_loader):
            loader.close()

    def uneven_models(self) -> dict[str, torch.nn.Module]:
        """Return the networks whose batch-norm statistics differ between the processes within an epoch."""
        if self.world == 1 or self.cfg.dist.sync_bn:
            return {}
        training = self.training
        return {"model": training.model} | ({"ema": training.ema.module} if training.ema else {})

    def run(self) -> None:
        """Train and evaluate epoch by epoch, then say where everything is.

        Raises:
            StopRequested: on all ranks, when a signal came; the state is saved then.
        """
        if distributed.is_primary():
            (self.output_dir / "config.yaml").write_text(dump_yaml(self.cfg), encoding="utf-8")
        self.recorder.begin(self.first_epoch, self.position.batches)
        for epoch in range(self.first_epoch, self.epochs):
            last = self.run_epoch(epoch)
            if last:
                break
            signum = max(distributed.all_gather_object(stopping.requested()))
            if signum:
                raise stopping.StopRequested(signum)
        self.finish()

    def run_epoch(self, epoch: int) -> bool:
        """Train, evaluate and save an epoch, or what is left of it; return whether it was the last."""
        start, self.position = self.position, run_state.Position()
        self.progress = Progress(start.batches, None if start.totals is None else
                                 torch.tensor(start.totals, device=self.device))
        self.train_set.set_epoch(epoch)
        if start.batches < len(self.train_loader):
            self.train_loader.sampler.start = start.batches * self.batch_size
        if epoch >= self.epochs - self.cfg.model.freeze_bn_epochs:
            self.freeze_statistics()
        try:
            stats = train_one_epoch(self.training, self.train_loader, epoch, self.progress,
                                    functools.partial(self.after_update, epoch), self.recorder)
        except NonFiniteError as error:
            raise self.explain(error) from None
        if not start.trained:
            self.share_batch_norm()
        last = epoch + 1 == self.epochs or self.training.is_finished
        evaluation = None
        if last or (epoch + 1) % self.cfg.run.val_interval == 0:
            try:
                evaluation = self.evaluate(epoch)
            except (stopping.StopRequested, BadPicturesError):
                self.save_recovery(epoch, trained=True)
                raise
        self.training.schedule.step(epoch + 1, evaluation and evaluation.metric)
        self.finish_epoch(stats, evaluation)
        return last

    def explain(self, error: NonFiniteError) -> SystemExit:
        """Write the batch behind an error down and return the error that ends the run."""
        ids = [self.train_set.parser.img_ids[index] for index in error.target["img_idx"].tolist()]
        path = write_postmortem(self.output_dir, self.training, error.images, error.target, ids)
        return SystemExit(f"train.py: error: {error}. Step {self.training.steps}, pictures {ids}; losses and gradient "
                          f"norms by module are in {path}. If they are finite there, lower --loss-scale; else lower "
                          "--lr, or look at these pictures.")

    def after_update(self, epoch: int, progress: Progress) -> None:
        """Save the state within an epoch when it is due, and stop there when a signal asked any rank to.

        Ranks agree by a reduction on the hosts whose result is read one update later, so nobody waits for it.
        """
        self.progress = progress
        self.bad_pictures.look()
        signum = self.vote(stopping.requested())
        interval = self.cfg.run.recovery_interval
        if signum or (interval and self.training.updates % interval == 0):
            self.save_recovery(epoch)
        if signum:
            raise stopping.StopRequested(signum)

    def save_recovery(self, epoch: int, trained: bool = False) -> None:
        """Write recovery.pth.tar: all that is needed to go on within an epoch."""
        cfg, progress = self.cfg, self.progress
        ranks = distributed.gather_object(run_state.capture_rank(self.device, progress.totals, self.uneven_models()))

        def write() -> None:
            position = {"batches": progress.batches, "batch_size": cfg.run.batch_size, "trained": trained,
                        "grad_accum": cfg.optim.grad_accum, "pictures": len(self.train_set)}
            payload = run_state.collect(self.training, cfg, self.categories, ranks)
            path = self.manager.save_recovery(payload | {"epoch": epoch - 1, "progress": position})
            _logger.info("saved %s: epoch %d, batch %d", path, epoch, progress.batches)
        self.save(write)

    def save(self, write: Callable[[], T]) -> T | None:
        """Run what writes files on rank 0; with --save-errors warn, a failure is logged and None comes back."""
        def guarded() -> T | None:
            try:
                return write()
            except OSError as error:
                if self.cfg.run.save_errors == "stop":
                    raise
                _logger.error("%s Training goes on (--save-errors warn).", error)
                return None
        return distributed.run_on_primary(guarded)

    def freeze_statistics(self) -> None:
        """Fix the batch-norm statistics for the rest of the run; they are equal on all ranks after every epoch."""
        training = self.training
        if not self.statistics_frozen:
            self.statistics_frozen = True
            _logger.info("batch-norm statistics fixed from here on: %d layers", freeze_bn_statistics(training.model))
            if training.ema is not None:
                training.ema.copy_buffers(training.model)

    def share_batch_norm(self) -> None:
        """Bring the batch-norm statistics of all processes together, for the evaluation and for the checkpoint."""
        training = self.training
        if self.world > 1 and not self.cfg.dist.sync_bn:
            for model in (training.model, training.ema.module if training.ema else None):
                if model is not None:
                    distributed.distribute_bn(model, self.cfg.dist.dist_bn)

    def evaluate(self, epoch: int) -> EvalStats:
        """Evaluate the averaged weights, or the trained ones where there is no average; the metric is COCO's AP."""
        training = self.training
        if training.ema is not None and training.ema.updates > 0 and training.ema.is_cold():
            _logger.warning("the averaged (EMA) weights are still %.0f %% initial weights: their metric will be low "
                            "until more steps are done (for short runs: --no-model-ema, a smaller --model-ema-decay)",
                            100 * training.ema.share_of_init())
        with live_line.progress("Evaluating", len(self.val_loader)) as on_batch:
            found = evaluate(self.eval_bench, self.val_loader, self.evaluator, training.precision.autocast,
                             on_batch=on_batch)
        _logger.info("Eval: %d  AP: %.5f  AP50: %.5f  AP75: %.5f  (%s weights)", epoch, found.metric,
                     found.scores["AP50"], found.scores["AP75"], "EMA" if training.ema else "trained")
        return found

    def finish_epoch(self, stats: EpochStats, evaluation: EvalStats | None) -> None:
        """Write summary.csv and the checkpoints of an epoch."""
        bad, metric = self.bad_pictures.settle(), evaluation and evaluation.metric
        _logger.info("epoch %d: loss %.5f, %.1f img/s, peak memory %.0f MiB, %d skipped step(s)%s", stats.epoch,
                     stats.loss, stats.img_per_s, stats.memory_mib, stats.skipped,
                     f", {bad} unreadable picture(s)" if bad else "")
        self.epoch_losses.append(stats.loss)
        ranks = distributed.gather_object(run_state.capture_rank(self.device))

        def write() -> None:
            # Before the checkpoint: resuming drops a row too many, but cannot add one.
            self.recorder.add_summary(stats, evaluation)
            self.manager.save(run_state.collect(self.training, self.cfg, self.categories, ranks), stats.epoch, metric)
        self.save(write)
        self.recorder.add_epoch(stats, evaluation)
        if metric is not None and distributed.is_primary():
            _logger.info("%s", format_best_metric(*self.manager.best))

    def finish(self) -> None:
        """Draw predictions, and say what came out and where it is."""
        metric, epoch = self.manager.best
        if distributed.is_primary():
            with self.training.precision.autocast():  # without an EMA the weights may be in half precision
                pictures = write_comparisons(self.eval_bench.model, self.val_set, self.device,
                                             self.output_dir / "pictures")
            # A run continued in another folder may not have bettered the metric it started from.
            best = self.output_dir / BEST_NAME
            checkpoint = best if best.exists() else self.output_dir / LAST_NAME
            self.recorder.end({
                "model": self.cfg.model.name, "processes": self.world, "batch_size": self.cfg.run.batch_size,
                "first_epoch": self.first_epoch, "steps": self.training.steps, "best_AP": metric, "best_epoch": epoch,
                "checkpoint": str(checkpoint)}, time.time() - self.started, pictures)
        if self.cfg.run.overfit:
            self.status = overfit.report(self, self.epoch_losses)
        distributed.barrier()
