"""The run configuration: precedence, flags, refusals, checks, round trips, and that every field is read by somebody."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch

from effdet.config.check import check_config
from effdet.config.cli import parse_demo_args, parse_train_args, parse_validate_args
from effdet.config.effdet_flags import MOOT, REFUSED, RENAMED
from effdet.config.load import (
    dump_yaml,
    from_plain,
    load_config,
    replace_settings,
    split_over_devices,
    to_plain,
    workers_per_device,
)
from effdet.config.options import ConfigError, list_options, nearest
from effdet.config.schema import DemoConfig, RunConfig, ValidateConfig

ROOT = Path(__file__).resolve().parents[3]
PARSERS = {RunConfig: parse_train_args, ValidateConfig: parse_validate_args, DemoConfig: parse_demo_args}


def parse(line: str) -> RunConfig:
    return parse_train_args(line.split())


def refusal(capsys, argv, parser=parse_train_args) -> str:
    """Return the error line; fail unless it is one line and the status is 2."""
    with pytest.raises(SystemExit) as stop:
        parser(argv.split() if isinstance(argv, str) else argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def write(tmp_path, text, name="preset.yaml") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def sections_of(root) -> dict[str, type]:
    return typing.get_type_hints(root)


def all_fields(root):
    return [(section, item) for section, kind in sections_of(root).items() for item in dataclasses.fields(kind)]


def spellings_of(root) -> list[str]:
    return [flag for option in list_options(root).values() for flag in option.spellings]


# ---- defaults and precedence ----


def test_defaults_are_the_historic_ones():
    cfg = parse("")
    assert (cfg.model.name, cfg.model.num_classes, cfg.model.image_size) == ("tf_efficientdet_d0", None, None)
    assert (cfg.run.batch_size, cfg.run.seed, cfg.run.log_interval, cfg.run.output) == (256, 42, 50, "output/train")
    optim = cfg.optim
    assert (optim.opt, optim.lr, optim.momentum, optim.weight_decay) == ("fusedmomentum", 0.32, 0.9, 4e-5)
    assert (optim.clip_grad, optim.clip_mode, optim.opt_eps, optim.grad_accum) == (10.0, "norm", None, 1)
    sched = cfg.sched
    assert (sched.sched, sched.epochs, sched.warmup_epochs, sched.cooldown_epochs) == ("cosine", 300, 5, 10)
    assert (sched.warmup_lr, sched.min_lr, sched.lr_noise) == (1e-4, 1e-5, None)
    assert (sched.lr_noise_pct, sched.lr_noise_std) == (0.67, 1.0)
    assert (cfg.ema.decay, cfg.amp.enabled, cfg.amp.opt_level, cfg.amp.loss_scale) == (0.9999, False, "O1", "dynamic")
    assert (cfg.data.scale_min, cfg.data.scale_max, cfg.data.crowd) == (0.1, 2.0, "drop")
    assert cfg == RunConfig() == load_config(RunConfig)


def test_each_level_of_precedence_beats_the_one_before(tmp_path):
    first = write(tmp_path, "optim: {lr: 0.1, momentum: 0.1, weight_decay: 0.1, opt_eps: 0.1}", "a.yaml")
    second = write(tmp_path, "optim: {momentum: 0.2, weight_decay: 0.2, opt_eps: 0.2}", "b.yaml")
    line = f"optim.opt_eps=0.4 -c {first} --weight-decay 0.3 --opt-eps 0.3 -c {second}"
    optim = parse(line).optim
    assert (optim.lr, optim.momentum, optim.weight_decay, optim.opt_eps) == (0.1, 0.2, 0.3, 0.4)
    assert (optim.opt, optim.clip_grad) == ("fusedmomentum", 10.0)


def test_yaml_forms(tmp_path):
    cfg = parse(
        "-c "
        + write(
            tmp_path,
            """
