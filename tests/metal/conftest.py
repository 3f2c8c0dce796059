"""GPUs of the emulator for tests of Metal kernels and of what drives them."""

from __future__ import annotations

import pytest

from tests.metal.emulator import FakeMps


@pytest.fixture(params=["forward", "reversed", "random"])
def gpu(request: pytest.FixtureRequest) -> FakeMps:
    """One in each of three schedules: what depends on the order of threads differs between them."""
    return FakeMps(schedule=request.param, seed=1)


@pytest.fixture
def quick_gpu() -> FakeMps:
    return FakeMps()
