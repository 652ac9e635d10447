"""Command lines written for effdet 0.4.1: which run, which are translated, and that the translation says the same."""

import logging
import re
import runpy
import shlex
from pathlib import Path

import pytest

from effdet.config.cli import in_our_words, parse_demo_args, parse_train_args, parse_validate_args
from effdet.config.effdet_flags import MOOT, REFUSED, RENAMED
from effdet.config.load import dump_yaml
from effdet.config.options import list_options
from effdet.config.schema import RunConfig, ValidateConfig

MAKE_FLAGS = Path(__file__).resolve().parents[3] / "docs/make_flags.py"


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def launched(monkeypatch, world, rank=0, local_world=None):
    for name, value in {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": local_world or world, "RANK": rank}.items():
        monkeypatch.setenv(name, str(value))


def translation(capsys, line, parser=parse_train_args) -> list[str]:
    """Return the words of the line that a refusal names; fail unless it is one line."""
    with pytest.raises(SystemExit) as stop:
        parser(shlex.split(line))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return shlex.split(re.search(r"The same training is: .*?train\.py (.*?) -- ", error)[1])


# ---- train.py: effdet's line gets ours ----


def test_the_published_recipe_on_four_devices(monkeypatch, capsys):
    """The line of effdet's README for D0, under its launcher of four processes."""
    launched(monkeypatch, 4)
    words = translation(
        capsys, "/mscoco --model tf_efficientdet_d0 -b 16 -j 3 --amp --lr .09 --warmup-epochs 5 --sync-bn --model-ema"
    )
    cfg = parse_train_args(words)
    assert (cfg.data.root, cfg.model.name) == ("/mscoco", "tf_efficientdet_d0")
    assert (cfg.run.batch_size, cfg.data.workers, cfg.dist.device_list) == (64, 12, [0, 1, 2, 3])
    assert (cfg.optim.lr, cfg.sched.warmup_epochs, cfg.dist.sync_bn, cfg.amp.enabled) == (0.09, 5, True, True)
    assert (cfg.ema.enabled, cfg.ema.decay, cfg.ema.warmup, cfg.sched.per_epoch) == (True, 0.9998, False, True)
    assert cfg.model.pretrained_backbone


def test_what_a_line_leaves_out_has_effdets_defaults(capsys):
    cfg = parse_train_args(translation(capsys, "coco"))
    assert (cfg.data.root, cfg.model.name, cfg.run.batch_size, cfg.optim.lr) == ("coco", "tf_efficientdet_d1", 32, 0.01)
    assert (cfg.ema.enabled, cfg.model.pretrained_backbone, cfg.dist.device_list) == (False, "auto", [])


def test_batch_norm_statistics_stay_each_processs_own(monkeypatch, capsys):
    launched(monkeypatch, 2)
    assert parse_train_args(translation(capsys, "coco")).dist.dist_bn == ""
    assert parse_train_args(translation(capsys, "coco --dist-bn broadcast")).dist.dist_bn == "broadcast"


def test_processes_on_other_hosts_keep_their_launcher(monkeypatch, capsys):
    launched(monkeypatch, 8, local_world=4)
    cfg = parse_train_args(translation(capsys, "coco -b 2"))
    assert (cfg.run.batch_size, cfg.dist.device_list) == (16, [])


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("--no-pretrained-backbone", "model.pretrained_backbone", ""),
        ("--pretrained", "model.pretrained", "url"),
        ("--pretrained", "model.pretrained_backbone", None),
        ("--resume last.pth.tar --no-resume-opt", "model.initial_checkpoint", "last.pth.tar"),
        ("--resume last.pth.tar --no-resume-opt", "run.resume", ""),
        ("--resume last.pth.tar", "run.resume", "last.pth.tar"),
        ("--resume last.pth.tar", "model.pretrained_backbone", None),
        ("--model-ema --model-ema-decay 0.5", "ema.decay", 0.5),
        ("--native-amp", "amp.enabled", True),
        ("--torchcompile", "run.compile", True),
        ("--color-jitter 0.4 --aa v0", "data.color_jitter", 0.0),
        ("--color-jitter 0.4 --aa v0", "data.aa", ""),
        ("--num-classes 90", "model.num_classes", None),
        ("--output out", "run.output", "out/train"),
        ("--no-soft-nms", "model.soft_nms", False),
        ("--redundant-bias", "model.redundant_bias", True),
        ("--lr-noise 0.4 0.9", "sched.lr_noise", [0.4, 0.9]),
        ("--dr 0.5 --sched step", "sched.decay_rate", 0.5),
        ("--batch 12", "run.batch_size", 12),  # argparse there took beginnings of flags
        ("-b12", "run.batch_size", 12),
        ("--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225", "data.root", "DIR"),
        ("--dataset coco2014", "data.val_ann", "DIR/annotations/instances_val2014.json"),
        ("--bench-labeler --jit-loss --pin-mem --no-prefetcher --save-images --eval-metric loss", "data.root", "DIR"),
    ],
)
def test_flags_of_a_translated_line(line, key, value, capsys):
    cfg = parse_train_args(translation(capsys, f"DIR {line}"))
    assert list_options(RunConfig)[key].get(cfg) == value


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        ("--dataset voc0712", "--dataset"),
        ("--mean 0 0 0", "--mean"),
        ("--torchcompile eager", "--torchcompile"),
        ("--num-gpu 2", "--num-gpu"),
    ],
)
def test_a_line_without_translation_says_why(line, flag, capsys):
    with pytest.raises(SystemExit):
        parse_train_args(["DIR", *line.split()])
    assert REFUSED[flag] in capsys.readouterr().err


