"""The sections of validate.py's and demo.py's settings; see schema.py, whose sections for training add to them."""

from dataclasses import dataclass

from .options import setting

DEVICE_TEXT = "device: auto (an NPU if there is one, else a GPU, else the CPU), npu, cuda or cpu"
NPU_DEFAULTS_TEXT = "leave torch_npu's own compile mode, for a chip on which ready-made kernels are missing"
JSON_TEXT = "print the metrics as one line of json on standard output, and the log on standard error"
PLAIN_TEXT = "print plain lines on a terminal, too, as into a file or pipe: no bars, no colours"


@dataclass(frozen=True)
class DemoModelConfig:
    """Choose the network to show, its input size and what becomes of its outputs."""

    name: str | None = setting(
        None, "model name, for weight files that do not carry one", flags="--model -m", none="from the checkpoint"
    )
    image_size: list[int] | None = setting(
        None,
        "network input as height and width in pixels; one value: square",
        flags="--image-size --img-size",
        low=32,
        metavar="H [W]",
        none="from the checkpoint or the model table",
    )
    soft_nms: bool | None = setting(None, "soft-NMS instead of NMS")
    nms: str = setting(
        "auto",
        "where overlapping boxes are suppressed: exact on the device, host on the CPU with the same result, npu by "
        "Ascend's own operator npu_batch_nms; auto is host on NPUs, exact elsewhere",
        choices=("auto", "exact", "host", "npu"),
    )
    same_padding: str = setting(
        "auto", "SAME padding pads the activation or extends the kernel", choices=("auto", "pad", "kernel")
    )
    max_det: int | None = setting(None, "detections kept per image", low=1)


@dataclass(frozen=True)
class EvalModelConfig(DemoModelConfig):
    """Choose the network to evaluate."""

    name: str | None = setting(
        None, "model name", flags="--model -m", none="from the checkpoint, else tf_efficientdet_d0"
    )
    num_classes: int | None = setting(
        None, "object classes; must agree with the annotation file", low=1, none="from the checkpoint or that file"
    )
    pretrained: str = setting(
        "", "published weights: downloaded, or every tensor of PATH that fits", bare="url", metavar="PATH"
    )
    pad_type: str | None = setting(
        None, "padding of strided layers; the original Ascend port's is symmetric", choices=("same", "symmetric")
    )
    redundant_bias: bool | None = setting(None, "biases before batch norm, as the published tf_ weights have")


@dataclass(frozen=True)
class EvalDataConfig:
    """Name the images to evaluate and how they are resized."""

    root: str = setting("", "data folder: COCO, Roboflow, CVAT, YOLO, VOC, ...; see docs/own_data.md", metavar="DIR")
    val_images: str = setting("", "folder of the validation images, instead of the one in --root", metavar="DIR")
    val_ann: str = setting("", "validation annotations in COCO format, instead of those in --root", metavar="JSON")
    val_split: float | None = setting(
        None, "share of the images held out where there is no validation part", low=0, below=1, none="0.15"
    )
    limit: int = setting(0, "use the first N images of each part, those with boxes first; 0: all", low=0)
    classes: list[str] = setting([], "use these classes alone, by name", metavar="A,B")
    workers: int | None = setting(
        None,
        "loader processes over all devices; 0: load in the main process",
        flags="-j --workers",
        low=0,
        none="up to 4 per device",
    )
    max_bad_images: int | None = setting(
        0, "absent or unreadable images allowed; each is named, and has no detections", low=0
    )
    match_classes: str = setting(
        "name",
        "what tells which class of the training a category of another json is: its name, or its id",
        choices=("name", "id"),
    )
    interpolation: str = setting("bilinear", "resampling in evaluation", choices=("bilinear", "bicubic"))
    fill_color: str = setting(
        "mean", "colour of the padding: 'mean' (the model's mean colour) or one gray value 0..255", metavar="COLOR"
    )


@dataclass(frozen=True)
class EvalAmpConfig:
    """Choose the precision of the arithmetic."""

    enabled: bool = setting(False, "mixed precision", flags="--amp")
    opt_level: str = setting(
        "O1", "with --amp: O0 float32, O1 autocast, O2 half-precision weights", choices=("O0", "O1", "O2")
    )
    dtype: str = setting("float16", "half-precision type", flags="--amp-dtype", choices=("float16", "bfloat16"))
    hf32: bool | None = setting(
        None, "Ascend A2, A3: float32 shortened to HF32 in convolutions", none="on with --amp, off without"
    )

    @property
    def is_full_precision(self) -> bool:
        """Whether the work is in float32."""
        return not self.enabled or self.opt_level == "O0"


