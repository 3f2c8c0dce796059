"""Calibrated rounding, through whole conversions."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import flashpack
from flashpack.cli import app
from flashpack.converter import Options, against, plan
from flashpack.converter.calibrated import LayerCalibration
from flashpack.converter.convert import bound
from flashpack.converter.forecast import forecast
from flashpack.converter.options import encoding_of
from flashpack.errors import SourceError, UnsupportedError
from flashpack.formats import Pack
from flashpack.formats.constants import QUALITY, QUALITY_PAGE
from tests.conftest import CHECKPOINTS, ROOT, TRAINED, contents
from tests.http_server import serve

SMALL = CHECKPOINTS / "qwen3_moe"
PACKED = CHECKPOINTS / "qwen3_moe-mlx4"
"""The same in integers of 4 bits, in groups of 32."""

Interrupted = Callable[..., Path]


def test_calibrated_packs_are_the_same_for_any_workers_and_after_a_stop(
    tmp_path: Path, calib: Path, interrupted: Interrupted
) -> None:
    options: dict[str, Any] = {"quality": "max", "calib": calib, "bpw": 3.0}
    flashpack.convert(SMALL, tmp_path / "whole", workers=3, **options)
    interrupted(SMALL, 5, **options)
    flashpack.convert(SMALL, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert flashpack.verify(tmp_path / "whole") == []
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        flashpack.convert(SMALL, tmp_path / "elsewhere", executor=pool, **options)
    assert contents(tmp_path / "elsewhere") == contents(tmp_path / "whole")


def test_calibration_changes_experts_that_were_seen_and_no_others(tmp_path: Path, calib: Path) -> None:
    plain = flashpack.convert(SMALL, tmp_path / "plain", "q2")
    fitted = flashpack.convert(SMALL, tmp_path / "fitted", "q2", quality="high", calib=calib)
    assert plain.uncalibrated is None
    assert fitted.uncalibrated == 3  # the last of each layer
    packs = [Pack(tmp_path / name) for name in ("plain", "fitted")]
    for layer in packs[0].manifest.layers:
        records = []
        for pack in packs:
            data = (pack.folder / layer.path).read_bytes()
            with pack.open_shard(layer) as shard:
                extents = [shard.extent(e) for e in range(layer.experts)]
            records.append([data[offset : offset + size] for offset, size in extents])
        same = [a == b for a, b in zip(*records, strict=True)]
        assert same == [False] * (layer.experts - 1) + [True]
    for row in json.loads((tmp_path / "fitted" / QUALITY).read_bytes())["layers"]:
        assert min(row["tokens"][:-1]) > 20
        assert row["tokens"][-1] == 3
        for matrices in row["projections"].values():
            assert [error is None for error in matrices["weighted"]] == same
    assert packs[1].manifest.recipe["calibration"] != ""
    assert packs[1].manifest.recipe["quantizer"] == "gptq"


def test_a_calibrated_pack_cannot_be_made_again_for_comparison(tmp_path: Path, calib: Path) -> None:
    flashpack.convert(SMALL, tmp_path / "out", "q2", quality="high", calib=calib)
    with pytest.raises(UnsupportedError, match="'gptq' does not give the same bytes again"):
        against(tmp_path / "out", SMALL)


def test_another_models_calibration_is_refused(tmp_path: Path, calib: Path) -> None:
    with pytest.raises(SourceError, match=r"small\.calib: of a .* layers of experts, not of this "):
        flashpack.convert(TRAINED, tmp_path / "out", quality="high", calib=calib)
    assert not (tmp_path / "out").exists()


def test_no_more_experts_are_calibrated_at_once_than_memory_holds(
    tmp_path: Path, calib: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for one, for two, and for all that work side by side; the pack is the same."""
    real, lock = LayerCalibration.encode, threading.Lock()
    inside, most = 0, [0]

    def encode(*arguments: Any) -> Any:
        nonlocal inside
        with lock:
            inside += 1
            most[-1] = max(most[-1], inside)
        time.sleep(0.02)
        try:
            return real(*arguments)
        finally:
            with lock:
                inside -= 1

    monkeypatch.setattr(LayerCalibration, "encode", encode)
    each = plan(SMALL, Options(quality="high", calib=str(calib))).calibrated_at_once()[1]
    for i, size in enumerate((1, 2 * each, 100 * each)):
        flashpack.convert(SMALL, tmp_path / str(i), quality="high", calib=calib, workers=2, calib_memory=size)
        most.append(0)
    assert most[0] == 1
    assert most[1] == 2
    assert most[2] > 2
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "2")


