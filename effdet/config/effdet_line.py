"""Command lines, flags and args.yaml of effdet 0.4.1's train.py and validate.py, put into our settings.

A word that asks for what happens here anyway is let through (MOOT, RENAMED), in any line. A whole line is known as
effdet's by its folder, which has no flag there, and by having no word that only we know; what it leaves out has
effdet's value then (docs/make_flags.py lists them). Which settings there are is in schema.py; no word of ours is
parsed here.
"""

import argparse
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from .effdet_flags import MOOT, REFUSED, RENAMED
from .model_config import efficientdet_model_param_dict
from .options import ConfigError, Option, list_options
from .schema import RunConfig, ValidateConfig

_logger = logging.getLogger(__name__)

_D1 = "tf_efficientdet_d1"
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_LEFT_OUT = {"model": _D1, "batch_size": 32, "lr": 0.01, "model_ema": False, "no_pretrained_backbone": False}
# what a saved args.yaml has, whatever else; any of these tells that nothing was left out
_SAVED = {"root", "dataset", *_LEFT_OUT}

_BOTH = (
    "dataset split model workers batch-size num-classes interpolation fill-color num-gpu local_rank local-rank",
    "mean std",
    "pretrained no-prefetcher pin-mem amp apex-amp native-amp torchscript",
    "redundant-bias soft-nms",
)
_GRAMMAR = {  # names of: flags with a value, with several, switches, switches that also have a --no-
    "train.py": (
        "val-skip initial-checkpoint resume clip-grad clip-mode opt opt-eps momentum weight-decay sched lr "
        "lr-noise-pct lr-noise-std lr-cycle-mul lr-cycle-limit warmup-lr min-lr epochs start-epoch decay-epochs "
        "warmup-epochs cooldown-epochs patience-epochs decay-rate color-jitter aa reprob remode recount "
        "train-interpolation smoothing model-ema-decay dist-bn seed log-interval recovery-interval output eval-metric "
        "tta config",
        "lr-noise",
        "no-pretrained-backbone no-resume-opt model-ema sync-bn save-images channels-last",
        "jit-loss legacy-focal bench-labeler",
    ),
    "validate.py": ("img-size log-freq checkpoint results", "", "use-ema", ""),
}
_SHORT = {"batch-size": "-b", "workers": "-j", "config": "-c", "decay-rate": "--dr", "model": "-m"}


class Line(NamedTuple):
    """A command line in our words, and what is to be said about it."""

    words: list[str]
    notes: list[str]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _build_parser(script: str) -> _Parser:
    """Return a parser of effdet's own grammar; what was not given is not in its namespace."""
    parser = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("root")
    values, lists, switches, pairs = (f"{a} {b}".split() for a, b in zip(_BOTH, _GRAMMAR[script], strict=True))
    for name in values:
        short = [_SHORT[name]] if name in _SHORT else []
        parser.add_argument("--" + name, *short, type=int if name in ("batch-size", "workers", "num-gpu") else str)
    for name in lists:
        parser.add_argument("--" + name, nargs="+")
    for name in switches:
        parser.add_argument("--" + name, action="store_true")
    for name in pairs:
        parser.add_argument("--" + name, action=argparse.BooleanOptionalAction)
    parser.add_argument("--torchcompile", nargs="?", const="inductor")
    return parser


