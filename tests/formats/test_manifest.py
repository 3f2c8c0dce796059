"""The manifest: canonical bytes, refusals, forward compatibility."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashpack.errors import FormatError, IntegrityError, NotAPackError, VersionError
from flashpack.formats import Manifest, Pack
from flashpack.formats.constants import JOURNAL, MANIFEST
from flashpack.formats.manifest import canonical
from tests.conftest import PackOf

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def manifest(pack_of: PackOf) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((pack_of("qwen3_moe_dense_first_tied") / MANIFEST).read_bytes())
    return data


def test_round_trip_is_byte_identical(pack_of: PackOf) -> None:
    raw = (pack_of("qwen3_5_moe") / MANIFEST).read_bytes()
    assert Manifest.from_bytes(raw).to_bytes() == raw


def test_holds_no_path_time_or_host_of_this_machine(pack_of: PackOf) -> None:
    import socket

    raw = (pack_of("qwen3_5_moe") / MANIFEST).read_text()
    assert str(Path.home()) not in raw
    assert str(Path(__file__).parent) not in raw
    assert socket.gethostname() not in raw.split('"')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "format version 2"),
        (
            lambda m: m.update(required_features=["warp"]),
            "feature 'warp' is unknown to flashpack .*needs flashpack 0.1",
        ),
        (lambda m: m["model"].update(name_schema="transformers-9"), "names 'transformers-9' is unknown"),
        (
            lambda m: m["record_kinds"][0]["projections"][0].update(encoding={"name": "trellis"}),
            "encoding 'trellis' is unknown",
        ),
    ],
)
def test_a_newer_pack_is_refused_by_name(manifest: dict[str, Any], change: Change, message: str) -> None:
    change(manifest)
    with pytest.raises(VersionError, match=message):
        Manifest.from_bytes(canonical(manifest))


def test_unknown_optional_things_are_ignored(manifest: dict[str, Any]) -> None:
    manifest["optional_features"] = ["sparkle"]
    manifest["colour"] = "blue"
    assert Manifest.from_bytes(canonical(manifest)).layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="zip"), "not a flashpack manifest"),
        (lambda m: m.update(version="1"), "not a format version"),
        (lambda m: m.pop("layers"), "layers is missing or not a list"),
        (lambda m: m.update(layers=7), "layers is missing or not a list"),
        (lambda m: m["files"][0].update(path="../x"), "not a path inside the pack"),
        (lambda m: m["files"][0].update(path="/etc/passwd"), "not a path inside the pack"),
        (lambda m: m["files"][0].update(path="a//b"), "not a path inside the pack"),
        (lambda m: m["files"][0].update(path="a\\b"), "not a path inside the pack"),
        (lambda m: m["files"][0].update(size=-1), "size is missing or not a size"),
        (lambda m: m["files"][0].update(digests={}), "of role copy has digests"),
        (lambda m: m["files"][0].update(digests={"file": "00"}), "64 hexadecimal digits"),
        (lambda m: m["files"].append(m["files"][0]), "stands twice"),
        (lambda m: m["layers"].append(m["layers"][0]), "stands twice"),
        (lambda m: m["layers"].pop(), "do not match one to one"),
        (lambda m: m["layers"][0]["kinds"][0].update(kind=9), "kind does not exist"),
        (lambda m: m["layers"][0]["kinds"][0].update(count=0), "kinds are empty"),
        (lambda m: m["layers"][0]["kinds"][0].update(count=10**6), "over the cap"),
        (lambda m: m["record_kinds"][0].update(stride=16384 * 9), "do not follow from the projections"),
        (lambda m: m["record_kinds"][0]["sections"][0].update(offset=64), "do not follow"),
        (lambda m: m["record_kinds"][0]["projections"].pop(), "gate, up, down"),
        (lambda m: m["record_kinds"][0]["projections"][0].update(shape=[0, 64]), "is empty"),
        (lambda m: m["record_kinds"][0]["projections"][0]["encoding"].update(bits=7), "out of range"),
        (lambda m: m["tensors"][0].update(offset=10**9), "it belongs at"),
        (lambda m: m["tensors"][0].update(path="config.json"), "in no dense file"),
        (lambda m: m["tensors"].append(m["tensors"][0]), "stands twice"),
        (lambda m: m["matrices"][0].update(shape=[1, 64]), "another shape"),
        (lambda m: m.pop("min_reader"), "min_reader is not a version"),
        (lambda m: m.update(min_reader="\x1b[2J"), "min_reader is not a version"),
        (lambda m: m.update(required_features=["zstd"]), "not the features that are used"),
        (lambda m: m.update(optional_features=["b", "a"]), "not sorted"),
        (lambda m: m.update(files=m["files"][::-1]), "files are not sorted"),
        (lambda m: m["files"][0].update(path="modeling.py"), "a program would run"),
        (lambda m: m["files"][0].update(path="FLASHPACK.json"), "the format's own"),
        (lambda m: m["files"][0].update(path=".hidden"), "not a path inside the pack"),
        (lambda m: m["files"][0].update(path="a\nb"), "not a printable string"),
        (lambda m: m["files"].insert(0, m["files"][0] | {"path": "CONFIG.json"}), "config.json stands twice"),
        (lambda m: m["files"].insert(1, m["files"][0] | {"path": m["files"][0]["path"] + "/x"}), "lies below a file"),
        (lambda m: m["layers"][0].update(module=["x"]), "module is missing or not a printable string"),
        (lambda m: m["layers"][0].update(index=True), "index is missing or not a size"),
        (lambda m: m.update(model=[]), "model is not an object"),
        (lambda m: m.update(recipe=0), "recipe is not an object"),
        (lambda m: m.update(note=0.5), "is not an integer"),
        (lambda m: m.update(files=[7]), "an entry of files is not an object"),
        (lambda m: m["tensors"][0].update(shape=[1] * 9), "too many dimensions"),
        (lambda m: m["tensors"][0].update(dtype="F64"), "'F64' is not one of"),
        (lambda m: m["record_kinds"][0]["projections"][0].update(shape=[2**61, 2**61]), "over the cap"),
    ],
)
def test_a_wrong_manifest_is_refused(manifest: dict[str, Any], change: Change, message: str) -> None:
    change(manifest)
    with pytest.raises(FormatError, match=message):
        Manifest.from_bytes(canonical(manifest))


def test_other_than_canonical_bytes_are_refused(manifest: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="canonical"):
        Manifest.from_bytes(json.dumps(manifest).encode())


def test_opening_says_what_a_folder_is(tmp_path: Path, pack_copy: Callable[..., Path]) -> None:
    with pytest.raises(NotAPackError, match="no such folder"):
        Pack(tmp_path / "none")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotAPackError, match="a file, not a folder"):
        Pack(tmp_path / "file")
    with pytest.raises(NotAPackError, match="not a pack"):
        Pack(tmp_path)
    (tmp_path / JOURNAL).write_bytes(b"{}\n")
    with pytest.raises(NotAPackError, match="unfinished conversion"):
        Pack(tmp_path)
    pack = pack_copy("qwen3_moe")
    (pack / "experts" / "layer-0001.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"layer-0001.safetensors: is missing"):
        Pack(pack)
