"""The kernels in C++ against float64, and against themselves: rows, tokens and threads computed together or alone."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flashpack.formats import Encoding, Projection, RecordKind
from flashpack.formats.dtypes import from_float32
from flashpack.formats.records import MXFP4, affine_dq, fp8
from flashpack.formats.writer import RecordBuffer
from flashpack.kernels import Activation, StoredMatrix
from flashpack.kernels.activations import recognize
from flashpack.kernels.cpu.compiled import NativeKernels, matrix_of
from flashpack.kernels.cpu.native import compute
from flashpack.kernels.cpu.reference import ReferenceKernels
from flashpack.kernels.cpu.steps import NativeSteps
from flashpack.kernels.interface import ACTIVATIONS
from tests.conftest import ROOT
from tests.kernels.test_reference import random_matrix, stored, stored_matrix

# Where there is a compiler they must be there, says test_native.py: nothing is skipped unseen.
pytestmark = pytest.mark.skipif(isinstance(compute.library(), str), reason=f"no native kernels: {compute.library()}")

LEVELS = range((compute.best_level() or 0) + 1)
AFFINE = [
    Encoding("affine", dtype, bits, group)
    for bits in (2, 3, 4, 5, 6, 8)
    for group in (32, 64, 128)
    for dtype in ("BF16", "F16", "F32")
]
DQ = [affine_dq(bits) for bits in (2, 3, 4)]


def product(
    x: Tensor, weight: Tensor | StoredMatrix, level: int, threads: int = 1, bias: Tensor | None = None
) -> Tensor:
    matrix = matrix_of(weight, bias)
    assert matrix is not None
    out = torch.full((len(x), weight.shape[0]), float("nan"))
    compute.Workers(threads, level).linear(x.data_ptr(), len(x), matrix, out.data_ptr())
    return out


def whole_rows(rows: int, width: int, encoding: Encoding) -> int:
    """So many rows or a few more, that such a matrix can have."""
    step = encoding.whole_rows(width)
    return -(-rows // step) * step


def takes_bytes(encoding: Encoding, level: int) -> bool:
    """Whether coarse products with several tokens round activations to 8 bits."""
    return encoding.bits == 4 and compute.Workers(1, level).name in ("avx2", "avx512")


def normal(tokens: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def states(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Random activations; the last token has one that is far larger than the others."""
    x = normal(tokens, width, seed)
    x[-1, width // 3] *= 300
    return x


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("encoding", [*AFFINE, *DQ, MXFP4], ids=str)
def test_products_with_codes_are_close_and_do_not_depend_on_company(encoding: Encoding, level: int) -> None:
    """Widths of whole and half units of 64, of less and more than a segment; rows and tokens beside multiples."""
    for rows, units in ((37, 1), (6, 3), (3, 37), (2, 129)):
        width = encoding.group_size * units
        rows = whole_rows(rows, width, encoding)
        parts, decoded = random_matrix(rows, width, encoding, seed=rows)
        weight = stored_matrix(parts, encoding, (rows, width))
        x = states(70, width)
        bound = np.linalg.norm(decoded, axis=1)[None] * np.linalg.norm(x.numpy(), axis=1)[:, None]
        together = product(x, weight, level, threads=3)
        error = np.abs(together.numpy() - x.numpy().astype(np.float64) @ decoded.T.astype(np.float64))
        # Activations of 15 bits and weights of 13, and float32 sums of products whose biases cancel.
        assert (error <= (np.sqrt(width) / 56_000 + 4e-4) * bound).all()
        for count in (4, 5, 6, 7):
            assert torch.equal(product(x[-count:], weight, level), together[-count:])
        few = product(x[-3:], weight, level, threads=2)
        error = np.abs(few.numpy() - x[-3:].numpy().astype(np.float64) @ decoded.T.astype(np.float64))
        # Few tokens' products are with the codes as they are.
        assert (error <= (np.sqrt(width) / 56_000 + 3e-6) * bound[-3:]).all()
        for count in (1, 2):
            assert torch.equal(product(x[-count:], weight, level), few[-count:])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [1, 7, 64, 1100])
