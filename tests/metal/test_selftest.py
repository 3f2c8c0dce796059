"""The self-test: it passes in the emulator, names what is broken, and torch computes what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import flashpack
from flashpack import user_cache
from flashpack.cli import app
from flashpack.kernels.interface import Kernels
from flashpack.kernels.metal import device, fallback, selftest, speed
from flashpack.kernels.metal import kernels as kernels_module
from flashpack.kernels.metal.cases import cases
from flashpack.kernels.metal.cases.case import Case
from flashpack.kernels.metal.layer import SMALL
from flashpack.kernels.metal.source import FORMATS, PARTS, PRODUCTS, source
from flashpack.kernels.metal.steps import KERNELS
from flashpack.kernels.metal.watch import Watched
from flashpack.runtime import timing
from flashpack.runtime.generate import Result, generate
from flashpack.runtime.lean.layers import LeanLayer
from flashpack.runtime.timing import Timing
from flashpack.runtime.tokenizer import load_tokenizer
from tests.cli.test_cli import flashpack as command
from tests.conftest import ROOT, PackOf
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
            others = ("2-bit", "3-bit", "5-bit", "6-bit", "dq", "fp4", "fp8", "two encodings")
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
    assert sum(name.startswith("product alone and beside others") for name in report.common) == 32
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


def test_run_says_what_it_waits_for_and_what_is_refused(machine: Machine, pack_of: PackOf) -> None:
    machine.change("combine", "float total = 0.0f", "float total = 0.5f")
    options = ["run", str(pack_of("trained", "q4", "q4")), "--raw", "-p", "The os", "--max-tokens", "2"]
    first, second, reference = (
        CliRunner().invoke(app, [*options, *more]) for more in (("--device", "mps"), (), ("--reference",))
    )
    assert (first.exit_code, second.exit_code, reference.exit_code) == (0, 0, 0)
    assert first.stdout == second.stdout == reference.stdout
    once, refused, *used, statistics = first.stderr.splitlines()
    assert once == "Metal: the kernels are compared with the processor, once; this takes a while"
    assert refused == "Metal kernels that failed the self-test, so that torch computes, more slowly: combine"
    assert all(line.startswith("kernel combine is not used") for line in used)
    assert "; metal; peak memory" in statistics
    assert second.stderr.splitlines()[:-1] == [refused, *used]
    assert len(reference.stderr.splitlines()) == 1
    assert machine.examined == 1


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

    class Behind(FakeMps):
        """The GPU's latest number is not there yet."""

        def host(self, tensor: Tensor) -> Tensor:
            self.last = tensor.detach()
            return self.last

        def wait(self) -> None:
            if hasattr(self, "last") and self.last.dtype == torch.uint8:
                self.last[-1] = 0
            super().wait()

    wrongs = {
        Apart: "what the processor wrote is not what the GPU read",
        Behind: "what the GPU wrote is not what the processor read",
        Broken: "AttributeError: _host_alias",
    }
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


@pytest.mark.parametrize("found", [torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 3.0]), torch.ones(3)])
def test_one_wrong_result_is_enough(found: Tensor) -> None:
    """Not a number, another number, another shape; also of integers, of which none may differ."""
    right = torch.ones(2)

    def wrong(pair: tuple[Tensor, Tensor]) -> str | None:
        case: Any = SimpleNamespace(tolerance=1.0, run=lambda _: [(right, right), pair])
        kernels: Any = None
        return selftest._try(case, kernels)[1]

    assert wrong((right, right)) is None
    assert wrong((found, right)) is not None
    assert wrong((right.int(), right.int())) is None
    assert wrong((torch.tensor([1, 2]), torch.tensor([1, 1]))) is not None


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