@dataclass(frozen=True)
class EvalDistConfig:
    """Run on several devices."""

    device_list: list[int] = setting([], "device numbers, one process each, as in 0,1,2,3", low=0, metavar="N,N")
    addr: str = setting("127.0.0.1", "address of the host that coordinates the processes", metavar="HOST")
    master_port: int | None = setting(None, "port on that host", low=1, high=65535, none="a free one")


@dataclass(frozen=True)
class _PredictRunConfig:
    """Say how a trained network is used."""

    device: str = setting("auto", DEVICE_TEXT)
    npu_defaults: bool = setting(False, NPU_DEFAULTS_TEXT)
    batch_size: int = setting(32, "images per step over all devices", flags="-b --batch-size", low=1)
    use_ema: bool | None = setting(None, "use the averaged weights", none="when the checkpoint has them")
    tta_flip: bool = setting(False, "test-time augmentation: also predict mirror images, and fuse")
    tta_scales: list[float] = setting(
        [], "test-time augmentation: also predict at these factors of the input size, and fuse", above=0, metavar="X,X"
    )
    plain: bool = setting(False, PLAIN_TEXT)
    json: bool = setting(False, JSON_TEXT)


@dataclass(frozen=True)
class EvalRunSectionConfig(_PredictRunConfig):
    """Say what is evaluated, where, and what is written."""

    checkpoint: str = setting("", "weights to evaluate", metavar="PATH")
    val_skip: int = setting(0, "evaluate every Nth validation image only; 0: all", low=0)
    log_interval: int = setting(10, "batches between two log lines", flags="--log-interval --log-freq", low=1)
    results: str = setting("", "write the detections to this file, in COCO's result format", metavar="JSON")
    metrics: str = setting("", "write the metrics to this file", metavar="JSON")
    output: str = setting(
        "output/validate", "folder for metrics.json, per_class.csv and report.html; empty: none", metavar="DIR"
    )
    speed: bool = setting(False, "also time the model and the post-processing, on one batch repeated")


@dataclass(frozen=True)
class DemoRunSectionConfig(_PredictRunConfig):
    """Say what is shown, where, and what is written."""

    batch_size: int = setting(1, "images per step", flags="-b --batch-size", low=1)
    recursive: bool = setting(False, "take the images of folders within the folders, too")
    max_bad_images: int | None = setting(
        None, "unreadable images allowed; each is named and passed over", low=0, none="any number"
    )
    max_image_pixels: int | None = setting(
        None, "largest image read, in pixels; larger ones may be made to fill the memory", low=1, none="Pillow's limit"
    )
    images: list[str] = setting(
        [],
        "images, folders, glob patterns, videos, addresses (http, https, rtsp, ...), numbers of cameras; - for a list "
        "of them on standard input, one a line; none: images of the default data set",
        flags="",
    )
    checkpoint: str = setting("", "weights to use; empty: the newest under runs/ and output/", metavar="PATH")
    score_thr: float | None = setting(
        None,
        "draw and list detections from this score on",
        low=0,
        high=1,
        none="that with the best F1 in the checkpoint's evaluation, or 0.4",
    )
    classes: list[str] = setting([], "draw and list these classes alone, by name", metavar="A,B")
    agnostic_nms: bool = setting(False, "also suppress what overlaps a better object of another class")
    output: str = setting("output/demo", "folder for the drawn images and the results", metavar="DIR")
    save: list[str] = setting(
        ["json"],
        "files with the results: 'json' (detections.json), 'jsonl' (an image a line), 'csv' (an object a line), 'coco' "
        "and 'yolo' (data sets, to correct the boxes in an annotation tool or to train on)",
        choices=("json", "jsonl", "csv", "coco", "yolo"),
    )
    every: int = setting(1, "of a video, take the first of so many frames", low=1)
    save_video: bool = setting(False, "draw the frames of a video into a video (mp4), not into an image each")
    draw: str = setting("png", "format of the drawn images", choices=("png", "jpg", ""), bare="png", negatable=True)