def test_one_of_the_processes_speaks(monkeypatch, capsys):
    launched(monkeypatch, 2, rank=1)
    with pytest.raises(SystemExit) as stop:
        parse_train_args(["coco"])
    assert stop.value.code == 2 and capsys.readouterr().err == ""


# ---- lines of ours ----


@pytest.mark.parametrize(
    ("parser", "flag"),
    [(parser, flag) for parser in (parse_train_args, parse_validate_args) for flag in [*MOOT, *RENAMED]]
    + [(parse_demo_args, flag) for flag in MOOT],
)
def test_words_that_ask_for_what_happens_anyway(parser, flag, caplog):
    """One line in the log each; the same settings as without, or with the other name."""
    without = parser([*RENAMED.get(flag, "").split(), "--device", "cpu"])
    values = MOOT[flag][0] if flag in MOOT else ()
    for value in values or [None]:
        forms = [[flag]] if value is None else [[flag, value], [f"{flag}={value}"]]
        for form in forms:
            caplog.clear()
            assert parser([*form, "--device", "cpu"]) == without
            assert len(caplog.records) == 1 and flag in caplog.text


def test_a_folder_beside_flags_of_ours(caplog, tmp_path):
    assert parse_train_args(["--device", "cpu", "coco", "--lr", "1"]).data.root == "coco"
    assert len(caplog.records) == 1 and "coco" in caplog.text
    preset = tmp_path / "ours.yaml"
    preset.write_text("optim: {lr: 0.5}\n")
    cfg = parse_train_args(["coco", "-c", str(preset)])
    assert (cfg.data.root, cfg.optim.lr, cfg.run.batch_size) == ("coco", 0.5, 256)


def test_lines_of_ours_are_left_as_they_are():
    for line in ("--pretrained weights.pth -b 16", "--root coco -b 16 --amp", "optim.lr=0.1", "a.jpg b.jpg", ""):
        for script in ("train.py", "validate.py", "demo.py"):
            assert in_our_words(script, line.split()) == line.split()


def test_the_rank_that_old_launchers_add(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert in_our_words("train.py", ["--local-rank=3", "--root", "coco"]) == ["--root", "coco"]


def test_the_models_mean_is_what_happens_anyway(capsys):
    lite = "-m tf_efficientdet_lite0 --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5".split()
    assert parse_train_args([*lite, "--root", "coco"]).data.root == "coco"
    with pytest.raises(SystemExit):
        parse_train_args("--root coco -m tf_efficientdet_d0 --mean 0.5 0.5 0.5".split())
    assert REFUSED["--mean"] in capsys.readouterr().err


# ---- args.yaml ----

SAVED = """aa: null
amp: true
batch_size: 16
bench_labeler: false
channels_last: false
clip_grad: 10.0
color_jitter: 0.4
dataset: coco
dist_bn: ''
epochs: 7
eval_metric: map
fill_color: null
initial_checkpoint: ''
interpolation: ''
jit_loss: null
lr: 0.09
lr_noise: [0.4, 0.9]
mean: null
model: tf_efficientdet_d2
model_ema: true
model_ema_decay: 0.9998
no_prefetcher: false
no_pretrained_backbone: true
no_resume_opt: false
num_classes: null
opt: momentum
opt_eps: null
output: ''
pretrained: false
redundant_bias: null
resume: ''
root: /mscoco
save_images: false
seed: 42
smoothing: null
soft_nms: false
sync_bn: false
torchcompile: null
torchscript: false
tta: 0
workers: 2
"""


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("line", ["-c args.yaml --device cpu", "-c args.yaml /data --epochs 9"])
def test_a_saved_args_yaml_leaves_nothing_open_and_runs(line, world, monkeypatch, tmp_path, caplog):
    launched(monkeypatch, world)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "args.yaml").write_text(SAVED)
    cfg = parse_train_args(line.split())
    assert (cfg.data.root, cfg.sched.epochs) == (("/data", 9) if "/data" in line else ("/mscoco", 7))
    assert (cfg.model.name, cfg.run.batch_size, cfg.data.workers) == ("tf_efficientdet_d2", 16 * world, 2 * world)
    assert (cfg.optim.lr, cfg.optim.opt, cfg.amp.enabled, cfg.sched.lr_noise) == (0.09, "momentum", True, [0.4, 0.9])
    assert (cfg.ema.enabled, cfg.ema.decay, cfg.ema.warmup) == (True, 0.9998, False)
    assert (cfg.model.pretrained_backbone, cfg.model.soft_nms, cfg.model.redundant_bias) == ("", False, None)
    assert cfg.data.color_jitter == 0 and cfg.dist.dist_bn == ("" if world > 1 else "reduce")
    assert "args" in caplog.text or "read as" in caplog.text