def translate(script: str, argv: Sequence[str], read_yaml: Any) -> Line:
    """Put a command line into our words: one of effdet 0.4.1, or one of ours with words of effdet's in it.

    Args:
        script: train.py, validate.py or demo.py.
        argv: the arguments.
        read_yaml: path -> content of a YAML file.

    Returns:
        What to parse, the same where nothing is effdet's.

    Raises:
        ConfigError: a line of effdet's that would train another way here, with the line that trains the same; or a
            word whose value is not to be had.
    """
    given = _read_line(script, argv, read_yaml) if script in _GRAMMAR else None
    if given is None:
        return _let_through(script, argv)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if script == "validate.py":
        settings, notes = _evaluation_settings(given)
        words = _spell(list_options(ValidateConfig), settings)
        return Line(words, [f"a command line of effdet 0.4.1, read as: {script} {shlex.join(words)}", *notes])
    config = given.pop("config", None)
    saved = read_yaml(config) if config else {}
    settings, notes = _training_settings({**({} if is_saved_args(saved) else _LEFT_OUT), **saved, **given}, world)
    words = _spell(list_options(RunConfig), settings)
    if is_saved_args(saved):
        return Line(words, [f"a command line of effdet 0.4.1, read as: {script} {shlex.join(words)}", *notes])
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    devices = ["--device-list", ",".join(map(str, range(world)))] if 1 < world == local else []
    launcher = "python" if devices or world == 1 else "the launcher as before, and"
    raise ConfigError(
        f"this is a command line of effdet 0.4.1, whose flags and defaults mean something else here (docs/flags.md). "
        f"The same training is: {launcher} {script} {shlex.join(words + devices)} -- "
        + "".join(f"{note}; " for note in notes)
        + f"with this script's own defaults it is: python {script} --root {shlex.quote(given['root'])} and your flags"
    )


def _read_line(script: str, argv: Sequence[str], read_yaml: Any) -> dict[str, Any] | None:
    """Return what a line gives in effdet's grammar, by effdet's names; None for a line that is not effdet's."""
    try:
        given = vars(_build_parser(script).parse_args(list(argv)))
    except ConfigError:
        return None
    root, words = given["root"], list(argv)
    before = words[words.index(root) - 1] if root in words and words.index(root) else ""
    if before == "--pretrained" and not os.path.isdir(root):  # our way to name a file of weights
        return None
    if "=" in root and not os.path.isdir(root):  # our way to set one field
        return None
    if "config" in given and not _is_flat(read_yaml(given["config"])):
        return None
    return given


def _is_flat(tree: Any) -> bool:
    return isinstance(tree, dict) and not any(isinstance(value, dict) for value in tree.values())


def is_saved_args(tree: Any) -> bool:
    """Tell whether a YAML file is the args.yaml that effdet's train.py writes beside its checkpoints."""
    return _is_flat(tree) and set(tree) >= _SAVED


