"""Resume a checkpoint of effdet 0.4.1's trainer, which is made here as there: timm's optimizer, average and saver."""

from __future__ import annotations

import copy
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from timm.optim import create_optimizer
from timm.utils import CheckpointSaver, ModelEmaV2
from torch import nn

from effdet.checkpoint.io import load_checkpoint_file
from effdet.checkpoint.manager import CheckpointError
from effdet.config.load import replace_settings
from effdet.config.schema import RunConfig
from effdet.training import effdet_checkpoint, resume
from effdet.training.amp import Precision
from effdet.training.ema import ModelEma
from effdet.training.engine import Training
from effdet.training.optim import build_optimizer
from effdet.training.schedule import build_schedule

CPU = torch.device("cpu")
EPOCH = 4


class Net(nn.Module):
    """A network with each kind of parameter; several have one shape, so that only the order tells them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, bias=False)  # a gradient of rounding alone would be noise to Adam
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3)
        self.third = nn.Conv2d(4, 4, 3)
        self.edge_weights = nn.Parameter(torch.ones(4))

    def forward(self, x):
        x = self.norm(self.first(x))
        return (self.third(self.second(x).relu()) * self.edge_weights[:, None, None]).square().mean()


def batch(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    model(batch(seed)).backward()
    optimizer.step()


def trained(folder: Path, opt: str = "momentum", weight_decay: float = 0.1):
    """Train as effdet's train.py does, save, and return model, optimizer and the checkpoint."""
    torch.manual_seed(0)
    model = Net()
    args = Namespace(opt=opt, lr=0.05, weight_decay=weight_decay, momentum=0.9, opt_eps=None, model="net")
    optimizer = create_optimizer(args, model)
    average = ModelEmaV2(model, decay=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for seed in range(3):
        step(model, optimizer, seed)
        average.update(model)
    scaler.state_dict_key = "amp_scaler"
    saver = CheckpointSaver(model, optimizer, args, average, scaler, checkpoint_dir=str(folder))
    saver.save_checkpoint(EPOCH, metric=0.25)
    return model, optimizer, average.module, load_checkpoint_file(folder / "last.pth.tar")


def build(opt: str, weight_decay: float = 0.1, amp: bool = False) -> Training:
    """Build the same network, elsewhere initialised, and our optimizer of it."""
    torch.manual_seed(1)
    model = Net()
    optimizer = build_optimizer(model, opt, 0.05, 0.9, weight_decay)
    schedule, _ = build_schedule(optimizer, "constant", epochs=10, warmup_epochs=0, updates_per_epoch=7)
    precision = Precision(CPU, amp, "O1", "bfloat16" if amp else "float16", "dynamic")
    return Training(model, model, optimizer, schedule, precision, CPU, ModelEma(model, 0.999), grad_accum=2)


def restore(payload, training: Training, opt: str) -> None:
    cfg = replace_settings(RunConfig(), optim={"opt": opt})
    resume.restore(payload, "old.pth.tar", training, None, {}, cfg)


@pytest.mark.parametrize("weight_decay", [0.1, 0.0], ids=["reversed groups", "one group"])
@pytest.mark.parametrize(
    ("stored", "opt"), [("momentum", "fusedmomentum"), ("momentum", "momentum"), ("sgd", "sgd"), ("adamw", "adamw")]
)
def test_the_next_step_is_the_one_that_effdets_trainer_would_have_done(stored, opt, weight_decay, tmp_path):
    model, optimizer, average, payload = trained(tmp_path, stored, weight_decay)
    training = build(opt, weight_decay)
    restore(payload, training, opt)
    for seed in (10, 11):
        step(model, optimizer, seed)
        step(training.model, training.optimizer, seed)
    for (name, parameter), own in zip(model.named_parameters(), training.model.parameters(), strict=True):
        torch.testing.assert_close(own, parameter, rtol=1e-6, atol=1e-7, msg=name)
    for name, tensor in average.state_dict().items():
        assert torch.equal(training.ema.module.state_dict()[name], tensor)


def test_epoch_rate_and_average_go_on(tmp_path):
    *_, payload = trained(tmp_path)
    training = build("fusedmomentum")
    restore(payload, training, "fusedmomentum")
    assert resume.read_position(payload, 8, 80, 2) == resume.Position(EPOCH + 1)
    assert training.updates == training.schedule.updates == (EPOCH + 1) * 7
    assert training.steps == (EPOCH + 1) * 7 * 2
    assert training.ema.decay_now == pytest.approx(0.999), "a warm-up would throw the average away"


def test_the_loss_scale_goes_on(tmp_path):
    *_, payload = trained(tmp_path)
    assert payload["amp_scaler"]["scale"] == 64.0
    converted = effdet_checkpoint.convert(payload, "old", build("momentum"), "momentum")
    assert converted["scaler"]["dynamic_scale"]["scale"] == 64.0


def test_settings_of_the_groups_are_this_runs(tmp_path):
    *_, payload = trained(tmp_path)
    training = build("fusedmomentum", weight_decay=0.02)
    before = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in training.optimizer.param_groups]
    restore(payload, training, "fusedmomentum")
    after = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in training.optimizer.param_groups]
    assert after == before and {group["weight_decay"] for group in after} == {0.02, 0.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda payload: payload["args"].update(opt="adamw"), "--opt adamw"),
        (lambda payload: payload["optimizer"]["param_groups"].pop(), "--initial-checkpoint"),
        (lambda payload: payload["optimizer"].pop("state"), "--initial-checkpoint"),
        (
            lambda payload: payload["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(9)),
            "--initial-checkpoint",
        ),
        (lambda payload: payload.update(optimizer={}), "--initial-checkpoint"),
    ],
    ids=["another optimizer", "another group count", "no state", "another shape", "nothing"],
)
def test_what_cannot_go_on_says_the_way_out(change, words, tmp_path):
    *_, payload = trained(tmp_path)
    payload = copy.deepcopy(payload)
    change(payload)
    with pytest.raises(CheckpointError, match=words) as error:
        restore(payload, build("fusedmomentum"), "fusedmomentum")
    assert "old.pth.tar" in str(error.value)
