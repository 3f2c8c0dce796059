"""The one definition of the block layouts, and where host code says that matrices lie."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flashpack.formats import constants as C
from flashpack.formats.affine import pack_bits, unpack_bits
from flashpack.formats.floats import E2M1, E4M3, E8M0
from flashpack.formats.records import MXFP4
from flashpack.kernels import RecordView, StoredMatrix
from flashpack.kernels.cpu.reference import ReferenceKernels
from flashpack.kernels.metal import layouts
from flashpack.kernels.metal.kernels import MetalKernels
from flashpack.kernels.metal.source import FORMATS, PARTS, PRODUCTS, source
from tests.metal.emulator import FakeMps
from tests.metal.lint import lint
from tests.metal.stored import matrix, record
from tests.metal.test_products_experts import AFFINE4, kind_of

MEANING = """
#include <metal_stdlib>
BLOCKS
using namespace metal;

// What a code of so many bits is in a stream of words, and what is said about it.
kernel void codes(
    device const uint* words [[buffer(0)]], device uint* found [[buffer(1)]], constant uint& bits [[buffer(2)]],
    uint i [[thread_position_in_grid]])
{
    uint word = words[blocks::word_of(bits, i)] >> blocks::shift_of(bits, i);
    if (blocks::is_split(bits, i))
        word |= words[blocks::word_of(bits, i) + 1] << (32 - blocks::shift_of(bits, i));
    found[i] = word & blocks::mask_of(bits);
}

kernel void floats(
    device float* found [[buffer(0)]], device uint* bits [[buffer(1)]], uint i [[thread_position_in_grid]])
{
    const half2 pair = as_type<half2>(blocks::fp4_halves((i & 15) | (15 - (i & 15)) << 16));
    found[i] = float(pair.x) * float(blocks::FP4_SCALE);
    found[256 + i] = float(pair.y) * float(blocks::FP4_SCALE);
    found[512 + i] = float(blocks::twice_fp4(i & 15)) / 2.0f;
    const float value = float(as_type<half>(ushort(blocks::fp8_half(i)))) * float(blocks::FP8_SCALE);
    found[768 + i] = blocks::fp8_is_nan(i) ? NAN : value;
    bits[i] = blocks::e8m0_bits(i);
}

