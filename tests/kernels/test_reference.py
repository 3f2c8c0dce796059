"""The torch kernels against the numpy meaning of the format, over odd shapes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flashpack.errors import DeviceError
from flashpack.formats import Encoding, Projection, RecordKind, affine
from flashpack.formats import constants as C
from flashpack.formats.constants import AFFINE_BITS
from flashpack.formats.dtypes import ITEMSIZE, NUMPY, from_float32, to_float32
from flashpack.formats.encodings import decode
from flashpack.formats.records import MXFP4, affine_dq, fp8, nvfp4
from flashpack.formats.writer import RecordBuffer
from flashpack.kernels import StoredMatrix, get_kernels
from flashpack.kernels.cpu.native import compute
from flashpack.kernels.cpu.reference import BLOCK_VALUES, ReferenceKernels

KERNELS = ReferenceKernels(1)
FLOATS = [
    MXFP4, *map(nvfp4, C.GLOBAL_SCALES), fp8("F32", (0, 0)), fp8("BF16", (1, 0)), fp8("F16", (0, 1)),
    fp8("E8M0", (1, 32)), fp8("F32", (128, 128)), fp8("BF16", (5, 7)), fp8("E8M0", (48, 0)),
]  # fmt: skip
DQ_SHAPES = [(8, 32), (8, 96), (80, 1056), (300, 2048)]
"""Blocks of several rows, blocks that begin within rows, and what is cut into parts."""
FLOAT_SHAPES = [(1, 32), (7, 96), (67, 320), (300, 2048), (33, 77), (1, 1)]


def stored(array: np.ndarray, dtype: str) -> torch.Tensor:
    if dtype == "BF16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.view(np.int32) if dtype == "U32" else array)


def stored_matrix(parts: dict[str, np.ndarray], encoding: Encoding, shape: tuple[int, int]) -> StoredMatrix:
    dtypes = {part: dtype for part, (dtype, _) in encoding.parts(shape).items()}
    return StoredMatrix.of(encoding, {part: stored(array, dtypes[part]) for part, array in parts.items()})


def random_floats(rows: int, width: int, encoding: Encoding, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Finite small floats of any code with scales about 1: (stored parts, decoded float32 values)"""
    rng = np.random.default_rng(seed)
    parts: dict[str, np.ndarray] = {}
    for part, (dtype, shape) in encoding.parts((rows, width)).items():
        if part == "scales" and dtype == "U8":
            low, high = (0x30, 0x41) if encoding.name == "nvfp4" else (122, 131)
            parts[part] = rng.integers(low, high, shape, np.uint8)
        elif part == "weight":
            codes = rng.integers(0, 256, (rows, width if dtype == "U8" else width // 2), np.uint8)
            finite = codes if dtype == "U32" else np.where(codes & 127 == 127, np.uint8(0x38), codes)
            parts[part] = finite.view(np.uint32) if dtype == "U32" else finite
        else:
            parts[part] = from_float32(rng.standard_normal(shape).astype(np.float32), dtype)
    return parts, decode(encoding, parts, (rows, width))


def random_codes(rows: int, width: int, encoding: Encoding, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Any codes of ``affine_dq``, with numbers of blocks that make values of about 1: (stored parts, values)"""
    rng = np.random.default_rng(seed)
    parts: dict[str, np.ndarray] = {}
    for part, (dtype, shape) in encoding.parts((rows, width)).items():
        if part == "blocks":
            numbers = rng.standard_normal(shape) / 2 ** (encoding.bits + 1)
            parts[part] = from_float32(numbers.astype(np.float32), dtype)
        else:
            parts[part] = rng.integers(0, 2 ** (8 * ITEMSIZE[dtype]), shape, NUMPY[dtype])
    return parts, decode(encoding, parts, (rows, width))


def random_matrix(rows: int, width: int, encoding: Encoding, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(stored parts, decoded float32 values)"""
    if encoding.name == "affine_dq":
        return random_codes(rows, width, encoding, seed)
    if encoding.name not in ("raw", "affine"):
        return random_floats(rows, width, encoding, seed)
    values = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    if not encoding.quantized:
        raw = from_float32(values, encoding.dtype)
        return {"weight": raw}, to_float32(raw, encoding.dtype)
    words, scales, biases, decoded = affine.quantize(values, encoding.bits, encoding.group_size, encoding.dtype)
    return {"weight": words, "scales": scales, "biases": biases}, decoded


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize(("rows", "width", "group"), [(1, 32, 32), (7, 96, 32), (67, 320, 64), (300, 2048, 128)])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_linear_and_embedding_over_quantized_matrices(bits: int, rows: int, width: int, group: int, dtype: str) -> None:
    encoding = Encoding("affine", dtype, bits, group)
    parts, decoded = random_matrix(rows, width, encoding, bits)
    matrix = stored_matrix(parts, encoding, (rows, width))
    assert matrix.shape == (rows, width)
    x = np.random.default_rng(9).standard_normal((3, width)).astype(np.float32)
    expected = x.astype(np.float64) @ decoded.T.astype(np.float64)
    found = KERNELS.linear(torch.from_numpy(x), matrix).numpy()
    # Sums of `width` float32 products of size 1.
    assert np.abs(found - expected).max() < 2e-6 * width
    ids = torch.tensor([[rows - 1, 0, rows // 2]])
    assert np.array_equal(KERNELS.embedding(ids, matrix, torch.float32).numpy()[0], decoded[ids[0].numpy()])


@pytest.mark.parametrize(
    ("encoding", "rows", "width"),
    [(e, *s) for e in FLOATS for s in FLOAT_SHAPES if s[1] % (e.group_size or 1) == 0]
    + [(affine_dq(bits), *s) for bits in (2, 3, 4) for s in DQ_SHAPES],
)
def test_linear_and_embedding_over_small_floats(encoding: Encoding, rows: int, width: int) -> None:
    """Of many rows a block is cut in the middle of a block of scales."""
    parts, decoded = random_matrix(rows, width, encoding, rows)
    matrix = stored_matrix(parts, encoding, (rows, width))
    assert matrix.shape == (rows, width)
    ids = torch.tensor([[rows - 1, 0, rows // 2]])
    assert np.array_equal(KERNELS.embedding(ids, matrix, torch.float32).numpy()[0], decoded[ids[0].numpy()])
    x = np.random.default_rng(9).standard_normal((3, width)).astype(np.float32)
    expected = x.astype(np.float64) @ decoded.T.astype(np.float64)
    found = KERNELS.linear(torch.from_numpy(x), matrix).numpy()
    assert np.abs(found - expected).max() < 2e-7 * width * np.abs(decoded).max() * np.abs(x).max()
    # Every product but one is 0: the matrix's values themselves.
    eye = torch.eye(width)[: min(width, 100)]
    assert np.array_equal(KERNELS.linear(eye, matrix).numpy(), decoded.T[: len(eye)])


@pytest.mark.parametrize("encoding", FLOATS, ids=lambda e: f"{e}-{e.global_scale}")
def test_every_code_and_scale_is_widened_as_numpy_does(encoding: Encoding) -> None:
    """Subnormal, infinite and NaN values, too, in all places of a row."""
    rows, width = 256, 544
    codes = np.arange(rows * width, dtype=np.uint32)
    parts = {}
    for part, (dtype, shape) in encoding.parts((rows, width)).items():
        if dtype in ("U8", "U32"):
            size = shape[0] * shape[1] * (4 if dtype == "U32" else 1)
            parts[part] = (codes[:size] * 37 % 256).astype(np.uint8).view(np.dtype(NUMPY[dtype])).reshape(shape)
        else:
            parts[part] = from_float32(
                np.geomspace(1e-6, 1e4, math.prod(shape), dtype=np.float32).reshape(shape), dtype
            )
    matrix = stored_matrix(parts, encoding, (rows, width))
    found = KERNELS.embedding(torch.arange(rows), matrix, torch.float32).numpy()
    expected = decode(encoding, parts, (rows, width))
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found[found == 0]), np.signbit(expected[expected == 0]))
    if encoding.name == "mxfp4":
        assert np.isinf(found).any()
        assert (found != 0)[np.abs(found) < 2.0**-126].any()


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_no_tokens_and_more_tokens_than_a_block(bits: int) -> None:
    encoding = Encoding("affine", "BF16", bits, 64)
    parts, decoded = random_matrix(50, 128, encoding, bits)
    matrix = stored_matrix(parts, encoding, (50, 128))
    assert KERNELS.linear(torch.empty(2, 0, 128), matrix).shape == (2, 0, 50)
    assert KERNELS.embedding(torch.empty(1, 0, dtype=torch.int64), matrix, torch.float16).shape == (1, 0, 128)
    ids = torch.randint(0, 50, (3, BLOCK_VALUES // 128), generator=torch.Generator().manual_seed(bits))
    assert np.array_equal(KERNELS.embedding(ids, matrix, torch.float32).numpy(), decoded[ids.numpy()])


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_linear_over_plain_matrices_is_exact_in_the_weights(dtype: str) -> None:
    parts, decoded = random_matrix(130, 70, Encoding("raw", dtype), 3)
    weight = stored(parts["weight"], dtype)
    eye = torch.eye(70)
    assert np.array_equal(KERNELS.linear(eye, weight).numpy(), decoded.T)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Encoding("affine", "BF16", 4, 64), Encoding("affine", "BF16", 4, 64)),
        (Encoding("affine", "BF16", 3, 32), Encoding("affine", "F16", 6, 32)),
        (Encoding("raw", "BF16"), Encoding("affine", "F32", 2, 128)),
        (Encoding("raw", "F32"), Encoding("raw", "F16")),
        (MXFP4, MXFP4),
        (nvfp4("none"), nvfp4("none")),
        (nvfp4("multiply"), nvfp4("multiply")),
        (nvfp4("divide"), MXFP4),
        (fp8("E8M0", (1, 32)), fp8("E8M0", (1, 32))),
        (fp8("F32", (8, 64)), fp8("F32", (8, 64))),
        (fp8("F32", (128, 128)), fp8("F32", (128, 128))),
        (fp8("F32", (0, 0)), fp8("F32", (0, 0))),
    ],
)
@pytest.mark.parametrize(
    ("tokens", "biases"),
    [(1, ("", "", "")), (5, ("BF16", "BF16", "BF16")), (1, ("F32", "F16", "")), (5, ("", "", "F32"))],
)
@pytest.mark.parametrize(("hidden", "width"), [(128, 40), (256, 128)])
def test_an_expert_from_its_record(
    gated: bool,
    first: Encoding,
    second: Encoding,
    biases: tuple[str, str, str],
    tokens: int,
    hidden: int,
    width: int,
) -> None:
    """gate in one encoding, up in another, odd widths: sections with and without gaps between them."""
    down = first if width % 128 == 0 or first.name == "fp8_e4m3" else Encoding("raw", "BF16")
    projections = [
        Projection("up", (width, hidden), second, biases[1]),
        Projection("down", (hidden, width), down, biases[2]),
    ]
    if gated:
        projections.insert(0, Projection("gate", (width, hidden), first, biases[0]))
    kind = RecordKind(tuple(projections))
    buffer = RecordBuffer(kind)
    decoded, added, rng = {}, {}, np.random.default_rng(6)
    for seed, p in enumerate(projections):
        parts, decoded[p.name] = random_matrix(*p.shape, p.encoding, seed)
        for part, array in parts.items():
            section = buffer.sections[f"{p.name}.{part}"]
            section[:] = array.view(section.dtype)
        added[p.name] = np.zeros(p.shape[0])
        if p.bias:
            bias = from_float32(rng.standard_normal(p.shape[0]).astype(np.float32) * 9, p.bias)
            section = buffer.sections[f"{p.name}.bias"]
            section[:, 0] = bias.view(section.dtype)
            added[p.name] += to_float32(bias, p.bias)
    record = KERNELS.view_record(torch.from_numpy(buffer.data), kind)
    x = np.random.default_rng(5).standard_normal((tokens, hidden)).astype(np.float32)

    def activation(h: torch.Tensor) -> torch.Tensor:
        if not gated:
            return torch.relu(h)
        gate, up = h.chunk(2, dim=-1)
        return torch.relu(gate) * up

    found = KERNELS.expert(torch.from_numpy(x), record, activation).numpy()
    up = x.astype(np.float64) @ decoded["up"].T + added["up"]
    gate = x.astype(np.float64) @ decoded["gate"].T + added["gate"] if gated else None
    inner = np.maximum(up, 0) if gate is None else np.maximum(gate, 0) * up
    expected = inner @ decoded["down"].T + added["down"]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("encoding", "width", "biases", "one"),
    [
        (Encoding("affine", "BF16", 4, 64), 64, ("", ""), True),
        (Encoding("raw", "BF16"), 64, ("", ""), True),
        (MXFP4, 64, ("BF16", "BF16"), True),
        (MXFP4, 64, ("BF16", "F32"), False),
        (MXFP4, 64, ("BF16", ""), False),
        (MXFP4, 16, ("BF16", "BF16"), False),  # a gap between the biases
        (nvfp4("none"), 64, ("F32", "F32"), True),
        (nvfp4("divide"), 64, ("", ""), False),
        (fp8("F32", (32, 64)), 1024, ("", ""), True),
        (fp8("F32", (32, 64)), 1040, ("", ""), False),  # a block of scales would hold rows of both
        (fp8("F32", (1, 0)), 64, ("", ""), True),
        (fp8("F32", (0, 0)), 64, ("", ""), False),
        (fp8("F32", (0, 4)), 64, ("", ""), False),
    ],
)
def test_gate_and_up_are_used_as_one_matrix_only_where_they_are_one(
    encoding: Encoding, width: int, biases: tuple[str, str], one: bool
) -> None:
    projections = [Projection(n, (width, 64), encoding, bias) for n, bias in zip(("gate", "up"), biases, strict=True)]
    kind = RecordKind((*projections, Projection("down", (64, width), Encoding("raw", "F32"))))
    record = KERNELS.view_record(torch.zeros(kind.stride, dtype=torch.uint8), kind)
    assert [m.shape for m in record.first] == ([(2 * width, 64)] if one else [(width, 64)] * 2)
    assert [b is not None and len(b) for b in record.first_bias] == (
        [bool(biases[0]) and 2 * width] if one else [bool(bias) and width for bias in biases]
    )
    assert record.down_bias is None


def test_a_view_of_a_record_follows_the_bytes_below_it() -> None:
    """The place of a record is used again for another expert: nothing of a view may be a copy, biases neither."""
    kind = RecordKind(tuple(Projection(n, (32, 32), fp8("F32", (0, 0)), "F32") for n in ("gate", "up", "down")))
    first, second = (RecordBuffer(kind) for _ in range(2))
    for seed, buffer in enumerate((first, second)):
        for p in kind.projections:
            parts, _ = random_matrix(*p.shape, p.encoding, seed)
            for name, array in (parts | {"bias": np.full((32, 1), seed + 1, np.float32)}).items():
                section = buffer.sections[f"{p.name}.{name}"]
                section[:] = array.view(section.dtype)
    place = torch.from_numpy(first.data.copy())
    view = KERNELS.view_record(place, kind)
    x = torch.ones(1, 32)
    for buffer in (first, second):
        place.copy_(torch.from_numpy(buffer.data))
        fresh = KERNELS.view_record(torch.from_numpy(buffer.data), kind)
        assert torch.equal(KERNELS.expert(x, view, halves), KERNELS.expert(x, fresh, halves))
    assert not torch.equal(KERNELS.expert(x, view, halves), KERNELS.expert(x, KERNELS.view_record(
        torch.from_numpy(first.data), kind), halves))  # fmt: skip


def halves(h: torch.Tensor) -> torch.Tensor:
    gate, up = h.chunk(2, dim=-1)
    return gate * up


def test_a_device_without_kernels_is_refused() -> None:
    with pytest.raises(DeviceError, match="cuda"):
        get_kernels("cuda")


def test_missing_native_kernels_are_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "library", lambda: "there was no compiler")
    assert get_kernels("cpu").notices == [
        "native kernels: there was no compiler; torch is used, which is several times slower"
    ]
    assert get_kernels("cpu", reference=True).notices == []
