"""GPTQ on matrices of the trained model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashpack.converter.gptq import gptq
from flashpack.formats.encodings import decode
from flashpack.formats.records import Encoding, affine_dq
from tests.converter.experts import inputs, matrices

ENCODINGS = [
    Encoding("affine", "BF16", 2, 64),
    Encoding("affine", "F32", 3, 32),
    Encoding("affine", "BF16", 4, 128),
    affine_dq(2),
    affine_dq(3),
    affine_dq(4),
]
NEAREST = torch.eye(256)
"""With this H no error is made up for: every group is rounded as well as it can be."""


@pytest.fixture(scope="module")
def matrix() -> Tensor:
    """[2, 64, 256]: gate and up of one expert."""
    found = matrices()
    return torch.from_numpy(np.stack([found["gate"], found["up"]]))


@pytest.fixture(scope="module")
def hessian() -> Tensor:
    """[256, 256]"""
    x = inputs(2000)
    return x.T @ x / 2000


def values(parts: dict[str, NDArray[np.generic]], encoding: Encoding, matrix: Tensor) -> Tensor:
    return torch.from_numpy(decode(encoding, parts, tuple(matrix.shape)))


def error(found: Tensor, matrix: Tensor, hessian: Tensor) -> float:
    lost = (found - matrix).double()
    return float(((lost @ hessian.double()) * lost).sum())


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_outputs_change_less_than_by_rounding_to_nearest(encoding: Encoding, matrix: Tensor, hessian: Tensor) -> None:
    nearest, once, twice = (
        error(values(gptq(matrix, h, encoding, refined), encoding, matrix), matrix, hessian)
        for h, refined in ((NEAREST, False), (hessian, False), (hessian, True))
    )
    assert once < 0.5 * nearest
    assert twice < 0.95 * once


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_parts_are_those_of_the_encoding(encoding: Encoding, matrix: Tensor, hessian: Tensor) -> None:
    parts = gptq(matrix, hessian, encoding, refined=True)
    expected = encoding.parts(tuple(matrix.shape))
    assert {name: array.shape for name, array in parts.items()} == {
        name: shape for name, (_, shape) in expected.items()
    }


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_matrices_side_by_side_are_as_alone(encoding: Encoding, matrix: Tensor, hessian: Tensor) -> None:
    together = gptq(matrix, hessian, encoding, refined=False)
    for i in range(2):
        alone = values(gptq(matrix[i], hessian, encoding, refined=False), encoding, matrix[i])
        both = values({name: array[i] for name, array in together.items()}, encoding, matrix[i])
        assert error(both, matrix[i], hessian) == pytest.approx(error(alone, matrix[i], hessian), rel=0.02)


def test_blocks_may_span_rows(matrix: Tensor, hessian: Tensor) -> None:
    """64 input values: 4 rows share a block."""
    narrow, own = matrix[0, :, :64].contiguous(), hessian[:64, :64]
    encoding = affine_dq(3)
    nearest, found = (
        error(values(gptq(narrow, h, encoding, refined=True), encoding, narrow), narrow, own)
        for h in (torch.eye(64), own)
    )
    assert found < 0.6 * nearest


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_constant_groups_are_exact(encoding: Encoding, hessian: Tensor) -> None:
    matrix = torch.zeros(8, 256)
    matrix[:, 128:] = 0.5
    matrix[3] = -2
    found = values(gptq(matrix, hessian, encoding, refined=True), encoding, matrix)
    assert torch.allclose(found, matrix, atol=0.02)
    assert torch.equal(found[3], matrix[3])


def test_same_bytes_again(matrix: Tensor, hessian: Tensor) -> None:
    for encoding in ENCODINGS:
        first, second = (gptq(matrix, hessian, encoding, refined=True) for _ in range(2))
        assert all(np.array_equal(first[name], second[name]) for name in first)
