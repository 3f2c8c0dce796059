"""``export --to flash-moe`` against Flash-MoE's layout, which is written down here once more.

From its documents and scripts (github.com/danveloper/flash-moe, commit 3601d41: CLAUDE.md, repack_experts.py,
metal_infer/extract_weights.py, metal_infer/repack_experts_2bit.py): offsets and sizes of the 397B model, the order of
an expert's arrays, alignment and order of the other tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import flashpack
from flashpack.errors import UnsupportedError
from flashpack.export import export
from flashpack.export.content import Content
from flashpack.export.flash_moe import expert_layout
from flashpack.formats import Pack
from flashpack.formats.records import Encoding, Projection, RecordKind
from tests.conftest import PackOf
from tests.export.test_mlx import stored_in

WIDTHS = {"gate": (64, 64), "up": (64, 64), "down": (64, 64)}
"""Rows and columns of the matrices of an expert of the tiny model, in the order of the file."""

ROUNDED = (".mlp.gate", ".mlp.shared_expert_gate", ".in_proj_a", ".in_proj_b")


def decoded(raw: bytes, at: int, rows: int, width: int, bits: int) -> tuple[NDArray[np.float32], int]:
    """A matrix whose words, scales and biases begin at byte ``at``, and where they end. uint32 words hold values from
    the lowest bit on; w = q * scale + bias for each 64 columns; bfloat16 is the upper half of a float32."""
    words = np.frombuffer(raw, "<u4", rows * width * bits // 32, at).reshape(rows, -1)
    at += words.nbytes
    halves = np.frombuffer(raw, "<u2", 2 * rows * width // 64, at).astype(np.uint32) << 16
    scales, biases = halves.view(np.float32).reshape(2, rows, -1, 1)
    codes = words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & np.uint32(2**bits - 1)
    values = codes.reshape(rows, -1, 64).astype(np.float32) * scales + biases
    return values.reshape(rows, width), at + 2 * len(halves)


def content_of(pack: Path) -> Content:
    return Content(Pack(pack), lambda count: None)


@pytest.mark.parametrize(("bits", "folder"), [(4, "packed_experts"), (2, "packed_experts_2bit")])
def test_experts_lie_where_flash_moe_reads_them(pack_of: PackOf, tmp_path: Path, bits: int, folder: str) -> None:
    pack = pack_of("qwen3_5_moe", f"q{bits}", "q4")
    export(pack, tmp_path / "out", "flash-moe")
    size = sum(rows * width * bits // 8 + rows * width // 64 * 4 for rows, width in WIDTHS.values())
    content = content_of(pack)
    for layer in content.layers:
        raw = (tmp_path / "out" / folder / f"layer_{layer.index:02}.bin").read_bytes()
        assert len(raw) == 8 * size
        for expert in content.experts(layer):
            at = expert.number * size
            for name, (rows, width) in WIDTHS.items():
                values, at = decoded(raw, at, rows, width, bits)
                assert np.array_equal(values, expert.matrices[name].values())
    assert sorted(p.name for p in (tmp_path / "out" / folder).glob("*.bin")) == [f"layer_0{n}.bin" for n in range(4)]
    assert (tmp_path / "out" / folder / "layout.json").exists() == (bits == 4)  # its scripts write none of 2 bits


@pytest.mark.parametrize(
    ("bits", "offsets", "size"),
    [
        (4, [0, 2097152, 2228224, 2359296, 4456448, 4587520, 4718592, 6815744, 6946816], 7077888),
        (2, [0, 1048576, 1179648, 1310720, 2359296, 2490368, 2621440, 3670016, 3801088], 3932160),
    ],
)
def test_an_expert_of_the_397b_model_has_the_documented_offsets(bits: int, offsets: list[int], size: int) -> None:
    encoding = Encoding("affine", "BF16", bits, 64)
    shapes = {"gate": (1024, 4096), "up": (1024, 4096), "down": (4096, 1024)}
    rows, end = expert_layout(RecordKind(tuple(Projection(name, shape, encoding) for name, shape in shapes.items())))
    assert [row["offset"] for row in rows] == offsets
    assert end == size
    named = [f"{name}_proj.{part}" for name in shapes for part in ("weight", "scales", "biases")]
    assert [row["name"] for row in rows] == named
    assert rows[0] | {"shape": list(rows[0]["shape"])} == {
        "name": "gate_proj.weight", "offset": 0, "size": offsets[1], "dtype": "U32", "shape": [1024, 128 * bits],
    }  # fmt: skip


def weights_of(folder: Path) -> tuple[dict[str, Any], bytes]:
    table: dict[str, Any] = json.loads((folder / "model_weights.json").read_text())
    return table, (folder / "model_weights.bin").read_bytes()


def test_all_else_is_what_mlx_has_sorted_and_aligned(pack_of: PackOf, tmp_path: Path) -> None:
    """The engine takes every tensor of the MLX checkpoint but the experts; what is 4 bits there is so here, too."""
    pack = pack_of("qwen3_5_moe", "q4", "q4")
    report = export(pack, tmp_path / "out", "flash-moe")
    export(pack, tmp_path / "mlx", "mlx")
    table, raw = weights_of(tmp_path / "out")
    mlx = {
        n.removeprefix("language_model."): t for n, t in stored_in(tmp_path / "mlx").items() if "switch_mlp" not in n
    }
    plain = [n.removesuffix(".weight") for n, (dtype, _, _) in mlx.items() if n.endswith(".weight") and dtype != "U32"]
    small = {stem for stem in plain if stem.endswith(ROUNDED)}
    expected = {*mlx, *(f"{stem}.{part}" for stem in small for part in ("scales", "biases"))}
    assert list(table["tensors"]) == sorted(expected)
    assert table["num_tensors"] == len(expected)
    end = 0
    for name, row in table["tensors"].items():
        assert row["offset"] == end + -end % 64
        assert not any(raw[end : row["offset"]])
        end = row["offset"] + row["size"]
        if name.rpartition(".")[0] not in small:
            assert (row["dtype"], tuple(row["shape"]), raw[row["offset"] : end]) == mlx[name]
    assert end == len(raw)
    assert f"{len(small)} small matrices" in "".join(report.losses)


def test_small_matrices_are_rounded_to_4_bits(pack_of: PackOf, tmp_path: Path) -> None:
    pack = pack_of("qwen3_5_moe", "q4", "q4")
    export(pack, tmp_path / "out", "flash-moe")
    table, raw = weights_of(tmp_path / "out")
    for name in ("model.layers.0.mlp.gate", "model.layers.3.mlp.shared_expert_gate"):
        parts = [table["tensors"][f"{name}.{part}"] for part in ("weight", "scales", "biases")]
        data = b"".join(raw[p["offset"] : p["offset"] + p["size"]] for p in parts)
        exact = content_of(pack).tensor(f"{name}.weight").values()
        values, _ = decoded(data, 0, *exact.shape, 4)
        steps = np.abs(exact.max(axis=1) - exact.min(axis=1)) / 15
        assert 0 < np.abs(values - exact).max() <= steps.max()


def test_other_tensors_have_the_types_that_its_kernels_read(source_copy: Callable[[str], Path], tmp_path: Path) -> None:
    """``A_log`` float32, all others bfloat16, whatever the checkpoint has; what that rounds is said."""
    source = source_copy("qwen3_5_moe")
    log, bias = (f"model.layers.0.linear_attn.{name}" for name in ("A_log", "dt_bias"))
    given = {log: torch.tensor([0.5, -1.25, 3.0, 2.0]).bfloat16(), bias: torch.tensor([0.1, -0.2, 1.0, 2.0])}
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        inside = {
            n: given[n.replace("language_model.", "")]
            for n in tensors
            if n.endswith(("0.linear_attn.A_log", "0.linear_attn.dt_bias"))
        }
        save_file(tensors | inside, path)
    flashpack.convert(source, tmp_path / "pack", "q4", "q4")
    report = export(tmp_path / "pack", tmp_path / "out", "flash-moe")
    table, raw = weights_of(tmp_path / "out")
    rows = [table["tensors"][name] for name in (log, bias)]
    assert [row["dtype"] for row in rows] == ["F32", "BF16"]
    stored = [raw[row["offset"] : row["offset"] + row["size"]] for row in rows]
    assert stored == [given[log].float().numpy().tobytes(), given[bias].bfloat16().view(torch.int16).numpy().tobytes()]
    assert "1 tensors are rounded to bf16" in report.losses


def test_its_configuration_is_the_models(pack_of: PackOf, tmp_path: Path) -> None:
    report = export(pack_of("qwen3_5_moe", "q4", "q4"), tmp_path / "out", "flash-moe")
    config = weights_of(tmp_path / "out")[0]["config"]
    assert config == {
        "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "vocab_size": 256, "rms_norm_eps": 1e-6, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "full_attention_interval": 4,
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.25,
        "rope_theta": 10000000.0, "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    }  # fmt: skip
    (other,) = [line for line in report.losses if line.startswith("Flash-MoE unchanged")]
    assert "hidden_size, num_hidden_layers, num_attention_heads, head_dim, vocab_size" in other
    assert "rope_theta" not in other


@pytest.mark.parametrize(
    ("name", "experts", "dense", "group_size", "why"),
    [
        ("qwen3_moe", "auto", "auto", 64, "runs Qwen3.5-MoE only, not model_type 'qwen3_moe'"),
        ("trained", "auto", "auto", 64, "needs an lm_head of its own"),
        ("qwen3_5_moe", "q3", "q4", 64, "these are 3-bit g64"),
        ("qwen3_5_moe", "q4", "q4", 32, "these are 4-bit g32"),
        ("qwen3_5_moe", "auto", "auto", 64, "lm_head.weight is 8-bit g64"),
    ],
)
def test_everything_else_is_refused(
    pack_of: PackOf, tmp_path: Path, name: str, experts: str, dense: str, group_size: int, why: str
) -> None:
    with pytest.raises(UnsupportedError) as refusal:
        export(pack_of(name, experts, dense, group_size), tmp_path / "out", "flash-moe")
    assert why in str(refusal.value)
    assert not (tmp_path / "out").exists()
