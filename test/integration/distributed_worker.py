"""One rank of the tests in test_distributed_cpu.py.

`python distributed_worker.py CASE[,CASE...] OUT_DIR [ANYTHING...]` writes OUT_DIR/RANK.json, the results by case.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

WITHOUT_TORCH = ("place", "exit7", "killed")


def main(names: str, out_dir: str) -> None:
    """Run the cases and leave their results, which the tests then compare between ranks."""
    rank = os.environ["RANK"]
    if names in WITHOUT_TORCH:
        place = {
            name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "MASTER_PORT")
        }
        Path(out_dir, f"{rank}.json").write_text(json.dumps(place | {"argv": sys.argv}))
        if names == "exit7" and rank == "1":
            sys.exit(7)
        if names == "killed" and rank == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return
    import torch

    import timm_patches.torchvision_ops  # noqa: F401  before the cases import timm
    from effdet.runtime import distributed as d

    torch.set_num_threads(1)
    assert d.init_process_group("gloo", timeout_s=60)
    cases = {
        "collectives": collectives,
        "effdets_collectives": effdets_collectives,
        "sync_bn": sync_bn,
        "evaluate": evaluate,
        "evaluate_broken": evaluate_broken,
    }
    results = {name: cases[name]() for name in names.split(",")}
    Path(out_dir, f"{rank}.json").write_text(json.dumps(results))
    d.shutdown()


# ---- collectives -----------------------------------------------------------------------------------------------------


def collectives() -> dict:
    """Use every collective once and return what this rank saw."""
    import torch

    from effdet.runtime import distributed as d

    rank = d.rank()
    out: dict = {
        "rank": rank,
        "world": d.world_size(),
        "local": d.local_rank(),
        "primary": d.is_primary(),
        "distributed": d.is_distributed(),
    }
    original = torch.tensor([1.0, 10.0], dtype=torch.float64) * (rank + 1)
    total = d.all_reduce_sum(original)
    out["sum"], out["sum_dtype"], out["untouched"] = total.tolist(), str(total.dtype), original.tolist()
    out["int_sum"] = [d.all_reduce_sum(torch.tensor(2**40 + rank)).item(), str(d.all_reduce_sum(torch.tensor(1)).dtype)]
    out["mean"] = d.all_reduce_mean(torch.tensor(rank)).item()
    out["half_mean"] = d.all_reduce_mean(torch.tensor(60000.0, dtype=torch.float16)).item()
    out["broadcast"] = d.broadcast_object({"from": rank})
    out["all_gather"] = d.all_gather_object("x" * rank)
    out["gather"] = d.gather_object(rank * 10, dst=1)
    out["primary_result"] = d.run_on_primary(lambda: {"rank": d.rank()})
    out["failures"] = [failure_of(fn) for fn in (divide_by_zero, lambda: lambda: 0, lambda: sys.exit("gone"))]
    out["after_failures"] = d.all_gather_object(rank)  # the group is still usable
    d.barrier()
    out["bn"] = {mode: averaged_bn(mode) for mode in ("reduce", "broadcast", "")}
    return out


def effdets_collectives() -> dict:
    """Use the collectives under effdet's names, with and without a group given."""
    import torch

    from effdet import distributed as d

    rank, world = d.get_rank(), torch.distributed.group.WORLD
    tensor = torch.tensor([[rank, 10 + rank]])
    d.synchronize()
    return {
        "place": [d.get_world_size(), d.get_local_rank(), d.get_local_size(), d.is_main_process()],
        "all_gather": [d.all_gather("x" * rank, group) for group in (None, world)],
        "gather": [d.gather(rank * 10, 1, group) for group in (None, world)],
        "seed": d.shared_random_seed(),
        "reduce": [
            {
                name: value.tolist()
                for name, value in d.reduce_dict(
                    {"b": torch.tensor(1.0 + rank), "a": torch.tensor(3.0)}, average
                ).items()
            }
            for average in (True, False)
        ],
        "all_gather_container": [
            d.all_gather_container(tensor).tolist(),
            d.all_gather_container({"t": tensor}, world, 1)["t"].tolist(),
            [part.tolist() for part in d.all_gather_container((tensor, tensor + 1))],
        ],
        "gather_container": [None if part is None else part.tolist() for part in d.gather_container([tensor], 1)],
    }


def divide_by_zero() -> float:
    return 1 / 0


def failure_of(fn) -> str:
    from effdet.runtime import distributed as d

    try:
        d.run_on_primary(fn)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def averaged_bn(mode: str) -> list:
    import torch

    from effdet.runtime import distributed as d

    model = torch.nn.Sequential(torch.nn.BatchNorm2d(2), torch.nn.BatchNorm1d(1).to(torch.float16))
    model[0].running_mean += torch.tensor([1.0, 2.0]) * (d.rank() + 1)
    model[0].running_var *= 4 * (d.rank() + 1)
    model[0].num_batches_tracked += 5 + d.rank()
    model[1].running_var.fill_(60000)  # a half-precision sum of two would be infinite
    d.distribute_bn(model, mode)
    return [
        model[0].running_mean.tolist(),
        model[0].running_var.tolist(),
        model[0].num_batches_tracked.item(),
        model[1].running_var.item(),
    ]


