"""The conformance suite: every valid vector is read as it was written, every invalid one is refused for its fault.

Vectors are frozen; tools/make_vectors.py adds new ones.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashpack.errors import FlashpackError, VersionError
from flashpack.formats import Pack, verify
from flashpack.formats import constants as C
from flashpack.formats.entries import Layer
from tests.conftest import ROOT, extract
from tests.formats.vector_messages import MESSAGES

sys.path.insert(0, str(ROOT / "tools"))
import make_vectors
from make_vectors import sections, values

VECTORS = ROOT / "tests" / "vectors"
INDEX: dict[str, dict[str, dict[str, Any]]] = json.loads((VECTORS / "index.json").read_text())
VALID, INVALID = INDEX["valid"], INDEX["invalid"]

WRITER_RULES = {
    "MUST refuse to continue with another source": "test_changed_options_are_refused_by_name",
    "MUST NOT commit a manifest": "test_what_a_reader_would_refuse_is_not_committed",
    "MUST NOT execute anything": "test_code_beside_the_configuration_never_runs",
    "MUST NOT take what `config.json` says": "test_an_absurd_configuration_is_refused_before_anything_is_made",
    "a reader MUST ignore fields": "test_a_valid_pack_is_read_as_it_was_written",
}
"""Sentences of SPEC.md that no invalid pack can break, and the test of each."""


def unpack(kind: str, name: str, folder: Path) -> Path:
    extract(VECTORS / kind / f"{name}.tar.gz", folder)
    return folder


def test_vectors_are_frozen() -> None:
    files = {p.relative_to(VECTORS).as_posix(): p for p in VECTORS.rglob("*.tar.gz")}
    listed = {f"{kind}/{name}.tar.gz": row["sha256"] for kind in INDEX for name, row in INDEX[kind].items()}
    assert {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items()} == listed


@pytest.mark.parametrize("name", sorted(VALID))
def test_a_valid_pack_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    pack = unpack("valid", name, tmp_path)
    assert verify(pack) == []
    Pack(pack, VALID[name]["identity"]).check_copies()
    assert values(pack) == {k: VALID[name][k] for k in ("identity", "experts", "tensors", "matrices")}


def step(pack: Path, at: str) -> None:
    """Read a pack up to a step, as a run does."""
    opened = Pack(pack)
    if at == "copies":
        opened.check_copies()
    for tensor in opened.manifest.tensors if at == "dense" else ():
        opened.map_tensor(tensor.name)
    for layer in opened.manifest.layers if at in ("shard", "read") else ():
        with opened.open_shard(layer) as shard:
            data = shard.path.read_bytes()
            for expert in range(layer.experts if at == "read" else 0):
                offset, span = shard.extent(expert)
                stored = memoryview(data)[offset : offset + span]
                if not shard.intact(expert, stored):
                    raise DamagedError("damaged")
                shard.decode(expert, stored, memoryview(bytearray(shard.kind(expert).stride)))


class DamagedError(FlashpackError):
    code = "integrity"


ALONGSIDE = {
    "size": {"truncated-tensor", "header-digest"},  # what the file lacks
    # What the damaged digests, table or sizes say does not fit the records.
    "tail-digest": {"record-digest", "content-digest", "expert-table", "frame", "padding"},
    "unreadable-file": {"unlisted-file"},
}
"""Findings that follow from another one."""

STEPS = ("open", "copies", "dense", "shard", "read")


@pytest.mark.parametrize("name", sorted(INVALID))
def test_an_invalid_pack_is_refused_for_its_fault(name: str, tmp_path: Path) -> None:
    row = INVALID[name]
    pack = unpack("invalid", name, tmp_path)
    if row["error"]:
        with pytest.raises(FlashpackError) as caught:
            step(pack, row["at"])
        assert caught.value.code == row["error"]
        assert "\n" not in str(caught.value)
        assert MESSAGES[row["rule"]]
        assert re.search(MESSAGES[row["rule"]], str(caught.value))
    # Up to the step where it shows, nothing else is wrong.
    for earlier in STEPS[: STEPS.index(row["at"]) if row["at"] else len(STEPS)]:
        step(pack, earlier)
    if row["finding"]:
        found = {f.code for f in verify(pack)}
        assert row["finding"] in found
        assert found <= {row["finding"], *ALONGSIDE.get(row["finding"], ())}
    else:
        with pytest.raises(FlashpackError) as caught:
            verify(pack)
        assert caught.value.code == row["error"]


def test_every_rule_of_the_spec_has_a_vector() -> None:
    rules = sections()
    rules.pop("like-this")
    assert set(rules) == {row["rule"] for row in INVALID.values()} == set(MESSAGES)
    assert all(rules[row["rule"]] == row["section"] for row in INVALID.values())
    assert all(name.split("--")[0] == row["rule"] for name, row in INVALID.items())


def test_every_must_of_the_spec_names_its_rules() -> None:
    text = re.sub(r"\n(?=[^\n|#-])", " ", (ROOT / "SPEC.md").read_text())
    sentences = [
        sentence
        for line in text.split("\n")
        for sentence in ([line] if line.startswith("|") else re.split(r"(?<=[.:;])\s+(?=[A-Z`0-9])", line))
        if "MUST" in sentence
    ]
    assert len(sentences) > 25
    bare = [s for s in sentences if "`[" not in s]
    # The first says what the word means; one begins a list whose items have rules.
    bare = [s for s in bare if not s.startswith("MUST, MUST NOT") and not s.endswith("A reader MUST refuse:")]
    elsewhere = {s: [part for part in WRITER_RULES if part in s] for s in bare}
    assert all(elsewhere.values()), elsewhere
    used = {part for s in sentences for part in WRITER_RULES if part in s}
    assert used == set(WRITER_RULES)
    tests = "".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))
    assert all(f"\ndef {test}(" in tests for test in WRITER_RULES.values())


def test_the_limit_of_experts_is_itself_allowed() -> None:
    """No vector: its shard would have a gigabyte. One more is refused: ``too-many-experts``."""
    data = {"index": 0, "module": "m", "path": "p", "kinds": [{"kind": 0, "count": C.MAX_EXPERTS}]}
    assert Layer.from_json(data).experts == C.MAX_EXPERTS


def test_the_tool_changes_no_vector_and_drops_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything there it makes nothing; with an archive that no row lists it refuses to replace it."""
    monkeypatch.setattr(make_vectors, "VECTORS", tmp_path)
    kept = {"valid": {**VALID, "of an earlier version": {"sha256": "0"}}, "invalid": dict(INVALID)}
    index = tmp_path / "index.json"
    index.write_text(json.dumps(kept))
    make_vectors.main()
    assert json.loads(index.read_text()) == kept
    assert [p.name for p in tmp_path.iterdir()] == ["index.json"]
    del kept["valid"]["small"]
    index.write_text(json.dumps(kept))
    (tmp_path / "valid").mkdir()
    (tmp_path / "valid" / "small.tar.gz").write_bytes(b"frozen")
    with pytest.raises(SystemExit, match="vectors are never changed"):
        make_vectors.main()
    assert (tmp_path / "valid" / "small.tar.gz").read_bytes() == b"frozen"
    assert json.loads(index.read_text()) == kept