def test_products_with_numbers_and_biases(dtype: torch.dtype, width: int, level: int) -> None:
    weight = states(13, width, seed=1).to(dtype)
    bias = states(1, 13, seed=2)[0]
    x = states(5, width)
    expected = x.double() @ weight.double().T + bias
    together = product(x, weight, level, 2, bias)
    assert (together - expected).abs().max() <= 1e-6 * max(1, width**0.5) * expected.abs().max()
    assert torch.equal(product(x[2:3], weight, level, 1, bias), together[2:3])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [3, 70, 200])
def test_what_is_not_finite_is_not_hidden(value: float, level: int, place: int) -> None:
    encoding = Encoding("affine", "BF16", 4, 64)
    parts, _ = random_matrix(5, 256, encoding, seed=3)
    x = states(3, 256)
    x[1, place] = value
    found = product(x, stored_matrix(parts, encoding, (5, 256)), level)
    assert not found[1].isfinite().any()
    assert found[[0, 2]].isfinite().all()
    for tiny in (0.0, 1e-45, -0.0):
        assert (
            product(torch.full((1, 256), tiny), stored_matrix(parts, encoding, (5, 256)), level).abs() <= 1e-40
        ).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("encoding", AFFINE, ids=str)
def test_rows_that_are_not_finite_stay_alone(encoding: Encoding, level: int) -> None:
    """Behind a row's numbers lie the next row's, which are read with them."""
    rows, width, broken = 37, 5 * encoding.group_size, 18
    parts, _ = random_matrix(rows, width, encoding, seed=4)
    others = torch.arange(rows) != broken
    for part in ("scales", "biases"):
        numbers = parts[part].copy()
        numbers[broken] = from_float32(np.full(numbers.shape[1], np.nan, np.float32), encoding.dtype)
        for tokens, coarse in ((1, False), (3, False), (5, False), (5, True), (70, True)):
            whole, damaged = (
                product(normal(tokens, width), replace(stored_matrix(p, encoding, (rows, width)), coarse=coarse), level)
                for p in (parts, {**parts, part: numbers})
            )
            assert torch.equal(damaged[:, others], whole[:, others])
            assert not damaged[:, broken].isfinite().any()


@pytest.mark.skipif(sys.platform != "linux", reason="forbids a page as Linux does")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("encoding", [e for e in [*AFFINE, *DQ, MXFP4] if e.dtype in ("BF16", "E8M0")], ids=str)
def test_nothing_is_read_behind_a_matrix(encoding: Encoding, level: int) -> None:
    """Codes end where memory ends: reading on would end the process."""
    page = mmap.PAGESIZE
    place = mmap.mmap(-1, 5 * page)
    start = np.frombuffer(place, np.uint8).ctypes.data
    libc = ctypes.CDLL(None)
    assert libc.mprotect(ctypes.c_void_p(start + 4 * page), page, 0) == 0
    width = 3 * encoding.group_size
    rows = whole_rows(3, width, encoding)
    parts, decoded = random_matrix(rows, width, encoding, seed=1)
    weight = stored_matrix(parts, encoding, (rows, width))
    up, ids = normal(width, rows, 1), torch.arange(5, dtype=torch.int32)
    first, count = matrix_of(up), torch.tensor([5], dtype=torch.int32)
    assert first is not None
    workers = compute.Workers(1, level)
    for part in parts.keys() & {"weight", "scales", "biases"}:
        matrix = matrix_of(weight)
        assert matrix is not None
        end = parts[part].tobytes()
        place[4 * page - len(end) : 4 * page] = end
        setattr(matrix, part, start + 4 * page - len(end))
        for tokens, coarse in ((1, False), (3, False), (5, False), (5, True)):
            matrix.coarse = coarse
            x = normal(tokens, width)
            out = torch.empty(tokens, rows)
            workers.linear(x.data_ptr(), tokens, matrix, out.data_ptr())
            near = (1e-2 if coarse else 1e-3) * np.abs(decoded).max() * width**0.5
            assert np.allclose(out, x.numpy() @ decoded.T, rtol=1e-3, atol=near)
        # Experts are multiplied in another way: here by the matrix after the activation, with more than a few tokens.
        x, out = normal(5, rows, 2), torch.empty(5, rows)
        expert = compute.Expert(first, compute.Matrix(), matrix, 0)
        workers.experts(
            x.data_ptr(), 5, [compute.address(expert)], count.data_ptr(), ids.data_ptr(), ACTIVATIONS.index("relu2"),
            float("inf"), out.data_ptr(),
        )  # fmt: skip
        expected = F.relu(x @ up.T).square().numpy() @ decoded.T
        assert np.linalg.norm(out.numpy() - expected) <= 3e-2 * np.linalg.norm(expected)


