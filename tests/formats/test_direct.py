"""Reads and writes past the page cache: any place and size is read right, and only whole blocks are written so."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from flashpack.errors import FormatError
from flashpack.formats import Encoding, Projection, RecordKind
from flashpack.formats.files import (
    READ_CHUNK,
    aligned_pread_into,
    is_aligned,
    pwrite,
    without_cache,
    without_cache_for_writing,
)
from flashpack.formats.writer import RecordBuffer

DATA = np.random.default_rng(0).integers(0, 256, READ_CHUNK + 12345, dtype=np.uint8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "data").write_bytes(DATA.tobytes())
    return tmp_path / "data"


@pytest.mark.parametrize("offset", [0, 1, 4095, 4096, 70_001])
@pytest.mark.parametrize("size", [0, 1, 4096, 2**16, 3 * 2**20 + 7, READ_CHUNK])
def test_any_bytes_are_read(path: Path, offset: int, size: int) -> None:
    size = min(size, len(DATA) - offset)
    fd = without_cache(str(path))
    buffer = np.zeros(size, np.uint8)
    try:
        aligned_pread_into(fd, buffer.data, offset, str(path))
    finally:
        os.close(fd)
    assert (buffer == DATA[offset : offset + size]).all()


def test_the_end_of_the_file_is_noticed(path: Path) -> None:
    fd = without_cache(str(path))
    try:
        with pytest.raises(FormatError, match="file ends before byte"):
            aligned_pread_into(fd, memoryview(bytearray(2**17)), len(DATA) - 2**17 + 1, str(path))
    finally:
        os.close(fd)


def test_a_record_is_aligned_and_what_is_not_is_told_apart() -> None:
    encoding = Encoding("affine", "BF16", bits=4, group_size=64)
    shapes = {"gate": (64, 128), "up": (64, 128), "down": (128, 64)}
    buffer = RecordBuffer(RecordKind(tuple(Projection(name, shape, encoding) for name, shape in shapes.items())))
    record = buffer.data.data
    assert not buffer.data.any()
    assert is_aligned(record, 16384)
    assert not is_aligned(record, 16385)
    assert not is_aligned(record[:-1], 0)
    assert not is_aligned(record[1:4097], 0)
    assert not is_aligned(b"", 0)


def test_both_descriptors_write_the_same_file(path: Path) -> None:
    buffer = np.frombuffer(mmap.mmap(-1, 8192), dtype=np.uint8)
    buffer[:] = 7
    direct = without_cache_for_writing(path)
    if direct is None:
        pytest.skip("this file system has no direct writes")
    fd = os.open(path, os.O_RDWR)
    pwrite(fd, b"header", 0)
    pwrite(direct, buffer.data, 4096)
    pwrite(fd, b"tail", 4096 + 8192)
    os.close(direct)
    os.close(fd)
    expected = DATA.tobytes()
    expected = b"header" + expected[6:4096] + b"\7" * 8192 + b"tail" + expected[4096 + 8192 + 4 :]
    assert path.read_bytes() == expected
