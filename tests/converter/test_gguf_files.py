"""GGUF files that are split, damaged, of other kinds, or beside other files; and what the metadata becomes."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import flashpack
from flashpack.converter.folder import base_name
from flashpack.converter.source import open_checkpoint
from flashpack.errors import FlashpackError, SourceError, UnsupportedError
from flashpack.formats import Pack
from tests.conftest import CHECKPOINTS, TRAINED, contents
from tests.converter.gguf_files import add_tokenizer, write_gguf


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole file, for copies."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, "qwen3_moe", "Q8_0")
    return path


def test_the_header_is_what_the_gguf_package_reads(good: Path) -> None:
    theirs = gguf.GGUFReader(good)
    checkpoint = open_checkpoint(good)
    extents = {e.offset: e.nbytes for t in checkpoint.stored.values() for e in [t]}
    assert extents == {t.data_offset: t.n_bytes for t in theirs.tensors}


def test_the_configuration_is_the_checkpoints_own(tmp_path: Path) -> None:
    """Compared with what transformers makes of the original: every key that the file's metadata sets."""
    for name in ("olmoe", "gpt_oss", "glm4_moe", "minimax_m2", "granitemoe"):
        write_gguf(tmp_path / f"{name}.gguf", name)
        made = open_checkpoint(tmp_path / f"{name}.gguf").config
        original = json.loads((CHECKPOINTS / name / "config.json").read_text())
        shared = set(made) & set(original) - {"rope_parameters"} - {f"{t}_token_id" for t in ("bos", "eos", "pad")}
        assert len(shared) > 10
        assert {k: made[k] for k in shared} == {k: original[k] for k in shared}, name


@pytest.mark.parametrize("src", ["folder", "first", "second"])
def test_all_pieces_of_a_split_file_are_read(src: str, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "split"
    folder.mkdir()
    write_gguf(folder / "big.gguf", "qwen3_moe", "Q8_0", pieces=12)
    pieces = sorted(folder.iterdir())
    assert len(pieces) > 2
    source = {"folder": folder, "first": pieces[0], "second": pieces[1]}[src]
    flashpack.convert(source, tmp_path / "split.flashpack")
    flashpack.convert(good, tmp_path / "whole.flashpack")
    assert contents(tmp_path / "split.flashpack") == contents(tmp_path / "whole.flashpack")
    if src != "folder":
        assert base_name(source) == "big"
    pieces[-1].unlink()
    with pytest.raises(SourceError, match=r"big-0000\d-of-0000\d.gguf: a piece of a split GGUF file is missing"):
        open_checkpoint(source)


def test_pieces_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "big.gguf", "qwen3_moe", "Q8_0", pieces=12)
    first, second, *_ = sorted(tmp_path.iterdir())
    shutil.copy(second, first)
    with pytest.raises(SourceError, match=r"00001-of-.* by its metadata not piece 1 of"):
        open_checkpoint(tmp_path)


def test_several_models_in_a_folder_are_listed(good: Path, tmp_path: Path) -> None:
    for name in ("a-Q4_0.gguf", "a-Q8_0.gguf"):
        shutil.copy(good, tmp_path / name)
    with pytest.raises(SourceError, match=r"2 GGUF files: a-Q4_0\.gguf, a-Q8_0\.gguf; name one of them"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path / "a-Q8_0.gguf").config["model_type"] == "qwen3_moe"


def test_other_files_of_the_folder_do_not_count(good: Path, tmp_path: Path) -> None:
    shutil.copy(good, tmp_path / "model.gguf")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "LICENSE.txt").write_text("mine")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.copied_files() == ["LICENSE.txt", "config.json"]
    assert checkpoint.config["model_type"] == "qwen3_moe"


def test_safetensors_files_beside_a_gguf_file_are_read_instead(good: Path, tmp_path: Path) -> None:
    source = tmp_path / "both"
    shutil.copytree(CHECKPOINTS / "olmoe", source)
    shutil.copy(good, source / "model.gguf")
    report = flashpack.convert(source, tmp_path / "pack")
    assert Pack(tmp_path / "pack").manifest.model["model_type"] == "olmoe"
    assert "the folder's GGUF files are not read; name one of them to convert it" in report.notices


def test_a_file_that_changes_during_the_conversion_is_noticed(good: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(good, tmp_path / "model.gguf"))
    checkpoint = open_checkpoint(path)
    checkpoint.check_unchanged()
    with path.open("ab") as f:
        f.write(b"\0")
    with pytest.raises(SourceError, match=r"model\.gguf: changed during the conversion: .*size"):
        checkpoint.check_unchanged()


