"""The native quantizer against its numpy meaning: bit for bit, for every encoding, odd shapes and special values."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flashpack.formats import affine, affine_dq_starts
from flashpack.formats.constants import AFFINE_BITS, DQ_BITS, GROUP_SIZES
from flashpack.formats.dtypes import from_float32, to_float32
from flashpack.formats.records import Encoding
from flashpack.formats.starts import group_squares
from flashpack.kernels.cpu import native
from flashpack.kernels.cpu.native import compute
from flashpack.kernels.cpu.quantize import quantize

built = pytest.mark.skipif(not native.available(), reason=native.status())
LEVELS = range(native.LEVELS.index(native.status().split()[-1]) + 1) if native.available() else ()
DTYPES = ["BF16", "F16", "F32"]
Q4 = Encoding("affine", "BF16", 4, 64)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def reference(values: np.ndarray, encoding: Encoding, method: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What the numpy meaning of the method stores, and what that decodes to."""
    arrays: list[np.ndarray]
    if encoding.name == "affine_dq":
        double = affine_dq_starts.quantize if method == "minmax" else affine_dq_starts.quantize_starts
        *arrays, decoded = double(values, encoding.bits)
    else:
        single = affine.quantize if method == "minmax" else affine.quantize_starts
        *arrays, decoded = single(values, encoding.bits, encoding.group_size, encoding.dtype)
    return dict(zip(encoding.part_names, arrays, strict=True)), decoded


def check(stored: np.ndarray, dtype: str, bits: int, group: int, scale_dtype: str, method: str) -> None:
    check_encoding(stored, dtype, Encoding("affine", scale_dtype, bits, group), method)


def check_encoding(stored: np.ndarray, dtype: str, encoding: Encoding, method: str) -> None:
    values = to_float32(stored, dtype)
    arrays, decoded = reference(values, encoding, method)
    with np.errstate(invalid="ignore"):
        difference = decoded - values
    finite = bool(np.isfinite(difference).all())
    for level in LEVELS:
        found, error, norm = native.quantize(stored, dtype, encoding, method, level)
        assert math.isfinite(error) == finite
        if not finite:
            continue  # refused by the converter
        assert found.keys() == arrays.keys()
        assert all(same(found[part], arrays[part]) for part in arrays)
        # To the last bit, since a report of them goes into the pack.
        for sum_, terms in ((error, difference), (norm, values)):
            assert sum_ == np.add.accumulate(group_squares(terms.reshape(-1, encoding.group_size)))[-1]
            assert sum_ == pytest.approx(float((terms.astype(np.float64) ** 2).sum()), rel=1e-5)


def test_it_is_built_where_there_is_a_compiler() -> None:
    if shutil.which("cc") is None and not native.available():
        pytest.skip("no compiler")
    assert native.status() in [f"native quantizer: {level}" for level in native.LEVELS]
    if shutil.which("c++") is None and isinstance(compute.library(), str):
        pytest.skip("no C++ compiler")
    assert compute.status() in [f"native kernels: {x}" for x in ("portable", "avx2", "avx512", "neon")]


@built
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("method", native.METHODS)
def test_random_values_of_all_magnitudes(method: str, bits: int, group: int, scale_dtype: str, dtype: str) -> None:
    rng = np.random.default_rng(bits * group)
    for rows, groups in ((1, 1), (3, 1), (5, 3), (67, 5), (1, 33)):
        magnitude = np.exp2(rng.integers(-40, 14, (rows, groups, 1)))
        values = (rng.standard_normal((rows, groups, group)) * magnitude).astype(np.float32)
        check(from_float32(values.reshape(rows, -1), dtype), dtype, bits, group, scale_dtype, method)


@built
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_every_value_of_sixteen_bits(bits: int, dtype: str) -> None:
    """In groups of neighbours (nearly constant, subnormal, huge, infinite, NaN) and mixed with the others."""
    patterns = np.arange(2**16, dtype=np.uint16)
    for order in (patterns, patterns.reshape(256, 256).T.ravel()):
        stored: np.ndarray = order.view(np.float16) if dtype == "F16" else order
        if dtype == "F32":
            stored = (order.astype(np.uint32) << 16 | order).view(np.float32)
        for group in GROUP_SIZES:
            for scale_dtype in DTYPES:
                for row in stored.reshape(-1, 2**12):
                    check(row.reshape(-1, group), dtype, bits, group, scale_dtype, "minmax")
            # Rows of one group: what is not finite is in the way of no other.
            for row in stored.reshape(-1, 2**10):
                check(row.reshape(-1, group), dtype, bits, group, dtype, "starts")


