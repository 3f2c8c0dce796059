"""The quality report: its numbers are those of the pack, its bytes depend on nothing else, its page is only a page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

import flashpack
from flashpack.converter import notes, units
from flashpack.converter.against import against
from flashpack.converter.quality import QUALITY_FILES
from flashpack.converter.quality_page import page
from flashpack.converter.quality_plots import heatmap, nice
from flashpack.converter.repair import repair
from flashpack.converter.units import Outcome
from flashpack.errors import OutputError, SourceError
from flashpack.formats import Pack
from flashpack.formats.checksums import hexdigest
from flashpack.formats.constants import JOURNAL, QUALITY, QUALITY_PAGE
from flashpack.formats.dtypes import NUMPY
from flashpack.formats.encodings import decode
from flashpack.formats.manifest import Manifest
from flashpack.formats.writer import commit
from tests.conftest import TRAINED, PackOf, contents
from tests.strangers import rewrite

Copy = Callable[..., Path]
EVIL = "<script>alert(1)</script>\"'&\x1b[2J\u202e\x00"


def report_of(pack: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((pack / QUALITY).read_bytes())
    return found


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack whose experts differ in their encodings."""
    out = tmp_path_factory.mktemp("mixed") / "out"
    flashpack.convert(TRAINED, out, dense="q4", bpw="3.1")
    return out


def experts_of(pack: Pack) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    """(layer, expert) -> its matrices, float32 [out, in] by projection."""
    found = {}
    for layer in pack.manifest.layers:
        with pack.open_shard(layer) as shard:
            for expert in range(layer.experts):
                kind, (offset, span) = shard.kind(expert), shard.extent(expert)
                record = np.fromfile(shard.path, np.uint8, span, offset=offset)
                stored = {
                    s.name: record[s.offset : s.offset + s.nbytes].view(NUMPY[s.dtype]).reshape(s.shape)
                    for s in kind.sections
                }
                found[layer.index, expert] = {
                    p.name: decode(p.encoding, {n: stored[f"{p.name}.{n}"] for n in p.encoding.part_names}, p.shape)
                    for p in kind.projections
                }
    return found


def relative(stored: np.ndarray, source: np.ndarray) -> float:
    wide = source.astype(np.float64)
    return float(np.linalg.norm(stored - wide) / np.linalg.norm(wide))


def test_errors_are_those_of_the_pack_beside_the_source(mixed: Path) -> None:
    source = {k: v.float().numpy() for f in TRAINED.glob("*.safetensors") for k, v in load_file(f).items()}
    report, pack = report_of(mixed), Pack(mixed)
    stored = experts_of(pack)
    assert [layer["index"] for layer in report["layers"]] == list(range(6))
    every: dict[str, list[float]] = {"gate": [], "up": [], "down": []}
    experts = []
    for layer in report["layers"]:
        of_layer = []
        for expert in range(32):
            found = {}
            for name, told in layer["projections"].items():
                stem = f"model.layers.{layer['index']}.mlp.experts.{expert}.{name}_proj.weight"
                found[name] = relative(stored[layer["index"], expert][name], source[stem])
                assert told["error"][expert] == pytest.approx(found[name], rel=6e-4), stem
                every[name].append(found[name])
            of_layer += found.values()
            experts.append((max(found.values()), layer["index"], expert))
        assert layer["mean"] == pytest.approx(np.mean(of_layer), rel=6e-4)
        assert layer["max"] == pytest.approx(max(of_layer), rel=6e-4)
    for row in report["summary"][:3]:
        assert (row["mean"], row["max"]) == pytest.approx(
            (np.mean(every[row["part"]]), max(every[row["part"]])), rel=6e-4
        )
    worst = sorted(experts, reverse=True)
    assert [row["error"] for row in report["worst"]] == pytest.approx([error for error, *_ in worst[:20]], rel=6e-4)
    assert (report["worst"][0]["layer"], report["worst"][0]["expert"]) == worst[0][1:]
    rounded = [t for t in report["dense"] if t["error"] is not None]
    matrices = {matrix.name: matrix for matrix in pack.manifest.matrices}
    assert {t["name"] for t in rounded} == matrices.keys()
    for tensor in rounded:
        matrix = matrices[tensor["name"]]
        parts = {part: pack.map_tensor(name) for part, name in matrix.tensor_names().items()}
        error = relative(decode(matrix.encoding, parts, matrix.shape), source[matrix.name])
        assert tensor["error"] == pytest.approx(error, rel=6e-4), tensor["name"]


