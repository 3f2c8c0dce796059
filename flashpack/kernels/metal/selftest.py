"""Whether this machine's Metal computes what the kernels say: each is compiled, looked at and compared.

A kernel that fails is refused, and torch's operations take its place. The answer for a source, a torch, a system and a
GPU is kept in the user's cache folder, so that only the first run waits for it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashpack import user_cache
from flashpack.kernels.interface import Kernels
from flashpack.kernels.metal import device
from flashpack.kernels.metal.cases import cases
from flashpack.kernels.metal.cases.case import Case
from flashpack.kernels.metal.cases.samples import Samples
from flashpack.kernels.metal.device import Gpu
from flashpack.kernels.metal.kernels import MetalKernels
from flashpack.kernels.metal.source import FORMATS, PARTS, PRODUCTS, source
from flashpack.kernels.metal.steps import KERNELS
from flashpack.kernels.metal.watch import Unshared, Watched
from flashpack.version import __version__

SIMD_WIDTH = 32
"""Threads of a SIMD group, as kernels have it."""

MEMORY = "the processor's view of the GPU's memory"
INSTEAD = "torch's operations in place of refused kernels"

_UNFINISHED = "a self-test did not come to its end; `flashpack selftest` tries again"


@dataclass
class Report:
    """What the self-test found.

    ``errors``: of each kernel that ran, the largest one, relative. ``refused``: kernels that are not used, and why.
    ``common``: what kernels have in common, and what is wrong with it; None for nothing. ``shared``: whether the
    processor may use the GPU's memory.
    """

    machine: dict[str, str]
    shared: bool = True
    errors: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    common: dict[str, str | None] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.refused and not self.wrong

    @property
    def wrong(self) -> list[str]:
        """What is wrong with what kernels have in common."""
        return [f"{what}: {why}" for what, why in self.common.items() if why]

    def to_json(self) -> dict[str, Any]:
        errors = {name: error if math.isfinite(error) else None for name, error in self.errors.items()}
        return asdict(self) | {"passed": self.passed, "errors": errors}


def examine(gpu: Gpu) -> Report:
    """Compile all kernels on ``gpu`` and compare what they compute."""
    memory = _memory(gpu)
    report = Report(machine(), memory is None, common={MEMORY: memory})
    watched = Watched(gpu if report.shared else Unshared(gpu))
    there = set[str]()
    for part in PARTS:
        there |= _compile(part, watched, report)
    kernels = MetalKernels(watched, frozenset(report.refused))
    for case in cases(kernels):
        watched.launched = set()
        error, wrong = _try(case, kernels)
        if not case.alone:
            if watched.launched and watched.launched.isdisjoint(report.refused):
                report.common[case.name] = wrong
        elif wrong and not watched.launched:
            report.common[case.name] = wrong
        for name in watched.launched if case.alone else ():
            report.errors[name] = max(error, report.errors.get(name, 0.0))
            if wrong:
                report.refused.setdefault(name, f"{case.name}: {wrong}")
    if not report.refused:  # else some are not run because others are not used
        report.refused = dict.fromkeys(there - report.errors.keys(), "the self-test does not run it")
    for name, (width, most, group) in watched.limits().items():
        if width != SIMD_WIDTH or most < group:
            report.refused[name] = f"SIMD groups of {width} threads, {most} threads in a group; not 32 and {group}"
    if report.refused:
        report.common[INSTEAD] = _instead(MetalKernels(watched, frozenset(report.refused)))
    return report


def _compile(part: str, watched: Watched, report: Report) -> set[str]:
    """The kernels of a part; none, and all refused, if it is not compiled."""
    try:
        library = watched.compile(source(part))
    except (SyntaxError, RuntimeError) as e:
        wrong = "does not compile: " + " | ".join(str(e).strip().splitlines()[:3])
        report.refused |= dict.fromkeys(names(part), wrong)
        return set()
    return set(dir(library))


def names(*parts: str) -> set[str]:
    """The kernels of some of ``PARTS``, all without any, whether they compile or not."""
    others = {"combine": {"combine"}, "steps": set(KERNELS)}
    found = [{f"{name}_{part}" for name in PRODUCTS} if part in FORMATS else others[part] for part in parts or PARTS]
    return set().union(*found)


def _try(case: Case, kernels: Kernels) -> tuple[float, str | None]:
    """The error, and what is wrong."""
    try:
        error = max(_error(found, expected) for found, expected in case.run(kernels))
    except Exception as e:  # whatever torch and Metal come up with
        return math.inf, _line(e)
    return error, None if error <= case.tolerance else f"error {error:.1e}, more than {case.tolerance:.0e}"


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value expected; infinite where there is a NaN."""
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else math.inf
    error = float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
    return math.inf if math.isnan(error) else error


