"""Every source format against its definition: values, what the pack holds instead of them, rows of a matrix."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest

from flashpack.converter.source import Checkpoint, open_checkpoint
from flashpack.converter.tensor import SourceTensor
from flashpack.converter.weights import read_tensors
from flashpack.formats.encodings import decode
from tests.converter.variants import E2M1, VARIANTS, Variant, e4m3, nibbles, write_checkpoint

ROWS, COLUMNS = 96, 64


def opened(folder: Path, tensors: dict[str, tuple[str, np.ndarray]], config: dict[str, object]) -> Checkpoint:
    return open_checkpoint(write_checkpoint(folder, tensors, config))


def stored_values(tensor: SourceTensor, checkpoint: Checkpoint) -> np.ndarray:
    """What the pack's encoding makes of the stored arrays."""
    encoding = tensor.encoding
    assert encoding is not None
    arrays = tensor.stored(checkpoint.folder)
    expected = encoding.parts(tensor.shape)
    assert {part: array.shape for part, array in arrays.items()} == {
        part: shape for part, (_, shape) in expected.items()
    }
    values: np.ndarray = decode(encoding, arrays, tensor.shape)
    return values


@pytest.fixture(params=VARIANTS)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Variant, Checkpoint, SourceTensor, np.ndarray]:
    """A matrix in one of the formats, and its values."""
    variant = VARIANTS[request.param]
    parts, values = variant.make(np.random.default_rng(zlib.crc32(request.param.encode())), ROWS, COLUMNS)
    checkpoint = opened(tmp_path / "source", {f"m.{part}": stored for part, stored in parts.items()}, variant.config)
    tensors, label = read_tensors(checkpoint)
    assert label == variant.label
    return variant, checkpoint, tensors["m.weight"], values


Made = tuple[Variant, Checkpoint, SourceTensor, np.ndarray]


def test_values_are_those_of_the_formats_definition(made: Made) -> None:
    _, checkpoint, tensor, values = made
    assert tensor.shape == values.shape
    assert np.array_equal(tensor.values(checkpoint.folder), values)


def test_what_the_pack_stores_decodes_to_the_same_bits(made: Made) -> None:
    variant, checkpoint, tensor, _ = made
    assert (None if tensor.encoding is None else str(tensor.encoding)) == variant.encoding
    if tensor.encoding is not None:
        values = tensor.values(checkpoint.folder)
        assert np.array_equal(stored_values(tensor, checkpoint).view(np.uint32), values.view(np.uint32))


def test_any_rows_can_be_taken(made: Made) -> None:
    _, checkpoint, tensor, values = made
    for rows in (slice(0, 32), slice(32, 96), slice(5, 40), slice(1, 96, 2), slice(40, 41), slice(7, 90, 3)):
        some = tensor.rows(rows.start, len(range(ROWS)[rows]), rows.step or 1)
        assert np.array_equal(some.values(checkpoint.folder), values[rows])
        if some.encoding is not None:
            assert np.array_equal(stored_values(some, checkpoint), values[rows])
        last = some.rows(some.shape[0] - 1, 1)
        assert np.array_equal(last.values(checkpoint.folder), values[rows][-1:])
        if last.encoding is not None:
            assert np.array_equal(stored_values(last, checkpoint), values[rows][-1:])


def test_whole_blocks_of_rows_stay_exact_and_read_no_others(made: Made) -> None:
    variant, _, tensor, _ = made
    block = tensor.rows(32, 32)
    assert block.encoding == tensor.encoding
    if not variant.label.startswith(("gptq", "awq")):
        assert block.nbytes <= tensor.nbytes / 2


def test_the_main_part_and_all_others_become_one_tensor(made: Made) -> None:
    _, checkpoint, _, _ = made
    tensors, _ = read_tensors(checkpoint)
    assert [name for name in tensors if not name.endswith(("input_scale", "input_global_scale"))] == ["m.weight"]


@pytest.mark.parametrize("scales", [(4, 2, 2), (4, 1, 1), (4,), (1,), (4, 48, 1)])
def test_fp8_of_fused_experts_is_taken_apart(tmp_path: Path, scales: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 0x7F, (4, 48, 64), dtype=np.uint8)
    scale = rng.uniform(0.01, 0.02, scales).astype(np.float32)
    stored = {"x.gate_up_proj": ("F8_E4M3", codes), "x.gate_up_proj_scale_inv": ("F32", scale)}
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [24, 32]}}
    checkpoint = opened(tmp_path, stored, config)
    tensor = read_tensors(checkpoint)[0]["x.gate_up_proj"]
    for e in range(4):
        own = scale if scales == (1,) else scale[e]
        wide = np.broadcast_to(own, own.shape)
        if own.size == 4:
            wide = np.repeat(np.repeat(own, 24, axis=0), 32, axis=1)
        expected = e4m3(codes[e]).astype(np.float32) * wide
        assert np.array_equal(tensor.expert(e).values(checkpoint.folder), expected)
        upper = tensor.expert(e).rows(24, 24)
        assert np.array_equal(stored_values(upper, checkpoint), expected[24:])


