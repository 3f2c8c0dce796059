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
        (lambda m: m.update(required_features=["warp"]), "requires warp"),
        (lambda m: m["model"].update(name_schema="transformers-9"), "names follow 'transformers-9'"),
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
        (lambda m: m.pop("layers"), "missing or has the wrong type"),
        (lambda m: m.update(layers=7), "missing or has the wrong type"),
        (lambda m: m["files"][0].update(path="../x"), "not a path inside the pack"),
        (lambda m: m["files"][0].update(path="/etc/passwd"), "not a path inside the pack"),
        (lambda m: m["files"][0].update(path="a//b"), "not a path inside the pack"),
        (lambda m: m["files"][0].update(path="a\\b"), "not a path inside the pack"),
        (lambda m: m["files"][0].update(size=-1), "role, size or digests"),
        (lambda m: m["files"][0].update(digests={}), "role, size or digests"),
        (lambda m: m["files"][0].update(digests={"file": "00"}), "64 hexadecimal digits"),
        (lambda m: m["files"].append(m["files"][0]), "stands twice"),
        (lambda m: m["layers"].append(m["layers"][0]), "stands twice"),
        (lambda m: m["layers"].pop(), "do not match one to one"),
        (lambda m: m["layers"][0]["kinds"][0].update(kind=9), "kinds are wrong"),
        (lambda m: m["layers"][0]["kinds"][0].update(count=0), "kinds are wrong"),
        (lambda m: m["layers"][0]["kinds"][0].update(count=10**6), "over the cap"),
        (lambda m: m["record_kinds"][0].update(stride=16384 * 9), "do not follow from the projections"),
        (lambda m: m["record_kinds"][0]["sections"][0].update(offset=64), "do not follow"),
        (lambda m: m["record_kinds"][0]["projections"].pop(), "gate, up, down"),
        (lambda m: m["record_kinds"][0]["projections"][0].update(shape=[0, 64]), "empty matrix"),
        (lambda m: m["record_kinds"][0]["projections"][0]["encoding"].update(bits=7), "out of range"),
        (lambda m: m["tensors"][0].update(offset=10**9), "ends past its file"),
        (lambda m: m["tensors"][0].update(path="config.json"), "in no dense file"),
        (lambda m: m["tensors"].append(m["tensors"][0]), "stands twice"),
        (lambda m: m["matrices"][0].update(shape=[1, 64]), "another shape"),
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
    with pytest.raises(NotAPackError, match="not a pack"):
        Pack(tmp_path)
    (tmp_path / JOURNAL).write_bytes(b"{}\n")
    with pytest.raises(NotAPackError, match="unfinished conversion"):
        Pack(tmp_path)
    pack = pack_copy("qwen3_moe")
    (pack / "experts" / "layer-0001.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"layer-0001.safetensors: is missing"):
        Pack(pack)