def test_every_encoding_and_feature_is_in_a_valid_vector(tmp_path: Path) -> None:
    encodings, codecs, mixed, features, biases, dtypes = (set[Any]() for _ in range(6))
    for name in VALID:
        manifest = Pack(unpack("valid", name, tmp_path / name)).manifest
        projections = [p for k in manifest.record_kinds for p in k.projections]
        encodings |= {p.encoding for p in projections}
        biases |= {p.bias for p in projections}
        dtypes |= {t.dtype for t in manifest.tensors}
        features |= set(manifest.required_features)
        codecs |= {layer.codec for layer in manifest.layers}
        mixed |= {(layer.codec, layer.mixed) for layer in manifest.layers}
    assert {e.dtype for e in encodings if not e.quantized} == set(C.RAW_DTYPES)
    for field, expected in (("bits", C.AFFINE_BITS), ("group_size", C.GROUP_SIZES), ("dtype", C.SCALE_DTYPES)):
        assert {getattr(e, field) for e in encodings if e.name == "affine"} == set(expected)
    assert {e.global_scale for e in encodings if e.name == "nvfp4"} == set(C.GLOBAL_SCALES)
    assert {e.dtype for e in encodings if e.name == "fp8_e4m3"} == set(C.FP8_SCALE_DTYPES)
    assert {0, 1, C.MAX_BLOCK} < {n for e in encodings if e.name == "fp8_e4m3" for n in e.block}
    assert features == set(C.FEATURES)
    assert biases == {"", *C.BIAS_DTYPES}
    assert dtypes == set(C.TENSOR_DTYPES)
    assert codecs == set(C.CODECS)
    assert len(mixed) == 4


NEWER = {name: row for name, row in INVALID.items() if row["error"] == "version"}


@pytest.mark.parametrize("name", sorted(NEWER))
def test_a_newer_pack_is_refused_with_the_version_that_reads_it(name: str, tmp_path: Path) -> None:
    """By name, and with the pack's own ``min_reader``, whatever it is that this version does not know."""
    pack = unpack("invalid", name, tmp_path)
    needs = json.loads((pack / C.MANIFEST).read_bytes())["min_reader"]
    with pytest.raises(VersionError, match=rf"; the pack needs flashpack {re.escape(needs)} or newer$"):
        Pack(pack)


def test_everything_that_may_be_newer_has_a_vector() -> None:
    assert {row["rule"] for row in NEWER.values()} == {
        "newer-version", "unknown-feature", "unknown-codec", "unknown-encoding", "unknown-name-schema",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(VALID))
def test_a_reader_of_version_2_reads_version_1(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(C, "VERSION", 2)
    monkeypatch.setattr(C, "FEATURES", C.FEATURES | {"warp": "3.1"})
    pack = unpack("valid", name, tmp_path)
    assert verify(pack) == []
    assert values(pack) == {k: VALID[name][k] for k in ("identity", "experts", "tensors", "matrices")}


def test_what_a_reader_would_refuse_is_not_committed(tmp_path: Path) -> None:
    from flashpack.formats import Manifest
    from flashpack.formats.writer import commit

    good = Pack(unpack("valid", "base", tmp_path / "base")).manifest
    changes: list[Callable[[], Manifest]] = [
        lambda: Manifest(good.model, {"x": 0.5}, *_tables(good)),
        lambda: Manifest({}, good.recipe, *_tables(good)),
        lambda: Manifest(good.model, good.recipe, *_tables(good)[:-1], good.files[:1]),
    ]
    for change in changes:
        with pytest.raises(FlashpackError):
            commit(tmp_path, change())
    assert not (tmp_path / C.MANIFEST).exists()


def _tables(m: Any) -> tuple[Any, ...]:
    return m.record_kinds, m.layers, m.matrices, m.tensors, m.files
