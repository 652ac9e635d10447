"""The flags of effdet 0.4.1's scripts and of the original Ascend port that are gone, or mean something else here.

Tables only, for effdet_line.py, cli.py and docs/flags.md. What is a flag of ours is in schema.py.

Source of names, defaults and effects: train.py and validate.py beside effdet 0.4.1.
"""

_LAUNCH = "use --device-list 0,1,..., or start the script with torchrun, which passes ranks in the environment"
_NEVER = "the option never had an effect; drop it"
_TABLE = "mean and standard deviation come from the model table; drop it"
REFUSED: dict[str, str] = {
    "--no-resume-opt": "use --initial-checkpoint FILE, which takes the weights and nothing else",
    "--mean": _TABLE,
    "--std": _TABLE,
    "--dataset": "data is read in COCO format: name it with --root DIR, or --val-images and --val-ann; other data sets "
    "are converted by effdet data convert",
    "--split": "name the images to evaluate with --val-images and --val-ann",
    "--torchcompile": "use --compile of train.py",
    "--tta": "use --tta-flip and --tta-scales of validate.py and demo.py",
    "--mixup-off-epoch": _NEVER,
    "--eval-metric": "checkpoints are ranked by COCO AP; drop it",
    "--save-images": "draw predictions with demo.py",
    "--local_rank": _LAUNCH,
    "--local-rank": _LAUNCH,
    "--rank": _LAUNCH,
    "--world-size": _LAUNCH,
    "--num-gpu": _LAUNCH,
    "--multiprocessing-distributed": _LAUNCH,
    "--gpu": "use --device NAME and --device-list N",
    "--dist-url": "use --addr HOST and --master-port PORT",
    "--dist-backend": "the backend follows from --device; drop it",
    "--dist-group-size": "--sync-bn spans all processes; drop it",
    "--data_path": "the scripts under test/ take it; here use --root DIR",
    "--pth_path": "the scripts under test/ take it; here use --resume, --initial-checkpoint or --checkpoint FILE",
}
"""Flags of effdet's and the original Ascend port's scripts that are gone, with what to do instead."""

_UINT8 = "images always travel as uint8 and are normalised on the device"
_LABELS = "targets are labelled on the device in every run"
_SCRIPT = "plain tensor code is used, TorchScript is not"
MOOT: dict[str, tuple[tuple[str, ...], str]] = {
    "--dataset": (("coco", "coco2017"), "annotations are read in COCO's format"),
    "--split": (("val",), "the validation split is what is evaluated"),
    "--tta": (("0",), "test-time augmentation is off by default"),
    "--num-gpu": (("1",), "one device is the default"),
    "--world-size": (("1",), "one process is the default"),
    "--rank": (("0", "-1"), "one process is the default"),
    "--local_rank": (("0",), "ranks come from the launcher's environment"),
    "--local-rank": (("0",), "ranks come from the launcher's environment"),
    "--dist-url": (("env://",), "processes meet by the launcher's environment"),
    "--eval-metric": (("map",), "checkpoints are ranked by COCO AP"),
    "--mixup-off-epoch": (("0",), "it never had an effect"),
    "--pin-mem": ((), "host memory is pinned whenever the device gains from it"),
    "--no-prefetcher": ((), _UINT8),
    "--bench-labeler": ((), _LABELS),
    "--no-bench-labeler": ((), _LABELS),
    "--jit-loss": ((), _SCRIPT),
    "--no-jit-loss": ((), _SCRIPT),
    "--torchscript": ((), _SCRIPT),
}
"""Flags that are accepted, with the values that ask for what happens anyway (none: a switch), and what does happen."""

RENAMED: dict[str, str] = {"--native-amp": "--amp", "--apex-amp": "--amp"}
"""Flags that are accepted under another name: both mean torch's autocast here."""

OTHER_MEANING: tuple[tuple[str, str, str, str], ...] = (
    ("`DIR`", "the data folder, without a flag", "accepted; beside flags of ours it is `--root DIR`", "`--root DIR`"),
    ("`-b`", "train.py: images of each process, 32; validate.py: of all, 128", "of all devices, 256 and 32",
     "`-b` times the number of processes"),
    ("`-j`", "train.py: loader processes of each process, 4", "of all devices, up to 4 for each",
     "`-j` times the number of processes"),
    ("`--model`", "tf_efficientdet_d1", "tf_efficientdet_d0; validate.py: the checkpoint's",
     "`--model tf_efficientdet_d1`"),
    ("`--lr`", "0.01, changed once an epoch", "0.32, for a batch of 256; changed at every update",
     "`--lr 0.01 --lr-per-epoch`"),
    ("`--opt`", "momentum", "fusedmomentum: the same numbers in less time", "nothing"),
    ("`--no-pretrained-backbone`", "the backbone starts from ImageNet weights without it", "from random ones",
     "`--pretrained-backbone`"),
    ("`--model-ema`", "off", "on, and what is ranked", "`--no-model-ema`"),
    ("`--model-ema-decay`", "0.9998 from the first update on", "0.9999, reached over the first updates",
     "`--model-ema-decay 0.9998 --no-model-ema-warmup`"),
    ("`--dist-bn`", "off", "reduce", "`--dist-bn ''`"),
    ("`--num-classes`", "train.py: 90, category ids are labels", "the categories of the annotation file",
     "nothing: ids may have gaps"),
    ("`--color-jitter`, `--aa`", "never had an effect", "augment the training images", "leave them out"),
    ("`--output`", "`DIR/train/RUN` is made", "`DIR/RUN` is made", "`--output DIR/train`"),
    ("`--no-resume-opt`", "with `--resume FILE`: without the optimizer's state", "gone",
     "`--initial-checkpoint FILE`, from epoch 0"),
    ("`--pretrained`", "validate.py: also without it, where no `--checkpoint` is given", "only with it",
     "`--pretrained`"),
    ("`--use-ema`", "off", "on where the checkpoint has averaged weights", "`--no-use-ema`"),
    ("`-c FILE`", "flat YAML", "sections; args.yaml of a run of effdet's is accepted", "`-c args.yaml`"),
)  # fmt: skip
"""Same flag, other meaning: (flag, in effdet 0.4.1, here, how to have effdet's)."""