def test_a_part_of_an_args_yaml_leaves_defaults_open(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "part.yaml").write_text("lr: 0.09\nbatch_size: 16\n")
    cfg = parse_train_args(translation(capsys, "coco -c part.yaml"))
    assert (cfg.optim.lr, cfg.run.batch_size, cfg.model.name) == (0.09, 16, "tf_efficientdet_d1")
    with pytest.raises(SystemExit):  # without effdet's folder it is a YAML file of ours, with a mistake
        parse_train_args(["--root", "coco", "-c", "part.yaml"])
    assert "did you mean optim.lr" in capsys.readouterr().err


# ---- validate.py ----


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("DIR", {"model.name": "tf_efficientdet_d1", "model.pretrained": "url", "data.root": "DIR"}),
        ("DIR -m tf_efficientdet_d3 --split val", {"model.name": "tf_efficientdet_d3", "model.pretrained": "url"}),
        ("DIR --checkpoint F", {"model.pretrained": "", "model.name": None, "run.use_ema": False}),
        ("DIR --checkpoint F --use-ema", {"run.use_ema": True}),
        ("DIR --checkpoint F -b 8 -j 2 --num-gpu 2", {"run.batch_size": 8, "data.workers": 2}),
        ("DIR --checkpoint F --num-gpu 2 --torchscript", {"dist.device_list": [0, 1]}),
        ("DIR --checkpoint F --num-gpu 1 --native-amp", {"dist.device_list": [], "amp.enabled": True}),
        ("DIR --checkpoint F --img-size 512", {"model.image_size": [512, 512]}),
        ("DIR --checkpoint F --num-classes 20", {"model.num_classes": 20}),
        ("DIR --checkpoint F --log-freq 5 --results r.json", {"run.log_interval": 5, "run.results": "r.json"}),
        ("DIR --split train", {"data.val_images": "DIR/train2017"}),
        ("DIR --dataset coco2014", {"data.val_ann": "DIR/annotations/instances_val2014.json"}),
        ("DIR --split testdev", {"data.val_ann": "DIR/annotations/image_info_test-dev2017.json"}),
        ("DIR --split testdev", {"data.val_images": "DIR/test2017"}),
    ],
)
def test_effdets_evaluation_runs(line, want, caplog):
    caplog.set_level(logging.WARNING)
    cfg = parse_validate_args(line.split())
    options = list_options(ValidateConfig)
    assert {key: options[key].get(cfg) for key in want} == want
    assert "read as" in caplog.text


def test_effdets_evaluation_on_other_data_is_refused(capsys):
    for line in ("DIR --dataset voc2012", "DIR --split minival"):
        with pytest.raises(SystemExit):
            parse_validate_args(line.split())
        assert line.split()[2] in capsys.readouterr().err


def test_the_table_names_flags_that_exist(caplog):
    """Every flag of the last column is one of ours."""
    spellings = {
        flag for root in (RunConfig, ValidateConfig) for o in list_options(root).values() for flag in o.spellings
    }
    spellings |= {"--no-" + flag[2:] for flag in spellings}
    for row in runpy.run_path(str(MAKE_FLAGS))["OTHER_MEANING"]:
        flags = re.findall(r"(?<![\w-])--?[a-z][\w-]*", row[3])
        assert set(flags) <= spellings | {"-c"}, row
    assert "lr: 0.32" in dump_yaml(RunConfig())  # the defaults that the table states
    assert (RunConfig().run.batch_size, ValidateConfig().run.batch_size) == (256, 32)