def test_bits_count_what_is_stored_and_say_what_padding_takes(mixed: Path) -> None:
    manifest, sizes = Pack(mixed).manifest, report_of(mixed)["sizes"]
    counts = [(manifest.record_kinds[kind], count) for layer in manifest.layers for kind, count in layer.kinds]
    nbytes = sum(count * sum(s.nbytes for s in kind.sections) for kind, count in counts)
    weights = 6 * 32 * 3 * 64 * 256
    assert (sizes["experts"]["weights"], sizes["experts"]["bytes"]) == (weights, nbytes)
    assert sizes["experts"]["bits"] == pytest.approx(8 * nbytes / weights, abs=1e-3)
    assert 3.0 < sizes["experts"]["bits"] <= 3.1
    padded = sum((mixed / layer.path).stat().st_size for layer in manifest.layers)
    assert 0 <= padded - sizes["experts"]["padded_bytes"] < len(manifest.layers) * 2 * 16384  # header, digests
    assert sizes["dense"]["bytes"] == sum(t.nbytes for t in manifest.tensors)
    assert sizes["dense"]["padded_bytes"] == (mixed / "dense-00001.safetensors").stat().st_size
    encodings = report_of(mixed)["encodings"]
    with Pack(mixed).open_shard(manifest.layers[2]) as shard:
        for expert in range(32):
            told = [p["encoding"][expert] for p in report_of(mixed)["layers"][2]["projections"].values()]
            kinds = [str(p.encoding) for p in shard.kind(expert).projections]
            assert [encodings[e]["name"] for e in told] == [kinds[2], kinds[0], kinds[1]]  # by name


def test_a_lossless_conversion_says_so(pack_of: PackOf) -> None:
    pack = pack_of("trained", "source", "source")
    report, text = report_of(pack), (pack / QUALITY_PAGE).read_text()
    assert all(row["rounded"] == 0 and row["mean"] is None for row in report["summary"])
    assert report["worst"] == []
    assert "Nothing was rounded" in text
    assert "<svg" not in text
    assert "worst" not in text


