"""Fixtures of the converter's tests: a conversion that was stopped in the middle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flashpack
from flashpack.converter import units
from tests.conftest import TRAINED


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``interrupted(source=, record=, **options)``: the folder of a conversion that Ctrl-C stopped before a record.

    Of the bundled model, 100 leaves four files finished: the dense file and layers 0 to 2, each of 32 experts.
    """

    def make(source: Path = TRAINED, record: int = 100, **options: Any) -> Path:
        out, left, real = tmp_path / "out", record, units.ShardWriter.write

        def write(writer: units.ShardWriter, expert: int, data: memoryview) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            real(writer, expert, data)

        with monkeypatch.context() as patch:
            patch.setattr(units.ShardWriter, "write", write)
            with pytest.raises(KeyboardInterrupt):
                flashpack.convert(source, out, workers=1, **options)
        return out

    return make
