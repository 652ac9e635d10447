"""What effdet 0.4.1 needs to run beside a current torch, and on a CPU. Nothing here changes what it computes.

- torchvision's compiled library does not load where it was built for another torch: its operators are declared by
  timm_patches/torchvision_ops.py, and `nms` gets the kernel in nms.c, the method of torchvision's own CPU kernel (sort,
  then one pass over a suppression mask) compiled by the system's C compiler. Where the library loads, it is used.
- Its loader normalises in a class that calls .cuda(): `PrefetchLoader` here does the same arithmetic on the CPU.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent
patches: list[str] = []  # what was done in this process


def has_ops() -> bool:
    """Stand in for torchvision.extension._has_ops; a plain function, so that TorchScript can read it."""
    return True


def prepare() -> None:
    """Make `import effdet` work; call it first."""
    from worker import REPO, load_file

    load_file("torchvision_ops", REPO / "timm_patches" / "torchvision_ops.py")
    import torchvision

    if not torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::nms", "CPU"):
        _add_nms_kernel()
        torchvision.extension._has_ops = has_ops
        patches.append("torchvision::nms on the CPU from nms.c")


_kept: list[Any] = []  # a library's registrations end with it


def _add_nms_kernel() -> None:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "nms.so"
        subprocess.run(["cc", "-O3", "-shared", "-fPIC", str(FOLDER / "nms.c"), "-o", str(target)], check=True)
        compiled = ctypes.CDLL(str(target))

    def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
        order = scores.sort(stable=True, descending=True)[1]
        boxes = boxes.contiguous().float()
        kept = torch.empty_like(order)
        count = compiled.nms(
            ctypes.c_void_p(boxes.data_ptr()),
            ctypes.c_void_p(order.data_ptr()),
            ctypes.c_long(len(order)),
            ctypes.c_float(iou_threshold),
            ctypes.c_void_p(kept.data_ptr()),
        )
        return kept[:count]

    library = torch.library.Library("torchvision", "IMPL")
    library.impl("nms", nms, "CPU")
    _kept.extend((library, compiled))


class PrefetchLoader:
    """Do on the CPU what the peer's class of this name does on a GPU: normalise a batch of uint8 images."""

    def __init__(self, loader: Any, mean: Any, std: Any) -> None:
        self.loader = loader
        self.mean = torch.tensor([x * 255 for x in mean]).view(1, 3, 1, 1)
        self.std = torch.tensor([x * 255 for x in std]).view(1, 3, 1, 1)

    def __iter__(self) -> Any:
        for images, target in self.loader:
            yield images.float().sub_(self.mean).div_(self.std), target


def make_loader(dataset: Any, size: int, batch: int, is_training: bool, workers: int, labeler: Any, device: str) -> Any:
    """Make the peer's loader with the settings of its train.py."""
    from effdet.data import create_loader
    from effdet.data.transforms import (
        IMAGENET_DEFAULT_MEAN,
        IMAGENET_DEFAULT_STD,
        transforms_coco_eval,
        transforms_coco_train,
    )

    interpolation = "random" if is_training else "bilinear"
    shared = {"batch_size": batch, "is_training": is_training, "num_workers": workers, "anchor_labeler": labeler}
    if device == "cuda":
        return create_loader(dataset, (3, size, size), interpolation=interpolation, pin_mem=True, **shared)
    make = transforms_coco_train if is_training else transforms_coco_eval
    transform = make((size, size), interpolation=interpolation, use_prefetcher=True)
    loader = create_loader(dataset, (3, size, size), use_prefetcher=False, transform_fn=transform, **shared)
    return PrefetchLoader(loader, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
