"""The project's Metal source keeps to the rules of Metal and to its limits."""

from __future__ import annotations

import pytest

from flashpack.kernels.metal.source import PARTS, source
from tests.metal.emulator import FakeMps, build
from tests.metal.emulator.library import MOST_THREADGROUP_BYTES
from tests.metal.emulator.source import kernels
from tests.metal.lint import lint


def test_the_lint_finds_nothing() -> None:
    assert lint(source()) == []


@pytest.mark.parametrize("part", PARTS)
def test_every_kernel_has_room_for_its_threadgroup_memory(quick_gpu: FakeMps, part: str) -> None:
    library = quick_gpu.compile(source(part))
    assert dir(library)
    for name in dir(library):
        assert getattr(library, name).static_thread_group_memory_length <= MOST_THREADGROUP_BYTES, name


def test_kernels_have_names_of_their_own() -> None:
    names = [k.name for part in PARTS for k in kernels(build.preprocess(source(part)))]
    assert len(names) == len(set(names))
    assert sorted(names) == sorted(k.name for k in kernels(build.preprocess(source())))