# ---- sync batch norm -------------------------------------------------------------------------------------------------


def sync_bn() -> dict:
    """Train one step on uneven shards under DDP and compare it with one process that has the whole batch."""
    import torch
    from timm.layers import BatchNormAct2d
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from effdet.runtime import distributed as d

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3),
            BatchNormAct2d(4, act_layer=nn.SiLU),
            nn.Conv2d(4, 5, 3),
            nn.BatchNorm2d(5, momentum=None),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(5 * 16, 6),
            nn.BatchNorm1d(6, affine=False),
        )

    generator = torch.Generator().manual_seed(1)
    images = torch.randn(5, 3, 8, 8, generator=generator)
    goal = torch.randn(5, 6, generator=generator)
    mine = slice(0, 3) if d.rank() == 0 else slice(3, 5)

    whole = build()
    reference_loss = ((whole(images) - goal) ** 2).sum() / 5
    reference_loss.backward()

    model = build()
    keys = list(model.state_dict())
    converted = d.convert_sync_batchnorm(model)
    assert list(converted.state_dict()) == keys
    assert [type(m) for m in converted if "Norm" in type(m).__name__] == [d.SyncBatchNorm] * 3
    assert isinstance(converted[1].act, nn.SiLU)
    assert d.convert_sync_batchnorm(converted)[1] is converted[1]
    ddp = DistributedDataParallel(converted)
    # DDP averages gradients over the ranks; the ranks' losses are scaled so that the average is the whole batch's.
    loss = ((ddp(images[mine]) - goal[mine]) ** 2).sum() / 5 * d.world_size()
    loss.backward()

    worst_grad = max(
        ((a.grad - b.grad).abs().max() / b.grad.abs().max().clamp(min=1)).item()
        for a, b in zip(model.parameters(), whole.parameters(), strict=True)
    )
    worst_buffer = max(
        ((a - b).abs() / b.abs().clamp(min=1)).max().item()
        for a, b in zip(model.buffers(), whole.buffers(), strict=True)
    )
    model.eval()
    whole.load_state_dict(model.state_dict())
    whole.eval()
    return {
        "loss": d.all_reduce_mean(loss.detach()).item(),
        "reference_loss": reference_loss.item(),
        "grad_error": worst_grad,
        "buffer_error": worst_buffer,
        "eval_error": (model(images) - whole(images)).abs().max().item(),
        "large_mean": sync_bn_large_mean(),
        "empty": sync_bn_empty_shard(),
        "bfloat16": sync_bn_bfloat16(),
        "too_few": sync_bn_too_few(),
    }


def sync_bn_large_mean() -> list:
    """Normalise values whose mean is 5000 times their spread; the difference of two sums would have no digits left."""
    import torch

    from effdet.runtime import distributed as d

    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(4)) + 5000
    plain = torch.nn.BatchNorm2d(3, momentum=1.0).double()
    expected = plain(x.double())
    layer = d.convert_sync_batchnorm(torch.nn.BatchNorm2d(3, momentum=1.0))
    mine = slice(0, 2) if d.rank() == 0 else slice(2, 6)
    return [
        (layer(x[mine]) - expected[mine]).abs().max().item(),
        (layer.running_var / plain.running_var - 1).abs().max().item(),
    ]


def sync_bn_empty_shard() -> dict:
    """Rank 1 has no image: it must take part in the collectives, and rank 0 must get a plain batch norm's numbers."""
    import torch

    from effdet.runtime import distributed as d

    torch.manual_seed(2)
    whole = torch.randn(4, 3, 2, 2)
    x = (whole if d.rank() == 0 else whole[:0]).clone().requires_grad_()
    layer = d.convert_sync_batchnorm(torch.nn.BatchNorm2d(3))
    (layer(x) ** 3).sum().backward()
    y = whole.clone().requires_grad_()
    plain = torch.nn.BatchNorm2d(3)
    (plain(y) ** 3).sum().backward()
    error = (x.grad - y.grad).abs().max().item() if d.rank() == 0 else float(x.grad.numel())
    return {
        "grad": error,
        "mean": (layer.running_mean - plain.running_mean).abs().max().item(),
        "var": (layer.running_var - plain.running_var).abs().max().item(),
    }


def sync_bn_bfloat16() -> list:
    import torch

    from effdet.runtime import distributed as d

    layer = d.convert_sync_batchnorm(torch.nn.BatchNorm2d(2))
    x = (torch.arange(16.0).reshape(1, 2, 2, 4) + 16 * d.rank()).to(torch.bfloat16).requires_grad_()
    out = layer(x)
    out.sum().backward()
    return [str(out.dtype), str(x.grad.dtype), str(layer.weight.grad.dtype), layer.running_mean.tolist()]


