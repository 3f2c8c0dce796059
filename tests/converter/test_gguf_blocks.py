"""GGUF's block formats: an encoding of the pack decodes to the very values that the gguf package decodes."""

from __future__ import annotations

import importlib.util

import gguf
import numpy as np
import pytest

from flashpack.converter.gguf.blocks import weight_format
from flashpack.converter.gguf.header import TYPES
from flashpack.converter.tensor import Plain, stored_shape
from flashpack.errors import SourceError, UnsupportedError
from flashpack.formats import affine
from flashpack.formats.encodings import decode

EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")
DECODED = [kind for kind, *_ in TYPES.values() if kind[0] in "QIT" and "_" in kind and kind not in EXACT]
LARGEST = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}
"""What the scale is multiplied by to give the bias."""


def blocks_of(kind: str, scales: np.ndarray, seed: int = 0) -> np.ndarray:
    """One block [blocks, bytes] for each float16 scale, or power of two, and all else random."""
    size = next(size for name, _, size in TYPES.values() if name == kind)
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (len(scales), size), dtype=np.uint8)
    stored = scales.astype(np.uint8)[:, None] if kind == "MXFP4" else scales.astype("<f2")[:, None].view(np.uint8)
    blocks[:, : stored.shape[1]] = stored
    if kind in ("Q4_1", "Q5_1"):
        blocks[:, 2:4] = random.permutation(stored)
    return blocks


def finite_halves() -> np.ndarray:
    """Every finite float16: both signs, zeros, subnormal ones."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    return halves[np.isfinite(halves)]


@pytest.mark.parametrize("kind", EXACT)
def test_every_scale_decodes_to_the_same_bits(kind: str) -> None:
    scales = np.arange(255) if kind == "MXFP4" else finite_halves()
    if kind in LARGEST:
        scales = scales[np.abs(scales.astype(np.float32)) * LARGEST[kind] <= 65504]
        assert len(scales) > 40000
    blocks = blocks_of(kind, scales)
    with np.errstate(over="ignore"):  # the largest power of two times 6
        expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    found = weight_format(kind, "t")
    assert found.encoding is not None
    stored = found.stored({"weight": blocks})
    shape = stored_shape(found.encoding, stored["weight"].shape)
    assert {part: (a.shape, a.itemsize) for part, a in stored.items()} == {
        part: (s, {"U32": 4, "F16": 2, "U8": 1}[d]) for part, (d, s) in found.encoding.parts(shape).items()
    }
    # Zeros of both signs are one value to the affine encoding.
    for values in (decode(found.encoding, stored, shape), found.values({"weight": blocks})):
        assert np.array_equal((values + 0).view(np.uint32), (expected + 0).view(np.uint32))


@pytest.mark.parametrize("kind", LARGEST)
def test_a_scale_too_large_for_its_bias_is_refused_but_can_be_decoded(kind: str) -> None:
    blocks = blocks_of(kind, np.array([1.0, 65504.0], np.float16))
    with pytest.raises(SourceError, match="too large for F16; choose a width"):
        weight_format(kind, "t").stored({"weight": blocks})
    expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(weight_format(kind, "t").values({"weight": blocks}), expected)


def test_an_mxfp4_scale_that_is_no_number_is_refused() -> None:
    with pytest.raises(SourceError, match="scale is 255"):
        weight_format("MXFP4", "t").values({"weight": blocks_of("MXFP4", np.array([127, 255]))})


@pytest.mark.parametrize("bits", [4, 5])
def test_values_stand_in_the_order_of_the_blocks(bits: int) -> None:
    """The first 16 values are in the low halves of the bytes: written down here by hand."""
    codes = np.arange(32) % 2**bits
    block = np.zeros(18 if bits == 4 else 22, np.uint8)
    block[:2] = np.array([1.0], "<f2").view(np.uint8)
    block[-16:] = (codes[:16] & 15) | (codes[16:] & 15) << 4
    if bits == 5:
        block[2:6] = np.array([sum(int(c >> 4) << i for i, c in enumerate(codes))], "<u4").view(np.uint8)
    stored = weight_format(f"Q{bits}_0", "t").stored({"weight": block[None]})
    assert affine.unpack_bits(stored["weight"].view(np.uint32), bits)[0].tolist() == codes.tolist()


@pytest.mark.parametrize("kind", DECODED)
def test_what_no_encoding_holds_is_decoded_by_the_gguf_package(kind: str) -> None:
    if kind in ("Q8_1", "Q8_K", "Q1_0"):
        with pytest.raises(UnsupportedError, match=rf"tensor t is stored as {kind}, which is not supported"):
            weight_format(kind, "t")
        return
    blocks = blocks_of(kind, np.full(6, 0.01, np.float16))
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    found = weight_format(kind, "t")
    assert found.encoding is None
    assert np.array_equal(found.values({"weight": blocks}), expected, equal_nan=True)


def test_without_the_gguf_package_only_what_needs_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    assert weight_format("Q8_0", "t").encoding is not None
    assert weight_format("BF16", "t") == Plain("BF16")
    with pytest.raises(UnsupportedError, match=r"stored as Q4_K.*pip install 'flashpack-moe\[gguf\]'"):
        weight_format("Q4_K", "t")


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    theirs = {t.value: (t.name, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    assert theirs == TYPES
