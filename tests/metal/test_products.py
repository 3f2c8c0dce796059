"""Products with stored matrices, and their rows, on the emulated GPU."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flashpack.formats import Encoding
from flashpack.formats.records import MXFP4, affine_dq, fp8
from flashpack.kernels import StoredMatrix
from flashpack.kernels.metal.device import Gpu
from flashpack.kernels.metal.kernels import MetalKernels
from flashpack.kernels.metal.layouts import TILE, parts_of
from tests.metal.emulator import FakeMps
from tests.metal.stored import EVERY, ONE_OF_EACH, matrix, name_of, states

TOLERANCE = 1e-6
"""Of the product of a row's and a token's norms. A lane adds up a 32nd of the products in float32, 32 sums follow;
where biases cancel, what is added up is some times larger than the result."""


def check_products(
    kernels: MetalKernels, encoding: Encoding, rows: int, width: int, tokens: int, last: int = 0
) -> None:
    weight, values = matrix(encoding, rows, width, seed=rows + width, last=last)
    x = states(tokens, width)
    found = kernels.linear(x, weight)
    exact = x.double().numpy() @ values.T.astype(np.float64)
    bound = np.linalg.norm(x.numpy(), axis=1)[:, None] * np.linalg.norm(values, axis=1)[None]
    assert found.shape == exact.shape
    assert (np.abs(found.numpy() - exact) <= TOLERANCE * bound).all()


def check_rows(kernels: MetalKernels, encoding: Encoding, rows: int, width: int, last: int = 0) -> None:
    """The values themselves, bit for bit; NaN for rows that are not there."""
    weight, values = matrix(encoding, rows, width, seed=rows + width, last=last)
    rows = len(values)
    ids = torch.tensor([[rows - 1, 0], [rows // 2, rows - 1], [rows, -1]])
    found = kernels.embedding(ids, weight, torch.float32)
    assert np.array_equal(found[:2].numpy(), values[ids[:2].numpy()])
    assert found[2].isnan().all()


def check_rows_in_the_middle_of_a_block(gpu: Gpu, first: int = 1) -> None:
    """Of a matrix that was cut from a larger one, the first row may not be the first of its block of scales."""
    for encoding in (fp8("F32", (5, 16)), affine_dq(3)):
        whole, values = matrix(encoding, 16, 96)
        part = cut(whole, 5 + first, 16)
        found = MetalKernels(gpu).embedding(torch.arange(len(part.weight)), part, torch.float32)
        assert np.array_equal(found.numpy(), values[5 + first :])


def widths(encoding: Encoding) -> list[int]:
    """Of one unit or group, ragged where it may be, and of more units than a SIMD group has lanes."""
    group = encoding.group_size
    found = [group, 3 * group, -(-560 // group) * group] if group else [1, 7, 48, 545]
    return [*found, 768] if encoding.name == "affine_dq" else found


@pytest.mark.parametrize("encoding", EVERY, ids=name_of)
def test_products_and_rows_of_every_encoding(encoding: Encoding, gpu: FakeMps) -> None:
    """Rows beside multiples of a SIMD group's, one token and several; each part is the last thing in memory."""
    kernels = MetalKernels(gpu)
    for last, width in enumerate(widths(encoding)):
        for rows in (1, 3, 5):
            check_products(kernels, encoding, rows, width, 1, last)
        check_products(kernels, encoding, 6, width, TILE + 1, last)
        check_rows(kernels, encoding, 5, width, last)


@pytest.mark.parametrize("encoding", ONE_OF_EACH, ids=name_of)
def test_large_matrices(encoding: Encoding, quick_gpu: FakeMps) -> None:
    kernels = MetalKernels(quick_gpu)
    check_products(kernels, encoding, 1021, 256, 1)
    check_products(kernels, encoding, 33, 1024, 20)


@pytest.mark.parametrize("encoding", ONE_OF_EACH, ids=name_of)
def test_results_do_not_depend_on_what_is_beside_them(encoding: Encoding, gpu: FakeMps) -> None:
    """1 to 20 tokens; rows computed with others or alone: bit for bit the same."""
    kernels = MetalKernels(gpu)
    width = encoding.group_size * 5 or 77
    weight, _ = matrix(encoding, 9, width)
    x = states(20, width)
    alone = torch.cat([kernels.linear(token, weight) for token in x.split(1)])
    for tokens in range(2, 21):
        assert torch.equal(kernels.linear(x[-tokens:], weight), alone[-tokens:])
    few = cut(weight, 4, 6)
    assert torch.equal(kernels.linear(x, few), alone[:, 4:6])


