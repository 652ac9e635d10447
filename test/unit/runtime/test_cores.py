"""cores.py: limits of control groups of both versions, as folders of files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from effdet.runtime import cores


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


V1 = "11:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc"


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        # version 2: a container sees its own group as the top
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {}, None),
        # a limit of a group above holds too, the smallest one counts
        ("0::/a.slice/b.scope", {"a.slice/cpu.max": "200000 100000", "a.slice/b.scope/cpu.max": "max 100000"}, 2.0),
        ("0::/a.slice/b.scope", {"a.slice/cpu.max": "400000 100000", "a.slice/b.scope/cpu.max": "50000 100000"}, 0.5),
        # version 1: the group's folder, or in a container only its contents at the top
        (
            V1,
            {"cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "150000", "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000"},
            1.5,
        ),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "300000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 3.0),
        (V1, {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "25000"}, 2.0),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        # both versions at once: the controllers of version 1 count
        (
            "0::/x\n3:cpu:/y",
            {"unified/x/cgroup.procs": "1", "cpu/y/cpu.cfs_quota_us": "250000", "cpu/y/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        ("not a line", {"cpu.max": "x"}, None),
    ],
)
def test_limit_of_the_groups(membership, files, quota, tmp_path):
    write(tmp_path / "mount", files)
    (tmp_path / "cgroup").write_text(membership + "\n")
    assert cores.cpu_quota(tmp_path / "cgroup", tmp_path / "mount") == quota


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert cores.cpu_quota(tmp_path / "absent", tmp_path) is None


@pytest.mark.parametrize(
    ("quota", "visible", "count"), [(1.5, 64, 1), (0.5, 64, 1), (2.5, 64, 2), (80.0, 64, 64), (None, 64, 64)]
)
def test_cores_are_the_smaller_of_the_visible_and_the_allotted(quota, visible, count, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(visible)))
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    assert cores.core_count() == count
