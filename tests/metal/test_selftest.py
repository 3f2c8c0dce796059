"""The self-test: it passes in the emulator, names what is broken, and torch computes what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import flashpack
from flashpack import user_cache
from flashpack.cli import app
from flashpack.kernels.interface import Kernels
from flashpack.kernels.metal import device, selftest, speed
from flashpack.kernels.metal import kernels as kernels_module
from flashpack.kernels.metal.cases import cases
from flashpack.kernels.metal.cases.case import Case
from flashpack.kernels.metal.layer import SMALL
from flashpack.kernels.metal.source import PARTS, PRODUCTS, source
from flashpack.kernels.metal.steps import KERNELS
from flashpack.runtime.generate import Result, generate, load_tokenizer
from tests.conftest import PackOf
from tests.metal.emulator import FakeMps, library

PROMPT = list(range(40, 48))
FEW = ("affine4", "affine8", "bf16", "f16", "f32", "combine", "steps")
"""The parts that the trained model needs."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where answers are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "flashpack" / "metal"


class Machine:
    """A machine whose GPU is the emulator, and whose self-test is about the parts ``FEW``.

    ``examined``: how often it ran; ``tried``: the cases that it ran. ``kind``: of GPU.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.examined, self.tried = 0, list[str]()
        self.kind: Any = FakeMps
        real = selftest.examine

        def examine(gpu: device.Gpu) -> selftest.Report:
            self.examined += 1
            return real(gpu)

        def few(kernels: Kernels) -> Iterator[Case]:
            others = ("2-bit", "3-bit", "5-bit", "6-bit", "fp4", "fp8", "two encodings")
            for case in cases(kernels):
                if not any(name in case.name for name in others):
                    self.tried.append(case.name)
                    yield case

        self._monkeypatch = monkeypatch
        monkeypatch.setattr(device, "unavailable", lambda: None)
        monkeypatch.setattr(device, "Mps", lambda: self.kind(guarded=False))
        monkeypatch.setattr(selftest, "examine", examine)
        monkeypatch.setattr(selftest, "PARTS", FEW)
        monkeypatch.setattr(selftest, "cases", few)

    def change(self, part: str, old: str, new: str) -> None:
        """Another source of ``part``."""

        def changed(*parts: str) -> str:
            text = source(*parts)
            if part in (parts or PARTS):
                assert old in text
                text = text.replace(old, new)
            return text

        for module in (selftest, kernels_module):
            self._monkeypatch.setattr(module, "source", changed)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def run(pack: Path, on: str = "mps", **options: Any) -> tuple[Result, Any]:
    model: Any = flashpack.load(pack, device=on, **options)
    return generate(model, load_tokenizer(pack), PROMPT, 4), model.flashpack


def test_every_kernel_runs_and_passes() -> None:
    gpu = FakeMps()
    report = selftest.examine(gpu)
    assert report.refused == {}
    assert report.wrong == []
    assert report.passed
    assert report.shared
    there = {name for part in PARTS for name in dir(gpu.compile(source(part)))}
    assert report.errors.keys() == there == selftest.names()
    assert max(report.errors.values()) < 2e-6  # tolerances leave room for Metal's own rounding
    assert sum(name.startswith("product alone and beside others") for name in report.common) == 29
    json.dumps(report.to_json(), allow_nan=False)


EXPERTS = {f"experts_{name}_affine4" for name in ("up", "up_many", "down", "down_many", "sum")}
LINEAR = {f"{name}_affine4" for name in PRODUCTS}
STEPS = set(KERNELS)

BROKEN = {
    "an activation": ("affine4", "= activated(between", "= 1.01f * activated(between", EXPERTS, "error 1.0e-02"),
    "a sum": ("combine", "float total = 0.0f", "float total = 0.5f", {"combine"}, "more than 1e-05"),
    "a trap": ("combine", "fma(weights[k],", "fma(float(1u << (at.x + 32u)),", {"combine"}, "RuntimeError: kernel "),
    "a norm": ("steps", "/ float(shape.width)", "/ float(shape.width + 1)", {"add_norm"}, "step: norm of 8: error"),
    "a format's source": ("affine4", "kernel void rows_", "kernel int rows_", LINEAR, "does not compile: "),
    "the steps' source": ("steps", "kernel void delta(", "kernel void delta(;", STEPS, "does not compile: "),
}
"""What is broken: the part, what is replaced in its source and by what; what is refused then, and a word of why."""


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_refused_and_torch_computes_the_same_tokens(
    machine: Machine, pack_of: PackOf, what: str
) -> None:
    part, old, new, refused, why = BROKEN[what]
    pack = pack_of("trained", "q4", "q4")
    machine.change(part, old, new)
    report = selftest.examine(machine.kind(guarded=False))
    assert report.refused.keys() == refused
    assert all(why in reason for reason in report.refused.values())
    assert report.wrong == []
    assert not report.passed
    expected, _ = run(pack, "cpu", reference=True)
    found, runtime = run(pack)
    assert found.text == expected.text
    assert runtime.kernels == "metal"
    assert runtime.decoding.startswith("the library's" if part == "steps" else "lean")
    (notice,) = [line for line in runtime.notices if "failed the self-test" in line]
    assert sorted(refused)[0] in notice


def test_a_source_that_nobody_compiles_leaves_torch(machine: Machine, pack_of: PackOf) -> None:
    pack = pack_of("trained", "q4", "q4")

    class Strict(FakeMps):
        def compile(self, source: str) -> Any:
            raise SyntaxError("program_source:1:1: error: unknown\n\nmore")

    machine.kind = Strict
    found, runtime = run(pack)
    expected, _ = run(pack, "cpu", reference=True)
    assert found.text == expected.text
    assert runtime.decoding == "the library's: the kernels have no steps"
    (notice,) = [line for line in runtime.notices if "failed the self-test" in line]
    assert notice.endswith("and others")
    plain, runtime = run(pack, reference=True)
    assert plain.text == expected.text
    assert (machine.examined, runtime.kernels) == (1, "metal")


def test_memory_that_is_not_shared_after_all_is_copied_to(machine: Machine, pack_of: PackOf) -> None:
    class Apart(FakeMps):
        def host(self, tensor: Tensor) -> Tensor:
            return tensor.detach().clone()

    class Broken(FakeMps):
        def host(self, tensor: Tensor) -> Tensor:
            raise AttributeError("_host_alias_storage")

    wrongs = {Apart: "what the processor wrote is not what the GPU read", Broken: "AttributeError: _host_alias"}
    for kind, wrong in wrongs.items():
        report = selftest.examine(kind(guarded=False))
        assert not report.shared
        assert report.wrong[0].startswith(f"the processor's view of the GPU's memory: {wrong}")
        assert report.refused == {}
    machine.kind = Apart
    pack = pack_of("trained", "q4", "q4")
    expected, _ = run(pack, "cpu", reference=True)
    found, runtime = run(pack)
    assert found.text == expected.text
    assert runtime.decoding.startswith("lean")
    assert [line for line in runtime.notices if line.startswith("Metal self-test: the processor's view")]


def test_results_that_depend_on_company_are_said_and_used(machine: Machine, pack_of: PackOf) -> None:
    """A product with one token has other bits than with many; both are near enough."""
    machine.change("affine4", "+ row] = y;", "+ row] = 1.000001f * y;")
    report = selftest.examine(FakeMps(guarded=False))
    assert report.refused == {}
    assert not report.passed
    assert [line.split(": error")[0] for line in report.wrong] == [
        f"product alone and beside others, 4-bit g{group}" for group in (32, 64, 128)
    ]
    kernels = selftest.tested_kernels(False)
    assert kernels.refused == frozenset()
    assert [line for line in kernels.notices if line.startswith("Metal self-test: product alone and beside others")]


def test_other_limits_than_the_kernels_count_on(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.Kernel, "thread_execution_width", 16)
    report = selftest.examine(FakeMps(guarded=False))
    assert "SIMD groups of 16 threads, 1024 threads in a group; not 32 and " in report.refused["linear_affine4"]
    monkeypatch.setattr(library.Kernel, "thread_execution_width", 32)
    monkeypatch.setattr(library.Kernel, "max_threads_per_threadgroup", 256)
    report = selftest.examine(FakeMps(guarded=False))
    assert report.refused.keys() >= {"add_norm", "delta", "attend_merge"}
    assert "linear_affine4" not in report.refused


def test_the_answer_is_kept(machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the source, torch, the system or the chip is another one; what is not sound is no answer."""

    def examined() -> int:
        before = machine.examined
        selftest.tested_kernels(False)
        return machine.examined - before

    monkeypatch.setattr(selftest, "cases", lambda _: iter(()))
    assert (examined(), examined()) == (1, 0)
    (answer,) = folder.iterdir()
    assert answer.stat().st_mode & 0o777 == 0o600
    known = answer.read_text()
    for text in ("", "[]", '{"shared": true}', '{"shared": true, "refused": [1], "wrong": []}', known[:-1]):
        answer.write_text(text)
        assert (examined(), examined()) == (1, 0)
    machine.change("combine", "float total = 0.0f", "float total = 0.00f")
    assert (examined(), examined()) == (1, 0)
    monkeypatch.setattr(torch, "__version__", "9.0")
    assert (examined(), examined()) == (1, 0)
    monkeypatch.setattr("platform.mac_ver", lambda: ("26.1", ("", "", ""), "arm64"))
    assert (examined(), examined()) == (1, 0)
    monkeypatch.setattr(selftest, "_chip", lambda: "Apple M9")
    assert (examined(), examined()) == (1, 0)
    assert len(list(folder.iterdir())) == 5


def test_a_self_test_that_ends_the_process_is_not_tried_again_unasked(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(gpu: device.Gpu) -> selftest.Report:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(selftest, "examine", end)
        with pytest.raises(KeyboardInterrupt):
            selftest.tested_kernels(False)
        patch.setattr(user_cache, "remove", lambda name: None)  # the process is gone
        with pytest.raises(KeyboardInterrupt):
            selftest.tested_kernels(False)
    kernels = selftest.tested_kernels(False)
    assert machine.examined == 0
    assert kernels.steps() is None
    assert any("a self-test did not come to its end; `flashpack selftest`" in line for line in kernels.notices)
    monkeypatch.setattr(selftest, "cases", lambda _: iter(()))
    selftest.remember(device.Mps())
    selftest.tested_kernels(False)
    assert machine.examined == 1


def test_the_command_prints_a_block(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    real = speed.measure
    monkeypatch.setattr(speed, "measure", lambda gpu, refused: real(gpu, refused, SMALL, 2**12, 1))
    done = CliRunner().invoke(app, ["selftest"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].endswith(f"self-test of Metal: all {len(selftest.names(*FEW))} kernels pass")