def cut(weight: Tensor | StoredMatrix, start: int, stop: int) -> Tensor | StoredMatrix:
    """Rows of a matrix."""
    if isinstance(weight, Tensor):
        return weight[start:stop]
    e, width = weight.encoding, weight.shape[1]
    parts = {part: array[e.part_rows(part, start, stop, width)] for part, array in parts_of(weight).items()}
    return replace(StoredMatrix.of(e, parts), first=e.first_in_block(start, width))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_of_16_bits(dtype: torch.dtype, quick_gpu: FakeMps) -> None:
    """They are widened, and the result is rounded to their type."""
    kernels = MetalKernels(quick_gpu)
    weight, _ = matrix(MXFP4, 5, 96)
    x = states(6, 96).to(dtype).view(2, 3, 96)
    found = kernels.linear(x, weight)
    assert found.dtype == dtype
    assert torch.equal(found, kernels.linear(x.float(), weight).to(dtype))
    ids = torch.tensor([4, 2])
    assert torch.equal(kernels.embedding(ids, weight, dtype), kernels.embedding(ids, weight, torch.float32).to(dtype))


@pytest.mark.parametrize("first", [0, 1, 3])
def test_rows_in_the_middle_of_a_block(first: int, gpu: FakeMps) -> None:
    check_rows_in_the_middle_of_a_block(gpu, first)


def test_no_tokens(quick_gpu: FakeMps) -> None:
    kernels = MetalKernels(quick_gpu)
    weight, _ = matrix(MXFP4, 5, 64)
    assert kernels.linear(torch.empty(0, 64), weight).shape == (0, 5)
    assert kernels.embedding(torch.empty(2, 0, dtype=torch.long), weight, torch.float32).shape == (2, 0, 64)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("encoding", ONE_OF_EACH, ids=name_of)
def test_what_is_not_finite_is_not_hidden(encoding: Encoding, value: float, quick_gpu: FakeMps) -> None:
    kernels = MetalKernels(quick_gpu)
    width = encoding.group_size * 5 or 77
    weight, _ = matrix(encoding, 5, width)
    x = states(3, width)
    x[1, width // 2] = value
    found = kernels.linear(x, weight)
    assert found[[0, 2]].isfinite().all()
    assert not found[1].isfinite().any()


def test_codes_and_scales_that_are_no_numbers(gpu: FakeMps) -> None:
    kernels = MetalKernels(gpu)
    for encoding in (fp8("F32", (0, 0)), fp8("F32", (0, 5)), MXFP4):
        weight, _ = matrix(encoding, 5, 96)
        assert isinstance(weight, StoredMatrix)
        part = weight.weight if encoding.name == "fp8_e4m3" else weight.scales
        part[2, 1] = 0xFF
        found = kernels.linear(states(2, 96), weight)
        assert found[:, 2].isnan().all()
        assert found[:, [0, 1, 3, 4]].isfinite().all()


@pytest.fixture
def far(tmp_path: Path) -> Tensor:
    """6 GiB in a file with holes: nothing is there before it is written."""
    with (tmp_path / "far").open("wb+") as file:
        file.truncate(6 * 2**30)
        return torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)


@pytest.mark.parametrize("encoding", [Encoding("affine", "F16", 5, 32), fp8("F32", (1, 0))], ids=str)
def test_parts_beyond_4_gib(encoding: Encoding, far: Tensor) -> None:
    """A base and offsets that 32 bits of bytes cannot hold."""
    kernels = MetalKernels(FakeMps(guarded=False))
    near, values = matrix(encoding, 6, 96)
    assert isinstance(near, StoredMatrix)
    for weight_at, scales_at, biases_at in ((5 * 2**30, 5 * 2**30 + 2**20, 5 * 2**30 + 2**21), (0, 2**32, 5 * 2**30)):
        moved = [
            far[start : start + part.nbytes].view(part.dtype).view(part.shape).copy_(part)
            for start, part in ((weight_at, near.weight), (scales_at, near.scales), (biases_at, near.biases))
            if part is not None
        ]
        weight = StoredMatrix(encoding, *moved)
        assert torch.equal(kernels.linear(states(2, 96), weight), kernels.linear(states(2, 96), near))
        assert np.array_equal(kernels.embedding(torch.arange(6), weight, torch.float32).numpy(), values)


def test_rows_beyond_4_gib(far: Tensor) -> None:
    width = 2**14
    weight = far[: 70_000 * width * 4].view(torch.float32).view(70_000, width)
    weight[-1] = torch.arange(width)
    found = MetalKernels(FakeMps(guarded=False)).embedding(torch.tensor([69_999, 69_998]), weight, torch.float32)
    assert torch.equal(found, weight[[69_999, 69_998]])


def _check(encoding: Encoding, gpu: Gpu) -> None:
    kernels = MetalKernels(gpu)
    for width in widths(encoding)[1:]:
        check_products(kernels, encoding, 9, width, 1)
        check_products(kernels, encoding, 9, width, 6)
        check_rows(kernels, encoding, 5, width)


CHECKS: dict[str, Callable[[Gpu], None]] = {
    **{
        f"products of {name_of(e)}": partial(_check, e)
        for e in [*ONE_OF_EACH, fp8("F16", (2, 7)), fp8("BF16", (0, 16))]
    },
    "rows in the middle of a block": check_rows_in_the_middle_of_a_block,
}
"""What must fail where a kernel of products.metal is broken."""