def saved_args_to_tree(tree: Mapping[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """Return an args.yaml of effdet's train.py in our sections; says in the log what became of it.

    Raises:
        ConfigError: a value that is not to be had here.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    settings, notes = _training_settings(tree, world)
    if os.environ.get("RANK", "0") == "0":
        _logger.warning("%s: arguments of a run of effdet 0.4.1%s", source, "".join(f"; {note}" for note in notes))
    sections: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return sections


# ---- one word in a line of ours --------------------------------------------------------------------------------------


def _let_through(script: str, argv: Sequence[str]) -> Line:
    """Take the words out of a line of ours that ask for what happens anyway, and rename what has another name."""
    words: list[str] = []
    notes: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        flag, equals, value = token.partition("=")
        if flag in RENAMED and not equals and script != "demo.py":  # which has no mixed precision
            words.append(RENAMED[flag])
            notes.append(f"{flag} is {RENAMED[flag]} here")
        elif flag == "--torchcompile" and script == "train.py":
            named = rest[:1] if not equals and rest and rest[0].isalnum() and not os.path.isdir(rest[0]) else []
            del rest[: len(named)]
            backend = value if equals else "".join(named) or "inductor"
            if backend != "inductor":
                raise ConfigError(f"{flag} {backend} is gone: {REFUSED[flag]}")
            words.append("--compile")
            notes.append("--torchcompile is --compile here")
        elif flag in ("--mean", "--std") and not equals and _is_the_models(_model_in(argv), flag[2:], rest[:3]):
            notes.append(f"{flag} {' '.join(rest[:3])} changes nothing: it is the model's")
            del rest[:3]
        elif flag in MOOT:
            values, why = MOOT[flag]
            if values and not equals:
                value = rest[0] if rest else ""
            if values and value not in values and not _is_rank(flag):
                words.append(token)
                continue
            if values and not equals:
                rest.pop(0)
            notes.append(f"{flag}{f' {value}' if values else ''} changes nothing: {why}")
        else:
            words.append(token)
    return Line(words, notes)


def _model_in(argv: Sequence[str]) -> str:
    """Return the model that a line of ours names, else the default."""
    after = {flag: value for flag, value in zip(argv, argv[1:], strict=False) if flag in ("--model", "-m")}
    return next(iter(after.values()), "tf_efficientdet_d0")


def _is_rank(flag: str) -> bool:
    """Tell whether a flag is the rank that torch.distributed.launch adds, beside the environment's."""
    return flag in ("--local_rank", "--local-rank") and "LOCAL_RANK" in os.environ


# ---- a whole line ----------------------------------------------------------------------------------------------------

_EFFECTLESS = (
    "no_prefetcher",
    "pin_mem",
    "torchscript",
    "jit_loss",
    "bench_labeler",
    "local_rank",
    "local-rank",
    "tta",
)
_SPLITS = {
    "train": "instances_train",
    "val": "instances_val",
    "test": "image_info_test",
    "testdev": "image_info_test-dev",
}


def _gone(flag: str, value: Any = "") -> ConfigError:
    return ConfigError(f"{flag}{f' {value}' if value else ''} is gone: {REFUSED[flag]}")


def _is_the_models(model: str, flag: str, numbers: Sequence[Any]) -> bool:
    """Tell whether mean or std are those that a model of the table has anyway."""
    own = efficientdet_model_param_dict.get(model, {}).get(flag, _IMAGENET[flag])
    try:
        return len(numbers) == 3 and all(abs(float(a) - b) < 1e-3 for a, b in zip(numbers, own, strict=True))
    except ValueError:  # words that are no numbers
        return False


def _shared_settings(values: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Take what both scripts have out of `values`, so that what is left is named as flags of ours are."""
    settings: dict[str, Any] = {"data.root": values.pop("root")}
    if values.get("dataset", "coco") not in ("coco", "coco2017", "coco2014"):
        raise _gone("--dataset", values["dataset"])
    for flag in ("mean", "std"):
        numbers = values.pop(flag, None)
        if numbers is not None and not _is_the_models(str(values.get("model") or _D1), flag, numbers):
            raise _gone(f"--{flag}")
    if any([values.pop(flag, False) for flag in ("amp", "apex_amp", "native_amp")]):
        settings["amp.enabled"] = True
    effectless = [name for name in _EFFECTLESS if values.pop(name, None) not in (None, False, 0, "0")]
    if effectless:
        notes.append(f"of no effect here: {', '.join('--' + name.replace('_', '-') for name in effectless)}")
    return settings


def _same(values: Mapping[str, Any], options: Mapping[str, Option]) -> dict[str, Any]:
    """Return the settings of flags with the same name and meaning; None and '' are effdet's for 'not given'."""
    by_flag = {spelling: key for key, option in options.items() for spelling in option.spellings}
    settings = {}
    for name, value in values.items():
        if value is None or value == "":
            continue
        flag = "--" + name.replace("_", "-")
        if flag not in by_flag:
            raise ConfigError(f"{flag} of effdet has no counterpart here: leave it out")
        settings[by_flag[flag]] = "url" if by_flag[flag] == "model.pretrained" else value
    return settings


def _training_settings(given: Mapping[str, Any], world: int) -> tuple[dict[str, Any], list[str]]:
    """Return our settings that train as effdet's train.py does with `given` (by its names), and notes about them."""
    values, notes = dict(given), list[str]()
    settings = _shared_settings(values, notes)
    if values.pop("dataset", "coco") == "coco2014":
        root = settings.pop("data.root")
        settings |= _files(root, "2014", "train", "train") | _files(root, "2014", "val", "val")
    for name, value in (("num_gpu", 1), ("split", "val")):
        if values.pop(name, value) != value:
            raise _gone("--" + name.replace("_", "-"), given[name])
    settings["run.batch_size"] = int(values.pop("batch_size")) * world
    workers = values.pop("workers", None)
    if workers is not None:
        settings["data.workers"] = int(workers) * world
    notes.append(
        f"-b and -j count all {world} processes here"
        if world > 1
        else "-b and -j count all devices here: on N of them --device-list 0,..,N-1 and N times as much"
    )
    settings["sched.per_epoch"] = True
    settings |= _weights_settings(values)
    dist_bn = values.pop("dist_bn", "")
    if world > 1 and not values.get("sync_bn"):
        settings["dist.dist_bn"] = dist_bn
    if values.pop("num_classes", None):
        notes.append("--num-classes is left out: the annotation file's categories are counted, whatever their ids")
    if any([values.pop("color_jitter", None), values.pop("aa", None)]):
        notes.append("--color-jitter and --aa never had an effect there")
    if values.pop("eval_metric", "map") != "map":
        notes.append(f"--eval-metric is left out: {REFUSED['--eval-metric'].partition(';')[0]}")
    if values.pop("save_images", False):
        notes.append(f"--save-images is left out: {REFUSED['--save-images']}")
    if values.get("output"):
        settings["run.output"] = os.path.join(values.pop("output"), "train")
    backend = values.pop("torchcompile", None)
    if backend not in (None, "inductor"):
        raise _gone("--torchcompile", backend)
    if backend:
        settings["run.compile"] = True
    for name in ("pretrained", "sync_bn", "channels_last"):  # switches: False is "not given"
        if not values.get(name):
            values.pop(name, None)
    return settings | _same(values, list_options(RunConfig)), notes


def _weights_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Take out of `values` what says where weights come from and how they are averaged."""
    settings: dict[str, Any] = {"ema.enabled": bool(values.pop("model_ema"))}
    decay = values.pop("model_ema_decay", 0.9998)
    if settings["ema.enabled"]:
        settings |= {"ema.decay": decay, "ema.warmup": False}
    if values.pop("no_resume_opt", False) and values.get("resume"):
        values["initial_checkpoint"] = values.pop("resume")
    random = values.pop("no_pretrained_backbone")
    if not any(map(values.get, ("pretrained", "resume", "initial_checkpoint"))):
        settings["model.pretrained_backbone"] = "" if random else "auto"
    return settings


def _evaluation_settings(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return our settings that evaluate as effdet's validate.py does with `given`, and notes about them."""
    values, notes = dict(given), list[str]()
    settings = _shared_settings(values, notes)
    year = "2014" if values.pop("dataset", "") == "coco2014" else "2017"
    split = values.pop("split", "val")
    if split not in _SPLITS:
        raise ConfigError(f"--split {split}: must be one of {', '.join(_SPLITS)}")
    if (split, year) != ("val", "2017"):
        settings |= _files(settings.pop("data.root"), year, split, "val")
    if not values.get("checkpoint"):
        values |= {"model": values.get("model", _D1), "pretrained": True}
    elif not values.get("use_ema"):
        settings["run.use_ema"] = False
        notes.append("averaged weights in a checkpoint are used with --use-ema only")
    devices = values.pop("num_gpu", 1)
    if devices > 1:
        settings["dist.device_list"] = list(range(devices))
    if values.pop("torchcompile", None):
        notes.append("of no effect here: --torchcompile")
    return settings | _same(values, list_options(ValidateConfig)), notes


def _files(root: str, year: str, split: str, ours: str) -> dict[str, str]:
    """Return the settings that name a split of COCO by its files."""
    return {
        f"data.{ours}_images": os.path.join(root, split.removesuffix("dev") + year),
        f"data.{ours}_ann": os.path.join(root, "annotations", f"{_SPLITS[split]}{year}.json"),
    }


def _spell(options: Mapping[str, Option], settings: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line that give these settings."""
    words: list[str] = []
    for key, value in settings.items():
        option = options[key]
        flag = min(option.spellings, key=len) if key in ("run.batch_size", "data.workers") else option.spellings[0]
        if isinstance(value, bool) or option.kinds == (bool,):
            words.append(flag if value else "--no-" + flag.removeprefix("--"))
        elif value == option.bare:
            words.append(flag)
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return words