FORMULAS = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "relu2": lambda gate, up: F.relu(gate).square() * up,
    "swiglu_oai": lambda gate, up: gate.clamp(max=2) * torch.sigmoid(1.702 * gate.clamp(max=2)) * (up.clamp(-2, 2) + 1),
}


def gated(name: str) -> Activation:
    return Activation(lambda x: FORMULAS[name](*x.chunk(2, dim=-1)), name, 2.0)


def random_record(
    kernels: ReferenceKernels, projections: list[Projection], seed: int = 0, weights: int | None = None
) -> object:
    """``weights``: all bytes of codes are that."""
    kind = RecordKind(tuple(projections))
    buffer = RecordBuffer(kind)
    for i, p in enumerate(projections):
        parts, _ = random_matrix(*p.shape, p.encoding, seed + i)
        if p.bias:
            values = np.random.default_rng(seed + i).standard_normal((p.shape[0], 1)).astype(np.float32)
            parts = parts | {"bias": from_float32(values, p.bias)}
        for part, array in parts.items():
            section = buffer.sections[f"{p.name}.{part}"]
            section[:] = array.view(section.dtype)
            if part == "weight" and weights is not None:
                section.view(np.uint8)[:] = weights
    return kernels.view_record(torch.from_numpy(buffer.data), kind)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bias", ["", "BF16", "F32"])
@pytest.mark.parametrize("second", [Encoding("affine", "BF16", 4, 64), Encoding("affine", "F16", 3, 32)], ids=str)
def test_experts_equal_the_reference(name: str, bias: str, second: Encoding) -> None:
    """Of one and of two matrices before the activation, several at once, with tokens of their own."""
    native, reference = NativeKernels(2), ReferenceKernels(1)
    first = Encoding("affine", "BF16", 4, 64)
    projections = [
        Projection("gate", (64, 128), first, bias),
        Projection("up", (64, 128), second, bias),
        Projection("down", (128, 64), Encoding("affine", "BF16", 6, 64), bias),
    ]
    x, rows = normal(9, 128), [[0], [8, 2, 3], [4, 4, 5, 6, 7, 1, 0]]
    results = []
    for kernels in (native, reference):
        records = [random_record(kernels, projections, seed) for seed in range(3)]
        out = torch.full((11, 128), float("nan"))
        kernels.experts(x, records, rows, gated(name), out)
        results.append(out)
    rounded = 3e-2 if takes_bytes(first, LEVELS[-1]) else 2e-3
    assert (results[0] - results[1]).abs().max() <= rounded * results[1].abs().max()
    alone = torch.empty(1, 128)
    native.experts(x, [random_record(native, projections, 1)], [[2]], gated(name), alone)
    assert torch.equal(alone, results[0][2:3])


def in_bytes(x: np.ndarray, count: int) -> np.ndarray:
    """x [tokens, width] rounded to 8 bits, with a scale for each ``count`` values."""
    parts = x.reshape(len(x), -1, count)
    scale = np.abs(parts).max(-1, keepdims=True) / 127
    return (np.rint(parts / scale) * scale).reshape(x.shape)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("encoding", [e for e in [*AFFINE, *DQ, MXFP4] if e.bits == 4], ids=str)
