"""ranks.py: the variables of each scheduler, as they are set there."""

from __future__ import annotations

import socket

import pytest

from effdet.runtime.ranks import first_host, take_ranks, tasks_on_node

STEP = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"}


def ranks(environ: dict[str, str]) -> tuple[str | None, ...]:
    return tuple(environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # srun, one machine; with the full and with the least set of variables
        (
            {
                **STEP,
                "SLURM_PROCID": "3",
                "SLURM_LOCALID": "3",
                "SLURM_STEP_NODELIST": "gpu7",
                "SLURM_STEP_NUM_NODES": "1",
            },
            ("3", "4", "3", "4", "127.0.0.1"),
        ),
        (
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_NODELIST": "gpu7"},
            ("1", "2", "1", "2", "127.0.0.1"),
        ),
        # srun, two machines
        (
            {
                **STEP,
                "SLURM_PROCID": "2",
                "SLURM_LOCALID": "0",
                "SLURM_NODEID": "1",
                "SLURM_STEP_NUM_NODES": "2",
                "SLURM_STEP_NODELIST": "gpu[07-08]",
                "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
            },
            ("2", "4", "0", "2", "gpu07"),
        ),
        (
            {
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            ("1", "2", "1", "2", "127.0.0.1"),
        ),
        # mpirun in a job of Slurm: the step is that of its daemons, one a machine
        (
            {
                **STEP,
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_PROCID": "1",
                "SLURM_STEP_NODELIST": "a1,b[2-3]",
                "OMPI_COMM_WORLD_RANK": "5",
                "OMPI_COMM_WORLD_SIZE": "8",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
            },
            ("5", "8", "1", "4", "a1"),
        ),
        # MPICH's and Intel's mpirun; the same in srun --mpi=pmi2, which says no local rank
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            ("1", "2", "1", "2", "127.0.0.1"),
        ),
        (
            {
                **STEP,
                "SLURM_PROCID": "2",
                "SLURM_LOCALID": "2",
                "SLURM_NODELIST": "n1",
                "PMI_RANK": "2",
                "PMI_SIZE": "4",
            },
            ("2", "4", "2", "4", "127.0.0.1"),
        ),
        # Kubernetes: a machine of its own for each; rank 0 may be told localhost
        (
            {"RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "job-master-0.invalid", "MASTER_PORT": "23456"},
            ("2", "3", "0", "1", "job-master-0.invalid"),
        ),
        (
            {
                "RANK": "0",
                "WORLD_SIZE": "3",
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": "23456",
                "KUBERNETES_SERVICE_HOST": "10.0.0.1",
            },
            ("0", "3", "0", "1", "localhost"),
        ),
        # by hand on one machine
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            ("1", "2", "1", "2", "127.0.0.1"),
        ),
    ],
)
def test_schedulers_variables_become_ranks(given, expected):
    environ = dict(given)
    take_ranks(environ)
    assert ranks(environ) == expected
    assert 1 <= int(environ["MASTER_PORT"]) < 32768


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "77", "SLURM_NNODES": "1"},  # salloc's shell on the login machine
        {**STEP, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # and inside the job
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "ENVIRONMENT": "BATCH"},  # sbatch's script
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"WORLD_SIZE": "4"},  # some clusters set one of them for their own purposes
        {**STEP, "SLURM_PROCID": "1", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"},  # torchrun inside srun
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"},  # incomplete: the process group says so
    ],
)
def test_what_is_one_process_or_has_ranks_is_left_alone(given):
    environ = dict(given)
    assert take_ranks(environ) == "" and environ == given


def test_a_batch_scripts_steps_are_tasks_all_the_same():
    environ = {**STEP, "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODELIST": "n1", "ENVIRONMENT": "BATCH"}
    assert take_ranks(environ) and environ["RANK"] == "1"


def test_the_users_address_and_port_stay():
    environ = {**STEP, "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "4000"}
    take_ranks(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.9", "4000")


def test_all_tasks_of_a_step_meet_at_one_port_and_those_of_another_elsewhere():
    ports = []
    for job, task in (("77", "0"), ("77", "1"), ("78", "0")):
        environ = {**STEP, "SLURM_JOB_ID": job, "SLURM_PROCID": task, "SLURM_LOCALID": task, "SLURM_NODELIST": "n1"}
        take_ranks(environ)
        ports.append(environ["MASTER_PORT"])
    assert ports[0] == ports[1] != ports[2]


@pytest.mark.parametrize(
    "given",
    [
        {  # several machines, and no word on which is the first
            "OMPI_COMM_WORLD_RANK": "3",
            "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        },
        {"PMI_RANK": "1", "PMI_SIZE": "4"},
    ],
)
def test_what_is_not_said_is_asked_for(given):
    with pytest.raises(ValueError, match=r"MASTER_ADDR.*torchrun --nproc-per-node 4 train\.py"):
        take_ranks(dict(given))
    environ = {**given, "MASTER_ADDR": socket.gethostname()}
    take_ranks(environ)
    assert environ["RANK"] == (given.get("PMI_RANK") or given["OMPI_COMM_WORLD_RANK"])


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("a,b", "a"), ("gpu[07-09,12]", "gpu07"), ("r[1-2]n[3,4],x", "r1n3"), ("n[3],m", "n3"), ("", "")],
)
def test_first_machine_of_a_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("counts", "node", "tasks"), [("4", 0, 4), ("2(x3),1", 2, 2), ("2(x3),1", 3, 1), ("", 0, None), ("2", 1, None)]
)
def test_tasks_of_a_machine(counts, node, tasks):
    assert tasks_on_node(counts, node) == tasks
