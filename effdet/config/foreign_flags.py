"""Flags that people know from other trainers, each with what serves for it here. Words only; cli.py looks them up."""

_DATA = "name the data with --root DIR; a YOLO data.yaml goes there, too: --root data.yaml"
_SIZE = "use --image-size H W (multiples of 32; one value: square)"
_WEIGHTS = (
    "train.py starts from weights with --pretrained FILE or --initial-checkpoint FILE, validate.py and demo.py use "
    "those of --checkpoint FILE"
)
_DEVICES = "use --device NAME, and --device-list 0,1,... for several devices"
_SCORE = "demo.py draws from --score-thr X on; validate.py needs all scores, as COCO's metric does"
_OVERLAP = "overlapping boxes are suppressed from IoU 0.5 on, as in effdet; --soft-nms lowers their scores instead"
_OUTPUT = "use --output DIR, with a folder for each run in it, and --experiment NAME for the run's name"
_TRACKER = "use --log-to wandb, or swanlab, tensorboard; metrics.jsonl in the run's folder has the same numbers"
_EARLY = "use --patience N: stop after N evaluations without a better AP; the best is kept as model_best.pth.tar"
_EMA = "weights are averaged unless --no-model-ema is given; --model-ema-decay X sets how far back"

FOREIGN: dict[str, str] = {
    # ultralytics
    "--data": _DATA,
    "--imgsz": _SIZE,
    "--img": _SIZE,
    "--weights": _WEIGHTS,
    "--project": _OUTPUT,
    "--name": _OUTPUT,
    "--exist-ok": "--experiment NAME may name a folder that is there; drop it",
    "--optimizer": "use --opt NAME, such as adamw or sgd",
    "--lr0": "use --lr X, the peak learning rate for the batch as it is",
    "--lrf": "use --min-lr X, the lowest learning rate itself and not a factor",
    "--cos-lr": "use --sched cosine, the default",
    "--label-smoothing": "use --smoothing X",
    "--cache": "images are read as they are needed, by -j N processes; drop it",
    "--freeze": "use --freeze-backbone",
    "--fliplr": "use --hflip X",
    "--hsv-h": "use --color-jitter X for brightness, contrast and saturation",
    "--hsv-s": "use --color-jitter X for brightness, contrast and saturation",
    "--hsv-v": "use --color-jitter X for brightness, contrast and saturation",
    "--half": "use --amp",
    "--conf": _SCORE,
    "--conf-thres": _SCORE,
    "--iou": _OVERLAP,
    "--iou-thres": _OVERLAP,
    "--source": "name images, folders, patterns, videos or addresses after demo.py, without a flag",
    "--save-txt": "demo.py writes label files with --save yolo; validate.py writes COCO's results with --results FILE",
    "--nosave": "demo.py draws nothing with --no-draw",
    "--vid-stride": "demo.py takes each Nth frame with --every N",
    "--save-period": "use --save-every N",
    "--noval": "use --val-interval N with a large N: the last epoch is always evaluated",
    "--hyp": "put settings into a YAML file and name it with -c FILE",
    "--cfg": "put settings into a YAML file and name it with -c FILE; the network is --model NAME",
    "--fraction": "use --limit N, a number of images",
    "--early-stop": _EARLY,
    # rf-detr
    "--dataset-dir": _DATA,
    "--output-dir": _OUTPUT,
    "--resolution": _SIZE,
    "--grad-accum-steps": "use --grad-accum N",
    "--pretrain-weights": _WEIGHTS,
    "--early-stopping": _EARLY,
    "--ema-decay": _EMA,
    "--wandb": _TRACKER,
    # timm
    "--data-dir": _DATA,
    "--input-size": _SIZE,
    "--log-wandb": _TRACKER,
    "--checkpoint-hist": "use --keep-best N",
    "--eval-checkpoint": "evaluate with validate.py --checkpoint FILE",
    "--train-split": "the parts are found in --root DIR, or named with --train-images, --train-ann and the like",
    # mmdetection, detectron2
    "--work-dir": _OUTPUT,
    "--cfg-options": "write section.field=value without a flag, such as optim.lr=0.01",
    "--auto-scale-lr": "the learning rate is taken as it is: set --lr X for your batch",
    "--gpus": _DEVICES,
    "--gpu-ids": _DEVICES,
    "--num-gpus": _DEVICES,
    "--launcher": "use --device-list 0,1,..., or start the script with torchrun",
    "--load-from": _WEIGHTS,
    "--resume-from": "use --resume FILE, or --resume auto",
    "--config-file": "use -c FILE",
    "--show-dir": "demo.py draws into --output DIR; a run draws into images/ in its folder",
}
"""Flag of ultralytics, rf-detr, timm, mmdetection or detectron2, with dashes -> what serves for it."""
