"""Routing files: what is written is read, by others as well; what is damaged or something else is refused."""

from __future__ import annotations

import io
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from flashpack.errors import FlashpackError, FormatError, OutputError, SourceError, VersionError
from flashpack.formats.checksums import hexdigest
from flashpack.formats.routing import RecordedRun, Routing, read_routing, write_routing
from tests.performance.routings import PAGE, arrays, made_up

RUN = RecordedRun({PAGE: 7}, 10**8, 20, 22)


def same(found: Routing, expected: Routing) -> None:
    for name, array in arrays(expected).items():
        np.testing.assert_array_equal(getattr(found, name), array, err_msg=name)
        assert getattr(found, name).dtype == array.dtype, name
    assert (found.layers, found.run, found.about) == (expected.layers, expected.run, expected.about)


@pytest.mark.parametrize("experts", [8, 255, 256], ids=["U8", "most of U8", "U16"])
def test_what_was_written_is_read(tmp_path: Path, experts: int) -> None:
    routing = made_up(experts=experts, run=RUN)
    routing.experts[3, 1, 1] = routing.none
    digest = write_routing(tmp_path / "a" / "b.routing", routing)
    found = read_routing(tmp_path / "a" / "b.routing")
    same(found, routing)
    assert (found.top_k, found.sized, found.stride_counts()) == (2, True, {PAGE: 3 * experts})
    header = (tmp_path / "a" / "b.routing").read_bytes()[:PAGE]
    assert hexdigest(header) == digest
    assert os.listdir(tmp_path / "a") == ["b.routing"]


def test_safetensors_reads_it(tmp_path: Path) -> None:
    routing = made_up()
    write_routing(tmp_path / "a", routing)
    found = load_file(tmp_path / "a")
    assert set(found) == set(arrays(routing))
    for name, array in arrays(routing).items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_the_same_routing_gives_the_same_bytes(tmp_path: Path) -> None:
    assert write_routing(tmp_path / "a", made_up(run=RUN)) == write_routing(tmp_path / "b", made_up(run=RUN))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("mine")
    with pytest.raises(OutputError, match=r"a: exists already; use --overwrite"):
        write_routing(path, made_up())
    assert path.read_text() == "mine"
    write_routing(path, made_up(), overwrite=True)
    same(read_routing(path), made_up())
    with pytest.raises(OutputError, match="exists already"):
        write_routing(tmp_path, made_up(), overwrite=True)


def changed(name: str, at: Any, value: Any) -> dict[str, Any]:
    array = arrays(made_up())[name].copy()
    array[at] = value
    return {name: array}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (changed("experts", (2, 1, 0), 8), "layer 2 has 8 experts; a token uses expert 8"),
        (changed("experts", (2, 1), 3), "layer 2: a token uses the same expert twice"),
        (changed("weights", (0, 2, 1), np.nan), "layer 5: a weight is not a number"),
        (changed("steps", 0, 1), "steps do not count up"),
        (changed("steps", 8, 9), "steps do not count up"),
        (changed("steps", 6, 1), "steps do not count up"),
        (changed("prompt", 0, False), "a decoded token is not a step of its own"),
        (changed("prompt", 1, False), "a decoded token is not a step of its own"),
        (changed("positions", 3, -1), "negative"),
        (changed("tokens", 3, -1), "negative"),
        (changed("record_bytes", (1, 4), 0), "with a gap"),
        (changed("record_bytes", 1, 0), "a layer without experts"),
        ({"layers": (1, 2)}, "2 numbers of layers"),
        ({"layers": (1, 5, 2)}, "ascending"),
        ({"tokens": made_up().tokens[:-1]}, r"tokens are int32 \[13\], not int32 \[14\]"),
        ({"tokens": made_up().tokens.astype(np.int64)}, "tokens are int64"),
        ({"record_bytes": made_up().record_bytes[:, 0]}, "record_bytes are of shape"),
        ({"record_bytes": np.full((3, 256), PAGE, np.uint32)}, "record_bytes are of shape"),
        ({"experts": made_up().experts.astype(np.int32)}, "experts are int32"),
        ({"experts": made_up().experts[:0]}, "experts are uint8"),
    ],
)
def test_arrays_that_contradict_are_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        replace(made_up(), **parts)


