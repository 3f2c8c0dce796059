"""The normative numpy encoding against definitions written another way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flashpack.formats import affine
from flashpack.formats.constants import AFFINE_BITS, GROUP_SIZES
from flashpack.formats.dtypes import from_float32, to_float32
from flashpack.formats.starts import lane_sum


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


@pytest.mark.parametrize(
    ("quantize", "expected"),
    [
        (affine.quantize, "3378c66e9aa82901c09f1922090405de8ed2bd9ffb7624b8272dead37ce55320"),
        (affine.quantize_starts, "0865821dfb2be09a9495d6ea17fc3bd5af0ba9375a80f1238399fed656399919"),
    ],
    ids=["minmax", "starts"],
)
def test_quantizer_bytes_are_frozen(quantize: Callable[..., tuple[np.ndarray, ...]], expected: str) -> None:
    """A recipe must give the same bytes on any processor and in any later version."""
    values = (np.arange(4 * 128, dtype=np.float32).reshape(4, 128) * 0.37) % 2.3 - 1.1
    digest = hashlib.sha256()
    for bits in AFFINE_BITS:
        for array in quantize(values, bits, 64, "BF16")[:3]:
            digest.update(array.tobytes())
    assert digest.hexdigest() == expected


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_starts_is_never_worse_than_minmax_and_much_better_at_few_bits(bits: int, group_size: int, dtype: str) -> None:
    values = np.random.default_rng(2).standard_t(6, (32, 256)).astype(np.float32)
    words, scales, biases, decoded = affine.quantize_starts(values, bits, group_size, dtype)
    assert (affine.dequantize(words, scales, biases, bits, group_size, dtype) == decoded).all()
    plain = affine.quantize(values, bits, group_size, dtype)[3]
    errors = [((x - values).astype(np.float64) ** 2).reshape(-1, group_size).sum(-1) for x in (decoded, plain)]
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all()
    assert errors[0].sum() < errors[1].sum() * {2: 0.6, 3: 0.8, 4: 0.9}.get(bits, 1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_starts_is_near_the_best_of_all_clipped_ranges(bits: int) -> None:
    """Within 2 % of a much finer search, which refines 121 ranges ten times and measures each after rounding."""
    values = np.random.default_rng(3).standard_normal((256, 64)).astype(np.float32)
    found = affine.quantize_starts(values, bits, 64, "BF16")[3]
    levels, x = 2**bits - 1, values.astype(np.float64)
    best = np.full(len(x), np.inf)
    shares = np.linspace({2: 0.4, 3: 0.6, 4: 0.7}[bits], 1, 11)
    for low in shares:
        for high in shares:
            bias = x.min(-1, keepdims=True) * low
            scale = (x.max(-1, keepdims=True) * high - bias) / levels
            for _ in range(10):
                q = np.clip(np.rint((x - bias) / scale), 0, levels)
                spread = q - q.mean(-1, keepdims=True)
                scale = (spread * x).sum(-1, keepdims=True) / (spread**2).sum(-1, keepdims=True)
                bias = (x - scale * q).mean(-1, keepdims=True)
            scale, bias = (to_float32(from_float32(n.astype(np.float32), "BF16"), "BF16") for n in (scale, bias))
            q = np.clip(np.rint((x - bias) / scale), 0, levels)
            best = np.minimum(best, ((q * scale + bias - x) ** 2).sum(-1))
    assert ((found - x) ** 2).sum() < 1.02 * best.sum()


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("value", [0.0, -0.0, 0.3, -7.0, 1e-40, 3e38, -3e38])
def test_starts_leaves_a_constant_group_to_minmax(bits: int, value: float) -> None:
    values = np.full((2, 64), value, dtype=np.float32)
    for found, plain in zip(
        affine.quantize_starts(values, bits, 64, "F32"), affine.quantize(values, bits, 64, "F32"), strict=True
    ):
        assert found.tobytes() == plain.tobytes()


def test_sums_have_one_order() -> None:
    values = np.random.default_rng(4).standard_normal((5, 32)).astype(np.float32)
    for row, found in zip(values, lane_sum(values), strict=True):
        a = [np.float32(0)] * 8
        for i, value in enumerate(row):
            a[i % 8] += value
        assert found == ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]))


@given(hnp.arrays(np.float32, 64, elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_bfloat16_rounds_to_nearest_even_as_torch_does(values: np.ndarray) -> None:
    import torch

    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert (from_float32(values, "BF16") == expected).all()