model: {image_size: 512, num_classes: 7}
optim: {lr: 1e-3}
sched: {lr_noise: [0.4, 0.9]}
dist: {device_list: "0,1"}
amp: {enabled: true, loss_scale: 16}
loss:
ema: {enabled: no}
""",
        )
    )
    assert cfg.model.image_size == [512, 512] and cfg.model.num_classes == 7
    assert cfg.optim.lr == 1e-3 and cfg.sched.lr_noise == [0.4, 0.9]
    assert cfg.dist.device_list == [0, 1]
    assert cfg.amp.loss_scale == 16.0 and cfg.amp.enabled is True and cfg.ema.enabled is False
    assert cfg.loss == RunConfig().loss


def test_an_empty_yaml_file_changes_nothing(tmp_path):
    assert parse("-c " + write(tmp_path, "# nothing yet\n")) == RunConfig()


def test_dotted_values_keep_texts_and_accept_lists_and_null(tmp_path):
    preset = write(tmp_path, "model: {num_classes: 3, image_size: [128, 256]}")
    cfg = parse(
        f"-c {preset} run.experiment=1e5 data.root=007 sched.lr_noise=[0.4,0.9] model.num_classes=null "
        "model.image_size=null run.resume=a=b amp.loss_scale=8 amp.enabled=true ema.enabled=false"
    )
    assert (cfg.run.experiment, cfg.data.root, cfg.run.resume) == ("1e5", "007", "a=b")
    assert cfg.sched.lr_noise == [0.4, 0.9]
    assert (cfg.model.num_classes, cfg.model.image_size) == (None, None)
    assert cfg.amp.loss_scale == 8.0 and cfg.ema.enabled is False
    assert parse("run.resume={a:").run.resume == "{a:"  # half a YAML mapping is a fine file name


def test_lists_of_two_configs_are_not_shared():
    one, other = RunConfig(), RunConfig()
    one.dist.device_list.append(3)
    assert other.dist.device_list == [] and RunConfig().dist.device_list == []


# ---- flags ----


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("--epoch 7", "sched.epochs", 7),
        ("--epochs 7", "sched.epochs", 7),
        ("-b 16", "run.batch_size", 16),
        ("-b16", "run.batch_size", 16),
        ("--batch-size=16", "run.batch_size", 16),
        ("-j 0", "data.workers", 0),
        ("--workers 3", "data.workers", 3),
        ("--dr 0.5", "sched.decay_rate", 0.5),
        ("--img-size 512", "model.image_size", [512, 512]),
        ("--image-size 512 640", "model.image_size", [512, 640]),
        ("--image-size 512,640", "model.image_size", [512, 640]),
        ("--lr-noise 0.4 0.9", "sched.lr_noise", [0.4, 0.9]),
        ("--lr-noise 0.4", "sched.lr_noise", [0.4]),
        ("--device-list 0,1,2,3", "dist.device_list", [0, 1, 2, 3]),
        ("--device-list 5", "dist.device_list", [5]),
        ("--device-list=1,0", "dist.device_list", [1, 0]),
        ("--pretrained", "model.pretrained", "url"),
        ("--pretrained w.pth", "model.pretrained", "w.pth"),
        ("--model-ema", "ema.enabled", True),
        ("--no-model-ema", "ema.enabled", False),
        ("--redundant-bias", "model.redundant_bias", True),
        ("--no-redundant-bias", "model.redundant_bias", False),
        ("--loss-scale dynamic", "amp.loss_scale", "dynamic"),
        ("--amp --loss-scale 128", "amp.loss_scale", 128.0),
        ("--smoothing 0.1", "loss.label_smoothing", 0.1),
        ("--amp --amp-dtype bfloat16", "amp.dtype", "bfloat16"),
        ("--amp --opt-level O2", "amp.opt_level", "O2"),
        ("--aspect-ratios 0.5 1 2", "model.aspect_ratios", [0.5, 1, 2]),
        ("--opt lookahead_momentum", "optim.opt", "lookahead_momentum"),
        ("--dist-bn broadcast", "dist.dist_bn", "broadcast"),
        ("--start-epoch 309", "sched.start_epoch", 309),
        ("--lr 0.1 --lr 0.2", "optim.lr", 0.2),
        ("--epoch 4 --epochs 4", "sched.epochs", 4),
    ],
)
def test_flag_sets_its_field_and_no_other(line, key, value):
    cfg = parse(line)
    section, name = key.split(".")
    assert getattr(getattr(cfg, section), name) == value
    changed = {
        f"{one}.{item.name}"
        for one, item in all_fields(RunConfig)
        if getattr(getattr(cfg, one), item.name) != getattr(getattr(RunConfig(), one), item.name)
    }
    assert changed - {"amp.enabled"} <= {key}


def test_empty_texts_and_the_empty_device_list_are_accepted():
    cfg = parse_train_args(["--device-list", "", "--dist-bn", "", "--experiment", "", "--seed", "3"])
    assert (cfg.dist.device_list, cfg.dist.dist_bn, cfg.run.experiment, cfg.run.seed) == ([], "", "", 3)


def test_flags_do_not_swallow_the_override_behind_them():
    cfg = parse("--lr-noise 0.4 0.9 optim.lr=0.16 --pretrained run.seed=7 --image-size 128 256 data.root=x")
    assert (cfg.sched.lr_noise, cfg.optim.lr) == ([0.4, 0.9], 0.16)
    assert (cfg.model.pretrained, cfg.run.seed) == ("url", 7)
    assert (cfg.model.image_size, cfg.data.root) == ([128, 256], "x")


@pytest.mark.parametrize("root", list(PARSERS))
def test_each_spelling_belongs_to_one_field(root):
    spellings = spellings_of(root)
    assert len(spellings) == len(set(spellings))
    assert not set(spellings) & {*REFUSED, *MOOT, *RENAMED}


@pytest.mark.parametrize("root", list(PARSERS))
def test_help_all_shows_every_group_and_field(root, capsys):
    with pytest.raises(SystemExit) as stop:
        PARSERS[root](["--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for section, kind in sections_of(root).items():
        assert f" {section}: {kind.__doc__}" in text
    assert all((option.spellings or (option.text,))[0] in text for option in list_options(root).values())
    if root is RunConfig:
        assert "--lr X peak learning rate, for the global batch as it is [> 0] (default: 0.32)" in text
        assert "loss.gamma: focal loss: focusing exponent [>= 0] (default: from the model table)" in text


@pytest.mark.parametrize(
    ("root", "flags"),
    [
        (RunConfig, "-c --root --model --epochs -b --image-size --device --output --resume --check"),
        (ValidateConfig, "-c --root --model --checkpoint -b --image-size --device --output --results"),
        (DemoConfig, "-c --model --checkpoint -b --image-size --device --output --score-thr --recursive"),
    ],
)
def test_help_shows_what_most_people_need(root, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        PARSERS[root](["-h"])
    text = capsys.readouterr().out
    listed = re.findall(r"^  (-.*?)(?:  |$)", text.partition("Examples")[0], re.MULTILINE)
    names = {re.split("[ ,]", entry)[0] for entry in listed}
    assert stop.value.code == 0 and "--help-all" in text
    assert names == {*flags.replace("-b", "--batch-size").split(), "-h", "--help-all"}


# ---- the historic runs ----

COMMON = (
    "--sync-bn --amp --lr 0.16 --opt fusedmomentum --warmup-epochs 5 --lr-noise 0.4 0.9 --opt-level O1 "
    "--model-ema --model-ema-decay 0.9999 --addr 10.0.0.7 "
)
EIGHT = "--device-list 0,1,2,3,4,5,6,7"
HISTORIC = {
    "train_performance_1p": (
        "--model tf_efficientdet_d0 --root /coco -b 16 -j 16 --loss-scale 16 "
        + COMMON
        + "--device-list 0 --max-steps 900",
        {"batch": 16, "workers": 16, "scale": 16.0, "devices": 1, "max_steps": 900},
    ),
    "train_performance_8p": (
        "--model tf_efficientdet_d0 --root /coco -b 128 -j 128 --loss-scale 128 " + COMMON + EIGHT + " --max-steps 900",
        {"batch": 128, "workers": 128, "scale": 128.0, "devices": 8, "max_steps": 900},
    ),
    "train_full_8p_0-120": (
        "--model tf_efficientdet_d0 --root /coco -b 128 -j 128 --epochs 120 --loss-scale 8 " + COMMON + EIGHT,
        {"batch": 128, "workers": 128, "scale": 8.0, "devices": 8, "epochs": 120},
    ),
    "train_full_8p_121-300": (
        "--model tf_efficientdet_d0 --root /coco --resume last.pth.tar -b 128 -j 128 --epochs 300 --loss-scale 128 "
        + COMMON
        + EIGHT,
        {"batch": 128, "workers": 128, "scale": 128.0, "devices": 8, "resume": "last.pth.tar"},
    ),
    "train_eval_8p": (
        "--model tf_efficientdet_d0 --root /coco -b 128 -j 128 --resume best.pth --epoch 300 --loss-scale 128 "
        + COMMON
        + EIGHT,
        {"batch": 128, "workers": 128, "scale": 128.0, "devices": 8, "resume": "best.pth"},
    ),
    "train_finetune_1p": (
        "--model tf_efficientdet_d0 --root /coco -b 16 -j 16 --num-classes 91 --pretrained best.pth --loss-scale 16 "
        + COMMON
        + "--device-list 3 --max-steps 900",
        {
            "batch": 16,
            "workers": 16,
            "scale": 16.0,
            "devices": 1,
            "max_steps": 900,
            "classes": 91,
            "pretrained": "best.pth",
        },
    ),
}


@pytest.mark.parametrize("script", list(HISTORIC))
def test_historic_command_line(script):
    line, want = HISTORIC[script]
    cfg = parse(line)
    assert (cfg.model.name, cfg.data.root, cfg.dist.addr) == ("tf_efficientdet_d0", "/coco", "10.0.0.7")
    assert (cfg.dist.sync_bn, cfg.amp.enabled, cfg.amp.opt_level, cfg.ema.enabled) == (True, True, "O1", True)
    assert (cfg.optim.lr, cfg.optim.opt, cfg.ema.decay) == (0.16, "fusedmomentum", 0.9999)
    assert (cfg.sched.warmup_epochs, cfg.sched.lr_noise) == (5, [0.4, 0.9])
    got = {
        "batch": cfg.run.batch_size,
        "workers": cfg.data.workers,
        "scale": cfg.amp.loss_scale,
        "devices": len(cfg.dist.device_list),
        "max_steps": cfg.run.max_steps,
        "epochs": cfg.sched.epochs,
        "resume": cfg.run.resume,
        "classes": cfg.model.num_classes,
        "pretrained": cfg.model.pretrained,
    }
    rest = {"max_steps": 0, "epochs": 300, "resume": "", "classes": None, "pretrained": ""}
    assert got == {**rest, **want}
    assert split_over_devices(cfg.run.batch_size, len(cfg.dist.device_list)) == 16
    assert workers_per_device(cfg.data.workers, len(cfg.dist.device_list)) == 16


def test_the_ports_evaluation_line_is_answered_as_a_whole(capsys):
    """eval_npu.py took the flags of the training: validate.py names the one with a successor and all without effect."""
    error = refusal(capsys, HISTORIC["train_eval_8p"][0], parse_validate_args)
    use, _, rest = error.partition("; ")
    assert "instead of --resume use --checkpoint FILE" in use
    gone = "--epoch --loss-scale --sync-bn --lr --opt --warmup-epochs --lr-noise --model-ema --model-ema-decay".split()
    assert set(re.findall(r"--[\w-]+", rest)) - {"--help", "--help-all"} == set(gone)
    cfg = parse_validate_args(
        "--model tf_efficientdet_d0 --root /coco -b 128 -j 128 --checkpoint best.pth --amp --opt-level O1 "
        f"--addr 10.0.0.7 {EIGHT}".split()
    )  # what is left of the line
    assert (cfg.run.checkpoint, cfg.run.batch_size, len(cfg.dist.device_list)) == ("best.pth", 128, 8)
    assert "has no effect here, leave it out" in refusal(capsys, "a.jpg --no-model-ema", parse_demo_args)


# ---- refusals ----


@pytest.mark.parametrize("flag", list(REFUSED))
def test_gone_flags_say_what_to_do(flag, capsys):
    words = f"is gone: {REFUSED[flag]}"
    assert words in refusal(capsys, f"{flag} 7 --device cpu")
    assert words in refusal(capsys, f"--device cpu {flag}=7 --lr 0.1")


@pytest.mark.parametrize(
    "replacement", [word.strip(",;.") for text in REFUSED.values() for word in text.split() if word.startswith("--")]
)
def test_every_named_successor_exists(replacement):
    known = {flag for root in PARSERS for flag in spellings_of(root)}
    assert replacement in known


PEER_FLAGS = """model redundant-bias val-skip num-classes pretrained no-pretrained-backbone initial-checkpoint resume
no-resume-opt mean std interpolation fill-color batch-size clip-grad opt opt-eps momentum weight-decay sched lr lr-noise
lr-noise-pct lr-noise-std lr-cycle-mul lr-cycle-limit warmup-lr min-lr epochs start-epoch decay-epochs warmup-epochs
cooldown-epochs patience-epochs decay-rate mixup mixup-off-epoch smoothing train-interpolation sync-bn dist-bn model-ema
model-ema-decay dist-group-size seed log-interval recovery-interval workers save-images amp channels-last no-prefetcher
torchscript torchcompile output eval-metric tta local_rank color-jitter aa reprob remode recount root dataset soft-nms
clip-mode jit-loss legacy-focal apex-amp native-amp pin-mem bench-labeler world-size rank gpu device addr dist-url
device-list loss-scale opt-level multiprocessing-distributed dist-backend""".split()


@pytest.mark.parametrize("name", PEER_FLAGS)
def test_flags_of_the_older_scripts_are_accepted_or_refused_with_a_hint(name):
    accepted = set(spellings_of(RunConfig))
    accepted |= {
        "--no-" + flag.removeprefix("--")
        for option in list_options(RunConfig).values()
        if option.default is False or option.negatable
        for flag in option.spellings
    }
    assert ("--" + name in accepted) != ("--" + name in {*REFUSED, *MOOT, *RENAMED})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--btach-size 3", "unknown flag --btach-size, did you mean --batch-size?"),
        ("--batch_size 3", "unknown flag --batch_size, did you mean --batch-size?"),
        ("--batch 3", "unknown flag --batch, did you mean --batch-size?"),  # a prefix is not an abbreviation
        ("--zzzzqq", "unknown flag --zzzzqq ("),
        ("lr=0.1", "unknown setting lr, did you mean optim.lr?"),
        ("optim.lrr=0.1", "unknown setting optim.lrr, did you mean optim.lr?"),
        ("model.lr=0.1", "unknown setting model.lr, did you mean optim.lr?"),
        ("/data/coco /data/other", "unexpected argument /data/coco. The data folder is given with --root DIR"),
        ("/data/coco --root /data/other", "unexpected argument /data/coco. The data folder is given with --root DIR"),
        ("--lr abc", "argument --lr: got 'abc', must be a number"),
        ("--epochs 3.5", "argument --epochs: got '3.5', must be a whole number"),
        ("--lr-noise a", "argument --lr-noise: got 'a', must be a list of numbers or null"),
        ("--lr", "argument --lr: expected one argument"),
        ("run.seed=x", "run.seed=x: got 'x', must be a whole number"),
        ("run.seed=null", "run.seed=null: got None, must be a whole number"),
        ("ema.enabled=maybe", "got 'maybe', must be true or false"),
        ("ema.enabled=3", "got 3, must be true or false"),
        ("amp.loss_scale=true", "amp.loss_scale (--loss-scale): got 'true', must be 'dynamic' or a number above 0"),
        ("data.root=${nowhere}", "cannot resolve '${nowhere}'"),
        ("-c /nowhere.yaml", "cannot read the config file /nowhere.yaml: No such file"),
        ("--epoch 3 --epochs 4", "--epoch and --epochs set the same thing to different values (3 and 4)"),
        ("-b 3 --batch-size 4", "-b and --batch-size set the same thing to different values (3 and 4)"),
        ("--model-ema --no-model-ema", "--model-ema and --no-model-ema set the same thing"),
    ],
)
def test_wrong_command_lines(line, words, capsys):
    assert words in refusal(capsys, line)


@pytest.mark.parametrize(
    "word", ["--foo", "--gpus", "--data", "--name", "--wd", "--half", "--project", "--fp16", "optim.foo", "zzz"]
)
def test_no_suggestion_without_likeness(word):
    """Dashes and sections are what all names have in common, and are no likeness."""
    assert nearest(word, spellings_of(RunConfig) if word.startswith("-") else list(list_options(RunConfig))) == ""


def test_a_suggestion_from_the_same_section_comes_first():
    keys = list(list_options(RunConfig))
    assert nearest("run.batch", keys) == ", did you mean run.batch_size?"
    assert nearest("batch_size", keys) == ", did you mean run.batch_size?"
    assert nearest("optim.batch", keys) == ", did you mean optim.lr_batch?"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: {lrr: 1}", "unknown setting optim.lrr, did you mean optim.lr?"),
        ("optm: {lr: 1}", "unknown setting optm, did you mean optim?"),
        ("lr: 1", "unknown setting lr, did you mean optim.lr?"),
        ("optim: 3", "optim is a section, it needs fields below it, got 3"),
        ("optim: {lr: abc}", "optim.lr: got 'abc', must be a number"),
        ("optim: {lr: [1]}", "optim.lr: got [1], must be a number"),
        ("optim: {lr: yes}", "optim.lr: got True, must be a number"),
        ("run: {seed: 1.5}", "run.seed: got 1.5, must be a whole number"),
        ("run: {seed: true}", "run.seed: got True, must be a whole number"),
        ("run: {resume: [a]}", "run.resume: got ['a'], must be a text"),
        ("run: {resume: {a: 1}}", "run.resume: got {'a': 1}, must be a text"),
        ("dist: {device_list: [a]}", "dist.device_list: got ['a'], must be a list of whole numbers"),
        ("- 1", "must hold sections such as 'optim'"),
        ("optim: {lr: 1}\noptim: {lr: 2}", "found duplicate key optim"),
        ("optim: [", "is not valid YAML"),
    ],
)
def test_wrong_yaml_names_the_file(text, words, tmp_path, capsys):
    path = write(tmp_path, text)
    line = refusal(capsys, ["-c", path])
    assert words in line and path in line


def test_yaml_that_is_a_single_number(tmp_path, capsys):
    assert "five.yaml" in refusal(capsys, ["-c", write(tmp_path, "5", "five.yaml")])


@pytest.mark.parametrize(
    "line",
    [
        "--lr 0",
        "--lr -1",
        "--lr nan",
        "--lr inf",
        "--momentum 1",
        "--weight-decay -1",
        "-b 0",
        "-j -1",
        "--epochs 0",
        "--smoothing 1",
        "--smoothing -0.1",
        "--model-ema-decay 1",
        "--clip-grad -1",
        "--clip-mode max",
        "--grad-accum 0",
        "--sched cos",
        "--sched polynomial",
        "--lr-noise 120 270",
        "--lr-noise 0.9 0.4",
        "--lr-noise 0.1 0.2 0.3",
        "--image-size 128 128 128",
        "--image-size 0",
        "--amp --opt-level O3",
        "--opt-level O2",
        "--amp-dtype bfloat16",
        "--amp --amp-dtype float8",
        "--amp --loss-scale 0",
        "--amp --loss-scale -1",
        "--amp --loss-scale fast",
        "--amp --loss-scale nan",
        "--device cpu --loss-scale 8",
        "--device cpu --amp --opt-level O0 --loss-scale 8",
        "--amp --amp-dtype bfloat16 --loss-scale 8",
        "--device-list 0,0",
        "--device-list -1",
        "--hflip 1.1",
        "--reprob -1",
        "--remode noise",
        "--crowd keep",
        "--scale-min 3",
        "--max-det 0",
        "--num-classes 0",
        "--start-epoch 310",
        "--start-epoch -1",
        "--fill-color red",
        "--fill-color 256",
        "--pretrained --initial-checkpoint a.pth",
        "--val-ann a.json",
        "--train-images a",
        "--keep-best 0",
        "--pad-type valid",
        "--interpolation random",
        "--dist-bn sum",
        "--master-port 0",
        "--master-port 70000",
        "--bn-momentum 0",
        "--drop-path 1",
        "--seed -1",
        "--log-interval 0",
        "--max-steps -1",
        "--aspect-ratios 0",
        "loss.alpha=2",
        "loss.gamma=-1",
        "sched.lr_noise=[]",
        "model.image_size=[]",
        "model.aspect_ratios=[]",
    ],
)
def test_values_out_of_range_and_contradictions_are_refused(line, capsys):
    assert refusal(capsys, line).startswith("train.py: error: ")


@pytest.mark.parametrize(
    "line",
    [
        "--lr 1e-9",
        "--warmup-epochs 0.5",
        "--loss-scale dynamic",
        "--amp --loss-scale 1e-3",
        "--momentum 0",
        "--smoothing 0",
        "--clip-grad 0",
        "--lr-noise 0 1",
        "--device-list 1,0",
        "--fill-color 0",
        "--fill-color 255",
        "--hflip 1",
        "--amp --opt-level O2",
        "--amp --opt-level O0",
        "--scale-min 2",
        "--root d --val-ann a.json",
        "--val-ann a.json --val-images b",
        "--resume a.pth --pretrained",
        "--master-port 65535",
        "--model-ema-decay 0",
    ],
)
def test_values_at_the_edge_are_accepted(line):
    parse(line)


def test_range_message_names_field_flag_value_and_limits(capsys):
    assert "optim.momentum (--momentum): got 1.5, must be >= 0 and < 1" in refusal(capsys, "--momentum 1.5")
    assert "run.batch_size (--batch-size): got 0, must be >= 1" in refusal(capsys, "-b 0")


def test_a_fixed_loss_scale_needs_float16(capsys):
    assert "--loss-scale 8.0 acts in float16 only: give --amp" in refusal(capsys, "--loss-scale 8 --device cpu")
    assert parse("--loss-scale 8 --device auto").amp.loss_scale == 8.0  # the device decides, as one may need it


def test_check_config_serves_api_users():
    cfg = replace_settings(RunConfig(), model={"image_size": [640]}, optim={"momentum": 0.5})
    checked = check_config(cfg)
    assert (checked.model.image_size, checked.optim.momentum, cfg.model.image_size) == ([640, 640], 0.5, [640])
    assert check_config(checked) is checked
    with pytest.raises(ConfigError, match="optim.lr"):
        check_config(replace_settings(cfg, optim={"lr": -1.0}))


@pytest.mark.parametrize("root", list(PARSERS))
def test_a_resolved_config_does_not_change(root):
    cfg = PARSERS[root]([])
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.model = None
    for section in sections_of(root):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(getattr(cfg, section), dataclasses.fields(getattr(cfg, section))[0].name, None)


# ---- validate.py and demo.py ----


def test_validate_flags():
    cfg = parse_validate_args(
        "--root /coco --checkpoint w.pth --model tf_efficientdet_d1 --num-classes 3 --image-size 128 256 -b 4 -j 2 "
        "--device cpu --device-list 0,1 --no-use-ema --amp --results r.json --metrics m.json --soft-nms --max-det 300 "
        "--val-skip 2 --log-freq 5".split()
    )
    assert (cfg.data.root, cfg.run.checkpoint, cfg.model.name, cfg.model.num_classes) == (
        "/coco",
        "w.pth",
        "tf_efficientdet_d1",
        3,
    )
    assert (cfg.model.image_size, cfg.run.batch_size, cfg.data.workers) == ([128, 256], 4, 2)
    assert (cfg.run.device, cfg.dist.device_list, cfg.run.use_ema, cfg.amp.enabled) == ("cpu", [0, 1], False, True)
    assert (cfg.run.results, cfg.run.metrics, cfg.model.soft_nms) == ("r.json", "m.json", True)
    assert (cfg.model.max_det, cfg.run.val_skip, cfg.run.log_interval) == (300, 2, 5)
    assert parse_validate_args(["--use-ema"]).run.use_ema is True
    assert parse_validate_args([]).run.use_ema is None
    assert parse_validate_args(["--pretrained"]).model.pretrained == "url"


def test_validate_refusals(capsys):
    assert "--use-ema and --no-use-ema" in refusal(capsys, "--use-ema --no-use-ema", parse_validate_args)
    assert "validate.py: error: unknown flag --checkpiont" in refusal(capsys, "--checkpiont a", parse_validate_args)
    assert "--opt-level O2 needs --amp" in refusal(capsys, "--opt-level O2", parse_validate_args)
    assert "--val-images and --val-ann go together" in refusal(capsys, "--val-images a", parse_validate_args)


def test_demo_takes_images_anywhere():
    cfg = parse_demo_args("a.jpg --image-size 512 b=1.jpg --score-thr 0.5 dir/*.png run.batch_size=2".split())
    assert cfg.run.images == ["a.jpg", "b=1.jpg", "dir/*.png"]
    assert (cfg.model.image_size, cfg.run.score_thr, cfg.run.batch_size) == ([512, 512], 0.5, 2)
    bare = parse_demo_args([])
    assert bare == DemoConfig() and bare.run.images == [] and bare.run.score_thr is None


def test_demo_keeps_commas_in_file_names():
    assert parse_demo_args(["a,b.jpg"]).run.images == ["a,b.jpg"]


def test_demo_refusals(capsys):
    assert "run.score_thr (--score-thr): got 2.0" in refusal(capsys, "--score-thr 2", parse_demo_args)
    assert "unknown flag --score, did you mean --score-thr" in refusal(capsys, "a.jpg --score 1", parse_demo_args)


# ---- to disk and back ----

FULL = (
    "--amp --opt-level O2 --loss-scale 8 --lr-noise 0.4 0.9 --image-size 128 256 --device-list 0,1 --soft-nms "
    "--num-classes 5 --pad-type symmetric --smoothing 0.1 run.experiment=12e45 --weight-decay 1e-7"
)


@pytest.mark.parametrize(
    ("root", "line"),
    [
        (RunConfig, ""),
        (RunConfig, FULL),
        (ValidateConfig, "--no-use-ema --root 007"),
        (DemoConfig, "null true 1e3.jpg"),
    ],
)
def test_dumped_yaml_loads_back_equal(root, line, tmp_path):
    cfg = PARSERS[root](line.split())
    path = write(tmp_path, dump_yaml(cfg))
    assert PARSERS[root](["-c", path]) == cfg
    assert dump_yaml(load_config(root, [path])) == dump_yaml(cfg)


def test_plain_form_is_plain_and_comes_back(tmp_path):
    cfg = parse(FULL)
    plain = to_plain(cfg)
    assert json.loads(json.dumps(plain)) == plain
    torch.save(plain, tmp_path / "plain.pth")
    assert from_plain(torch.load(tmp_path / "plain.pth", weights_only=True)) == cfg
    assert from_plain({}) == RunConfig()
    assert from_plain({"optim": {"lr": 0.5}}).optim.lr == 0.5


@pytest.mark.parametrize("plain", [{"optim": {"lrr": 1}}, {"optim": {"lr": -1}}, {"optim": {"lr": "x"}}, [1], None])
def test_wrong_saved_configs_are_refused(plain):
    with pytest.raises(ConfigError):
        from_plain(plain)


def test_config_handed_out_is_made_of_plain_dataclasses_and_lists():
    cfg = parse(FULL)
    for section, kind in sections_of(RunConfig).items():
        assert type(getattr(cfg, section)) is kind
    values = [getattr(getattr(cfg, section), item.name) for section, item in all_fields(RunConfig)]
    assert {type(value) for value in values} == {int, float, str, bool, list, type(None)}


# ---- splitting ----


@pytest.mark.parametrize("devices", range(1, 9))
def test_split_against_a_search(devices):
    for total in range(0, 40):
        for zero_ok in (False, True):
            valid = [count for count in range(0, 60) if count % devices == 0 and (count or zero_ok)]
            if total in valid:
                assert split_over_devices(total, devices, zero_ok=zero_ok) * devices == total
                continue
            below = [count for count in valid if count < total][-1:]
            above = [count for count in valid if count > total][:1]
            with pytest.raises(ConfigError, match="batch size") as error:
                split_over_devices(total, devices, "batch size", zero_ok)
            assert [int(number) for number in re.findall(r"\d+", str(error.value))] == [total, devices, *below, *above]


def test_split_of_impossible_counts():
    with pytest.raises(ConfigError, match="nearest valid: 8"):
        split_over_devices(-3, 8)
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        split_over_devices(8, 0)


def test_workers():
    assert workers_per_device(0, 8) == 0 and workers_per_device(16, 8) == 2
    assert 1 <= workers_per_device(None, 1) <= 4 and workers_per_device(None, 10_000) == 1
    with pytest.raises(ConfigError, match="workers 1 cannot be split evenly over 2 devices; nearest valid: 0 or 2"):
        workers_per_device(1, 2)


# ---- a real process ----


def test_error_of_a_real_process_is_one_line():
    code = "from effdet.config.cli import parse_train_args; parse_train_args()"
    done = subprocess.run([sys.executable, "-c", code, "--lr", "abc"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("train.py: error: ") and all(part in line for part in ("--lr", "'abc'", "number", "--help"))


def test_a_command_line_is_parsed_before_torch_is_imported_and_timm_still_finds_what_it_needs():
    code = (
        "import sys; from effdet.config.cli import parse_train_args; parse_train_args(['--lr', '0.1'])\n"
        "assert not {'torch', 'timm', 'numpy'} & set(sys.modules)\n"
        "import timm, torch; assert torch.ops.torchvision.nms and torch.ops.torchvision.qnms"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- every field is read ----


def read_fields(root: type, sources: dict[str, str]) -> set[tuple[str, str]]:
    """Return the (section, field) pairs of a root config that some source reads.

    A read is an attribute access or getattr with a literal name, on something called like the section
    (`cfg.optim.lr`, `optim.lr`, `optim_cfg.lr`) or on an argument annotated with the section's class.
    """
    sections = sections_of(root)
    # a function annotated with a base class (or a subclass) of the section's class reads that section too
    by_class = {base.__name__: [] for kind in sections.values() for base in kind.__mro__[:-1]}
    for section, kind in sections.items():
        for base in kind.__mro__[:-1]:
            by_class[base.__name__].append(section)
    spellings = {
        form: section
        for section in sections
        for form in (section, f"{section}_cfg", f"{section}_config", f"cfg_{section}")
    }
    found = set()

    def visit(node: ast.AST, scope: dict[str, list[str]]) -> None:
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            annotated = {one.arg: ast.unparse(one.annotation) for one in arguments if one.annotation}
            scope = {
                **scope,
                **{
                    name: by_class[kind.split(".")[-1].split(" ")[0].strip("'\"")]
                    for name, kind in annotated.items()
                    if kind.split(".")[-1].split(" ")[0].strip("'\"") in by_class
                },
            }
        owner, name = None, None
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner, name = node.value, node.attr
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "getattr"
            and len(node.args) > 1
            and isinstance(node.args[1], ast.Constant)
        ):
            owner, name = node.args[0], node.args[1].value
        if name is not None:
            last = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            of_scope = scope.get(last, []) if isinstance(owner, ast.Name) else []
            found.update((section, name) for section in [*of_scope, *filter(None, [spellings.get(last)])])
        for child in ast.iter_child_nodes(node):
            visit(child, scope)

    for text in sources.values():
        visit(ast.parse(text), {})
    return found & {(section, item.name) for section, item in all_fields(root)}


def test_read_fields_finds_reads_and_only_reads():
    source = """
