"""Fixtures of the converter's tests: a conversion that was stopped in the middle, and a calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashpack
from flashpack.converter import units
from flashpack.converter.convert import bound
from flashpack.formats.calibration import CalibrationWriter
from flashpack.formats.dtypes import from_float32
from tests.conftest import CHECKPOINTS, TRAINED


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


@pytest.fixture(scope="session")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration of the checkpoint qwen3_moe: 256 tokens with 2 experts each, of which 3 chose the last expert."""
    path = tmp_path_factory.mktemp("calib") / "small.calib"
    source = bound(CHECKPOINTS / "qwen3_moe")
    sites = source.sites
    generator = np.random.default_rng(0)
    layers = {site.layer: (site.projections()["up"][1], 2) for site in sites}
    architecture = type(source.model).__name__
    source.checkpoint.folder.close()
    with CalibrationWriter(path, architecture, layers, 256, {}) as writer:
        for site in sites:
            experts = np.stack([generator.permutation(site.num_experts - 1)[:2] for _ in range(256)])
            experts[:3, 0] = site.num_experts - 1
            inputs = generator.standard_normal((256, layers[site.layer][0])).astype(np.float32)
            weights = generator.uniform(0.2, 0.8, (256, 2)).astype(np.float32)
            arrays = {"inputs": from_float32(inputs, "BF16"), "experts": experts.astype(np.int32), "weights": weights}
            writer.write(0, site.layer, arrays | {"residual": np.ones((256, 1), dtype=np.float32)})
        writer.finish()
    return path
