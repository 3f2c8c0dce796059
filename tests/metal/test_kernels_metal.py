"""The device's torch operations in place of kernels, and what is said about them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashpack.formats import Encoding
from flashpack.formats.records import MXFP4, affine_dq, fp8
from flashpack.kernels import StoredMatrix
from flashpack.kernels.activations import named
from flashpack.kernels.cpu.reference import ReferenceKernels
from flashpack.kernels.metal import fallback
from flashpack.kernels.metal.kernels import MetalKernels
from flashpack.kernels.metal.source import FORMATS, PARTS, PRODUCTS
from tests.metal.emulator import FakeMps
from tests.metal.stored import EVERY, ONE_OF_EACH, matrix, name_of, states
from tests.metal.test_products import cut
from tests.metal.test_products_experts import Slots, assert_same, compute, kind_of

ALL = frozenset([f"{name}_{format}" for name in PRODUCTS for format in FORMATS] + ["combine"])


@pytest.mark.parametrize("encoding", EVERY, ids=name_of)
def test_torch_decodes_every_encoding_as_the_format_means_it(encoding: Encoding) -> None:
    for width in (encoding.group_size * 3 or 77, encoding.group_size or 1):
        weight, values = matrix(encoding, 11, width)
        assert np.array_equal(fallback.decode(weight).numpy(), values)
        ids = torch.tensor([10, 0, 3])
        assert np.array_equal(fallback.rows(ids, weight).numpy(), values[ids])


def test_torch_decodes_rows_in_the_middle_of_a_block() -> None:
    for encoding in (fp8("F32", (5, 16)), affine_dq(2)):
        whole, values = matrix(encoding, 16, 96)
        part = cut(whole, 9, 16)
        assert isinstance(part, StoredMatrix)
        assert part.first > 0
        assert np.array_equal(fallback.decode(part).numpy(), values[9:])
        assert np.array_equal(fallback.rows(torch.arange(7), part).numpy(), values[9:])


def test_large_matrices_are_decoded_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, values = matrix(fp8("F32", (5, 7)), 33, 96)
    x = states(3, 96)
    monkeypatch.setattr(fallback, "BLOCK_VALUES", 4 * 96)
    exact = x.double().numpy() @ values.T.astype(np.float64)
    assert np.abs(fallback.product(x, weight, torch.ones(33)).numpy() - 1 - exact).max() < 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("encoding", ONE_OF_EACH, ids=name_of)
def test_refused_kernels_are_not_launched(encoding: Encoding, quick_gpu: FakeMps) -> None:
    kernels = MetalKernels(quick_gpu, refused=ALL)
    width = encoding.group_size * 3 or 77
    weight, values = matrix(encoding, 11, width)
    x = states(5, width)
    assert_same(kernels.linear(x, weight), x @ torch.from_numpy(values).T)
    ids = torch.tensor([[10, 0]])
    assert np.array_equal(kernels.embedding(ids, weight, torch.float32).numpy(), values[ids])
    slots = Slots(kind_of(encoding, width, width, True, "F32"), 2)
    activation, rows = named("silu", gated=True), [[0, 3], [1]]
    found = compute(kernels, slots, x, [1, 0], rows, activation)
    assert_same(found, compute(ReferenceKernels(1), slots, x, [1, 0], rows, activation))
    assert_same(compute(kernels, slots, x[:1], [1], [[0]], activation), found[:1])
    places = torch.tensor([[0, 2], [-1, 1]], dtype=torch.int32)
    combined = kernels.combine(found, places, states(2, 2))
    assert torch.equal(combined, ReferenceKernels(1).combine(found, places, states(2, 2)))
    assert quick_gpu.launches == 0
    assert len(kernels.notices) == len(set(kernels.notices)) > 3


def test_one_refused_kernel_leaves_the_others(quick_gpu: FakeMps) -> None:
    """Nothing depends on how many tokens there are: what is refused for many is for one, too."""
    kernels = MetalKernels(quick_gpu, refused=frozenset({"linear_many_mxfp4"}))
    weight, _ = matrix(MXFP4, 5, 64)
    kernels.linear(states(1, 64), weight)
    assert quick_gpu.launches == 0
    assert len(kernels.notices) == 1
    assert "linear_many_mxfp4" in kernels.notices[0]
    kernels.embedding(torch.tensor([1]), weight, torch.float32)
    assert quick_gpu.launches == 1
    assert len(kernels.notices) == 1


def test_numbers_that_no_kernel_knows(quick_gpu: FakeMps) -> None:
    kernels = MetalKernels(quick_gpu)
    weight = torch.arange(12, dtype=torch.int32).view(3, 4)
    assert torch.equal(kernels.linear(torch.ones(1, 4), weight), weight.float().sum(1).unsqueeze(0))
    assert "int32" in kernels.notices[0]
    (view,) = Slots(kind_of(MXFP4, 32, 32), 1).views(ReferenceKernels(1))
    with pytest.raises(TypeError, match="view_record"):
        kernels.expert(states(1, 32), view, named("silu", gated=True))


def test_libraries_are_compiled_when_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    gpu = FakeMps()
    own = gpu.compile
    monkeypatch.setattr(gpu, "compile", lambda text: compiled.append(text) or own(text))
    kernels = MetalKernels(gpu)
    assert not compiled
    for _ in range(2):
        kernels.linear(states(1, 64), matrix(MXFP4, 5, 64)[0])
        kernels.combine(states(2, 8), torch.zeros(1, 2, dtype=torch.int32), states(1, 2))
    assert len(compiled) == 2
    assert set(FORMATS) < set(PARTS)


def test_waiting_is_the_devices(quick_gpu: FakeMps) -> None:
    kernels = MetalKernels(quick_gpu)
    before = quick_gpu.waits
    kernels.commit()
    kernels.wait()
    assert (quick_gpu.commits, quick_gpu.waits - before) == (1, 1)
