"""A width for each expert, and calibrated rounding, through whole conversions."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flashpack
from flashpack.converter import Options, against, allocation, plan
from flashpack.converter.calibrated import LayerCalibration
from flashpack.converter.convert import bound
from flashpack.errors import OutputError, SourceError, UnsupportedError, UsageError
from flashpack.formats import Pack
from flashpack.formats.calibration import CalibrationWriter
from flashpack.formats.constants import ALLOCATION
from flashpack.formats.dtypes import from_float32
from tests.conftest import CHECKPOINTS, ROOT, TRAINED, contents
from tests.server import serve

SMALL = CHECKPOINTS / "qwen3_moe"


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration of ``SMALL``: 256 tokens with 2 experts each, the last expert of each layer chosen by none."""
    path = tmp_path_factory.mktemp("calib") / "small.calib"
    source = bound(SMALL)
    sites = source.sites
    generator = np.random.default_rng(0)
    layers = {site.layer: (site.projections()["up"][1], 2) for site in sites}
    architecture = type(source.model).__name__
    source.checkpoint.folder.close()
    with CalibrationWriter(path, architecture, layers, 256, {}) as writer:
        for site in sites:
            experts = np.stack([generator.permutation(site.num_experts - 1)[:2] for _ in range(256)])
            inputs = generator.standard_normal((256, layers[site.layer][0])).astype(np.float32)
            weights = generator.uniform(0.2, 0.8, (256, 2)).astype(np.float32)
            arrays = {"inputs": from_float32(inputs, "BF16"), "experts": experts.astype(np.int32), "weights": weights}
            writer.write(0, site.layer, arrays | {"residual": np.ones((256, 1), dtype=np.float32)})
        writer.finish()
    return path


def widths(pack: Path) -> dict[int, list[tuple[str, ...]]]:
    """Layer -> the encodings of each expert's matrices, as the pack has them."""
    opened = Pack(pack)
    found = {}
    for layer in opened.manifest.layers:
        with opened.open_shard(layer) as shard:
            found[layer.index] = [
                tuple(str(p.encoding) for p in shard.kind(e).projections) for e in range(layer.experts)
            ]
    return found


def test_bits_stay_within_what_was_asked_for_and_near_it(tmp_path: Path) -> None:
    report = flashpack.convert(TRAINED, tmp_path / "out", bpw=2.8)
    assert 2.78 < report.expert_bits <= 2.8
    assert flashpack.verify(tmp_path / "out") == []
    found = widths(tmp_path / "out")
    assert len({kind for kinds in found.values() for kind in kinds}) > 2
    told = json.loads((tmp_path / "out" / ALLOCATION).read_text())
    assert {int(layer): len(experts) for layer, experts in told.items()} == dict.fromkeys(found, 32)
    assert {bits for e in told["0000"] for bits in e.split(" ")} <= {"dq2", "dq3", "dq4"}


def test_a_plan_knows_the_size_before_anything_is_read(tmp_path: Path) -> None:
    work = plan(TRAINED, Options(bpw="2.8"))
    promised = sum(size for path, size in work.file_sizes().items() if path.startswith("experts/"))
    report = flashpack.convert(TRAINED, tmp_path / "out", bpw="2.8")
    assert abs(report.expert_bytes / promised - 1) < 0.05  # records are whole pages


@pytest.mark.parametrize("bpw", ["2.43", "4.5", "16"])
def test_bits_that_no_widths_give_are_refused(tmp_path: Path, bpw: str) -> None:
    with pytest.raises(UsageError, match=rf"--bpw {bpw}: the widths of this model's experts give 2\.438 to 4\.438"):
        flashpack.convert(TRAINED, tmp_path / "out", bpw=bpw)
    assert not (tmp_path / "out").exists()


Interrupted = Callable[..., Path]


def test_a_conversion_continues_with_the_widths_it_began_with(
    tmp_path: Path, interrupted: Interrupted, monkeypatch: pytest.MonkeyPatch
) -> None:
    flashpack.convert(TRAINED, tmp_path / "whole", bpw=2.8, workers=3)
    interrupted(bpw=2.8)
    with monkeypatch.context() as patch:
        patch.setattr(allocation, "_measure", None)  # nothing is measured again
        report = flashpack.convert(TRAINED, tmp_path / "out", bpw=2.8)
    assert report.resumed_files > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_bits_are_another_conversion(tmp_path: Path, interrupted: Interrupted) -> None:
    interrupted(bpw=2.8)
    with pytest.raises(OutputError, match=r"an unfinished conversion differs.*bpw"):
        flashpack.convert(TRAINED, tmp_path / "out", bpw=2.9)


