"""Every byte of a pack is covered: flips anywhere are found, and found where they are."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flashpack.errors import FlashpackError, NotAPackError, UsageError
from flashpack.formats import Encoding, Pack, Projection, RecordKind, verify
from flashpack.formats.constants import MANIFEST, MANIFEST_DIGEST
from flashpack.formats.entries import Layer
from flashpack.formats.layout import ShardLayout
from flashpack.formats.manifest import Manifest
from flashpack.formats.writer import RecordBuffer, ShardWriter, commit
from tests.conftest import PackOf

Copy = Callable[..., Path]


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit (overwriting with a constant would sometimes change nothing)."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def offset_of(layout: ShardLayout, expert: int) -> int:
    """Where the record of an expert starts in a plain shard of one kind."""
    (start,) = layout.record_offsets.values()
    return start + expert * layout.kinds[layout.layer.kinds[0][0]].stride


def codes(pack: Path, level: str = "full") -> list[str]:
    return [f.code for f in verify(pack, level)]


@pytest.mark.parametrize("level", ["quick", "full"])
@pytest.mark.parametrize("name", ["trained", "qwen3_moe_dense_first_tied", "qwen3_5_moe-mlx4"])
def test_a_whole_pack_has_no_findings(pack_of: PackOf, name: str, level: str) -> None:
    assert verify(pack_of(name), level) == []


def test_a_flipped_bit_is_found_in_every_file_and_at_200_random_places(pack_copy: Copy) -> None:
    pack = pack_copy("qwen3_5_moe")
    files = sorted(p for p in pack.rglob("*") if p.is_file())
    assert {p.suffix for p in files} >= {".json", ".b3", ".jinja", ".safetensors"}
    rng = random.Random(7)
    places = [(p, rng.randrange(p.stat().st_size)) for p in files]
    places += [(p, p.stat().st_size - 1) for p in files] + [(p, 0) for p in files]
    sizes = [p.stat().st_size for p in files]
    places += [(p, rng.randrange(p.stat().st_size)) for p in rng.choices(files, sizes, k=200)]
    for path, offset in places:
        bit = rng.randrange(8)
        flip(path, offset, bit)
        found = verify(pack)
        assert found, f"bit {bit} of byte {offset} of {path.name}"
        named = {path.relative_to(pack).as_posix(), MANIFEST}
        assert {f.file for f in found} & named
        flip(path, offset, bit)
    assert verify(pack) == []


def test_every_structural_byte_of_a_shard_is_checked(pack_copy: Copy) -> None:
    """Header length, each header byte of the JSON, its padding, the digests, a record's padding."""
    pack = pack_copy("qwen3_moe_dense_first_tied")
    layer = Pack(pack).manifest.layers[0]
    layout = ShardLayout(layer, Pack(pack).manifest.record_kinds)
    path = pack / layer.path
    used = len(layout.header_bytes.rstrip())
    padding = offset_of(layout, 4) - 1
    assert layout.kinds[0].nbytes < layout.kinds[0].stride
    for place in [*range(used), len(layout.header_bytes) - 1, layout.tail, layout.size - 1, padding]:
        flip(path, place, place % 8)
        assert verify(pack), f"byte {place}"
        flip(path, place, place % 8)


def test_a_damaged_expert_is_named_with_layer_offset_and_digests(pack_copy: Copy) -> None:
    pack = pack_copy("qwen3_moe")
    layer = Pack(pack).manifest.layers[2]
    layout = ShardLayout(layer, Pack(pack).manifest.record_kinds)
    offset = offset_of(layout, 5)
    flip(pack / layer.path, offset + 100)
    (finding,) = verify(pack)
    assert (finding.code, finding.layer, finding.expert, finding.offset) == ("record-digest", 2, 5, offset)
    assert finding.section == "record"
    assert finding.expected != finding.found
    assert verify(pack, "quick") == []