kernel void numbers(device uint* found [[buffer(0)]])
{
    const uint all[13] = {
        blocks::BF16, blocks::F16, blocks::F32, blocks::E8M0, blocks::E4M3, blocks::NIBBLES, blocks::GLOBAL_NONE,
        blocks::GLOBAL_MULTIPLY, blocks::GLOBAL_DIVIDE, blocks::MXFP4_GROUP, blocks::NVFP4_GROUP, blocks::DQ_GROUP,
        blocks::DQ_GROUPS};
    for (uint i = 0; i < 13; i++)
        found[i] = all[i];
    for (uint i = 0; i < 6; i++)
        found[13 + i] = blocks::size_of(i);
}
"""
FOLDER = Path(layouts.__file__).parent


@pytest.fixture
def meaning(quick_gpu: FakeMps):  # type: ignore[no-untyped-def]
    return quick_gpu.compile(MEANING.replace("BLOCKS", (FOLDER.parent / "blocks.h").read_text()))


@pytest.mark.parametrize("bits", C.AFFINE_BITS)
def test_places_of_codes_are_the_formats(bits: int, meaning) -> None:  # type: ignore[no-untyped-def]
    codes = np.random.default_rng(bits).integers(0, 2**bits, 96, np.uint8)
    words = pack_bits(codes, bits)
    found = torch.zeros(96, dtype=torch.int32)
    meaning.codes(torch.from_numpy(words.view(np.int32)), found, torch.tensor([bits], dtype=torch.int32), threads=96)
    assert np.array_equal(found.numpy(), unpack_bits(words, bits))


def test_small_floats_are_the_formats(meaning) -> None:  # type: ignore[no-untyped-def]
    found, bits = torch.zeros(1024), torch.zeros(256, dtype=torch.int32)
    meaning.floats(found, bits, threads=256)
    low, high, twice, wide = found.view(4, 256).numpy()
    assert np.array_equal(low, np.tile(E2M1, 16))
    assert np.array_equal(high, np.tile(E2M1[::-1], 16))
    assert np.array_equal(twice, np.tile(E2M1, 16))
    assert np.array_equal(wide, E4M3, equal_nan=True)
    assert np.array_equal(bits.numpy().view(np.float32), E8M0, equal_nan=True)


def test_numbers_are_those_of_the_host(meaning) -> None:  # type: ignore[no-untyped-def]
    found = torch.zeros(19, dtype=torch.int32)
    meaning.numbers(found, threads=1)
    assert layouts.NUMBERS == ("BF16", "F16", "F32", "E8M0", "E4M3", "nibbles")
    assert C.GLOBAL_SCALES == ("none", "multiply", "divide")
    groups = [C.MXFP4_GROUP, C.NVFP4_GROUP, C.DQ_GROUP, C.DQ_BLOCK // C.DQ_GROUP]
    assert found.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, *groups, 2, 2, 4, 1, 1, 1]


def test_sizes_are_those_of_the_kernels() -> None:
    text = source("affine4")
    sizes = dict(re.findall(r"^constant constexpr uint (\w+) = (\d+);", text, re.M))
    for name in ("UNIT", "ROWS", "TILE", "MATRICES", "SIMDS"):
        assert int(sizes[name]) == getattr(layouts, name)
    (layout,) = re.findall(r"^struct Layout \{(.*?)\};", text, re.M | re.S)
    assert layout.count("uint ") == layouts.WORDS
    weight = matrix(AFFINE4, 2, 32)[0]
    assert len(layouts.layout_of(weight, None, {})) == layouts.WORDS


@pytest.mark.parametrize("part", [*FORMATS, "combine"])
def test_every_part_is_metal(part: str, quick_gpu: FakeMps) -> None:
    text = source(part)
    assert text.count("#include") == 1
    assert lint(text) == []
    names = [f"{name}_{part}" for name in PRODUCTS] if part in FORMATS else [part]
    assert dir(quick_gpu.compile(text)) == sorted(names)


def test_all_parts_are_one_source() -> None:
    text = source()
    assert text.count("#include") == 1
    for part in PARTS:
        assert part in text
    for name in FORMATS:
        assert f"PRODUCTS({name}, " in text


def parts(weight: Tensor | StoredMatrix) -> list[Tensor]:
    return list(layouts.parts_of(weight).values())


def test_parts_that_lie_together_stay_where_they_are() -> None:
    piece = torch.arange(4096).to(torch.uint8)
    views = [piece[192:256].view(torch.int32), piece[1024:1040].view(torch.bfloat16), piece[80:100]]
    where = layouts.locate(views)
    assert where is not None
    assert where.slab.data_ptr() == piece.data_ptr()
    assert len(where.slab) == len(piece)
    assert (where.base, where.offsets) == (1, (8, 60, 1))
    again = layouts.locate(views[:1])
    assert again is not None
    assert again.slab is where.slab


@pytest.mark.parametrize(
    "views",
    [
        lambda piece, other: [piece[64:128], other],
        lambda piece, other: [piece[64:128], piece[136:200]],
        lambda piece, other: [piece[64:128], piece[256:384].view(8, 16)[:, :8]],
    ],
)
def test_parts_that_do_not_are_copied(views) -> None:  # type: ignore[no-untyped-def]
    arrays = views(torch.arange(512).to(torch.uint8), torch.arange(100))
    assert layouts.locate(arrays) is None
    where = layouts.moved(arrays)
    for array, offset in zip(arrays, where.offsets, strict=True):
        start = offset * layouts.OFFSET
        assert torch.equal(where.slab[start : start + array.nbytes].view(array.dtype).view(array.shape), array)


def test_records_are_never_copied(quick_gpu: FakeMps) -> None:
    kind = kind_of(AFFINE4, 64, 96)
    kernels = MetalKernels(quick_gpu)
    arena = torch.zeros(3 * kind.stride + 64, dtype=torch.uint8)
    first, second = (kernels.view_record(arena[start : start + kind.stride], kind) for start in (64, 64 + kind.stride))
    assert first.slab.data_ptr() == second.slab.data_ptr() == arena.data_ptr()  # type: ignore[attr-defined]
    assert first.bound is second.bound  # type: ignore[attr-defined]
    assert second.base - first.base == kind.stride // layouts.BASE  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="multiples of 16"):
        kernels.view_record(arena[8 : 8 + kind.stride], kind)


def test_a_network_of_unknown_numbers(quick_gpu: FakeMps) -> None:
    kind = kind_of(MXFP4, 64, 96)
    view = ReferenceKernels(1).view_record(record(kind), kind)
    odd = RecordView(view.first, torch.ones(96, 64, dtype=torch.int32), view.first_bias, view.down_bias)
    assert MetalKernels(quick_gpu).bound_record(odd, copy=True) is None
