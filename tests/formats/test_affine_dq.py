"""The affine_dq encoding: its values by definition, its rows, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from flashpack.errors import FormatError
from flashpack.formats import Encoding
from flashpack.formats.affine import unpack_bits
from flashpack.formats.dtypes import to_float32
from flashpack.formats.encodings import decode
from flashpack.formats.records import affine_dq
from tests.formats.test_encodings import random_parts, same

SHAPES = [(1, 256), (8, 32), (8, 96), (4, 64), (3, 512), (16, 1056)]
"""Blocks of whole rows, of several rows, and such as begin within rows."""


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_value_is_that_of_its_group_and_block(bits: int, shape: tuple[int, int]) -> None:
    encoding = affine_dq(bits)
    parts = random_parts(encoding, shape, bits)
    codes, numbers = unpack_bits(parts["weight"], bits), to_float32(parts["blocks"], "BF16")
    expected = np.empty(shape, np.float32)
    for i, j in np.ndindex(shape):
        byte = int(parts["scales"][i, j // 32])
        d, c, m = numbers[(i * shape[1] + j) // 256]
        scale, bias = d * np.float32(byte & 15), c + m * np.float32(byte >> 4)
        expected[i, j] = np.float32(codes[i, j]) * scale + bias
    assert same(decode(encoding, parts, shape), expected)


def test_the_example_of_the_specification() -> None:
    parts = {
        "weight": np.full((1, 16), 0b11_10_01_00 * 0x01010101, "<u4"),
        "scales": np.full((1, 8), 0x23, "u1"),
        "blocks": np.frombuffer(bytes.fromhex("003f80bf803e"), "<u2").reshape(1, 3),
    }
    assert decode(affine_dq(2), parts, (1, 256))[0, :4].tolist() == [-0.5, 1, 2.5, 4]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_decoded_as_in_the_whole(bits: int, shape: tuple[int, int]) -> None:
    encoding, (rows, width) = affine_dq(bits), shape
    parts = random_parts(encoding, shape)
    whole = decode(encoding, parts, shape)
    for start in range(rows):
        for stop in range(start + 1, rows + 1):
            cut = {part: array[encoding.part_rows(part, start, stop, width)] for part, array in parts.items()}
            first = encoding.first_in_block(start, width)
            assert same(decode(encoding, cut, (stop - start, width), first), whole[start:stop])
            if start % encoding.whole_rows(width) == 0:
                assert first == 0


def test_a_stack_is_decoded_at_once() -> None:
    encoding, shape = affine_dq(3), (8, 96)
    single = [random_parts(encoding, shape, seed) for seed in range(3)]
    stack = {part: np.stack([parts[part] for parts in single]) for part in single[0]}
    assert {p: a.shape for p, a in stack.items()} == {p: s for p, (_, s) in encoding.parts((3, *shape)).items()}
    expected = np.stack([decode(encoding, parts, shape) for parts in single])
    assert same(decode(encoding, stack, (3, *shape)), expected)


def test_bits_and_json() -> None:
    for bits in (2, 3, 4):
        encoding = affine_dq(bits)
        assert encoding.bits_per_weight() == bits + 0.4375
        assert Encoding.from_json(encoding.to_json()) == encoding
    parts = affine_dq(2).parts((16, 96))
    assert {part: dtype for part, (dtype, _) in parts.items()} == {"weight": "U32", "scales": "U8", "blocks": "BF16"}


@pytest.mark.parametrize(("shape", "message"), [((16, 48), "not a multiple of 32"), ((1, 96), "not in blocks of 256")])
def test_other_shapes_are_refused(shape: tuple[int, int], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        affine_dq(2).parts(shape)


@pytest.mark.parametrize("numbers", [("BF16", 5, 32), ("BF16", 2, 64), ("F16", 2, 32), ("BF16", 1, 32), ("BF16", 0, 0)])
def test_other_parameters_are_refused(numbers: tuple[str, int, int]) -> None:
    with pytest.raises(FormatError, match="parameter out of range"):
        Encoding("affine_dq", *numbers)
