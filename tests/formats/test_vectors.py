"""The conformance suite: every valid vector is read as it was written, every invalid one is refused for its fault.

Vectors are frozen; tools/make_vectors.py adds new ones.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashpack.errors import FlashpackError, VersionError
from flashpack.formats import Pack, verify
from flashpack.formats import constants as C
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from make_vectors import sections, values

VECTORS = ROOT / "tests" / "vectors"
INDEX: dict[str, dict[str, dict[str, Any]]] = json.loads((VECTORS / "index.json").read_text())
VALID, INVALID = INDEX["valid"], INDEX["invalid"]

WRITER_RULES = {
    "MUST refuse to continue with another source": "test_changed_options_are_refused_by_name",
    "MUST NOT commit a manifest": "test_what_a_reader_would_refuse_is_not_committed",
    "MUST NOT execute anything": "test_code_beside_the_configuration_never_runs",
    "MUST NOT take what `config.json` says": "test_an_absurd_configuration_is_refused_before_anything_is_made",
    "a reader MUST ignore fields": "unknown-fields",
    "MUST, MUST NOT, SHOULD and MAY": "the meaning of the words",
}
"""Sentences of SPEC.md that no invalid pack can break, and where they are tested."""


def unpack(kind: str, name: str, folder: Path) -> Path:
    with tarfile.open(VECTORS / kind / f"{name}.tar.gz") as tar:
        tar.extractall(folder, filter="fully_trusted")
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
    for layer in opened.manifest.layers if at in ("shard", "read") else ():
        with opened.open_shard(layer) as shard:
            data = shard.path.read_bytes()
            for expert in range(layer.experts if at == "read" else 0):
                offset, span = shard.extent(expert)
                stored = memoryview(data)[offset : offset + span]
                if not shard.intact(expert, stored):
                    raise DamagedError
                shard.decode(expert, stored, memoryview(bytearray(shard.kind(expert).stride)))


class DamagedError(FlashpackError):
    code = "integrity"


ALONGSIDE = {
    "size": {"truncated-tensor"},  # what the file lacks
    "tail-digest": {"record-digest"},  # a damaged digest is not that of its record
    "unreadable-file": {"unlisted-file"},
}
"""Findings that follow from another one."""

STEPS = ("open", "copies", "shard", "read")


@pytest.mark.parametrize("name", sorted(INVALID))
def test_an_invalid_pack_is_refused_for_its_fault(name: str, tmp_path: Path) -> None:
    row = INVALID[name]
    pack = unpack("invalid", name, tmp_path)
    if row["error"]:
        with pytest.raises(FlashpackError) as caught:
            step(pack, row["at"])
        assert caught.value.code == row["error"]
        assert "\n" not in str(caught.value)
    # Up to the step where it shows, nothing else is wrong.
    for earlier in STEPS[: STEPS.index(row["at"]) if row["at"] else len(STEPS)]:
        if (row["at"], earlier) != ("shard", "copies"):
            step(pack, earlier)
    if row["finding"]:
        assert {f.code for f in verify(pack)} <= {row["finding"], *ALONGSIDE.get(row["finding"], ())}
        assert row["finding"] in {f.code for f in verify(pack)}
    else:
        with pytest.raises(FlashpackError) as caught:
            verify(pack)
        assert caught.value.code == row["error"]


def test_every_rule_of_the_spec_has_a_vector() -> None:
    rules = sections()
    rules.pop("like-this")
    assert set(rules) == {row["rule"] for row in INVALID.values()}
    assert all(rules[row["rule"]] == row["section"] for row in INVALID.values())
    assert all(name.split("--")[0] == row["rule"] for name, row in INVALID.items())


def test_every_must_of_the_spec_names_its_rules() -> None:
    text = re.sub(r"\n(?=[^\n|#-])", " ", (ROOT / "SPEC.md").read_text())
    sentences = [s for line in text.split("\n") for s in re.split(r"(?<=[.:])\s+(?=[A-Z])|\|", line) if "MUST" in s]
    assert len(sentences) > 25
    tests = "".join(p.read_text() for p in (ROOT / "tests").rglob("*.py")) + " ".join(VALID)
    for sentence in sentences:
        known = [where for part, where in WRITER_RULES.items() if part in sentence]
        row = next((line for line in text.split("\n") if sentence in line), sentence)
        assert known or "`[" in sentence or "`[" in row or sentence.endswith("MUST refuse:"), sentence
        assert all(where in tests or " " in where for where in known), known


def test_every_encoding_and_feature_is_in_a_valid_vector(tmp_path: Path) -> None:
    encodings, codecs, mixed = set(), set(), set()
    for name in VALID:
        manifest = Pack(unpack("valid", name, tmp_path / name)).manifest
        projections = [p.encoding for k in manifest.record_kinds for p in k.projections]
        encodings |= set(projections)
        codecs |= {layer.codec for layer in manifest.layers}
        mixed |= {(layer.codec, layer.mixed) for layer in manifest.layers}
    assert {e.dtype for e in encodings if not e.quantized} == set(C.RAW_DTYPES)
    for field, expected in (("bits", C.AFFINE_BITS), ("group_size", C.GROUP_SIZES), ("dtype", C.SCALE_DTYPES)):
        assert {getattr(e, field) for e in encodings if e.quantized} == set(expected)
    assert codecs == set(C.CODECS)
    assert len(mixed) == 4


@pytest.mark.parametrize("name", ["newer-version", "unknown-feature"])
def test_a_newer_pack_is_refused_with_the_version_that_reads_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(VersionError, match=r"the pack needs flashpack 3\.1 or newer"):
        Pack(unpack("invalid", name, tmp_path))


@pytest.mark.parametrize("name", sorted(VALID))
def test_a_reader_of_version_2_reads_version_1(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(C, "VERSION", 2)
    monkeypatch.setattr(C, "FEATURES", C.FEATURES | {"warp": "3.1"})
    assert verify(unpack("valid", name, tmp_path)) == []


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
