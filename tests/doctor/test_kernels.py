"""Which kernels, and the reason where they are not the best ones."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest
import torch

from flashpack.doctor import kernels
from flashpack.doctor.remark import Remark
from flashpack.kernels.cpu import native
from flashpack.kernels.cpu.native import compute
from flashpack.kernels.cuda import quantize
from flashpack.kernels.metal import device, selftest


def by_name(findings: object) -> dict[str, Remark]:
    assert hasattr(findings, "__iter__")
    return {f.name: f for f in findings}


@pytest.mark.parametrize("there", [True, False])
def test_without_the_native_library_the_reason_and_the_way_to_it(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(compute, "library", lambda: "not built; some reason")
    monkeypatch.setattr(native, "_load", lambda: "another reason")
    monkeypatch.setattr(kernels, "compiler", lambda: "/usr/bin/c++" if there else None)
    found = by_name(kernels.cpu())
    assert {f.level for f in found.values()} == {"note"}
    assert "not built; some reason" in found["run"].text
    assert "another reason" in found["convert"].text
    assert ("pip install --force-reinstall" in found["run"].todo) == there
    assert ("apt install g++" in found["run"].todo) == (not there)
    assert found["run"].data["level"] is None


@pytest.mark.parametrize(
    ("level", "sets", "says", "finding"),
    [
        ("avx2", ["avx2", "fma", "avx512_vnni"], "avx512 needs avx512vbmi, avx512vl, avx512bw, avx512dq", "ok"),
        ("portable", ["fma"], "avx2 needs avx2, which", "note"),
        ("avx512", ["avx2"], "native, avx512", "ok"),
        ("avx2", [], "native, avx2", "ok"),
    ],
)
def test_why_a_better_level_is_not_used(
    monkeypatch: pytest.MonkeyPatch, level: str, sets: list[str], says: str, finding: str
) -> None:
    monkeypatch.setattr(compute, "library", object)
    monkeypatch.setattr(compute, "status", lambda: f"native kernels: {level}")
    monkeypatch.setattr(kernels, "instruction_sets", lambda: sets)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    found = by_name(kernels.cpu())["run"]
    assert says in found.text
    assert found.level == finding
    assert found.data["level"] == level


def test_a_compiler_of_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert kernels.compiler() is None
    for name in ("g++", "mine"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    assert kernels.compiler() == str(tmp_path / "g++")
    monkeypatch.setenv("CXX", "mine -O2")
    assert kernels.compiler() == str(tmp_path / "mine")


def test_a_gpu_that_torch_cannot_use_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(quantize, "missing", lambda: "no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(kernels, "_NVIDIA", tmp_path / "version")
    (found,) = kernels.gpu()
    assert (found.level, found.text) == ("ok", "no NVIDIA GPU")
    (tmp_path / "version").write_text("driver")
    (found,) = kernels.gpu()
    assert found.level == "note"
    assert found.todo.startswith("install a build of torch with CUDA")
    monkeypatch.setattr(quantize, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    (found,) = kernels.gpu()
    assert found.text.startswith("A GPU: `convert` quantizes on it")


def test_metal_is_asked_for_on_a_mac_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(quantize, "missing", lambda: "no CUDA device")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(device, "unavailable", lambda: "torch is too old")
    assert "torch is too old" in by_name(kernels.gpu())["Metal"].text
    monkeypatch.setattr(device, "unavailable", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "flashpack selftest" in by_name(kernels.gpu())["Metal"].todo
    monkeypatch.setattr(selftest, "_recall", lambda: (True, [], []))
    assert by_name(kernels.gpu())["Metal"].level == "ok"
    monkeypatch.setattr(selftest, "_recall", lambda: (False, ["linear_q4"], ["memory: wrong"]))
    found = by_name(kernels.gpu())["Metal"]
    assert found.level == "note"
    assert "linear_q4 is refused; memory: wrong" in found.text
