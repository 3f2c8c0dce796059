"""The quantizers of the affine_dq encoding: what the search gains over plain rounding, and what it never loses."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from flashpack.formats import affine, affine_dq, affine_dq_starts
from flashpack.formats.constants import DQ_BITS


def block_errors(decoded: np.ndarray, values: np.ndarray) -> np.ndarray:
    errors: np.ndarray = np.square((decoded - values).astype(np.float64)).reshape(-1, 256).sum(-1)
    return errors


@pytest.mark.parametrize("bits", DQ_BITS)
@pytest.mark.parametrize("width", [96, 256, 320])
def test_starts_is_never_worse_than_minmax_and_close_to_scales_that_are_not_rounded(bits: int, width: int) -> None:
    values = np.random.default_rng(bits).standard_normal((64, width)).astype(np.float32)
    words, codes, blocks, decoded = affine_dq_starts.quantize_starts(values, bits)
    assert (affine_dq.dequantize(words, codes, blocks, bits) == decoded).all()
    found = block_errors(decoded, values)
    plain = block_errors(affine_dq_starts.quantize(values, bits)[3], values)
    assert (found <= plain * (1 + 1e-6)).all()
    free = block_errors(affine.quantize_starts(values, bits, 32, "BF16")[3], values)
    assert found.sum() < plain.sum() * {2: 0.6, 3: 0.8, 4: 0.87}[bits]
    assert found.sum() < free.sum() * {2: 1.02, 3: 1.05, 4: 1.12}[bits]


@pytest.mark.parametrize("bits", DQ_BITS)
@pytest.mark.parametrize("rounds", [0, 1])
def test_each_round_of_refinement_pays(bits: int, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    full = block_errors(affine_dq_starts.quantize_starts(values, bits)[3], values).sum()
    monkeypatch.setattr(affine_dq_starts, "ROUNDS", rounds)
    assert full < block_errors(affine_dq_starts.quantize_starts(values, bits)[3], values).sum()


@pytest.mark.parametrize("bits", DQ_BITS)
@pytest.mark.parametrize("value", [0.0, -0.0, 0.375, -7.0, 3e38])
def test_constant_blocks_and_groups(bits: int, value: float) -> None:
    values = np.full((2, 256), value, dtype=np.float32)
    decoded = affine_dq_starts.quantize_starts(values, bits)[3]
    assert (decoded == affine_dq_starts.quantize(values, bits)[3]).all()
    values[:, 128:] = np.random.default_rng(0).standard_normal((2, 128)).astype(np.float32)
    decoded = affine_dq_starts.quantize_starts(values, bits)[3]
    assert (block_errors(decoded, values) <= block_errors(affine_dq_starts.quantize(values, bits)[3], values)).all()


def test_bytes_are_frozen() -> None:
    """Both recipes must give the same bytes on any processor and in any later version."""
    values = (np.arange(4 * 256, dtype=np.float32).reshape(4, 256) * 0.37) % 2.3 - 1.1
    digest = hashlib.sha256()
    for bits in DQ_BITS:
        for function in (affine_dq_starts.quantize, affine_dq_starts.quantize_starts):
            for array in function(values, bits)[:3]:
                digest.update(array.tobytes())
    assert digest.hexdigest() == "ffa8faed38504707f28d5e23385c1faf335d1ce4dd122a840ddbe549b0042ad9"
