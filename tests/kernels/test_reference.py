"""The torch kernels against the numpy meaning of the format, over odd shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashpack.errors import DeviceError
from flashpack.formats import Encoding, Projection, RecordKind, affine
from flashpack.formats.constants import AFFINE_BITS
from flashpack.formats.dtypes import from_float32, to_float32
from flashpack.formats.writer import RecordBuffer
from flashpack.kernels import StoredMatrix, get_kernels
from flashpack.kernels.cpu.reference import BLOCK_VALUES

KERNELS = get_kernels("cpu")
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def stored(array: np.ndarray, dtype: str) -> torch.Tensor:
    if dtype == "BF16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def random_matrix(rows: int, width: int, encoding: Encoding, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(stored parts, decoded float32 values)"""
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
    matrix = StoredMatrix(
        encoding,
        torch.from_numpy(parts["weight"].view(np.int32)),
        stored(parts["scales"], dtype),
        stored(parts["biases"], dtype),
    )
    assert matrix.shape == (rows, width)
    x = np.random.default_rng(9).standard_normal((3, width)).astype(np.float32)
    expected = x.astype(np.float64) @ decoded.T.astype(np.float64)
    found = KERNELS.linear(torch.from_numpy(x), matrix).numpy()
    # Sums of `width` float32 products of size 1.
    assert np.abs(found - expected).max() < 2e-6 * width
    ids = torch.tensor([[rows - 1, 0, rows // 2]])
    assert np.array_equal(KERNELS.embedding(ids, matrix, torch.float32).numpy()[0], decoded[ids[0].numpy()])


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_no_tokens_and_more_tokens_than_a_block(bits: int) -> None:
    encoding = Encoding("affine", "BF16", bits, 64)
    parts, decoded = random_matrix(50, 128, encoding, bits)
    words = torch.from_numpy(parts["weight"].view(np.int32))
    matrix = StoredMatrix(encoding, words, stored(parts["scales"], "BF16"), stored(parts["biases"], "BF16"))
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
    ],
)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(("hidden", "width"), [(128, 40), (256, 128)])
def test_an_expert_from_its_record(
    gated: bool, first: Encoding, second: Encoding, tokens: int, hidden: int, width: int
) -> None:
    """gate in one encoding, up in another, odd widths: sections with and without gaps between them."""
    down = Encoding("raw", "BF16") if width % 128 else first
    projections = [Projection("up", (width, hidden), second), Projection("down", (hidden, width), down)]
    if gated:
        projections.insert(0, Projection("gate", (width, hidden), first))
    kind = RecordKind(tuple(projections))
    buffer = RecordBuffer(kind)
    decoded = {}
    for seed, p in enumerate(projections):
        parts, decoded[p.name] = random_matrix(*p.shape, p.encoding, seed)
        for part, array in parts.items():
            section = buffer.sections[f"{p.name}.{part}"]
            section[:] = array.view(section.dtype)
    record = KERNELS.view_record(torch.from_numpy(buffer.data), kind)
    x = np.random.default_rng(5).standard_normal((tokens, hidden)).astype(np.float32)

    def activation(h: torch.Tensor) -> torch.Tensor:
        if not gated:
            return torch.relu(h)
        gate, up = h.chunk(2, dim=-1)
        return torch.relu(gate) * up

    found = KERNELS.expert(torch.from_numpy(x), record, activation).numpy()
    up = x.astype(np.float64) @ decoded["up"].T
    inner = np.maximum(x.astype(np.float64) @ decoded["gate"].T, 0) * up if gated else np.maximum(up, 0)
    expected = inner @ decoded["down"].T
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_equal_gate_and_up_are_used_as_one_matrix() -> None:
    encoding = Encoding("affine", "BF16", 4, 64)
    kind = RecordKind(tuple(Projection(n, (64, 64), encoding) for n in ("gate", "up", "down")))
    record = KERNELS.view_record(torch.zeros(kind.stride, dtype=torch.uint8), kind)
    assert [m.shape for m in record.first] == [(128, 64)]


def test_a_device_without_kernels_is_refused() -> None:
    with pytest.raises(DeviceError, match="cuda"):
        get_kernels("cuda")