def test_any_flipped_byte_of_the_arrays_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_routing(path, made_up())
    good = path.read_bytes()
    for at in (PAGE, PAGE + 200, (PAGE + len(good)) // 2, len(good) - 20, len(good) - 1):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(FormatError, match=r"a: damaged|a: prompt holds other values"):
            read_routing(path)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        (b'"flashpack":"routing"', b'"flashpack":"calibration"', FormatError),
        (b'"version":"1"', b'"version":"2"', VersionError),
        (b'"version":"1"', b'"varsion":"1"', VersionError),
        (b'"layers":"[1, 2, 5]"', b'"layers":"[1, 2, 5.0]"', FormatError),
        (b'"layers":"[1, 2, 5]"', b'"layers":"[1, 2, true]"', FormatError),
        (b'"layers":"[1, 2, 5]"', b'"layers":"7"', FormatError),
        (b'"layers":"[1, 2, 5]"', b'"layers":"[1, 2"', FormatError),
        (b"beside", b"bezide", FormatError),
        (b'\\"hits\\": 20', b'\\"hits\\": -1', FormatError),
        (b'\\"16384\\": 7', b'\\"16385\\": 7', FormatError),
        (b'\\"16384\\": 7', b'\\"x6384\\": 7', FormatError),
        (b'"tokens":{', b'"tokenz":{', FormatError),
        (b'"BOOL"', b'"I8"', FormatError),
        (b'"digest":"', b'"digezt":"', FormatError),
        (b"[14,3,2]", b"[3,14,2]", FormatError),
    ],
)
def test_headers_of_something_else_are_refused_in_one_line(
    tmp_path: Path, old: bytes, new: bytes, error: type[FlashpackError]
) -> None:
    path = tmp_path / "a"
    write_routing(path, made_up(run=RUN))
    good = path.read_bytes()
    header = good[8:PAGE]
    assert old in header
    path.write_bytes(good[:8] + header.replace(old, new).rstrip(b" ").ljust(len(header)) + good[PAGE:])
    with pytest.raises(error) as refused:
        read_routing(path)
    assert type(refused.value) is error
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_cut_files_are_refused(tmp_path: Path, size: int) -> None:
    write_routing(tmp_path / "a", made_up())
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:size])
    with pytest.raises(FormatError, match=r"a: .*flashpack trace PACK makes such a file"):
        read_routing(tmp_path / "a")


def test_no_file_and_no_plain_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, error in (("none", SourceError), (".", SourceError), ("pipe", FormatError)):
        with pytest.raises(error, match="flashpack trace PACK makes such a file"):
            read_routing(tmp_path / name)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archives_of_arrays_are_read(tmp_path: Path, save: Any) -> None:
    routing = made_up(layers=(0, 1, 2))
    save(tmp_path / "a.npz", experts=np.asfortranarray(routing.experts.astype(np.int64)), weights=routing.weights)
    found = read_routing(tmp_path / "a.npz")
    np.testing.assert_array_equal(found.experts, routing.experts)
    np.testing.assert_array_equal(found.weights, routing.weights)
    assert (found.layers, found.sized, found.run, found.prompt.any()) == ((0, 1, 2), False, None, False)
    assert found.stride_counts() == {1: 3 * (int(routing.experts.max()) + 1)}
    save(tmp_path / "b.npz", experts=routing.experts)
    assert not read_routing(tmp_path / "b.npz").weights.any()


def archive(path: Path, header: str, data: bytes = b"") -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        text = header.encode().ljust(117) + b"\n"
        out.writestr("experts.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"weights": np.zeros((2, 2, 2))}, "has integers `experts`"),
        ({"experts": np.zeros((2, 2), np.int64)}, "has integers `experts`"),
        ({"experts": np.zeros((2, 2, 2))}, "has integers `experts`"),
        ({"experts": np.zeros((0, 2, 2), np.int8)}, "has integers `experts`"),
        ({"experts": np.full((2, 2, 1), -1)}, "numbers of experts begin at 0"),
        ({"experts": np.full((2, 2, 1), 70_000)}, "numbers of experts begin at 0"),
        ({"experts": np.zeros((2, 2, 2), np.int64)}, "the same expert twice"),
        ({"experts": np.zeros((2, 2, 1), np.int64), "weights": np.zeros((2, 2))}, "`weights` are float64"),
        ({"experts": np.array([[[{}]]], dtype=object)}, "not a sound .npz file"),
    ],
)
def test_archives_of_something_else_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(FormatError, match=message):
        read_routing(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (4000000000, 12, 8), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 12, 8), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1, 1, 1), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': __import__('os').system('touch pwned'), }",
        "(" * 110,
    ],
)
def test_archives_that_lie_are_refused_before_memory_is_taken(tmp_path: Path, header: str) -> None:
    archive(tmp_path / "a.npz", header, b"\0" * 96)
    with pytest.raises(FormatError, match=r"a\.npz: not a sound \.npz file") as refused:
        read_routing(tmp_path / "a.npz")
    assert "\n" not in str(refused.value)


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashpack.formats.routing._MAX_ARCHIVE_BYTES", 10_000)
    np.savez_compressed(tmp_path / "a.npz", experts=np.zeros((10_001, 1, 1), np.uint8))
    with pytest.raises(FormatError, match="more than 10000"):
        read_routing(tmp_path / "a.npz")


def test_nothing_but_our_errors_comes_out_of_broken_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_routing(path, made_up(run=RUN))
    native = path.read_bytes()
    packed = io.BytesIO()
    np.savez_compressed(packed, experts=made_up().experts, weights=made_up().weights)
    rng = np.random.default_rng(3)
    messages = []
    for good, most in ((native, 900), (packed.getvalue(), len(packed.getvalue()))):
        for _ in range(150):
            broken = bytearray(good)
            for at in rng.integers(0, most, rng.integers(1, 4)):
                broken[at] = rng.integers(256)
            path.write_bytes(broken)
            try:
                read_routing(path)
            except FlashpackError as e:
                messages.append(str(e))
    assert len(messages) > 200
    assert not any("\n" in message for message in messages)
