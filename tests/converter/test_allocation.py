"""A width for each expert, and calibrated rounding, through whole conversions."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashpack
from flashpack.converter import Options, against, allocation, plan, units
from flashpack.converter.convert import bound
from flashpack.errors import OutputError, SourceError, UnsupportedError, UsageError
from flashpack.formats import Pack
from flashpack.formats.calibration import CalibrationWriter
from flashpack.formats.constants import ALLOCATION
from flashpack.formats.dtypes import from_float32
from tests.conftest import CHECKPOINTS, TRAINED, contents

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
            arrays = from_float32(inputs, "BF16"), experts.astype(np.int32), weights
            writer.write(site.layer, 0, *arrays, np.ones((256, 1), dtype=np.float32))
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


def stop_after(monkeypatch: pytest.MonkeyPatch, records: int, *arguments: Any, **options: Any) -> None:
    """A conversion that Ctrl-C stops before the given record."""
    real, left = units.ShardWriter.write, records

    def write(writer: units.ShardWriter, expert: int, data: memoryview) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        real(writer, expert, data)

    with monkeypatch.context() as patch:
        patch.setattr(units.ShardWriter, "write", write)
        with pytest.raises(KeyboardInterrupt):
            flashpack.convert(*arguments, workers=1, **options)


def test_a_conversion_continues_with_the_widths_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flashpack.convert(TRAINED, tmp_path / "whole", bpw=2.8, workers=3)
    stop_after(monkeypatch, 100, TRAINED, tmp_path / "out", bpw=2.8)
    with monkeypatch.context() as patch:
        patch.setattr(allocation, "_measure", None)  # nothing is measured again
        report = flashpack.convert(TRAINED, tmp_path / "out", bpw=2.8)
    assert report.resumed_files > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_bits_are_another_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 100, TRAINED, tmp_path / "out", bpw=2.8)
    with pytest.raises(OutputError, match=r"an unfinished conversion differs.*bpw"):
        flashpack.convert(TRAINED, tmp_path / "out", bpw=2.9)


def test_widths_that_were_damaged_meanwhile_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flashpack.convert(TRAINED, tmp_path / "whole", bpw=2.8)
    stop_after(monkeypatch, 100, TRAINED, tmp_path / "out", bpw=2.8)
    (tmp_path / "out" / ALLOCATION).write_bytes(b'{"0000": ["dq2"]}')
    flashpack.convert(TRAINED, tmp_path / "out", bpw=2.8)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_calibrated_packs_are_the_same_for_any_workers_and_after_a_stop(
    tmp_path: Path, calib: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"quality": "max", "calib": calib, "bpw": 3.0}
    flashpack.convert(SMALL, tmp_path / "whole", workers=3, **options)
    stop_after(monkeypatch, 5, SMALL, tmp_path / "out", **options)
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
