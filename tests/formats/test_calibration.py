"""Calibration files: what is written is read, and what is damaged or another model's is refused."""

from __future__ import annotations

import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from flashpack.errors import FormatError, OutputError, SourceError
from flashpack.formats.calibration import PARTS, Calibration, CalibrationWriter, open_calibration

LAYERS = {1: (64, 2), 3: (96, 4)}
"""Number -> width of the inputs and experts per token."""
TOKENS = 7


def arrays(layer: int) -> dict[str, np.ndarray]:
    hidden, top_k = LAYERS[layer]
    generator = np.random.default_rng(layer)
    return {
        "inputs": generator.integers(0, 1 << 16, (TOKENS, hidden), dtype=np.uint16),
        "experts": generator.integers(0, 8, (TOKENS, top_k), dtype=np.int32),
        "weights": generator.random((TOKENS, top_k), dtype=np.float32),
        "residual": generator.random((TOKENS, 1), dtype=np.float32),
    }


def write(path: Path, pieces: tuple[int, ...] = (0, TOKENS)) -> str:
    with CalibrationWriter(path, "ToyMoe", LAYERS, TOKENS, {"pack": "abc"}) as writer:
        for first, end in pairwise(pieces):
            for layer in LAYERS:
                writer.write(first, layer, {part: a[first:end] for part, a in arrays(layer).items()})
        return writer.finish()


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.calib"
    digest = write(path)
    opened = Calibration(path)
    assert (opened.digest, opened.layers, opened.tokens) == (digest, [1, 3], TOKENS)
    assert opened.metadata["pack"] == "abc"
    layers = {n: opened.layer(n) for n in LAYERS}
    opened.close()
    for n, layer in layers.items():
        for part, expected in arrays(n).items():
            np.testing.assert_array_equal(getattr(layer, part), expected)


def test_pieces_do_not_change_the_file(tmp_path: Path) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert write(whole) == write(pieces, (0, 2, 3, TOKENS))
    assert whole.read_bytes() == pieces.read_bytes()


def test_an_unfinished_file_leaves_nothing_and_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.calib"
    write(path)
    before = path.read_bytes()
    with CalibrationWriter(path, "ToyMoe", LAYERS, TOKENS, {}) as writer:
        writer.write(0, 1, arrays(1))
        assert len(list(tmp_path.iterdir())) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a.calib"]
    assert path.read_bytes() == before


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"a\.calib: 0\.00 GB needed, 0\.00 GB free; take fewer --tokens"):
        CalibrationWriter(tmp_path / "a.calib", "ToyMoe", LAYERS, TOKENS, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("first", [0, 1], ids=["width", "rows"])
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, first: int) -> None:
    inputs = arrays(1)["inputs"]
    with (
        CalibrationWriter(tmp_path / "a", "ToyMoe", LAYERS, TOKENS, {}) as writer,
        pytest.raises(ValueError, match="inputs: "),
    ):
        writer.write(first, 1, {"inputs": inputs[:, first - 1 :]})


def test_flipped_bytes_of_any_array_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a.calib"
    write(path)
    good = path.read_bytes()
    opened = Calibration(path)
    places = [(n, t.offset, t.nbytes) for n in LAYERS for t in opened._tensors.values() if f"{n:04}." in t.name]
    opened.close()
    assert len(places) == 8
    for layer, offset, size in places:
        for at in (offset, offset + size - 1):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            opened = Calibration(path)
            with pytest.raises(FormatError, match=f"layer {layer} is damaged; make the file again"):
                opened.layer(layer)
            opened.close()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"tokens":"7"', b'"tokens":"8"'),
        (b'"tokens":"7"', b'"tokens":"x"'),
        (b'"flashpack":"calibration"', b'"flashpack":"calibratiom"'),
        (b"layer-0003.experts", b"layer-0003.expertz"),
        (b'"layer-0003":"', b'"layer-0004":"'),
        (b"[7,96]", b"[8,84]"),
        (b"[7,96]", b"[9999999999999,96]"),
        (b'"I32"', b'"F32"'),
    ],
)
def test_headers_of_something_else_are_refused_in_one_line(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "a.calib"
    write(path)
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = good[8 : 8 + length]
    assert old in header
    changed = header.replace(old, new, 1).rstrip(b" ").ljust(length, b" ")
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + good[8 + length :])
    with pytest.raises(FormatError) as refused:
        Calibration(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)


def test_the_file_of_another_version_is_to_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one from before there was ``residual``."""
    path = tmp_path / "a.calib"
    with monkeypatch.context() as patch:
        patch.delitem(PARTS, "residual")
        with CalibrationWriter(path, "ToyMoe", LAYERS, TOKENS, {}) as writer:
            writer.finish()
    with pytest.raises(FormatError, match="no calibration file of this version; make it again with flashpack calib"):
        Calibration(path)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_cut_files_are_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.calib"
    write(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(FormatError, match=re.escape(str(path))):
        Calibration(path)


def test_no_file_and_another_models(tmp_path: Path) -> None:
    path = tmp_path / "a.calib"
    with pytest.raises(SourceError, match="flashpack calibrate makes such a file"):
        Calibration(path)
    write(path)
    widths = {n: hidden for n, (hidden, _) in LAYERS.items()}
    open_calibration(path, "ToyMoe", widths).close()
    for architecture, layers in (("OtherMoe", widths), ("ToyMoe", widths | {5: 96}), ("ToyMoe", widths | {3: 64})):
        with pytest.raises(SourceError, match="of a ToyMoe with 2 layers of experts"):
            open_calibration(path, architecture, layers)


def test_a_file_of_another_kind_says_what_makes_one(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text('{"not": "safetensors"}')
    with pytest.raises(FormatError, match="flashpack calibrate makes such a file"):
        Calibration(path)