def test_experts_of_four_bits_with_many_tokens(encoding: Encoding, level: int) -> None:
    """Whole and half units, more tokens than a tile and a block have, activations rounded to bytes or not."""
    native = NativeKernels(2)
    native.workers = compute.Workers(2, level)
    group = encoding.group_size
    rounded = takes_bytes(encoding, level)
    for hidden, inner in ((group, 3 * group), (9 * group, group), (5 * group, 11 * group)):
        shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        records = [
            random_record(native, [Projection(n, s, encoding) for n, s in shapes.items()], seed) for seed in (0, 9)
        ]
        gate, up, down = (random_matrix(*s, encoding, i)[1].astype(np.float64) for i, s in enumerate(shapes.values()))
        x, rows = normal(80, hidden, 1), [list(range(70)), list(range(3, 80, 7))]
        out = torch.full((70 + 11, hidden), float("nan"))
        native.experts(x, records, rows, gated("silu"), out)
        seen = x[:70].numpy().astype(np.float64)
        seen = in_bytes(seen, min(64, group)) if rounded else seen
        middle = F.silu(torch.from_numpy(seen @ gate.T)).numpy() * (seen @ up.T)
        expected = (in_bytes(middle, min(64, group)) if rounded else middle) @ down.T
        error = np.linalg.norm(out[:70].numpy() - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert np.median(error) <= (1e-6 if rounded else 1e-3)
        assert error.max() <= 5e-3  # a value in the middle between two bytes may be rounded either way
        alone = torch.empty(4, hidden)
        native.experts(x, records[:1], [[9, 69, 0, 8]], gated("silu"), alone)
        assert torch.equal(alone, out[[9, 69, 0, 8]])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("encoding", [e for e in [*AFFINE, *DQ, MXFP4] if e.bits == 4], ids=str)
def test_coarse_products(encoding: Encoding, level: int) -> None:
    """As experts' with many tokens; with few they are what they would be otherwise."""
    for rows, units in ((37, 1), (6, 3), (64, 9), (3, 37)):
        width = encoding.group_size * units
        rows = whole_rows(rows, width, encoding)
        parts, decoded = random_matrix(rows, width, encoding, seed=rows)
        weight = stored_matrix(parts, encoding, (rows, width))
        coarse = replace(weight, coarse=True)
        x = states(70, width)
        together = product(x, coarse, level, threads=3)
        if not takes_bytes(encoding, level):
            assert torch.equal(together, product(x, weight, level))
        else:
            expected = in_bytes(x.numpy().astype(np.float64), min(64, encoding.group_size)) @ decoded.T
            error = np.linalg.norm(together.numpy() - expected, axis=1) / np.linalg.norm(expected, axis=1)
            assert np.median(error) <= 2e-6
            assert error.max() <= 5e-3  # a value in the middle between two bytes may be rounded either way
        for count in (4, 5, 6, 7, 66):
            assert torch.equal(product(x[-count:], coarse, level), together[-count:])
        for count in (1, 2, 3):
            assert torch.equal(product(x[:count], coarse, level), product(x[:count], weight, level))


def test_matrices_of_which_some_are_coarse_in_one_call() -> None:
    """Of the same width and encoding: each gets its own kind of activations."""
    encoding = Encoding("affine", "BF16", 4, 64)
    weight = stored_matrix(random_matrix(40, 256, encoding, seed=1)[0], encoding, (40, 256))
    weights = [replace(weight, coarse=coarse) for coarse in (False, True, False)]
    x, outs = normal(9, 256), [torch.empty(9, 40) for _ in weights]
    matrices = (compute.Matrix * 3)(*map(matrix_of, weights))
    addresses = (ctypes.c_void_p * 3)(*(out.data_ptr() for out in outs))
    workers = compute.Workers(2)
    assert workers.library.flashpack_linear(workers.handle, x.data_ptr(), 9, matrices, 3, addresses) == 0
    for one, out in zip(weights, outs, strict=True):
        assert torch.equal(out, product(x, one, LEVELS[-1]))
    assert torch.equal(outs[0], outs[1]) != takes_bytes(encoding, LEVELS[-1])


FOUR_BITS = [MXFP4, Encoding("affine", "BF16", 4, 64), Encoding("affine", "F32", 4, 32)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("encoding", FOUR_BITS, ids=str)
@pytest.mark.parametrize("size", [1, 7, 24, 45, 77])
@pytest.mark.parametrize("packed", ["before", "after"])
def test_rows_beside_whole_blocks(packed: str, size: int, encoding: Encoding, level: int) -> None:
    """Packed matrices before or after the activation have any number of rows where the others are not packed."""
    native, reference = NativeKernels(2), ReferenceKernels(1)
    native.workers = compute.Workers(2, level)
    raw = Encoding("raw", "BF16", 0, 0)
    hidden, inner, first, second = (128, size, encoding, raw) if packed == "before" else (size, 128, raw, encoding)
    projections = [Projection(n, (inner, hidden), first) for n in ("gate", "up")]
    projections.append(Projection("down", (hidden, inner), second))
    x, rows = normal(7, hidden), [[0, 1, 2, 3, 4, 5, 6], [6, 2, 4, 1]]
    results = []
    for kernels in (native, reference):
        out = torch.full((12, hidden), float("nan"))
        records = [random_record(kernels, projections, seed) for seed in (0, 5)]
        kernels.experts(x, records, rows, gated("silu"), out[:11])
        assert out[11].isnan().all()
        results.append(out[:11])
    assert (results[0] - results[1]).norm() <= 3e-2 * results[1].norm()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("encoding", FOUR_BITS, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_fit(sign: int, encoding: Encoding, level: int) -> None:
    """All activations and all codes are the largest: sums of few bits would wrap around."""
    native, reference = NativeKernels(1), ReferenceKernels(1)
    native.workers = compute.Workers(1, level)
    projections = [Projection("up", (64, 256), encoding), Projection("down", (256, 64), encoding)]
    activation = Activation(lambda h: F.relu(h).square(), "relu2")
    for weights in (0x77, 0xFF):  # MXFP4's 6 and -6, and what is large for integers
        results = []
        for kernels in (native, reference):
            out = torch.full((9, 256), float("nan"))
            record = random_record(kernels, projections, 2, weights)
            kernels.experts(sign * torch.ones(9, 256), [record], [list(range(9))], activation, out)
            results.append(out)
        assert (results[0] - results[1]).abs().max() <= 1e-2 * results[1].abs().max()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "encoding", [MXFP4, Encoding("affine", "BF16", 4, 64), Encoding("affine", "F32", 6, 32)], ids=str
)
def test_few_tokens_left_of_a_block_of_many(level: int, encoding: Encoding) -> None:
    """Gate and up take 64 at once; what is left is multiplied as few tokens are, alone and beside others."""
    native, reference = NativeKernels(2), ReferenceKernels(1)
    native.workers = compute.Workers(2, level)
    shapes = {"gate": (64, 128), "up": (64, 128), "down": (128, 64)}
    projections = [Projection(n, s, encoding) for n, s in shapes.items()]
    x = normal(140, 128, 1)
    for counts in ([65], [66], [67], [129], [130, 2], [5, 67], [4, 1]):
        rows = [list(range(count)) for count in counts]
        results = []
        for kernels in (native, reference):
            out = torch.full((sum(counts), 128), float("nan"))
            records = [random_record(kernels, projections, seed) for seed in range(len(counts))]
            kernels.experts(x, records, rows, gated("silu"), out)
            results.append(out)
        error = (results[0] - results[1]).norm(dim=1) / results[1].norm(dim=1)
        assert error.max() <= 3e-2, counts


def test_an_expert_without_gate() -> None:
    native, reference = NativeKernels(2), ReferenceKernels(1)
    e = Encoding("affine", "BF16", 4, 64)
    activation = Activation(lambda h: F.relu(h).square(), "relu2")
    results = []
    for kernels in (native, reference):
        record = random_record(kernels, [Projection("up", (64, 128), e), Projection("down", (128, 64), e)])
        out = torch.empty(2, 128)
        kernels.experts(normal(3, 128), [record], [[0, 2]], activation, out)
        results.append(out)
    assert (results[0] - results[1]).abs().max() <= 1e-3 * results[1].abs().max()


def test_an_activation_or_encoding_the_library_does_not_know_is_torchs() -> None:
    native, reference = NativeKernels(2), ReferenceKernels(1)
    e = Encoding("affine", "BF16", 4, 64)
    for encoding, activation in (
        (e, Activation(lambda h: torch.tanh(h[:, :64]))),
        (fp8("F32", (0, 0)), gated("silu")),
    ):
        results = []
        for kernels in (native, reference):
            record = random_record(kernels, [Projection(n, s, encoding) for n, s in (
                ("gate", (64, 128)), ("up", (64, 128)), ("down", (128, 64)))])  # fmt: skip
            out = torch.empty(2, 128)
            kernels.experts(normal(3, 128), [record], [[0, 2]], activation, out)
            results.append(out)
        assert (results[0] - results[1]).abs().max() <= 1e-3 * results[1].abs().max()


def test_weighted_sums_skip_what_has_no_place() -> None:
    outputs, weights = states(7, 65), torch.rand(3, 2, generator=torch.Generator().manual_seed(1))
    places = torch.tensor([[6, 0], [-1, 3], [2, -1]], dtype=torch.int32)
    expected = torch.stack([
        outputs[6] * weights[0, 0] + outputs[0] * weights[0, 1], outputs[3] * weights[1, 1], outputs[2] * weights[2, 0],
    ])  # fmt: skip
    for kernels in (NativeKernels(2), ReferenceKernels(1)):
        assert torch.allclose(kernels.combine(outputs, places, weights), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_known_by_what_they_compute(name: str) -> None:
    found = recognize(gated(name).function, gated=True, limit=2.0)
    assert (found.name, found.limit) == (name, 2.0 if name == "swiglu_oai" else 0.0)
    for other in (
        lambda x: F.silu(x[:, : x.shape[1] // 2].clamp(max=25)) * x[:, x.shape[1] // 2 :],  # a limit of its own
        lambda x: F.silu(x[:, x.shape[1] // 2 :]) * x[:, : x.shape[1] // 2],  # up first
        lambda x: F.silu(x[:, ::2]) * x[:, 1::2],  # in turns
    ):
        assert recognize(other, gated=True).name is None
    assert recognize(F.gelu, gated=False).name == "gelu"


def test_a_matrix_out_of_bounds_is_refused() -> None:
    encoding = Encoding("affine", "BF16", 4, 64)
    parts, _ = random_matrix(4, 64, encoding, seed=0)
    workers = compute.Workers(1)
    x, out = states(1, 64), torch.empty(1, 4)
    for field, value in (("bits", 7), ("group", 48), ("width", 100), ("kind", 9), ("biases", None)):
        matrix = matrix_of(stored_matrix(parts, encoding, (4, 64)))
        assert matrix is not None
        setattr(matrix, field, value)
        with pytest.raises(ValueError, match="do not know"):
            workers.linear(x.data_ptr(), 1, matrix, out.data_ptr())


RAW = [Encoding("raw", dtype, 0, 0) for dtype in ("BF16", "F16", "F32")]


@pytest.mark.parametrize("encoding", [*AFFINE, *RAW], ids=str)
def test_a_row_is_what_an_embedding_gives(encoding: Encoding) -> None:
    shape = 50, 384
    parts, _ = random_matrix(*shape, encoding, encoding.bits)
    weight = stored_matrix(parts, encoding, shape) if encoding.quantized else stored(parts["weight"], encoding.dtype)
    kernels, out = NativeKernels(1), torch.zeros(384)
    row = NativeSteps(kernels).row(weight, out)
    assert row is not None
    for i in (0, 1, 17, 49):
        row.given(i)
        row()
        assert torch.equal(out, kernels.embedding(torch.tensor([i]), weight, torch.float32)[0])
    for i in (-1, 50):
        row.given(i)
        with pytest.raises(ValueError, match="row"):
            row()


@pytest.mark.parametrize("encoding", [MXFP4, *DQ, fp8("F32", (128, 128))], ids=str)
def test_rows_of_other_encodings_are_not_known(encoding: Encoding) -> None:
    shape = 128, 256
    matrix = stored_matrix(random_matrix(*shape, encoding, 1)[0], encoding, shape)
    assert NativeSteps(NativeKernels(1)).row(matrix, torch.zeros(256)) is None


def test_what_is_built_by_hand_for_emulated_processors_still_can_be() -> None:
    tool = (ROOT / "tools" / "check_kernels.cpp").read_text()
    names = set(re.findall(r"flashpack_\w+", tool))
    assert "flashpack_run" in names
    assert [name for name in names if not hasattr(compute.library(), name)] == []


@pytest.mark.parametrize(
    "functions", [{"flashpack_kernels_abi": lambda: compute.ABI - 1}, {}], ids=["version", "other"]
)
def test_a_library_of_another_version_is_not_used(
    functions: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "load", lambda name: SimpleNamespace(**functions))
    found = compute.library.__wrapped__()
    assert isinstance(found, str)
    assert "another version" in found or "flashpack_kernels_abi" in found
    with pytest.raises(RuntimeError, match=re.escape(found)):
        compute.Workers(1, found=found)
