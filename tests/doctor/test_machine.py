"""What is said about processor, memory, limits and settings, on machines made of files."""

from __future__ import annotations

import os
import resource
from importlib import metadata
from pathlib import Path

import pytest
import torch

from flashpack.doctor import machine
from flashpack.doctor.remark import Remark
from flashpack.runtime import memory

GB = 10**9


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No cgroups; its /sys/fs/cgroup."""
    monkeypatch.setattr(memory, "_LISTING", tmp_path / "listing")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    return tmp_path


def by_name(findings: object) -> dict[str, Remark]:
    assert hasattr(findings, "__iter__")
    return {f.name: f for f in findings}


def test_what_is_not_ok_has_a_next_step_and_what_is_has_none() -> None:
    for level, todo in (("note", ""), ("problem", ""), ("ok", "do this"), ("fine", "")):
        with pytest.raises(ValueError, match="machine"):
            Remark(level, "machine", "memory", "text", todo)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "nonsense\n"}, None),
        ({"cpu.cfs_quota_us": "300000\n", "cpu.cfs_period_us": "100000\n"}, 3.0),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_cgroup(groups: Path, files: dict[str, str], cores: float | None) -> None:
    old = any("cfs" in name for name in files)
    (groups / "listing").write_text("4:cpu,cpuacct:/job\n" if old else "0::/job\n")
    folder = groups / "cpu" / "job" if old else groups / "job"
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    assert machine.quota() == cores


def cores(monkeypatch: pytest.MonkeyPatch, threads: int, usable: int, quota: float | None) -> Remark:
    monkeypatch.setattr(machine, "usable_cores", lambda: usable)
    monkeypatch.setattr(machine, "quota", lambda: quota)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    return by_name(machine.processor())["cores"]


def test_more_threads_than_a_quota_allows_is_a_note_with_the_right_number(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cores(monkeypatch, 64, 64, 3.5)
    assert found.level == "note"
    assert found.todo.startswith("flashpack run --threads 3:")
    assert "the time of 3.5" in found.text
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert "--threads 8, or unset OMP_NUM_THREADS" in cores(monkeypatch, 2, 8, None).todo
    assert cores(monkeypatch, 8, 8, None).level == "ok"
    assert "8 of 64 usable" in cores(monkeypatch, 8, 8, None).text


def test_a_machine_that_works_for_others_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cores(monkeypatch, 4, 4, None).level == "ok"
    assert "load" not in by_name(machine.processor())
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 9.0, 9.0))
    assert "load 9.0" in by_name(machine.processor())["load"].text


def test_name_and_instruction_sets_come_from_cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("model name\t: Some Chip\x1b[2J\nflags\t\t: fpu avx2 fma avx512f avx512_vnni\n")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert by_name(machine.processor())["processor"].data["instruction_sets"] == ["avx2", "fma", "avx512_vnni"]
    (tmp_path / "cpuinfo").write_text("Features\t: fp asimd asimddp i8mm\n")
    assert machine.instruction_sets() == ["asimd", "asimddp", "i8mm"]


def test_a_cgroups_limit_on_memory_is_said(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "installed", lambda: 64 * GB)
    monkeypatch.setattr(memory, "_system_available", lambda: 60 * GB)
    (groups / "meminfo").write_text("SwapTotal: 2000000 kB\n")
    monkeypatch.setattr(machine, "MEMINFO", groups / "meminfo")
    (found,) = machine.memory()
    assert found.level == "ok"
    assert found.data == {
        "installed": 64 * GB, "limit": None, "available": 60 * GB, "spare": 54 * GB, "swap": 2048 * 10**6
    }  # fmt: skip
    (groups / "listing").write_text("0::/\n")
    for name, text in {"memory.max": f"{GB}", "memory.current": f"{GB // 2}", "memory.stat": ""}.items():
        (groups / name).write_text(text)
    (found,) = machine.memory()
    assert "the cgroup allows 1.00 GB" in found.text
    assert "swap 2.05 GB" in found.text
    assert found.level == "note"
    assert "raise the cgroup's limit" in found.todo


@pytest.mark.parametrize(("soft", "level"), [(256, "note"), (65536, "ok"), (resource.RLIM_INFINITY, "ok")])
def test_few_open_files_are_a_note(monkeypatch: pytest.MonkeyPatch, soft: int, level: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, resource.RLIM_INFINITY))
    found = by_name(machine.settings())["open files"]
    assert found.level == level
    assert found.data["hard"] is None


def test_variables_are_explained_and_unknown_ones_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHPACK_WARM", "0")
    monkeypatch.setenv("FLASHPACK_WRAM", "secret")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not/there"))
    found = by_name(machine.settings())
    assert "FLASHPACK_WARM=0 (0: experts that earlier" in found["environment"].text
    assert found["variables"].level == "note"
    assert "FLASHPACK_WRAM" in found["variables"].text
    assert "secret" not in str(found)
    assert "cache folder" not in found
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert by_name(machine.settings())["cache folder"].level == "note"


def test_packages_that_are_missing_or_too_old_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.wrong_packages() == {}
    needs = ["numpy>=999", "not-a-package-at-all>=1", "torch>=1", 'never>=1; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda name: needs)
    found = by_name(machine.software())["packages"]
    assert found.level == "problem"
    assert found.todo == "pip install 'numpy>=999' 'not-a-package-at-all>=1'"
    assert "not-a-package-at-all is missing" in found.text
