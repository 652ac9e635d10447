"""Settings that were changed but do nothing, because of another setting: found before the run, said in its log."""
from collections.abc import Callable, Iterator

from .options import list_options
from .schema import RunConfig, spelled

_DECAYING = ("step", "multistep", "plateau", "poly")
_CYCLIC = ("cosine", "tanh", "poly")

# (fields, when they act, what that takes in words)
_NEEDS: tuple[tuple[tuple[str, ...], Callable[[RunConfig], bool], str], ...] = (
    (("data.remode", "data.recount"), lambda cfg: cfg.data.reprob > 0, "--reprob above 0"),
    (("ema.decay", "ema.warmup"), lambda cfg: cfg.ema.enabled, "--model-ema"),
    (("optim.clip_mode",), lambda cfg: cfg.optim.clip_grad > 0, "--clip-grad above 0"),
    (("sched.warmup_lr",), lambda cfg: cfg.sched.warmup_epochs > 0, "--warmup-epochs above 0"),
    (("sched.lr_noise_pct", "sched.lr_noise_std"), lambda cfg: cfg.sched.lr_noise is not None, "--lr-noise"),
    (("sched.lr_cycle_mul", "sched.lr_cycle_limit"), lambda cfg: cfg.sched.sched in _CYCLIC,
     f"--sched {', '.join(_CYCLIC)}"),
    (("sched.decay_epochs",), lambda cfg: cfg.sched.sched == "step", "--sched step"),
    (("sched.decay_milestones",), lambda cfg: cfg.sched.sched == "multistep", "--sched multistep"),
    (("sched.decay_rate",), lambda cfg: cfg.sched.sched in _DECAYING, f"--sched {', '.join(_DECAYING)}"),
    (("sched.patience_epochs",), lambda cfg: cfg.sched.sched == "plateau", "--sched plateau"),
    (("model.pretrained_backbone",), lambda cfg: not (cfg.model.pretrained or cfg.model.initial_checkpoint),
     "neither --pretrained nor --initial-checkpoint, which replace those weights"),
    (("dist.master_port", "dist.max_restarts"), lambda cfg: len(cfg.dist.device_list) > 1,
     "several devices in --device-list"),
    (("dist.dist_bn",), lambda cfg: not cfg.dist.sync_bn, "--sync-bn switched off"),
)


def inert_settings(cfg: RunConfig) -> Iterator[str]:
    """Yield a line for each setting that differs from its default and has no effect together with the others."""
    options = list_options(RunConfig)
    for keys, acts, words in _NEEDS:
        for key in keys if not acts(cfg) else ():
            section, name = key.split(".")
            value = getattr(getattr(cfg, section), name)
            if value != options[key].default:
                yield f"{spelled(section, options[key].item)}: {value} has no effect, it needs {words}"
