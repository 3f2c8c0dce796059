"""What may be taken: machine, cgroups of both versions, nested, and what a default leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashpack.runtime import memory

GB = 10**9


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GB available and no cgroups; its /sys/fs/cgroup."""
    monkeypatch.setattr(memory, "_system_available", lambda: 8 * GB)
    monkeypatch.setattr(memory, "_LISTING", tmp_path / "listing")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    return tmp_path


def group(folder: Path, stat: str = "", **files: int | str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(stat)


def test_without_cgroups_the_machine_decides() -> None:
    assert memory.available() == 8 * GB
    assert memory.spare() == 7 * GB


@pytest.mark.parametrize(("free", "spare"), [(100 * GB, 90 * GB), (20 * GB, 18 * GB), (2 * GB, 1.5 * GB), (0, 0)])
def test_a_default_leaves_a_part_of_the_machine_alone(monkeypatch: pytest.MonkeyPatch, free: int, spare: float) -> None:
    monkeypatch.setattr(memory, "_system_available", lambda: free)
    assert memory.spare() == spare


def test_the_least_limit_of_nested_groups_of_version_2_counts(machine: Path) -> None:
    (machine / "listing").write_text("0::/user/app\n")
    group(machine / "user/app", memory__max="max", memory__high="max", memory__current=5)
    assert memory.available() == 8 * GB
    stat = f"anon {GB}\nactive_file {GB // 2}\ninactive_file {GB // 2}\n"
    group(machine / "user", stat, memory__max=4 * GB, memory__current=2 * GB)
    assert memory.available() == 3 * GB  # half of what is in use are pages of files, which can be dropped
    assert memory.spare() == 2.7 * GB
    group(machine / "user/app", memory__max=3 * GB, memory__high=2 * GB, memory__current=GB)
    assert memory.available() == GB


def test_version_1_counts_the_whole_tree_below_the_group(machine: Path) -> None:
    (machine / "listing").write_text("9:cpu,cpuacct:/x\n4:hugetlb,memory:/job/1\n0::/\n")
    unlimited = 2**63 - 4096
    stat = f"inactive_file 5\ntotal_inactive_file {GB}\ntotal_active_file 0\n"
    group(machine / "memory/job/1", stat, memory__limit_in_bytes=6 * GB, memory__usage_in_bytes=3 * GB)
    group(machine / "memory/job", memory__limit_in_bytes=unlimited, memory__usage_in_bytes=7 * GB)
    assert memory.available() == 4 * GB
    # In a container the group's own path is not there, its files are at the root.
    (machine / "listing").write_text("4:memory:/docker/0123\n")
    group(machine / "memory", memory__limit_in_bytes=2 * GB, memory__usage_in_bytes=GB)
    assert memory.available() == GB


def test_a_group_over_its_limit_has_nothing_left(machine: Path) -> None:
    (machine / "listing").write_text("0::/\n")
    group(machine, memory__max=GB, memory__current=2 * GB)
    assert memory.available() == memory.spare() == 0


def test_damaged_files_of_the_system_are_no_limit(machine: Path) -> None:
    (machine / "listing").write_text("0::/\n")
    group(machine, memory__max="what", memory__current=GB)
    assert memory.available() == 8 * GB


def test_the_limit_is_the_least_of_all_groups(machine: Path) -> None:
    assert memory.limit() is None
    (machine / "listing").write_text("0::/user/app\n")
    group(machine / "user/app", memory__max="max", memory__high=5 * GB)
    group(machine / "user", memory__max=6 * GB)
    assert memory.limit() == 5 * GB
    (machine / "user/app/memory.high").write_text("nonsense")
    assert memory.limit() == 6 * GB


def test_folders_of_another_controller(machine: Path) -> None:
    (machine / "listing").write_text("5:cpu,cpuacct:/job/1\n4:memory:/other\n")
    assert memory.cgroup_folders("cpu")[:2] == [machine / "cpu/job/1", machine / "cpu/job"]
