"""Bits of the kernels' results depend on neither the number of threads nor where operands lie in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from flashpack.formats import Encoding, Projection, RecordKind
from flashpack.formats.records import MXFP4, fp8, nvfp4
from flashpack.kernels import StoredMatrix, get_kernels
from flashpack.kernels.cpu.pool import Pool
from flashpack.kernels.cpu.reference import BLOCK_VALUES

THREADS = (1, 2, 3, 5)
TOKENS = (1, 2, 3, 5, 16, 31, 100)
SHAPES = [(1, 64), (97, 128), (300, 64), (67, 320), (682, 768), (257, 2048), (2051, 320), (20, BLOCK_VALUES // 8)]


@pytest.fixture(autouse=True)
def torch_threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def affine_matrix(rows: int, width: int, bits: int, seed: int) -> StoredMatrix:
    g = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (rows, width * bits // 32), generator=g).to(torch.int32)
    scales, biases = (torch.randn(rows, width // 32, generator=g).bfloat16() for _ in range(2))
    return StoredMatrix(Encoding("affine", "BF16", bits, 32), words, scales, biases)


FLOATS = {"mxfp4": MXFP4, "nvfp4": nvfp4("divide"), "fp8": fp8("BF16", (48, 100))}


def float_matrix(rows: int, width: int, encoding: Encoding, seed: int) -> StoredMatrix:
    """Any codes but those of NaN, scales about 1."""
    g = torch.Generator().manual_seed(seed)
    parts = {}
    for part, (dtype, shape) in encoding.parts((rows, width)).items():
        if dtype == "U32":
            parts[part] = torch.randint(-(2**31), 2**31, shape, generator=g).to(torch.int32)
        elif dtype == "U8":
            low, high = {"mxfp4": (122, 131), "nvfp4": (0x30, 0x41)}.get(encoding.name, (0, 127))
            parts[part] = torch.randint(low, high, shape, generator=g).to(torch.uint8)
        else:
            parts[part] = torch.randn(shape, generator=g).to(torch.bfloat16 if dtype == "BF16" else torch.float32)
    return StoredMatrix.of(encoding, parts)


def moved(x: Tensor, floats: int) -> Tensor:
    """A copy of ``x`` (float32) that begins ``floats`` values after a multiple of 64 bytes."""
    buffer = torch.empty(x.numel() + floats)
    assert buffer.data_ptr() % 64 == 0
    return buffer[floats:].view(x.shape).copy_(x)


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("weight", ["2", "3", "4", "8", "bf16", "f32", *FLOATS])
def test_a_product_has_the_same_bits_on_any_number_of_threads(rows: int, width: int, weight: str) -> None:
    g = torch.Generator().manual_seed(rows)
    matrix: Tensor | StoredMatrix
    if weight in ("bf16", "f32"):
        matrix = torch.randn(rows, width, generator=g)
        matrix = matrix.bfloat16() if weight == "bf16" else matrix
    elif weight in FLOATS:
        matrix = float_matrix(rows, width, FLOATS[weight], rows)
    else:
        matrix = affine_matrix(rows, width, int(weight), rows)
    for tokens in TOKENS:
        x = torch.randn(tokens, width, generator=g)
        results = []
        for threads in THREADS:
            torch.set_num_threads(threads)
            results.append(get_kernels("cpu", threads).linear(x, matrix))
            assert torch.get_num_threads() == threads
        assert results[0].isfinite().all()
        assert all(torch.equal(results[0], r) for r in results[1:]), tokens


@pytest.mark.parametrize(("hidden", "width"), [(96, 160), (320, 1056), (2048, 768)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", ["", "BF16"])
def test_an_expert_has_the_same_bits_on_any_number_of_threads(
    hidden: int, width: int, dtype: torch.dtype, bias: str
) -> None:
    """The activation's, too: torch computes the last values of a thread's share by other code."""
    encoding = Encoding("affine", "BF16", 4, 32)
    kind = RecordKind(
        (
            Projection("gate", (width, hidden), encoding, bias),
            Projection("up", (width, hidden), encoding, bias),
            Projection("down", (hidden, width), encoding, bias),
        )
    )
    rng = np.random.default_rng(hidden)
    record = torch.from_numpy(rng.integers(0, 256, kind.stride, dtype=np.uint8))
    view = get_kernels("cpu").view_record(record, kind)
    for matrix in (*view.first, view.down):
        assert isinstance(matrix, StoredMatrix)
        for part in (matrix.scales, matrix.biases):
            assert part is not None
            part.copy_(torch.from_numpy(rng.standard_normal(part.shape) / 64))
    for part in (*view.first_bias, view.down_bias):
        assert (part is not None) == bool(bias)
        if part is not None:
            part.copy_(torch.from_numpy(rng.standard_normal(part.shape)))

    def activation(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    for tokens in (1, 3, 47, 129):
        x = torch.from_numpy(rng.standard_normal((tokens, hidden))).to(dtype)
        results = []
        for threads in THREADS:
            torch.set_num_threads(threads)
            with torch.inference_mode(threads % 2 == 1):
                results.append(get_kernels("cpu", threads).expert(x, view, activation))
        assert results[0].isfinite().all()
        assert all(torch.equal(results[0], r) for r in results[1:]), tokens


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_a_product_has_the_same_bits_wherever_its_operands_lie(rows: int, width: int) -> None:
    g = torch.Generator().manual_seed(rows)
    kernels = get_kernels("cpu", 2)
    for tokens in TOKENS:
        x, weight = torch.randn(tokens, width, generator=g), torch.randn(rows, width, generator=g)
        expected = kernels.linear(x, weight)
        for floats in (1, 2, 4, 7, 8, 15):
            assert torch.equal(kernels.linear(moved(x, floats), weight), expected)
            assert torch.equal(kernels.linear(x, moved(weight, floats)), expected)
        strided = torch.empty(tokens, 2 * width + 1)[:, 1 : width + 1].copy_(x)
        assert torch.equal(kernels.linear(strided, weight), expected)


def test_every_piece_runs_once_on_one_torch_thread_and_all_threads_take_part() -> None:
    pool = Pool(3)
    torch.set_num_threads(4)
    seen: list[tuple[int, int, str]] = []

    def work(piece: int) -> None:
        time.sleep(0.01)
        seen.append((piece, torch.get_num_threads(), threading.current_thread().name))

    pool.run(work, range(30))
    assert sorted(piece for piece, _, _ in seen) == list(range(30))
    assert {threads for _, threads, _ in seen} == {1}
    assert len({name for _, _, name in seen}) == 3
    assert torch.get_num_threads() == 4


def test_helpers_stay_on_one_torch_thread_whatever_the_caller_sets() -> None:
    torch.set_num_threads(4)
    helpers = Pool(3)._started()
    assert [helpers.submit(torch.get_num_threads).result() for _ in range(6)] == [1] * 6
    torch.set_num_threads(2)
    assert [helpers.submit(torch.get_num_threads).result() for _ in range(6)] == [1] * 6


def test_a_pool_leaves_the_torch_threads_of_later_threads_alone() -> None:
    torch.set_num_threads(3)
    Pool(3).run(lambda piece: None, range(9))
    found: list[int] = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [3]


@pytest.mark.parametrize("bad", [0, 17])
def test_an_error_in_a_piece_is_raised_after_all_threads_have_stopped(bad: int) -> None:
    running: set[int] = set()

    def work(piece: int) -> None:
        running.add(piece)
        try:
            time.sleep(0.005)
            if piece == bad:
                raise ValueError(f"piece {piece}")
        finally:
            running.remove(piece)

    pool = Pool(3)
    torch.set_num_threads(2)
    with pytest.raises(ValueError, match=f"piece {bad}"):
        pool.run(work, range(20))
    assert not running
    assert torch.get_num_threads() == 2
    done: list[int] = []
    pool.run(done.append, range(5))
    assert sorted(done) == list(range(5))
