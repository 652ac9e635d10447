"""How many cores this process may use. No torch here: it is asked before torch is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_MEMBERSHIP, _MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def core_count() -> int:
    """Return the cores that this process may keep busy, at least 1.

    These are not the machine's: taskset, a scheduler or a container gives some of them, and a container's limit in CPUs
    (docker run --cpus) leaves all of them visible and stops the process for a while when it has used up its share.
    """
    visible = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return visible if quota is None else max(1, min(visible, int(quota)))


def cpu_quota(membership: Path | None = None, mount: Path | None = None) -> float | None:
    """Return the smallest limit in CPUs of the control groups that this process is in; None without one.

    Args:
        membership: the file that names its groups; default /proc/self/cgroup.
        mount: where the groups' folders are; default /sys/fs/cgroup.

    Source:
        The kernel's admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (cpu.cfs_quota_us, version 1).
    """
    try:
        lines = (membership or _MEMBERSHIP).read_text().splitlines()
    except OSError:
        return None
    quotas = [quota for folder in _group_folders(lines, mount or _MOUNT) if (quota := _quota_in(folder)) is not None]
    return min(quotas, default=None)


def _group_folders(lines: list[str], mount: Path) -> Iterator[Path]:
    """Yield the folders of the groups and of those above them, whose limits hold too.

    In a container the path may be the host's, of which only the last folder is mounted, as the top.
    """
    for line in lines:
        number, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if number == "0" and not controllers:
            tops = [mount, mount / "unified"]
        elif "cpu" in controllers.split(","):
            tops = [mount / controllers, mount / "cpu"]
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for top in tops:
            yield from (top.joinpath(*parts[:depth]) for depth in range(len(parts) + 1))


def _quota_in(folder: Path) -> float | None:
    """Read the limit of one group; None where it has none."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except (OSError, ValueError):  # no such file; "max"
        return None