def _instead(kernels: MetalKernels) -> str | None:
    """What is wrong with the results where kernels are refused."""
    tried = ((case.name, _try(case, kernels)[1]) for case in cases(kernels) if case.alone)
    return next((f"{name}: {wrong}" for name, wrong in tried if wrong), None)


def _memory(gpu: Gpu) -> str | None:
    """What is wrong with the processor's view of the GPU's memory; nothing where there is none."""
    try:
        whole = torch.zeros(2**16 + 64, dtype=torch.uint8, device=gpu.device)
        part = whole[64:]
        gpu.wait()
        host = gpu.host(part)
        for seed in range(3 if host is not None else 0):
            assert host is not None
            numbers = Samples(seed).integers(0, 255, part.shape, torch.uint8)
            host.numpy()[:] = numbers.numpy()
            if not torch.equal(part.cpu(), numbers):
                return "what the processor wrote is not what the GPU read"
            part.add_(1)
            gpu.wait()
            if (host.numpy() != numbers.numpy() + 1).any():
                return "what the GPU wrote is not what the processor read"
    except Exception as e:  # a name of torch that is not public
        return _line(e)
    return None


def _line(error: Exception) -> str:
    return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])


def machine() -> dict[str, str]:
    """What an answer depends on, and what else a report should say."""
    system = platform.mac_ver()[0]
    return {
        "flashpack": __version__,
        "source": hashlib.sha256(source().encode()).hexdigest()[:16],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"macOS {system}" if system else f"{platform.system()} {platform.release()}",
        "chip": _chip(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "fast math": os.environ.get("PYTORCH_MPS_FAST_MATH", "0"),
    }


def _chip() -> str:
    if platform.system() != "Darwin":
        return platform.machine()
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or platform.machine()


def remember(gpu: Gpu) -> Report:
    """``examine``, whose answer is kept for ``tested_kernels``."""
    # Should Metal end the process, it must not end the next one, too.
    user_cache.write(_name(), _answer(False, names(), [_UNFINISHED]))
    try:
        report = examine(gpu)
    except BaseException:
        user_cache.remove(_name())
        raise
    user_cache.write(_name(), _answer(report.shared, report.refused, report.wrong))
    return report


def tested_kernels(reference: bool) -> MetalKernels:
    """Kernels of this machine's GPU, but for those that fail the self-test: it runs where its answer is not known. With
    ``reference``, torch's operations alone."""
    gpu: Gpu = device.Mps()
    if reference:
        return MetalKernels(gpu, frozenset(names()))
    found = _recall()
    if found is None:
        report = remember(gpu)
        found = report.shared, list(report.refused), report.wrong
    shared, refused, wrong = found
    kernels = MetalKernels(gpu if shared else Unshared(gpu), frozenset(refused))
    if refused:
        some = ", ".join(sorted(refused)[:4]) + (" and others" if len(refused) > 4 else "")
        kernels.notice(f"Metal kernels that failed the self-test, so that torch computes, more slowly: {some}")
    for line in wrong:
        kernels.notice(f"Metal self-test: {line}")
    return kernels


def known() -> bool:
    """Whether ``tested_kernels`` has an answer already."""
    return _recall() is not None


def answer() -> list[str] | None:
    """What the answer that is kept says is wrong; empty if nothing is, None if there is no answer."""
    found = _recall()
    return None if found is None else [*(f"{name} is refused" for name in found[1]), *found[2]]


def _name() -> str:
    """The answer's file: another one for another source, torch, system or chip."""
    return f"metal/{hashlib.sha256(json.dumps(machine()).encode()).hexdigest()[:32]}.json"


def _answer(shared: bool, refused: Iterable[str], wrong: list[str]) -> str:
    return json.dumps({"shared": shared, "refused": sorted(refused), "wrong": wrong})


def _recall() -> tuple[bool, list[str], list[str]] | None:
    """What ``remember`` wrote; None if there is nothing sound."""
    try:
        data = json.loads((user_cache.folder() / _name()).read_bytes())
        shared, refused, wrong = bool(data["shared"]), list(data["refused"]), list(data["wrong"])
    except (OSError, RuntimeError, ValueError, LookupError, TypeError):
        return None
    return (shared, refused, wrong) if all(isinstance(text, str) for text in (*refused, *wrong)) else None
