"""The flags of effdet 0.4.1's scripts and of the original Ascend port that are gone or renamed here.

Tables only, for effdet_line.py, cli.py and docs/flags.md; flags with another meaning are in
docs/make_flags.py. What is a flag of ours is in schema.py.

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
