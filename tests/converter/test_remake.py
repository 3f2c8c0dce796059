"""A pack's content made again from its source: to prove it (verify --against) and to mend it (repair)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import flashpack
from flashpack.converter.against import against
from flashpack.converter.remake import Remake
from flashpack.errors import SourceError, UnsupportedError
from flashpack.formats import Manifest, Pack
from flashpack.formats.constants import MANIFEST
from flashpack.formats.manifest import canonical
from flashpack.formats.repair import repair
from flashpack.formats.writer import commit_bytes
from tests.conftest import PackOf, contents, source_of
from tests.formats.test_repair import ALL, damage_manifest, damage_record, everything, remove_manifest

Copy = Callable[..., Path]


def change_manifest(pack: Path, change: Callable[[dict[str, object]], object]) -> None:
    data = json.loads((pack / MANIFEST).read_bytes())
    change(data)
    commit_bytes(pack, canonical(data))


def remake(name: str, pack: Path) -> Remake:
    return Remake(source_of(name), Pack(pack).manifest)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3_5_moe", {}),
        ("trained", {"experts": "q3", "dense": "q4"}),
        ("qwen3_moe-mlx4", {}),
        ("mixtral", {"experts": "source", "dense": "source"}),
    ],
)
def test_a_pack_is_proven_from_its_source(pack_of: PackOf, name: str, options: dict[str, str]) -> None:
    total, done = [], []
    findings = against(pack_of(name, **options), source_of(name), total.append, done.append)
    assert findings == []
    assert sum(done) == sum(total) > 0


def test_a_compressed_pack_is_proven_by_its_content(tmp_path: Path) -> None:
    flashpack.convert(source_of("mixtral"), tmp_path / "pack", experts="source", codec="zstd")
    assert against(tmp_path / "pack", source_of("mixtral")) == []


def test_a_pack_of_other_weights_is_found_out_tensor_by_tensor(
    pack_of: PackOf, source_copy: Callable[[str], Path]
) -> None:
    """A stranger's pack with sound checksums, whose weights are not those of the source it names."""
    source = source_copy("qwen3_moe")
    files = sorted(source.glob("model-*.safetensors"))
    changed = 0
    for path in files:
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        for name in ("model.layers.1.mlp.experts.4.down_proj.weight", "model.norm.weight"):
            if name in header:
                at = start + header[name]["data_offsets"][0]
                data[at : at + 2] = np.array([3.0], dtype="<f4").tobytes()[2:]
                changed += 1
        path.write_bytes(data)
    (source / "tokenizer_config.json").write_text("{}")
    assert changed == 2
    findings = against(pack_of("qwen3_moe"), source)
    assert [(f.code, f.layer, f.expert, f.tensor) for f in findings] == [
        ("source-record", 1, 4, None),
        ("source-tensor", None, None, "model.norm.weight"),
        ("source-copy", None, None, None),
        ("source-copy", None, None, None),
    ]
    assert [f.file for f in findings[2:]] == ["quality.json", "tokenizer_config.json"]


@pytest.mark.parametrize("damage", [d for d in ALL if d not in (damage_manifest, remove_manifest, everything)])
def test_damage_is_mended_from_the_source(pack_copy: Copy, pack_of: PackOf, damage: Callable[[Path], None]) -> None:
    pack, good = pack_copy("qwen3_moe"), pack_of("qwen3_moe")
    identity = Pack(pack).identity
    damage(pack)
    donor = Remake(source_of("qwen3_moe"), Manifest.from_bytes((pack / MANIFEST).read_bytes()))
    assert repair(pack, donor, expect=identity).findings == []
    assert contents(pack) == contents(good)


def test_a_compressed_pack_is_mended_from_the_source(tmp_path: Path) -> None:
    source, good = source_of("mixtral"), tmp_path / "good"
    flashpack.convert(source, good, experts="source", codec="zstd")
    pack = Path(shutil.copytree(good, tmp_path / "pack"))
    damage_record(pack)
    (pack / "experts" / "layer-0000.safetensors").unlink()
    assert repair(pack, remake_of(pack, source)).findings == []
    assert contents(pack) == contents(good)


def remake_of(pack: Path, source: Path) -> Remake:
    return Remake(source, Manifest.from_bytes((pack / MANIFEST).read_bytes()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["recipe"].update(quantizer="gptq"), "quantizer 'gptq' does not give the same bytes again"),
        (lambda m: m["recipe"].update(experts="q1"), "not one that this version follows"),
        (lambda m: m["recipe"].pop("dense"), "not one that this version follows"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused_by_name(
    pack_copy: Copy, change: Callable[[dict[str, object]], object], message: str
) -> None:
    pack = pack_copy("qwen3_moe")
    change_manifest(pack, change)
    with pytest.raises(UnsupportedError, match=message):
        against(pack, source_of("qwen3_moe"))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("olmoe", r"not the source of this pack: other model \(architecture: 'OlmoeForCausalLM'"),
        ("qwen3_moe-mlx4", r"other recipe \(source_format: 'mlx-affine', the pack's 'plain'\)|other"),
        ("qwen3_moe_dense_first_tied", "other shapes of experts|other MoE layers|other"),
    ],
)
def test_another_source_is_refused(pack_of: PackOf, other: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        against(pack_of("qwen3_moe"), source_of(other))


def test_another_recipe_is_refused_before_anything_is_read(pack_copy: Copy) -> None:
    pack = pack_copy("qwen3_moe", experts="q3")
    change_manifest(pack, lambda m: m["recipe"].update(experts="q4"))
    with pytest.raises(SourceError, match="other shapes of experts"):
        remake("qwen3_moe", pack)


def test_a_source_with_other_values_mends_nothing(pack_copy: Copy, source_copy: Callable[[str], Path]) -> None:
    pack, source = pack_copy("qwen3_moe"), source_copy("qwen3_moe")
    damage_record(pack)
    before = contents(pack)
    for path in sorted(source.glob("model-*.safetensors")):
        start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        data = bytearray(path.read_bytes())
        data[start:] = bytes(len(data) - start)
        path.write_bytes(data)
    with pytest.raises(SourceError, match=r"can be mended from it"):
        repair(pack, remake_of(pack, source))
    assert contents(pack) == before