@pytest.mark.parametrize("workers", [1, 4])
def test_an_interrupted_conversion_has_the_same_report(
    interrupted: Callable[..., Path], pack_of: PackOf, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(notes, "NOTE_SECONDS", 0.0)
    out = interrupted()
    assert flashpack.convert(TRAINED, out, workers=workers).resumed_files == 4
    assert {name: contents(out)[name] for name in QUALITY_FILES} == {
        name: contents(pack_of("trained"))[name] for name in QUALITY_FILES
    }


def test_what_calibration_knows_survives_an_interruption(
    interrupted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens and weighted errors, from finished files and from the notes of one that is not."""
    monkeypatch.setattr(notes, "NOTE_SECONDS", 0.0)
    real = units.encode_record

    def encode_record(folder: Any, plan: Any, expert: int, *others: Any) -> Any:
        errors = real(folder, plan, expert, *others)
        for error in errors.values():
            error.tokens = 7 * expert
            error.weighted = error.relative() / 3 if expert > 2 else None
        return errors

    monkeypatch.setattr(units, "encode_record", encode_record)
    flashpack.convert(TRAINED, tmp_path / "whole")
    out = interrupted()
    flashpack.convert(TRAINED, out)
    report = report_of(out)
    assert report == report_of(tmp_path / "whole")
    for layer in report["layers"]:
        assert layer["tokens"] == [7 * expert for expert in range(32)]
        for told in layer["projections"].values():
            assert told["weighted"][:3] == [None] * 3
            assert told["weighted"][3:] == pytest.approx([e / 3 for e in told["error"][3:]], rel=1e-3)
    text = (out / QUALITY_PAGE).read_text()
    assert "18 experts saw too few" in text  # 3 in each of 6 layers


def test_the_journal_of_an_older_version_is_refused(interrupted: Callable[..., Path]) -> None:
    out = interrupted()
    lines = (out / JOURNAL).read_bytes().splitlines()
    for number, text in enumerate(lines):
        line = json.loads(text)
        if "file" in line:
            del line["digest"]
            line["errors"] = {"max": 0.1, "mean": 0.05}
            lines[number] = json.dumps(line | {"digest": hexdigest(json.dumps(line, sort_keys=True).encode())}).encode()
    (out / JOURNAL).write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(OutputError, match=r"is of another version; use --overwrite"):
        flashpack.convert(TRAINED, out)


def test_an_outcome_is_the_same_after_its_way_through_the_journal() -> None:
    errors = [{"up": [0.1, 2.0, 0.25, 12]}, {"up": [0.0, 1e-30, None, None]}, {}]
    line = {"file": {"path": "x", "role": "copy", "size": 1, "digests": {}}, "tensors": [], "errors": errors}
    assert json.loads(json.dumps(Outcome.from_json(line).to_json()))["errors"] == errors


# A pack's report is proven, mended and carried as its other files are.


def test_a_report_that_was_changed_is_found_out(pack_copy: Copy) -> None:
    pack = pack_copy("trained")
    assert against(pack, TRAINED) == []
    report = report_of(pack)
    report["layers"][3]["projections"]["up"]["error"][5] /= 2
    rewrite(pack, QUALITY, json.dumps(report).encode())
    assert [(f.code, f.file) for f in against(pack, TRAINED)] == [("source-copy", QUALITY)]


def test_a_page_that_another_version_drew_is_no_finding(pack_copy: Copy) -> None:
    """Nor is one that is not there; the numbers decide."""
    pack = pack_copy("trained")
    rewrite(pack, QUALITY_PAGE, b"<!DOCTYPE html><title>an older page</title>")
    assert flashpack.verify(pack) == []
    assert against(pack, TRAINED) == []
    manifest = Manifest.from_bytes((pack / "flashpack.json").read_bytes())
    (pack / QUALITY_PAGE).unlink()
    commit(pack, replace(manifest, files=tuple(f for f in manifest.files if f.path != QUALITY_PAGE)))
    assert against(pack, TRAINED) == []


def test_a_lost_report_is_made_again_from_the_source(pack_copy: Copy, pack_of: PackOf) -> None:
    pack = pack_copy("trained")
    (pack / QUALITY).write_bytes(b"damaged")
    (pack / QUALITY_PAGE).unlink()
    assert repair(pack, TRAINED).files == [QUALITY_PAGE, QUALITY]
    assert contents(pack) == contents(pack_of("trained"))


def test_a_source_that_gives_another_report_does_not_mend_it(
    pack_copy: Copy, source_copy: Callable[[str], Path]
) -> None:
    pack, source = pack_copy("trained"), source_copy("trained")
    for path in source.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-2:] = b"\x40\x40"
        path.write_bytes(data)
    (pack / QUALITY).unlink()
    with pytest.raises(SourceError, match="can be mended from it"):
        repair(pack, source)


def test_recoding_carries_the_report(pack_of: PackOf, tmp_path: Path) -> None:
    flashpack.recode(pack_of("trained"), tmp_path / "out", "zstd")
    for name in QUALITY_FILES:
        assert (tmp_path / "out" / name).read_bytes() == (pack_of("trained") / name).read_bytes()


def test_a_pack_of_before_reports_is_proven_and_runs_as_it_is(pack_copy: Copy) -> None:
    pack = pack_copy("trained")
    manifest = Manifest.from_bytes((pack / "flashpack.json").read_bytes())
    for name in QUALITY_FILES:
        (pack / name).unlink()
    files = tuple(f for f in manifest.files if f.path not in QUALITY_FILES)
    commit(pack, replace(manifest, files=files))
    assert flashpack.verify(pack) == []
    assert against(pack, TRAINED) == []


# The page.

ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "b", "i", "code", "span", "figure",
    "figcaption", "svg", "path", "circle", "text", "table", "tr", "th", "td",
}  # fmt: skip


class Parsed(HTMLParser):
    """Elements and text of a page; every element that is opened is closed, in order."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_loads_and_runs_nothing(mixed: Path) -> None:
    text = (mixed / QUALITY_PAGE).read_text()
    parsed = Parsed(text)
    assert set(parsed.tags) <= ELEMENTS
    assert not {name for name, _ in parsed.attributes} & {"src", "href", "srcset", "style", "onload", "onclick"}
    assert not re.search(r"url\(|@import|https?:", text)
    assert parsed.tags.count("figure") == parsed.tags.count("svg") == 3  # no tokens: it was not calibrated
    assert not re.search(r"\d\d:\d\d|/tmp|/home|nan|inf\b", parsed.text)


def test_a_page_shows_the_numbers_of_the_report(mixed: Path) -> None:
    report, text = report_of(mixed), (mixed / QUALITY_PAGE).read_text()
    parsed = Parsed(text)
    for row in report["summary"]:
        for value in (row["mean"], row["max"]):
            assert f"{100 * value:#.3g} %" in parsed.text
    assert f"{report['sizes']['experts']['bits']:.2f}" in parsed.text
    assert "The 20 worst experts" in parsed.text
    counts = re.findall(r"(\d\.\d\d) bits: (\d+)<", text)
    assert sum(int(count) for _, count in counts) == 6 * 32
    assert 3.0 < sum(float(bits) * int(count) for bits, count in counts) / (6 * 32) <= 3.11


def test_names_of_strangers_are_text(mixed: Path) -> None:
    report = report_of(mixed)
    plain = Parsed(page(report).decode())
    report["model"]["architecture"] = EVIL
    report["recipe"][EVIL] = {"a": EVIL}
    for tensor in report["dense"]:
        tensor["name"] = EVIL
    for encoding in report["encodings"]:
        encoding["name"] = EVIL
    text = page(report).decode()
    parsed = Parsed(text)
    assert [t for t in parsed.tags if t not in ("td", "tr")] == [t for t in plain.tags if t not in ("td", "tr")]
    assert "<script>alert(1)</script>\"'&\\x1b[2J\\u202e\\x00" in parsed.text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


def test_a_report_of_a_very_large_model_stays_small(mixed: Path) -> None:
    """60 layers of 512 experts, each of its own width: a page of a megabyte or two."""
    report = report_of(mixed)
    layer = report["layers"][0]
    wide = {
        name: {k: v * 16 if isinstance(v, list) else v for k, v in p.items()}
        for name, p in layer["projections"].items()
    }
    report["layers"] = [layer | {"index": i, "projections": wide} for i in range(60)]
    assert len(page(report)) < 2.5e6


def test_equal_experts_beside_each_other_are_drawn_as_one() -> None:
    plot = heatmap("title", [(0, [1] * 300 + [0] * 212), (1, [1] * 512)], "expert", "layer")
    drawn = re.findall(r'class="heat h(\d)" d="([^"]*)"', plot)
    assert [(shade, path.count("M")) for shade, path in drawn] == [("0", 1), ("1", 2)]


@pytest.mark.parametrize(
    ("value", "found"),
    [(0.0, 0.0), (1.0, 1.0), (1.01, 2.0), (2.3, 2.5), (26.0, 50.0), (0.00051, 0.001), (9.9999999, 10.0)],
)
def test_steps_of_an_axis_are_round(value: float, found: float) -> None:
    assert nice(value) == found
