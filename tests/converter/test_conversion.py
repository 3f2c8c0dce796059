"""Conversion as a process: reproducible, resumable, bounded, refusing what it cannot do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import flashpack
from flashpack.converter import Options, plan
from flashpack.converter.quality import QUALITY_FILES
from flashpack.errors import SourceError, UnsupportedError, UsageError
from flashpack.formats import Pack
from flashpack.formats.constants import MANIFEST
from tests.conftest import CHECKPOINTS, TRAINED, PackOf
from tests.converter.killing import contents

SourceCopy = Callable[[str], Path]


def test_same_input_and_options_give_the_same_bytes(pack_of: PackOf, tmp_path: Path) -> None:
    first = pack_of("trained", "q4", "q8")
    report = flashpack.convert(TRAINED, tmp_path / "again", workers=3)  # auto means the same recipe
    assert contents(first) == contents(tmp_path / "again")
    assert report.identity == Pack(first).identity


def test_the_report_tells_sizes_and_errors(tmp_path: Path) -> None:
    report = flashpack.convert(TRAINED, tmp_path / "out")
    assert report.pack_bytes == sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file()) - 65
    assert report.expert_bits == 4.5
    assert 8.5 < report.dense_bits < 9
    layers = [e for e in report.errors if e.path.startswith("experts/")]
    assert len(layers) == 6
    assert all(0.05 < e.mean <= e.largest < 0.12 for e in layers)
    assert flashpack.convert(TRAINED, tmp_path / "lossless", "source", "source").errors == []


def test_a_plan_promises_the_sizes_that_are_written_and_writes_nothing(pack_of: PackOf, tmp_path: Path) -> None:
    work = plan(CHECKPOINTS / "qwen3_5_moe", Options())
    pack = pack_of("qwen3_5_moe")
    files = {f.path: f.size for f in Pack(pack).manifest.files if f.path not in QUALITY_FILES}
    assert work.file_sizes() == files
    assert any(name.startswith("mtp.") for name in work.dropped)
    assert any("visual" in name for name in work.dropped)
    assert not any("layers.0.mlp" in name and "mtp" not in name for name in work.dropped)


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def break_missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00007.safetensors").unlink()


def break_truncated_shard(folder: Path) -> None:
    path = folder / "model-00002-of-00007.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def break_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.extra.weight"] = "model-00001-of-00007.safetensors"
    path.write_text(json.dumps(index))


def break_missing_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def break_missing_tensor(folder: Path) -> None:
    change_config(folder, num_hidden_layers=4)


def break_extra_tensor(folder: Path) -> None:
    change_config(folder, mlp_only_layers=[1])


def break_shape(folder: Path) -> None:
    change_config(folder, moe_intermediate_size=32)


def break_dense_model(folder: Path) -> None:
    change_config(folder, model_type="qwen3", architectures=["Qwen3ForCausalLM"], num_experts=None)


def break_architecture(folder: Path) -> None:
    change_config(folder, model_type="martian_moe")


def break_config_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_only_bin(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def break_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"x")


def break_quantization(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "bitsandbytes"})


def break_lfs_pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 12\n"
    (folder / "model-00001-of-00007.safetensors").write_text(text)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (break_missing_shard, SourceError, "model-00002-of-00007.safetensors: the shard is missing"),
        (break_truncated_shard, SourceError, "model-00002-of-00007.safetensors: truncated"),
        (break_index, SourceError, "names tensor model.layers.9.extra.weight"),
        (break_missing_index, SourceError, "no model.safetensors.index.json"),
        (break_missing_tensor, SourceError, "lacks model.layers.3"),
        (break_extra_tensor, SourceError, r"layers.1.mlp.*no place|lacks model.layers.1.mlp"),
        (break_shape, SourceError, r"\[8, 128, 64\] in the checkpoint, \[8, 64, 64\] in the model"),
        (break_dense_model, UnsupportedError, "'qwen3' is not a Mixture-of-Experts model"),
        (break_architecture, UnsupportedError, "'martian_moe' is not supported by transformers"),
        (break_config_json, SourceError, "config.json: not valid JSON"),
        (break_no_config, SourceError, "no config.json"),
        (break_only_bin, UnsupportedError, ".bin checkpoints are not supported"),
        (break_folder, SourceError, "neither a folder nor a GGUF file; name the checkpoint's folder"),
        (break_quantization, UnsupportedError, "'bitsandbytes' are not supported; supported: "),
        (break_lfs_pointer, SourceError, "Git LFS pointer"),
    ],
)
def test_a_bad_source_is_refused_in_one_line_and_leaves_nothing(
    source_copy: SourceCopy,
    tmp_path: Path,
    damage: Callable[[Path], None],
    error: type[Exception],
    message: str,
) -> None:
    source, out = source_copy("qwen3_moe"), tmp_path / "out"
    damage(source)
    with pytest.raises(error, match=message) as caught:
        flashpack.convert(source, out)
    assert "\n" not in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": 3}, SourceError, "3 bits in groups of 32"),
        ({"group_size": 64}, SourceError, "4 bits in groups of 64"),
        ({"mode": "mxfp4"}, SourceError, "has biases, but config.json says mode 'mxfp4'"),
        ({"bits": None}, SourceError, "lacks bits or group_size"),
        ({"model.layers.1.mlp.gate": False}, SourceError, "is False, but the module has scales"),
    ],
)
def test_mlx_parameters_are_checked_against_the_shapes(
    source_copy: SourceCopy, tmp_path: Path, change: dict[str, object], error: type[Exception], message: str
) -> None:
    source = source_copy("qwen3_moe-mlx4")
    config = json.loads((source / "config.json").read_text())
    change_config(source, quantization=config["quantization"] | change)
    with pytest.raises(error, match=message):
        flashpack.convert(source, tmp_path / "out")


def test_infinite_weights_are_refused_by_name(source_copy: SourceCopy, tmp_path: Path) -> None:
    source = source_copy("qwen3_moe_dense_first_tied")
    path = source / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    field = json.loads(data[8 : 8 + length])["model.layers.2.mlp.experts.1.up_proj.weight"]
    start = 8 + length + field["data_offsets"][0]
    data[start : start + 2] = (0x7F80).to_bytes(2, "little")
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"layers.2.mlp.experts.1.up_proj.weight: infinite or NaN"):
        flashpack.convert(source, tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()
    assert flashpack.convert(source, tmp_path / "out", experts="source", overwrite=True)


def test_a_tied_head_that_is_present_must_equal_the_embedding(source_copy: SourceCopy, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    source = source_copy("qwen3_moe_dense_first_tied")
    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path)
    report = flashpack.convert(source, tmp_path / "same")
    assert report.dropped == ["lm_head.weight"]
    tensors["lm_head.weight"] += torch.ones(1, dtype=torch.bfloat16)
    save_file(tensors, path)
    with pytest.raises(SourceError, match="their values differ"):
        flashpack.convert(source, tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"experts": "q7"}, "--experts q7"), ({"dense": "q3"}, "--dense q3"), ({"group_size": 16}, "--group-size 16")],
)
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        flashpack.convert(TRAINED, tmp_path / "out", **options)  # type: ignore[arg-type]