def test_widths_that_were_damaged_meanwhile_are_measured_again(tmp_path: Path, interrupted: Interrupted) -> None:
    flashpack.convert(TRAINED, tmp_path / "whole", bpw=2.8)
    interrupted(bpw=2.8)
    (tmp_path / "out" / ALLOCATION).write_bytes(b'{"0000": ["dq2"]}')
    flashpack.convert(TRAINED, tmp_path / "out", bpw=2.8)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


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
    flashpack.convert(SMALL, tmp_path / "plain", "q2")
    flashpack.convert(SMALL, tmp_path / "fitted", "q2", quality="high", calib=calib)
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
    assert packs[1].manifest.recipe["calibration"] != ""
    assert packs[1].manifest.recipe["quantizer"] == "gptq"


def test_a_calibrated_pack_cannot_be_made_again_for_comparison(tmp_path: Path, calib: Path) -> None:
    flashpack.convert(SMALL, tmp_path / "out", "q2", quality="high", calib=calib)
    with pytest.raises(UnsupportedError, match="'gptq' does not give the same bytes again"):
        against(tmp_path / "out", SMALL)


def test_a_pack_of_chosen_widths_cannot_be_made_again_for_comparison(tmp_path: Path) -> None:
    flashpack.convert(SMALL, tmp_path / "out", bpw=3)
    with pytest.raises(UnsupportedError, match="the widths of its experts were chosen one by one"):
        against(tmp_path / "out", SMALL)


def test_another_models_calibration_is_refused(tmp_path: Path, calib: Path) -> None:
    with pytest.raises(SourceError, match=r"small\.calib: of a .* layers of experts, not of this "):
        flashpack.convert(TRAINED, tmp_path / "out", quality="high", calib=calib)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are not read before it is clear that the conversion can go on: that takes hours."""

    def measured(*arguments: object) -> None:
        raise AssertionError("experts were measured")

    monkeypatch.setattr(allocation, "_measure", measured)


@pytest.mark.usefixtures("nothing_measured")
def test_a_finished_pack_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    flashpack.convert(SMALL, tmp_path / "out")
    with pytest.raises(OutputError, match="holds a finished pack; use --overwrite"):
        flashpack.convert(SMALL, tmp_path / "out", bpw=3)


@pytest.mark.usefixtures("nothing_measured")
def test_a_full_disk_is_refused_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"GB needed, 0\.00 GB free"):
        flashpack.convert(SMALL, tmp_path / "out", bpw=3)


@pytest.mark.usefixtures("nothing_measured")
def test_another_unfinished_conversion_is_refused_before_anything_is_measured(interrupted: Interrupted) -> None:
    out = interrupted(SMALL, 5)
    with pytest.raises(OutputError, match=r"an unfinished conversion differs from this one: .*bpw"):
        flashpack.convert(SMALL, out, bpw=3)


def test_a_pack_of_several_widths_runs_as_the_reference_in_any_memory(tmp_path: Path) -> None:
    flashpack.convert(TRAINED, tmp_path / "out", bpw=2.8)
    ids = torch.randint(0, 4096, (1, 40), generator=torch.Generator().manual_seed(1))
    found = []
    for options in ({}, {"memory": "smallest"}, {"reference": True}):
        model: Any = flashpack.load(tmp_path / "out", **options)
        assert len(model.flashpack.budget.slots) > 1  # records of more than one size
        with torch.inference_mode():
            found.append(model(ids).logits)
    assert torch.equal(found[0], found[1])
    # Of most tokens: where two experts are almost equal for a router, rounding decides.
    assert (found[0] - found[2]).abs().amax(-1).median() < 3e-2


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
from flashpack.formats.records import Projection, RecordKind, affine_dq
from flashpack.kernels.activations import named
from flashpack.runtime.memory import usage
import threading, time
shapes = {"gate": (512, 1024), "up": (512, 1024), "down": (1024, 512)}
rng = np.random.default_rng(0)
bits = rng.integers(0x3F00, 0x3FFF, (2048, 1024), np.uint16) | rng.integers(0, 2, (2048, 1024), np.uint16) << 15
choice = np.tile(np.arange(4, dtype=np.int32), (2048, 1))
tokens = LayerTokens(bits, choice, np.full((2048, 4), 0.25, np.float32), np.ones((2048, 1), np.float32))
layer = LayerCalibration(tokens, named("silu", True), False)
kind = RecordKind(tuple(Projection(n, s, affine_dq(2)) for n, s in shapes.items()))
before, peak, done = usage().anonymous, [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], usage().anonymous)
thread = threading.Thread(target=watch)
thread.start()
layer.encode(0, kind, {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}, {})
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
