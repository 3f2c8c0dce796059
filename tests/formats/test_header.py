"""Headers: what must be refused, and that other readers open what we write."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flashpack.errors import FormatError
from flashpack.formats.constants import PAGE
from flashpack.formats.header import TensorSpec, build_header, parse_header, read_header

ONE = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def text(fields: object) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"[]", 0, "not a JSON object"),
        (b" " + text({}), 0, "not a JSON object"),
        (b'{"a":NaN}', 0, "NaN"),
        (b"{" * 4000, 0, "not valid JSON"),
        (b'{"a' + bytes([0xFF]) + b'":1}', 0, "not valid JSON"),
        (b'{"a":' + text(ONE) + b',"a":' + text(ONE) + b"}", 4, "twice"),
        (text({"a": ONE | {"extra": 1}}), 4, "expected dtype, shape and data_offsets"),
        (text({"a": ONE | {"dtype": "Q4"}}), 4, "type 'Q4' is unknown"),
        (text({"a": ONE | {"shape": [-4]}}), 4, "not lists of sizes"),
        (text({"a": ONE | {"shape": [4.0]}}), 4, "not lists of sizes"),
        (text({"a": ONE | {"shape": [True, 4]}}), 4, "not lists of sizes"),
        (text({"a": ONE | {"shape": 4}}), 4, "not lists of sizes"),
        (text({"a": ONE | {"data_offsets": [0, 4, 5]}}), 4, "not lists of sizes"),
        (text({"a": ONE | {"shape": [5]}}), 4, "4 bytes for shape"),
        (text({"a": ONE | {"shape": [2**40, 2**40]}}), 4, "4 bytes for shape"),
        (text({"a": ONE, "b": ONE | {"data_offsets": [2, 6]}}), 6, "starts at"),
        (text({"a": ONE, "b": ONE | {"data_offsets": [8, 12]}}), 12, "starts at"),
        (text({"a": ONE}), 3, "truncated"),
        (text({"a": ONE}), 5, "too long"),
        (text({"__metadata__": {"a": 1}}), 0, "not a map of strings"),
        (text({"__metadata__": []}), 0, "not a map of strings"),
    ],
)
def test_a_wrong_header_is_refused_by_name(header: bytes, data: int, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_header(header, 8 + len(header) + data, "file")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"1234567", "too few"),
        ((2**40).to_bytes(8, "little") + b"{}", "truncated or not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
    ],
)
def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with open(path, "rb") as f, pytest.raises(FormatError, match=message):
        read_header(lambda count, offset: os.pread(f.fileno(), count, offset), path.stat().st_size, str(path))


def test_built_headers_align_and_open_in_the_safetensors_library(tmp_path: Path) -> None:
    from safetensors import safe_open

    specs = [
        TensorSpec("odd", "U8", (5,), 64),
        TensorSpec("big", "F32", (3, 7), PAGE),
        TensorSpec("tail", "BF16", (9,), 64),
    ]
    raw, header = build_header(specs, {"a": "b"}, "file")
    assert len(raw) == header.data_start
    assert header.data_start % PAGE == 0
    offsets = {t.name: t.offset for t in header.tensors}
    assert [offsets[s.name] % s.alignment for s in specs] == [0, 0, 0]
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw.ljust(header.size, b"\0"))
    with safe_open(path, "pt") as f:
        assert {"odd", "big", "tail"} < set(f.keys())
        assert f.get_tensor("big").shape == (3, 7)
        assert f.metadata() == {"a": "b"}


def test_a_tensor_name_cannot_stand_twice() -> None:
    with pytest.raises(FormatError, match="taken"):
        build_header([TensorSpec("a", "U8", (1,)), TensorSpec("a", "U8", (1,))], {}, "file")


def test_metadata_may_be_null_as_mlx_writes_it() -> None:
    assert parse_header(b'{"__metadata__":null}', 29, "a file").metadata == {}