@built
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", DQ_BITS)
@pytest.mark.parametrize("method", native.METHODS)
def test_double_quantization(method: str, bits: int, dtype: str) -> None:
    """Random values of all magnitudes, constant groups, and every value of sixteen bits."""
    encoding = Encoding("affine_dq", "BF16", bits, 32)
    rng = np.random.default_rng(bits)
    for rows, width in ((1, 256), (8, 32), (8, 96), (67, 512)):
        values = rng.standard_normal((rows, width // 32, 32)).astype(np.float32)
        for magnitude in (1, np.exp2(rng.integers(-40, 14, (rows, width // 32, 1))), rng.random(values.shape) < 0.01):
            array = from_float32((values * magnitude).astype(np.float32).reshape(rows, width), dtype)
            check_encoding(array, dtype, encoding, method)
    patterns = np.arange(2**16, dtype=np.uint16)
    for order in (patterns, patterns.reshape(256, 256).T.ravel()):
        stored: np.ndarray = order.view(np.float16) if dtype == "F16" else order
        if dtype == "F32":
            stored = (order.astype(np.uint32) << 16 | order).view(np.float32)
        for row in stored.reshape(-1, 2**10):
            check_encoding(row.reshape(-1, 256), dtype, encoding, method)


@built
@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(np.float32, (2, 256), elements=st.floats(width=32)),
    st.sampled_from(DQ_BITS),
    st.sampled_from(native.METHODS),
)
def test_any_values_in_double_quantization(values: np.ndarray, bits: int, method: str) -> None:
    check_encoding(values, "F32", Encoding("affine_dq", "BF16", bits, 32), method)


@built
@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.float32, (2, 128), elements=st.floats(width=32)),
    st.sampled_from(AFFINE_BITS),
    st.sampled_from(GROUP_SIZES),
    st.sampled_from(DTYPES),
    st.sampled_from(native.METHODS),
)
def test_any_values(values: np.ndarray, bits: int, group: int, scale_dtype: str, method: str) -> None:
    check(values, "F32", bits, group, scale_dtype, method)


@pytest.mark.parametrize("use_native", [pytest.param(True, marks=built), False])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("position", [0, 63, 1000, 1279])
@pytest.mark.parametrize("method", native.METHODS)
def test_a_value_that_is_not_finite_shows_in_the_error(
    method: str, use_native: bool, value: float, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "available", lambda: use_native)
    values = np.random.default_rng(0).standard_normal((10, 128)).astype(np.float32)
    assert math.isfinite(quantize(values, "F32", Q4, method)[1])
    values.flat[position] = value
    assert not math.isfinite(quantize(values, "F32", Q4, method)[1])


@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_zeros_of_both_signs_are_one_value(scale_dtype: str) -> None:
    """Their minimum is one or the other, by the code that numpy has for the processor."""
    rng = np.random.default_rng(0)
    values = np.where(rng.random((64, 64)) < 0.5, np.float32(-0.0), np.float32(0))
    values[32:] += rng.choice([0, 1], (32, 64)).astype(np.float32) * np.float32(0.25)
    values[0] = -0.0
    for sign in (1, -1):
        _, scales, biases, _ = affine.quantize(values * np.float32(sign), 4, 64, scale_dtype)
        assert not np.signbit(to_float32(scales, scale_dtype)).any()
        assert not np.signbit(to_float32(biases[:32], scale_dtype)).any()


@built
def test_slices_are_taken_as_they_are() -> None:
    values = np.random.default_rng(0).standard_normal((9, 256)).astype(np.float32)[::2, 64:192]
    check(values, "F32", 5, 64, "F16", "starts")


@built
@pytest.mark.parametrize("method", native.METHODS)
@pytest.mark.parametrize("encoding", [Encoding("affine", "F16", 3, 32), Encoding("affine_dq", "BF16", 2, 32)])
def test_numpy_and_native_say_the_same_through_one_call(
    encoding: Encoding, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In more than one of numpy's blocks."""
    stored = from_float32(np.random.default_rng(0).standard_normal((456, 320)).astype(np.float32), "BF16")
    first = quantize(stored, "BF16", encoding, method)
    monkeypatch.setattr(native, "available", lambda: False)
    second = quantize(stored, "BF16", encoding, method)
    assert all(same(first[0][part], second[0][part]) for part in encoding.part_names)
    assert first[1:] == second[1:]


@built
def test_other_encodings_are_refused() -> None:
    encoding = object.__new__(Encoding)
    vars(encoding).update(vars(Q4) | {"bits": 7})
    with pytest.raises(ValueError, match="not for this routine"):
        native.quantize(np.zeros((1, 64), np.float32), "F32", encoding, "minmax")


@built
def test_arrays_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="BF16 as float32"):
        native.quantize(np.zeros((1, 64), np.float32), "BF16", Q4, "minmax")


def test_a_missing_library_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_load", lambda: "not built; install a C compiler, then flashpack again")
    assert not native.available()
    assert native.status().count("\n") == 0
    assert "C compiler" in native.status()
