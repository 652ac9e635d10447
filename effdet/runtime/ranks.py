"""Which of several processes this one is, where a scheduler started them: srun, mpirun, Kubernetes.

torch.distributed reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them. Schedulers have names of
their own; processes that ignored them would each train by themselves, all into one folder. No torch here: the number of
processes on a machine says how many threads torch may start.

Source:
    srun(1), "OUTPUT ENVIRONMENT VARIABLES"; Open MPI's FAQ, "environment variables that Open MPI sets"; MPICH's Hydra.
"""

from __future__ import annotations

import re
import socket
import zlib
from collections.abc import MutableMapping
from dataclasses import dataclass

_FIRST_PORT, _PORTS = 12000, 20000  # below those that systems give to outgoing connections


@dataclass(frozen=True)
class Place:
    """The place of this process among those of its job step.

    Args:
        started_by: the program that started them.
        rank: number of this process.
        world: how many there are.
        local_rank: number on this machine; None where that is not said.
        local_world: how many are on this machine; None where that is not said.
        host: the machine of rank 0; empty where that is not said.
        job: a text that processes of another job do not have.
    """

    started_by: str
    rank: int
    world: int
    local_rank: int | None
    local_world: int | None
    host: str
    job: str


def take_ranks(environ: MutableMapping[str, str]) -> str:
    """Set torch.distributed's variables from a scheduler's, where it started several processes.

    What torchrun or the user has set stays.

    Args:
        environ: the process's environment; changed in place.

    Returns:
        A line that says which process of how many this is; empty where nothing was taken over.

    Raises:
        ValueError: several processes were started, but not all that each must know is said; with what to type.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        place = Place("", int(environ["RANK"]), int(environ["WORLD_SIZE"]), None, None, "", "")
        if "LOCAL_RANK" in environ or place.world == 1 or not {"MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
            return ""  # torchrun's; or incomplete, which the process group says
    else:
        found = _find_place(environ)
        if found is None or found.world == 1:
            return ""
        place = found
        environ.setdefault("MASTER_PORT", str(_FIRST_PORT + zlib.crc32(place.job.encode()) % _PORTS))
        if place.host:
            environ.setdefault("MASTER_ADDR", place.host)
    if "MASTER_ADDR" not in environ:
        raise ValueError(
            f"{place.started_by} started {place.world} processes, but does not say on which machine rank 0 is, where "
            "they meet: give all of them MASTER_ADDR (mpirun -x MASTER_ADDR=HOST python train.py ...), or, on one "
            f"machine, type: torchrun --nproc-per-node {place.world} train.py ..."
        )
    local_rank, local_world = place.local_rank, place.local_world
    if local_rank is None or local_world is None:
        # On the machine of rank 0 they are taken for one machine's. Elsewhere each has a machine of its own, as in a
        # pod of Kubernetes; there rank 0 may be told that it is at "localhost".
        is_pod = place.rank == 0 and "KUBERNETES_SERVICE_HOST" in environ
        here = _is_this_machine(environ["MASTER_ADDR"]) and not is_pod
        local_rank, local_world = (place.rank, place.world) if here else (0, 1)
    environ["RANK"], environ["WORLD_SIZE"] = str(place.rank), str(place.world)
    environ["LOCAL_RANK"] = str(local_rank)
    environ.setdefault("LOCAL_WORLD_SIZE", str(local_world))
    if not place.started_by:
        return ""
    return (
        f"{place.started_by} started {place.world} processes, which train as one; this is rank {place.rank}. "
        f"They meet at {environ['MASTER_ADDR']}:{environ['MASTER_PORT']}."
    )


def _find_place(environ: MutableMapping[str, str]) -> Place | None:
    """Read what a scheduler has set; an mpirun inside a job of Slurm hides the step that started its daemons."""

    def number(*names: str) -> int | None:
        texts = (environ.get(name, "") for name in names)
        return next((int(text) for text in texts if text.isdigit()), None)

    rank, world = number("OMPI_COMM_WORLD_RANK"), number("OMPI_COMM_WORLD_SIZE")
    local = number("OMPI_COMM_WORLD_LOCAL_RANK"), number("OMPI_COMM_WORLD_LOCAL_SIZE")
    if rank is None or world is None:
        rank, world = number("PMI_RANK"), number("PMI_SIZE")
        local = number("MPI_LOCALRANKID"), number("MPI_LOCALNRANKS")
    task, tasks = number("SLURM_PROCID"), number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
    is_step = task is not None and tasks is not None and not _is_batch_script(environ)
    job = "/".join(environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE"))
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST", "")
    if rank is not None and world is not None and not (is_step and None in local):
        host = "127.0.0.1" if local[1] == world else first_host(nodes)
        return Place("mpirun", rank, world, *local, host, "mpi" + job)
    if not is_step:
        return None
    assert task is not None and tasks is not None
    counts = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    here = tasks_on_node(counts, number("SLURM_NODEID") or 0)
    machines = number("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    if machines == 1 or machines is None and not re.search(r"[\[,]", nodes):
        here = tasks
    host = "127.0.0.1" if here == tasks else first_host(nodes)
    return Place("srun", task, tasks, number("SLURM_LOCALID"), here, host, "slurm" + job)


def _is_batch_script(environ: MutableMapping[str, str]) -> bool:
    """Tell whether this is sbatch's script itself, which is number 0 of the job but not a task of a step."""
    return environ.get("ENVIRONMENT") == "BATCH" and not environ.get("SLURM_STEP_ID")


def first_host(nodes: str) -> str:
    """Return the first name of Slurm's compressed list of machines: 'gpu[07-09,12]' gives 'gpu07'."""
    first = re.match(r"[^,\[]*(?:\[[^\]]*\][^,\[]*)*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0]) if first else ""


def tasks_on_node(counts: str, node: int) -> int | None:
    """Return how many tasks run on a machine: of Slurm's '2(x3),1' machine 3 has 1; None where nothing is said."""
    each: list[int] = []
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        each += [int(count)] * int(repeats or 1)
    return each[node] if node < len(each) else None


def _is_this_machine(host: str) -> bool:
    """Tell whether a name or an address is this machine's."""
    try:
        found = {(family, address[0]) for family, _, _, _, address in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    for family, address in found:
        try:
            with socket.socket(family) as probe:
                probe.bind((address, 0))
            return True
        except OSError:
            continue
    return False