def test_torch_is_looked_at_where_it_takes_a_kernels_place(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.change("combine", "float total = 0.0f", "float total = 0.5f")
    monkeypatch.setattr(fallback, "combine", lambda outputs, places, weights: outputs[: len(places)])
    (line,) = selftest.examine(FakeMps(guarded=False)).wrong
    assert line.startswith("torch's operations in place of refused kernels: sums of experts: error ")


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


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is small."""
    real = speed.measure
    monkeypatch.setattr(speed, "measure", lambda gpu, refused: real(gpu, refused, SMALL, 2**12, 1))


@pytest.mark.usefixtures("quickly")
def test_the_command_prints_a_block(machine: Machine) -> None:
    done = CliRunner().invoke(app, ["selftest"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].endswith(f"self-test of Metal: all {len(selftest.names(*FEW))} kernels pass")
    assert all(word in lines[1] for word in (torch.__version__, "Python 3.", "GiB", selftest.machine()["source"]))
    table: dict[str, list[str]] = {kernel: [] for kernel in PRODUCTS}
    for line in lines:
        if line.startswith(("linear", "experts", "rows")):
            kernel, *cells = line.split()
            table[kernel] += cells
    assert all([cell != "-" for cell in row] == [form in FEW for form in FORMATS] for row in table.values())
    assert any(line.startswith("GB/s of a matrix times one token: 2-bit g64 ") for line in lines)
    assert any(line.startswith("a launch ") and " a launch and a wait " in line for line in lines)
    assert [line.split(",")[:2] for line in lines[-3:]] == [
        ["  recurrent layer: 14 launches", " 1 waits"],
        ["  attention layer: 14 launches", " 1 waits"],
        ["  60 layers: 843 launches", " 61 waits"],
    ]
    assert max(map(len, lines)) <= 120


@pytest.mark.usefixtures("quickly")
def test_the_command_says_what_fails(machine: Machine) -> None:
    machine.change("combine", "float total = 0.0f", "float total = 0.5f")
    done = CliRunner().invoke(app, ["selftest", "--json"])
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["refused"].keys() == {"combine"}
    assert (found["passed"], found["shared"]) == (False, True)
    assert found["speed"]["layers"]["attention"]["launches"] == 14
    machine.change("steps", "/ float(shape.width)", "/ float(shape.width + 1)")
    done = CliRunner().invoke(app, ["selftest"])
    assert done.exit_code == 1
    assert done.stdout.splitlines()[0].endswith(f"self-test of Metal: 1 of {len(selftest.names(*FEW))} kernels FAIL")
    assert done.stdout.splitlines()[2].startswith("FAILS  add_norm: step: norm of 8: error ")
    assert "Qwen" not in done.stdout  # no layer without steps


def test_without_metal_the_command_ends_with_one_line() -> None:
    for options in ((), ("--json",), ("--device", "cpu"), ("--device", "cuda")):
        done = command("selftest", *options)
        assert (done.returncode, done.stdout) == (7, "")
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"flashpack: device '{options[1] if len(options) > 1 else 'mps'}'")


def test_a_token_launches_what_the_documentation_says(
    machine: Machine, pack_of: PackOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each layer with all experts in memory, as the self-test's layers do; and where some had to be read."""
    gpu = Watched(FakeMps(guarded=False))
    monkeypatch.setattr(selftest, "tested_kernels", lambda _: kernels_module.MetalKernels(gpu))
    model: Any = flashpack.load(pack_of("trained"), device="mps")
    stats, real, counted = model.flashpack.store.stats, LeanLayer.__call__, list[tuple[bool, int]]()

    def call(layer: LeanLayer, token: Any) -> None:
        misses, launches, waits = stats.total().misses, gpu.launches, gpu.waits
        real(layer, token)
        assert gpu.waits - waits == 1
        counted.append((stats.total().misses > misses, gpu.launches - launches))

    monkeypatch.setattr(LeanLayer, "__call__", call)
    with torch.inference_mode():
        cache = model(torch.tensor([PROMPT]), use_cache=True).past_key_values
        for token in (3, 4, 4, 4, 4, 4):
            launches, waits = gpu.launches, gpu.waits
            model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    (layer,) = {launches for read, launches in counted if not read}
    assert {launches for read, launches in counted if read} <= {layer, *range(layer + 3, layer + 12, 2)}
    assert (gpu.launches - launches, gpu.waits - waits) == (6 * layer + 3, 6)
    small = speed.measure(FakeMps(guarded=False), (), SMALL, 2**12, 1)
    assert {kind: x.launches for kind, x in small.layers.items()} == {"recurrent": layer, "attention": layer}
    assert small.token is not None
    text = " ".join((ROOT / "docs" / "metal.md").read_text().split())
    assert f"{layer} launches" in text
    assert f"60 x {layer} + 3 = {small.token.launches} launches and 60 + 1 = {small.token.waits} waits" in text


def test_each_part_is_waited_for_while_it_is_timed(
    machine: Machine, pack_of: PackOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches run as late as they may; none is left when a part's time ends, or that of experts of a batch."""
    gpu = FakeMps(lazy=True, guarded=False)
    monkeypatch.setattr(selftest, "tested_kernels", lambda _: kernels_module.MetalKernels(gpu))
    pack, times, left = pack_of("trained", "q4", "q4"), list[int](), list[int]()

    def look() -> float:
        times.append(len(gpu._queue))
        return time.perf_counter()

    def looking(compute: Any) -> Any:
        def call(*args: Any) -> None:
            compute(*args)
            left.append(len(gpu._queue))

        return call

    with gpu.watched():
        plain, _ = run(pack)
        model: Any = flashpack.load(pack, device="mps")
        timed = Timing(model)
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=look))
        for layer in model.flashpack.decoder.layers:
            layer.block.compute, layer.block.at_once = looking(layer.block.compute), looking(layer.block.at_once)
        result = generate(model, load_tokenizer(pack), PROMPT, 4, timing=timed)
    assert result.text == plain.text
    assert result.split is not None
    assert result.split.waited
    assert len(times) == 3 * 6 * 3 * 2  # a beginning and an end, of three parts of a layer, for three tokens
    assert set(times[1::2]) == {0}
    assert set(left) == {0}