def test_gpt_oss_blocks_have_rows_and_columns_exchanged(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 16, (3, 48, 64))
    scale = rng.integers(0, 255, (3, 48, 2), dtype=np.uint8)
    blocks = nibbles(codes.reshape(-1, 64)).reshape(3, 48, 2, 16)
    stored = {"x.gate_up_proj_blocks": ("U8", blocks), "x.gate_up_proj_scales": ("U8", scale)}
    checkpoint = opened(tmp_path, stored, {"quantization_config": {"quant_method": "mxfp4"}})
    tensors, label = read_tensors(checkpoint)
    tensor = tensors["x.gate_up_proj"]
    assert (label, tensor.shape) == ("mxfp4", (3, 64, 48))
    with np.errstate(over="ignore"):
        expected = (E2M1[codes] * np.repeat(2.0 ** (scale.astype(float) - 127), 32, axis=2)).astype(np.float32)
    for e in range(3):
        assert np.array_equal(tensor.expert(e).values(checkpoint.folder), expected[e].T)
        odd = tensor.transpose().expert(e).rows(1, 24, 2)  # up: the odd rows
        assert np.array_equal(stored_values(odd, checkpoint), expected[e][1::2])


def test_stacked_mlx_experts_are_taken_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    made = [VARIANTS["mlx-mxfp4"].make(rng, 32, 64) for _ in range(3)]
    stem = "model.layers.0.mlp.switch_mlp.up_proj"
    stored = {
        f"{stem}.{part}": (dtype, np.stack([m[0][part][1] for m in made])) for part, (dtype, _) in made[0][0].items()
    }
    checkpoint = opened(tmp_path, stored, VARIANTS["mlx-mxfp4"].config)
    tensor = read_tensors(checkpoint)[0]["model.layers.0.mlp.experts.*.up_proj.weight"]
    for e in range(3):
        assert np.array_equal(stored_values(tensor.expert(e), checkpoint), made[e][1])


def test_modules_of_an_mlx_checkpoint_may_have_modes_of_their_own(tmp_path: Path) -> None:
    """An override without a mode is affine, whatever the mode of the others is."""
    rng = np.random.default_rng(4)
    names = {"a": "mlx-mxfp4", "b": "mlx-nvfp4", "c": "mlx-affine-8"}
    made = {stem: VARIANTS[name].make(rng, 32, 64) for stem, name in names.items()}
    stored = {f"{stem}.{part}": s for stem, (parts, _) in made.items() for part, s in parts.items()}
    overrides = {"b": {"bits": 4, "group_size": 16, "mode": "nvfp4"}, "c": {"bits": 8, "group_size": 32}}
    config = {"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"} | overrides}
    checkpoint = opened(tmp_path, stored, config)
    tensors, label = read_tensors(checkpoint)
    assert label == "mlx-affine+mlx-mxfp4+mlx-nvfp4"
    for stem, (_, values) in made.items():
        assert np.array_equal(tensors[f"{stem}.weight"].values(checkpoint.folder), values)


def test_one_checkpoint_may_mix_formats(tmp_path: Path) -> None:
    """ModelOpt's MIXED_PRECISION: FP8 and NVFP4 by layer, told apart by their parts; scales of activations are left."""
    rng = np.random.default_rng(5)
    made = {stem: VARIANTS[name].make(rng, 32, 64) for stem, name in (("a", "fp8-tensor"), ("b", "nvfp4-modelopt"))}
    stored = {f"{stem}.{part}": s for stem, (parts, _) in made.items() for part, s in parts.items()}
    config = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}}
    checkpoint = opened(tmp_path, stored, config)
    tensors, label = read_tensors(checkpoint)
    assert label == "fp8-tensor+nvfp4"
    assert sorted(tensors) == ["a.weight", "b.input_scale", "b.weight"]
    for stem, (_, values) in made.items():
        assert np.array_equal(tensors[f"{stem}.weight"].values(checkpoint.folder), values)


def test_a_gptq_zero_point_of_zero_has_borrowed_from_the_next(tmp_path: Path) -> None:
    """GPTQModel subtracts 1 from each zero point of a word at once: 0 becomes 15, and the next is one less."""
    zeros = np.array([0, 5, 0, 0, 9, 15, 1, 8])
    word = (sum(int(z) << (4 * i) for i, z in enumerate(zeros)) - 0x11111111) % 2**32
    scale = np.full((2, 8), 0.5, np.float16)
    stored = {
        "m.qweight": ("I32", np.zeros((8, 8), np.int32)),
        "m.qzeros": ("U32", np.full((2, 1), word, np.uint32)),
        "m.scales": ("F16", scale),
    }
    stored["m.qzeros"] = ("I32", stored["m.qzeros"][1].view(np.int32))
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}}
    checkpoint = opened(tmp_path, stored, config)
    values = read_tensors(checkpoint)[0]["m.weight"].values(checkpoint.folder)
    assert np.array_equal(values[:, 0], -0.5 * zeros)