def test_an_expert_takes_no_more_than_is_promised() -> None:
    """Measured in a process of its own, in which nothing else grows."""
    command = [sys.executable, "-c", CALIBRATED]
    taken, promised = map(int, subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.split())
    assert promised / 4 < taken <= promised


CALIBRATED = """
import numpy as np
from flashpack.converter.calibrated import LayerCalibration, expert_bytes
from flashpack.formats.calibration import LayerTokens
from flashpack.formats.records import affine_dq
from flashpack.kernels.activations import named
from flashpack.runtime.memory import usage
import threading, time
shapes = {"gate": (512, 1024), "up": (512, 1024), "down": (1024, 512)}
rng = np.random.default_rng(0)
bits = rng.integers(0x3F00, 0x3FFF, (2048, 1024), np.uint16) | rng.integers(0, 2, (2048, 1024), np.uint16) << 15
choice = np.tile(np.arange(4, dtype=np.int32), (2048, 1))
tokens = LayerTokens(bits, choice, np.full((2048, 4), 0.25, np.float32), np.ones((2048, 1), np.float32))
layer = LayerCalibration(tokens, named("silu", True), False)
before, peak, done = usage().anonymous, [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], usage().anonymous)
thread = threading.Thread(target=watch)
thread.start()
values = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
for expert in range(4):
    layer.encode(expert, dict.fromkeys(shapes, affine_dq(2)), values, {})
done.set()
thread.join()
print(peak[0] - before, expert_bytes(shapes))
"""


def test_a_source_that_is_far_away_gives_the_same_pack(tmp_path: Path, calib: Path) -> None:
    """Experts that saw too few tokens are read a second time."""
    options: dict[str, Any] = {"quality": "high", "calib": calib, "bpw": 3}
    flashpack.convert(SMALL, tmp_path / "near", **options)
    site, server = serve(SMALL)
    try:
        flashpack.convert(site.url, tmp_path / "far", **options)
    finally:
        server.shutdown()
        server.server_close()
    assert contents(tmp_path / "far") == contents(tmp_path / "near")


def test_matrices_that_are_exact_are_not_calibrated(tmp_path: Path, calib: Path) -> None:
    """down is the source's, gate and up are not; the report says so."""
    report = flashpack.convert(
        PACKED, tmp_path / "out", "gate_up=q2,down=q4", quality="high", calib=calib, group_size=32
    )
    with Pack(tmp_path / "out").open_shard(Pack(tmp_path / "out").manifest.layers[0]) as shard:
        assert shard.kind(0).projections[2].encoding == encoding_of("q4", 32)
    for row in json.loads((tmp_path / "out" / QUALITY).read_bytes())["layers"]:
        assert row["projections"]["down"]["error"] == row["projections"]["down"]["weighted"] == [None] * 8
        assert None not in row["projections"]["up"]["weighted"][:-1]
    assert report.uncalibrated == 3


def test_nothing_is_calibrated_where_all_is_exact(tmp_path: Path, calib: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerCalibration, "encode", None)
    report = flashpack.convert(PACKED, tmp_path / "out", "source", "source", quality="high", calib=calib)
    assert report.uncalibrated == 0
    assert report.errors == []


@pytest.mark.parametrize(("experts", "memory"), [(8, 10**9), (2, 2), (1, 0)])
def test_a_plan_counts_the_memory_of_experts_that_are_calibrated(
    tmp_path: Path, calib: Path, experts: int, memory: int
) -> None:
    """Two workers work at four experts each, where memory holds so many."""
    each = plan(SMALL, Options(quality="high", calib=str(calib))).calibrated_at_once()[1]
    plain, fitted = (
        forecast(bound(SMALL), options, tmp_path, overwrite=False, workers=2, remote=False).working_bytes
        for options in (Options(), Options(quality="high", calib=str(calib), calib_memory=memory * each))
    )
    assert fitted - plain == experts * each


def test_what_the_commands_tell(tmp_path: Path, calib: Path) -> None:
    out = tmp_path / "out"
    options = ["--experts", "q2", "--quality", "high", "--calib", str(calib)]
    done = CliRunner().invoke(app, ["convert", str(SMALL), str(out), *options])
    assert "experts are calibrated, but for 3 that saw too few tokens; the quality report" in done.stdout
    told = CliRunner().invoke(app, ["inspect", str(out)]).stdout
    assert len(re.findall("mean error .* %, largest .* %; of what it gives .* %", told)) == 3
    page = (out / QUALITY_PAGE).read_text()
    assert '<th class="n">output error</th><th class="n">calibration tokens</th>' in page
    assert re.search(r'<td class="n">[\d.]+ %</td><td class="n">[\d.]+ %</td><td class="n">\d+</td>', page)