def test_the_vocabulary_becomes_a_tokenizer_that_gives_the_same_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from flashpack.runtime.tokenizer import load_tokenizer

    write_gguf(tmp_path / "model.gguf", TRAINED, "Q8_0", tokenizer=add_tokenizer)
    flashpack.convert(tmp_path / "model.gguf", tmp_path / "pack")
    made, original = load_tokenizer(tmp_path / "pack"), AutoTokenizer.from_pretrained(TRAINED)
    text = "<|im_start|>user\nWie geht's, 1234 Bären?  x = [1,\t2]\r\n\n日本語<|im_end|>"
    assert made(text)["input_ids"] == original(text)["input_ids"]
    assert made.decode(made(text)["input_ids"]) == text
    assert (made.eos_token, made.pad_token) == ("<|im_end|>", "<|endoftext|>")
    messages = [{"role": "user", "content": "hello"}]
    assert made.apply_chat_template(messages, tokenize=False) == original.apply_chat_template(messages, tokenize=False)
    generation = json.loads((tmp_path / "pack" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 2, "pad_token_id": 0}


def test_a_tokenizer_that_cannot_be_built_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    def strange(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("rwkv")
        writer.add_token_list(["a"])

    write_gguf(tmp_path / "model.gguf", "qwen3_moe", tokenizer=strange)
    with pytest.raises(UnsupportedError, match=r"transformers cannot build its tokenizer.*'rwkv'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba' is not supported in GGUF files; supported: glm4moe"),
        ({"expert_count": 0}, "qwen3moe without experts: nothing to stream"),
        ({"attention.sliding_window": 128}, r"qwen3moe.attention.sliding_window = 128 is not supported"),
        ({"expert_gating_func": 2}, r"qwen3moe.expert_gating_func = 2 is not supported"),
        ({"embedding_length": "wide"}, "metadata qwen3moe.embedding_length is wide, no number"),
        ({"block_count": None}, "metadata qwen3moe.block_count is missing"),
        ({"attention.head_count": [2, 4]}, r"metadata qwen3moe.attention.head_count is \[2, 4\], no number"),
        ({"rope.scaling.type": "longrope"}, "rope scaling 'longrope' is not supported"),
    ],
)
def test_metadata_that_is_not_understood_is_refused(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "qwen3_moe", metadata=metadata)
    with pytest.raises(FlashpackError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"GGML", "not a GGUF file"),
        (4, struct.pack(">I", 3), "a big-endian GGUF file"),
        (4, struct.pack("<I", 1), "GGUF version 1 is not supported"),
        (8, struct.pack("<Q", 2**60), "damaged: counts 1152921504606846976 entries"),
        (16, struct.pack("<Q", 2**60), "damaged: counts 1152921504606846976 entries"),
        (24, struct.pack("<Q", 2**62), "damaged: counts 4611686018427387904 entries"),
    ],
)
def test_damaged_headers_are_refused(offset: int, data: bytes, message: str, good: Path, tmp_path: Path) -> None:
    damaged = bytearray(good.read_bytes())
    damaged[offset : offset + len(data)] = data
    (tmp_path / "model.gguf").write_bytes(damaged)
    with pytest.raises(FlashpackError, match=f"^{tmp_path}/model.gguf: .*{message}"):
        open_checkpoint(tmp_path)


def test_a_file_cut_off_anywhere_is_refused(good: Path, tmp_path: Path) -> None:
    whole, path = good.read_bytes(), tmp_path / "model.gguf"
    header = gguf.GGUFReader(good).data_offset
    random.seed(0)
    for size in [*range(64), *random.sample(range(header), 100), header, *random.sample(range(len(whole)), 20)]:
        path.write_bytes(whole[:size])
        with pytest.raises(SourceError, match=r"(cut off|not a GGUF file|too short)"):
            open_checkpoint(path)


def test_damage_anywhere_in_the_header_is_refused_in_one_line_or_does_no_harm(good: Path, tmp_path: Path) -> None:
    whole, path = good.read_bytes(), tmp_path / "model.gguf"
    header = gguf.GGUFReader(good).data_offset
    generator = random.Random(1)
    messages = []
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(generator.choice((1, 1, 4))):
            damaged[generator.randrange(header)] = generator.choice((0, 1, 0x7F, 0xFF, generator.randrange(256)))
        path.write_bytes(damaged)
        try:
            open_checkpoint(path)
        except FlashpackError as e:
            messages.append(str(e))
    assert len(messages) > 75
    assert all("\n" not in m and len(m) < 700 for m in messages)


def test_strange_tensors_are_refused_by_name(tmp_path: Path) -> None:
    writer_add = gguf.GGUFWriter.add_tensor

    def convert_with(name: str, values: np.ndarray) -> None:
        def more(writer: gguf.GGUFWriter) -> None:
            writer_add(writer, name, values)

        write_gguf(tmp_path / "model.gguf", "qwen3_moe", tokenizer=more)
        flashpack.convert(tmp_path / "model.gguf", tmp_path / "pack")

    with pytest.raises(SourceError, match=r"rope_freqs.weight has no place in Qwen3MoeForCausalLM"):
        convert_with("rope_freqs.weight", np.ones(4, np.float32))
    with pytest.raises(SourceError, match=r"two tensors would become model.layers.0.post_attention_layernorm.weight"):
        convert_with("blk.0.post_attention_norm.weight", np.ones(64, np.float32))
    with pytest.raises(SourceError, match=r"the gate of model.layers.0.mlp.experts is there in another form, too"):
        convert_with("blk.0.ffn_gate_up_exps.weight", np.ones((8, 128, 64), np.float32))
    with pytest.raises(UnsupportedError, match="tensor odd is stored as I32, which is not supported"):
        convert_with("odd", np.ones(4, np.int32))