def test_all_findings_are_reported_not_only_the_first(pack_copy: Copy) -> None:
    pack = pack_copy("qwen3_moe")
    opened = Pack(pack)
    for layer in opened.manifest.layers:
        layout = ShardLayout(layer, opened.manifest.record_kinds)
        flip(pack / layer.path, offset_of(layout, 1))
        flip(pack / layer.path, offset_of(layout, 7))
    tensor = opened.tensors["model.norm.weight"]
    flip(pack / tensor.path, tensor.offset)
    (pack / "tokenizer.json").unlink()
    (pack / "stray.txt").write_text("?")
    assert sorted(codes(pack)) == sorted(["record-digest"] * 6 + ["tensor-digest", "missing-file", "unlisted-file"])


def test_damage_to_a_header_does_not_hide_damage_to_data(pack_copy: Copy) -> None:
    pack = pack_copy("qwen3_moe")
    layer = Pack(pack).manifest.layers[0]
    layout = ShardLayout(layer, Pack(pack).manifest.record_kinds)
    flip(pack / layer.path, 3, 7)
    flip(pack / layer.path, offset_of(layout, 2))
    assert codes(pack) == ["header-digest", "record-digest"]


@pytest.mark.parametrize("path", ["experts/layer-0000.safetensors", "dense-00001.safetensors", "config.json"])
def test_truncated_and_longer_files_are_found_by_a_quick_check(pack_copy: Copy, path: str) -> None:
    pack = pack_copy("qwen3_moe")
    data = (pack / path).read_bytes()
    (pack / path).write_bytes(data[:-1])
    assert "size" in codes(pack, "quick")
    (pack / path).write_bytes(data + b"\0")
    assert "size" in codes(pack, "quick")


def test_an_empty_or_missing_digest_file_is_a_finding(pack_copy: Copy) -> None:
    pack = pack_copy("qwen3_moe")
    (pack / MANIFEST_DIGEST).write_bytes(b"")
    assert "manifest-digest" in codes(pack)
    (pack / MANIFEST_DIGEST).unlink()
    assert "manifest-digest" in codes(pack)


def test_a_symlink_in_place_of_a_file_is_a_finding(pack_copy: Copy, tmp_path: Path) -> None:
    pack = pack_copy("qwen3_moe")
    elsewhere = tmp_path / "elsewhere"
    (pack / "config.json").rename(elsewhere)
    (pack / "config.json").symlink_to(elsewhere)
    assert codes(pack) == ["unreadable-file"]


def test_no_pack_and_unknown_level_are_errors_not_findings(tmp_path: Path, pack_of: PackOf) -> None:
    with pytest.raises(NotAPackError):
        verify(tmp_path)
    with pytest.raises(UsageError):
        verify(pack_of("qwen3_moe"), "half")


def test_experts_of_several_kinds_in_one_shard(tmp_path: Path) -> None:
    """A shard whose experts differ in bits: written, verified, read back by expert; a wrong table is refused."""
    kinds = tuple(
        RecordKind(
            tuple(
                Projection(name, shape, Encoding("affine", "BF16", bits, 32))
                for name, shape in (("up", (32, 64)), ("down", (64, 32)))
            )
        )
        for bits in (2, 8)
    )
    layer = Layer(4, "model.layers.4.mlp.experts", "experts/layer-0004.safetensors", ((0, 2), (1, 1)))
    table = np.array([(0, 0), (1, 0), (0, 1)], dtype="<u4")
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path, layer, kinds, table) as writer:
        for expert, (kind, _) in enumerate(table):
            buffer = RecordBuffer(kinds[kind])
            buffer.data[: kinds[kind].nbytes] = rng.integers(0, 256, kinds[kind].nbytes)
            writer.write(expert, buffer.data.data)
        entry = writer.finish()
    model = {"architecture": "A", "model_type": "a", "name_schema": "transformers-5", "transformers": "5"}
    commit(tmp_path, Manifest(model, {}, kinds, (layer,), (), (), (entry,)))
    assert verify(tmp_path) == []
    with Pack(tmp_path).open_shard(layer) as shard:
        assert [shard.kind(e) for e in range(3)] == [kinds[0], kinds[1], kinds[0]]
        offset, _ = shard.extent(2)
    flip(tmp_path / layer.path, offset)
    assert [(f.code, f.expert) for f in verify(tmp_path)] == [("record-digest", 2)]
    with pytest.raises(FlashpackError, match="every record once"):
        ShardWriter(tmp_path / "x", layer, kinds, table[[0, 0, 1]])
