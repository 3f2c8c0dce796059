"""The normative numpy encoding against definitions written another way."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flashpack.formats import affine
from flashpack.formats.constants import AFFINE_BITS, GROUP_SIZES
from flashpack.formats.dtypes import from_float32, to_float32


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_value_i_stands_at_bits_i_of_a_little_endian_stream(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 96), dtype=np.uint8)
    for row, words in zip(codes, affine.pack_bits(codes, bits), strict=True):
        stream = int.from_bytes(words.tobytes(), "little")
        assert [(stream >> (bits * i)) & (2**bits - 1) for i in range(96)] == row.tolist()


@given(st.sampled_from(AFFINE_BITS), st.data())
def test_unpack_inverts_pack(bits: int, data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 4)), 32 * data.draw(st.integers(1, 4)))
    codes = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    assert (affine.unpack_bits(affine.pack_bits(codes, bits), bits) == codes).all()


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_error_is_at_most_half_a_step_and_the_rounding_of_scale_and_bias(
    bits: int, group_size: int, dtype: str
) -> None:
    values = np.random.default_rng(1).standard_normal((7, 256)).astype(np.float32)
    words, scales, biases, decoded = affine.quantize(values, bits, group_size, dtype)
    assert (affine.dequantize(words, scales, biases, bits, group_size, dtype) == decoded).all()
    grouped = values.reshape(7, -1, group_size)
    step = (grouped.max(-1) - grouped.min(-1)) / (2**bits - 1)
    rounding = {"BF16": 2**-8, "F16": 2**-11, "F32": 2**-23}[dtype]
    bound = step / 2 + 2 * rounding * np.abs(grouped).max(-1) + 1e-6
    assert (np.abs(decoded.reshape(grouped.shape) - grouped).max(-1) <= bound).all()


def test_a_constant_group_is_kept_to_the_rounding_of_its_bias() -> None:
    values = np.full((1, 64), 0.3, dtype=np.float32)
    _, scales, _, decoded = affine.quantize(values, 4, 64, "BF16")
    assert (scales == 0).all()
    assert (decoded == to_float32(from_float32(values, "BF16"), "BF16")).all()


def test_quantizer_bytes_are_frozen() -> None:
    """The recipe "minmax" must give the same bytes on any processor and in any later version."""
    values = (np.arange(4 * 128, dtype=np.float32).reshape(4, 128) * 0.37) % 2.3 - 1.1
    digest = hashlib.sha256()
    for bits in AFFINE_BITS:
        words, scales, biases, _ = affine.quantize(values, bits, 64, "BF16")
        for array in (words, scales, biases):
            digest.update(array.tobytes())
    assert digest.hexdigest() == "3378c66e9aa82901c09f1922090405de8ed2bd9ffb7624b8272dead37ce55320"


@given(hnp.arrays(np.float32, 64, elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_bfloat16_rounds_to_nearest_even_as_torch_does(values: np.ndarray) -> None:
    import torch

    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert (from_float32(values, "BF16") == expected).all()