def train(cfg, step: SchedConfig, other: "EvalAmpConfig | None"):
    print(cfg.optim.lr, optim_cfg.momentum, step.epochs, getattr(cfg.ema, "decay"), other.dtype)
    cfg.optim.opt = "sgd"
    print(unrelated.weight_decay, step.nothing, cfg.lr)
"""
    assert read_fields(RunConfig, {"a.py": source}) == {
        ("optim", "lr"),
        ("optim", "momentum"),
        ("sched", "epochs"),
        ("ema", "decay"),
        ("amp", "dtype"),
    }


@pytest.mark.parametrize(
    ("root", "script"), [(RunConfig, "train.py"), (ValidateConfig, "validate.py"), (DemoConfig, "demo.py")]
)
def test_every_field_is_read(root, script):
    if not (ROOT / script).exists():
        pytest.skip(f"{script} is not there yet")
    files = [ROOT / script, *sorted((ROOT / "effdet").rglob("*.py"))]
    declaring = ("schema.py", "options.py", "load.py", "cli.py")
    sources = {
        str(path): path.read_text() for path in files if path.parent.name != "config" or path.name not in declaring
    }
    wanted = {(section, item.name) for section, item in all_fields(root)}
    unread = sorted(".".join(pair) for pair in wanted - read_fields(root, sources))
    assert not unread, f"settings of {script} that nothing reads: {', '.join(unread)}"
