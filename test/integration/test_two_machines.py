"""A run over two machines, which are network namespaces of this one, and the loss of one of them.

TORCH_DISABLE_SHARE_RDZV_TCP_STORE is for torch's launcher: without it (torch 2.13) the machine that stayed does not
tell one that joins anew where the processes meet, and both give up after a minute.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from real_process import Process, is_alive, losses, train_argv, wait_until_gone

from effdet.data.synthetic.dataset import make_synthetic_dataset

EPOCHS, STEPS = 2, 2 * 24 // 4
SHORT = ("--epochs", EPOCHS, "--model", "tf_efficientdet_lite0", "--no-pretrained-backbone")
pytestmark = pytest.mark.slow


@dataclass
class Machine:
    """A network namespace: its name, its address and its end of the cable, and what runs on it."""

    name: str
    address: str
    cable: str
    process: Process | None = None

    def torchrun(self, host: str, log: Path, argv: list[str]) -> Process:
        """Start the launcher of one process here; it tells which machine is the host by names, and there are none."""
        launcher = [
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc-per-node=1",
            "--max-restarts=5",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={host}:29400",
            "--rdzv-id=test",
            f"--rdzv-conf=is_host={int(host == self.address)}",
            f"--local-addr={self.address}",
        ]
        self.process = Process(
            [*launcher, "train.py", *argv],
            log,
            ["ip", "netns", "exec", self.name],
            {"GLOO_SOCKET_IFNAME": self.cable, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        )
        return self.process

    def lose_power(self) -> list[int]:
        """Kill everything that runs here at once; return the processes."""
        family = self.process.family()
        for pid in family:
            if is_alive(pid):
                os.kill(pid, 9)
        self.process.process.wait()
        return family


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    """Two machines with a cable between them."""
    if shutil.which("ip") is None:
        pytest.skip("needs the program ip (package iproute2)")
    number = os.getpid()
    pair = [Machine(f"effdet-{number}-{i}", f"10.77.0.{i + 1}", f"ve{number}-{i}") for i in range(2)]
    commands = [["netns", "add", one.name] for one in pair]
    commands.append(["link", "add", pair[0].cable, "type", "veth", "peer", "name", pair[1].cable])
    for one in pair:
        commands += [
            ["link", "set", one.cable, "netns", one.name],
            ["-n", one.name, "addr", "add", f"{one.address}/24", "dev", one.cable],
            ["-n", one.name, "link", "set", one.cable, "up"],
            ["-n", one.name, "link", "set", "lo", "up"],
        ]
    try:
        for command in commands:
            done = subprocess.run(["ip", *command], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"network namespaces are not permitted here: ip {' '.join(command)}: {done.stderr.strip()}")
        yield pair
    finally:
        for one in pair:
            if one.process is not None:
                one.process.end()
            subprocess.run(["ip", "netns", "del", one.name], capture_output=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_synthetic_dataset(tmp_path_factory.mktemp("data") / "set", num_train=24, num_val=6)


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run in two processes of one machine, which nothing disturbed."""
    output = tmp_path_factory.mktemp("straight")
    run = Process(["train.py", *train_argv(data, output, *SHORT, "--device-list", "0,1")], output / "log.txt")
    assert run.wait(600) == 0, run.output()
    return output / "run"


def test_a_machine_that_is_lost_and_comes_back_continues_the_run(machines, data, straight, tmp_path):
    """No --resume auto: the machine that comes back counts no restart, and must hear of it from the other."""
    argv = train_argv(data, tmp_path, *SHORT, "--recovery-interval", 1, "--resume", "")
    first, _ = (one.torchrun(machines[0].address, tmp_path / f"{one.address}.txt", argv) for one in machines)
    first.wait_for(r"Train: 1 \[ *2/", 600)
    assert not wait_until_gone(machines[1].lose_power())
    again = machines[1].torchrun(machines[0].address, tmp_path / "again.txt", argv)
    deltas = first.wait(600), again.wait(600)
    assert deltas == (0, 0), first.output() + again.output()
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "2 process(es), batch 4 (2 each)" in log
    assert len(re.findall(r"resumed \S+recovery.pth.tar: continuing with epoch 1, batch [1-6]", log)) == 1, log
    assert losses(tmp_path / "run") == losses(straight) and len(losses(straight)) == STEPS
