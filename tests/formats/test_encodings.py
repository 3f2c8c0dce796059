"""The normative numpy encodings of small floats against ml_dtypes and against definitions written another way."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from flashpack.errors import FormatError, VersionError
from flashpack.formats import Encoding, Projection, RecordKind
from flashpack.formats import constants as C
from flashpack.formats.dtypes import NUMPY, to_float32
from flashpack.formats.encodings import decode
from flashpack.formats.floats import E2M1, E4M3, E8M0
from flashpack.formats.records import MXFP4, fp8, nvfp4

ENCODINGS = [
    Encoding("raw", "BF16"), Encoding("affine", "F16", 3, 32), MXFP4, *map(nvfp4, C.GLOBAL_SCALES),
    fp8("F32", (0, 0)), fp8("BF16", (1, 0)), fp8("F16", (0, 1)), fp8("E8M0", (1, 32)), fp8("F32", (4, 48)),
    fp8("BF16", (5, 7)), fp8("F32", (C.MAX_BLOCK, C.MAX_BLOCK)),
]  # fmt: skip


def random_parts(encoding: Encoding, shape: tuple[int, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Stored arrays of any bits, but floats of the size of 1."""
    rng = np.random.default_rng(seed)
    parts = {}
    for part, (dtype, dims) in encoding.parts(shape).items():
        if dtype in ("U8", "U32"):
            parts[part] = rng.integers(0, 2 ** (8 if dtype == "U8" else 32), dims, NUMPY[dtype])
        else:
            floats = rng.standard_normal(dims).astype(np.float32)
            parts[part] = floats.view("<u4").astype("<u4") >> 16 if dtype == "BF16" else floats.astype(NUMPY[dtype])
            parts[part] = parts[part].astype(NUMPY[dtype])
    return parts


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bit for bit, but for the bits of NaN."""
    return bool(a.dtype == b.dtype == np.float32 and a.shape == b.shape) and np.array_equal(
        np.where(np.isnan(a), np.float32(np.nan), a).view(np.uint32),
        np.where(np.isnan(b), np.float32(np.nan), b).view(np.uint32),
    )


@pytest.mark.parametrize(
    ("table", "dtype"),
    [(E2M1, ml_dtypes.float4_e2m1fn), (E4M3, ml_dtypes.float8_e4m3fn), (E8M0, ml_dtypes.float8_e8m0fnu)],
    ids=["e2m1", "e4m3", "e8m0"],
)
def test_every_code_has_the_value_that_ml_dtypes_gives_it(table: np.ndarray, dtype: type) -> None:
    codes = np.arange(len(table), dtype=np.uint8)
    assert len(table) == (16 if table is E2M1 else 256)
    assert same(table, codes.view(dtype).astype(np.float32))


def test_numbers_of_nan_and_the_ends_of_each_table() -> None:
    assert [int(np.isnan(t).sum()) for t in (E2M1, E4M3, E8M0)] == [0, 2, 1]
    assert (E2M1.max(), np.nanmax(E4M3), E8M0[0], E8M0[254]) == (6, 448, 2.0**-127, 2.0**127)
    with pytest.raises(ValueError, match="read-only"):
        E4M3[0] = 1


def defined(encoding: Encoding, parts: dict[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Value by value, in exact arithmetic of float64, rounded where SPEC.md says."""
    values = np.empty(shape, np.float32)
    stream = [int.from_bytes(row.tobytes(), "little") for row in parts["weight"]]
    scales = parts["scales"]
    if encoding.name == "fp8_e4m3":
        scales = (
            scales.view(ml_dtypes.float8_e8m0fnu) if encoding.dtype == "E8M0" else to_float32(scales, encoding.dtype)
        )
    else:
        scales = scales.view(ml_dtypes.float8_e8m0fnu if encoding.name == "mxfp4" else ml_dtypes.float8_e4m3fn)
    for i, j in np.ndindex(shape):
        if encoding.name == "fp8_e4m3":
            code = np.float64(parts["weight"][i, j].view(ml_dtypes.float8_e4m3fn))
            r, c = encoding.block
            scale = np.float64(scales[i // r if r else 0, j // c if c else 0])
        else:
            code = np.float64(np.uint8(stream[i] >> 4 * j & 15).view(ml_dtypes.float4_e2m1fn))
            scale = np.float64(scales[i, j // encoding.group_size])
            if encoding.global_scale == "multiply":
                scale = np.float64(np.float32(scale * np.float64(parts["global"][0])))
            elif encoding.global_scale == "divide":
                scale = np.float64(np.float32(scale / np.float64(parts["global"][0])))
        values[i, j] = np.float32(code * scale)
    return values


@pytest.mark.parametrize("encoding", [e for e in ENCODINGS if e.name not in ("raw", "affine")], ids=str)
@pytest.mark.parametrize("shape", [(1, 32), (13, 96), (11, 19)])
def test_a_matrix_has_the_values_of_its_definition(encoding: Encoding, shape: tuple[int, int]) -> None:
    if encoding.group_size and shape[1] % encoding.group_size:
        with pytest.raises(FormatError, match="not a multiple of"):
            encoding.parts(shape)
        return
    parts = random_parts(encoding, shape, sum(shape))
    with np.errstate(all="ignore"):
        expected = defined(encoding, parts, shape)
    assert same(decode(encoding, parts, shape), expected)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_rows_of_a_matrix_are_decoded_as_in_the_whole(encoding: Encoding) -> None:
    rows, width = 13, 96
    parts = random_parts(encoding, (rows, width))
    whole = decode(encoding, parts, (rows, width))
    assert set(encoding.parts((rows, width))) == set(encoding.part_names)
    for start in range(rows):
        for stop in range(start + 1, rows + 1):
            cut = {part: array[encoding.part_rows(part, start, stop, width)] for part, array in parts.items()}
            first = encoding.first_in_block(start, width)
            assert same(decode(encoding, cut, (stop - start, width), first), whole[start:stop])
            if not first:
                assert {p: a.shape for p, a in cut.items()} == {
                    p: s for p, (_, s) in encoding.parts((stop - start, width)).items()
                }


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_a_stack_of_matrices_is_decoded_at_once(encoding: Encoding) -> None:
    shape = (7, 96)
    single = [random_parts(encoding, shape, seed) for seed in range(3)]
    stack = {part: np.stack([parts[part] for parts in single]) for part in single[0]}
    assert {p: a.shape for p, a in stack.items()} == {p: s for p, (_, s) in encoding.parts((3, *shape)).items()}
    values = decode(encoding, stack, (3, *shape))
    assert same(values, np.stack([decode(encoding, parts, shape) for parts in single]))


def test_infinite_and_nan_values_come_without_a_warning() -> None:
    assert np.isposinf(decode(MXFP4, {"weight": np.full((1, 4), 0x77777777, "<u4"), "scales": np.array([[254]], "u1")},
                              (1, 32))).all()  # fmt: skip
    parts = {
        "weight": np.full((1, 2), 0x22222222, "<u4"),
        "scales": np.array([[0x38]], "u1"),
        "global": np.zeros(1, "<f4"),
    }
    assert np.isposinf(decode(nvfp4("divide"), parts, (1, 16))).all()
    assert np.isnan(decode(nvfp4("divide"), parts | {"scales": np.array([[0]], "u1")}, (1, 16))).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Encoding("mxfp4", "E8M0", 4, 16),
        lambda: Encoding("mxfp4", "E8M0", 4, 32, global_scale="multiply"),
        lambda: Encoding("nvfp4", "E4M3", 4, 16),
        lambda: nvfp4("twice"),
        lambda: fp8("E4M3", (0, 0)),
        lambda: fp8("F32", (-1, 0)),
        lambda: fp8("F32", (0, C.MAX_BLOCK + 1)),
        lambda: Encoding("fp8_e4m3", "F32", 4),
        lambda: Encoding("affine", "BF16", 4, 32, block=(1, 1)),
        lambda: Encoding("raw", "BF16", global_scale="none"),
        lambda: Encoding("raw", "F64"),
    ],
)
def test_parameters_that_an_encoding_does_not_have_are_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(FormatError, match="parameter out of range"):
        make()


def test_an_unknown_encoding_is_of_a_newer_version() -> None:
    with pytest.raises(VersionError, match="fp6"):
        Encoding("fp6", "F32")


def test_integers_are_for_dense_tensors_only() -> None:
    ids = Encoding("raw", "I64")
    assert ids.parts((3,)) == {"weight": ("I64", (3,))}
    with pytest.raises(FormatError, match="parameter out of range"):
        RecordKind((Projection("up", (1, 1), ids), Projection("down", (1, 1), Encoding("raw", "F32"))))


def test_stored_bits_per_weight() -> None:
    expected = {MXFP4: 4.25, nvfp4("divide"): 4.5, fp8("E8M0", (1, 32)): 8.25, fp8("F32", (128, 128)): 8 + 32 / 128**2,
                fp8("BF16", (1, 0)): 8, Encoding("affine", "BF16", 4, 64): 4.5, Encoding("raw", "F16"): 16}  # fmt: skip
    assert {e: e.bits_per_weight() for e in expected} == expected


def test_which_matrices_are_one_where_they_lie_side_by_side() -> None:
    """By decoding: two of them, and the same parts put together."""
    shape = (8, 96)
    for encoding in [*ENCODINGS, fp8("F32", (4, 0)), fp8("F32", (8, 32)), fp8("F32", (16, 0))]:
        a, b = random_parts(encoding, shape, 1), random_parts(encoding, shape, 2)
        apart = np.concatenate([decode(encoding, a, shape), decode(encoding, b, shape)])
        dims = {part: size for part, (_, size) in encoding.parts((16, 96)).items()}
        together = {part: np.concatenate([a[part], b[part]]) for part in a}
        fits = {part: array.shape for part, array in together.items()} == dims
        assert encoding.stackable(8) == (fits and same(decode(encoding, together, (16, 96)), apart)), encoding
