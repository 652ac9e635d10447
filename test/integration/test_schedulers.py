"""Processes with the variables that srun and mpirun give them train as one."""

from __future__ import annotations

import os
import re

import pytest
from real_process import ENVIRONMENT, Process, train_argv

from effdet.data.synthetic.dataset import make_synthetic_dataset


def slurm(task: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(task),
        "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NODELIST": "some-node",
    }


def open_mpi(rank: int) -> dict[str, str]:
    names = {"RANK": rank, "SIZE": 2, "LOCAL_RANK": rank, "LOCAL_SIZE": 2}
    job = {"PMIX_NAMESPACE": f"prterun-{os.getpid()}@1"}
    return job | {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in names.items()}


@pytest.mark.parametrize("scheduler", [slurm, open_mpi])
def test_two_tasks_are_one_training(scheduler, tmp_path):
    data = make_synthetic_dataset(tmp_path / "set", num_train=8, num_val=2)
    argv = ["train.py", *train_argv(data, tmp_path / "runs", "--epochs", 1, "--sync-bn")]
    argv[argv.index("--experiment") : argv.index("--experiment") + 4] = []  # a name would hide a second folder
    tasks = [Process(argv, tmp_path / f"{rank}.txt", environment=scheduler(rank)) for rank in range(2)]
    try:
        status = [task.wait() for task in tasks]
        printed = [task.output() for task in tasks]
        assert status == [0, 0], printed
        assert "2 process(es), batch 4 (2 each)" in printed[0]
        assert len(list((tmp_path / "runs").iterdir())) == 1
        assert len(re.findall(r"Train: ", printed[0])) == 2 and "Train: " not in printed[1]
    finally:
        for task in tasks:
            task.end()


def test_a_shell_with_an_allocation_is_one_process(tmp_path):
    assert not any(name.startswith(("SLURM_", "OMPI_", "PMI")) for name in ENVIRONMENT)
    data = make_synthetic_dataset(tmp_path / "set", num_train=4, num_val=2)
    allocation = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "some-node"}
    argv = ["train.py", *train_argv(data, tmp_path / "runs", "--epochs", 1)]
    process = Process(argv, tmp_path / "log.txt", environment=allocation)
    try:
        assert process.wait() == 0, process.output()
        assert "1 process(es), batch 4 (4 each)" in process.output()
    finally:
        process.end()


def test_what_a_scheduler_does_not_say_is_asked_for_in_one_line(tmp_path):
    argv = ["train.py", *train_argv(tmp_path, tmp_path / "runs")]
    process = Process(argv, tmp_path / "log.txt", environment={"PMI_RANK": "1", "PMI_SIZE": "4"})
    assert process.wait() != 0
    (line,) = process.output().splitlines()
    assert "torchrun --nproc-per-node 4" in line and not (tmp_path / "runs").exists()