def sync_bn_too_few() -> str:
    import torch

    from effdet.runtime import distributed as d

    layer = d.convert_sync_batchnorm(torch.nn.BatchNorm1d(3))
    try:
        layer(torch.zeros(1 if d.rank() == 0 else 0, 3))
    except ValueError as error:
        return str(error)
    return "no error"


# ---- evaluation ------------------------------------------------------------------------------------------------------


def make_coco() -> tuple[SimpleNamespace, list]:
    """Return a data set of 7 images with sparse category ids, and noisy detections [7, 6, 6] of them."""
    import numpy as np
    import torch

    random = np.random.default_rng(3)
    categories = [{"id": i, "name": f"kind {i}"} for i in (5, 17, 1000)]
    images = [{"id": 100 + 7 * i, "width": 200, "height": 150} for i in range(7)]
    annotations, detections = [], torch.zeros(7, 6, 6)
    for index, image in enumerate(images):
        for slot in range(4):
            x, y, w, h = random.uniform((0, 0, 10, 10), (100, 80, 90, 60)).tolist()
            kind = int(random.integers(3))
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": image["id"],
                    "category_id": categories[kind]["id"],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
            shift = random.normal(0, 3, 4)
            detections[index, slot] = torch.tensor(
                [x + shift[0], y + shift[1], x + w + shift[2], y + h + shift[3], random.uniform(0.2, 1), kind + 1]
            )
        detections[index, 4] = torch.tensor([1, 1, 50, 50, 0.5, 1])
    truth = {"images": images, "categories": categories, "annotations": annotations}
    parser = SimpleNamespace(
        img_ids=[i["id"] for i in images],
        category_map=SimpleNamespace(idx_to_id=np.array([5, 17, 1000])),
        coco_dict=lambda: truth,
    )
    return SimpleNamespace(parser=parser), detections


# Which rank predicts which images: with repeats (0 and 3), uneven, and one rank with nothing where there are three.
SHARDS = {1: [[0, 1, 2, 3, 4, 5, 6]], 2: [[0, 1, 2, 3, 4], [3, 5, 6, 0]], 3: [[0, 1, 2, 3, 4], [], [3, 5, 6, 0]]}


def evaluate() -> dict:
    """Evaluate this rank's shard twice (the second time fewer images) and return every number it can see."""
    import torch

    from effdet.evaluator import create_evaluator
    from effdet.runtime import distributed as d

    dataset, detections = make_coco()
    evaluator = create_evaluator("coco", dataset, distributed=d.is_distributed(), all_images=True)
    shard = SHARDS[d.world_size()][d.rank()]
    for start in range(0, len(shard), 2):
        chosen = torch.tensor(shard[start : start + 2])
        evaluator.add_predictions(detections[chosen], {"img_idx": chosen})
    results, saved = (Path(sys.argv[2], name) for name in ("results.json", "saved.json"))
    out: dict = {"ap": evaluator.evaluate(results), "type": None}
    evaluator.save(saved)
    evaluator.write_metrics(Path(sys.argv[2], "metrics.json"))
    out.update(
        type=type(out["ap"]).__name__,
        stats=evaluator.stats,
        summary=evaluator.summary(),
        per_class=evaluator.per_class(),
        collected=len(evaluator.predictions),
    )
    if d.is_primary():
        evaluator.add_predictions(detections[:2], {"img_idx": torch.arange(2)})
    out["second_ap"] = evaluator.evaluate()
    if d.rank() == d.world_size() - 1:  # and nothing on the rank that scores
        evaluator.add_predictions(detections[:2], {"img_idx": torch.arange(2)})
    out["third_ap"] = evaluator.evaluate()
    # A script of effdet's time sends the number on in a tensor: it must be one that all ranks hold already.
    sent = torch.tensor([out["ap"]], dtype=torch.float32)
    if d.is_distributed():
        torch.distributed.broadcast(sent, src=0)
    out["float32"] = [sent.item(), torch.tensor(out["ap"], dtype=torch.float32).item()]
    out["nothing_ap"] = evaluator.evaluate()
    return out


def evaluate_broken() -> dict:
    """Evaluate against ground truth that cannot be read: every rank must fail, with rank 0's words."""
    from effdet.evaluator import CocoEvaluator
    from effdet.runtime import distributed as d

    def unreadable() -> dict:
        raise FileNotFoundError("annotations went away")

    dataset, detections = make_coco()
    dataset.parser.coco_dict = unreadable
    CocoEvaluator(dataset, distributed=True).evaluate()
    d.barrier()
    return {}


if __name__ == "__main__":
    main(*sys.argv[1:3])
