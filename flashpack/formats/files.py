"""Positional reads and durable writes. Everything that touches a file of a pack goes through here."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from flashpack.errors import FormatError, OutputError

READ_CHUNK = 4 * 2**20


def pread_into(fd: int, buffer: memoryview, offset: int, what: str) -> None:
    """Fill ``buffer`` from ``offset``; a short file is a ``FormatError`` that names ``what``."""
    view = buffer.cast("B")
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done:]], offset + done)
        if got == 0:
            raise FormatError(f"{what}: file ends at byte {offset + done}, {len(view) - done} bytes missing")
        done += got


def pread(fd: int, size: int, offset: int, what: str) -> bytearray:
    """Read exactly ``size`` bytes."""
    data = bytearray(size)
    pread_into(fd, memoryview(data), offset, what)
    return data


def chunks(fd: int, offset: int, size: int, what: str) -> Iterator[memoryview]:
    """The bytes [offset, offset + size) in pieces of at most ``READ_CHUNK``, in a reused buffer."""
    buffer = memoryview(bytearray(min(READ_CHUNK, size)))
    while size:
        piece = buffer[: min(len(buffer), size)]
        pread_into(fd, piece, offset, what)
        yield piece
        offset += len(piece)
        size -= len(piece)


def pwrite(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``."""
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def sync(fd: int) -> None:
    """Force the file to the drive itself (F_FULLFSYNC on macOS, where fsync stops at the drive's cache)."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in ``folder`` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, data: bytes, suffix: str) -> None:
    """Replace ``path`` by ``data``: write ``path + suffix``, sync, rename, sync the folder."""
    partial = path.with_name(path.name + suffix)
    with output_errors(path), open(partial, "wb") as f:
        f.write(data)
        f.flush()
        sync(f.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn a failing write into an ``OutputError`` that says which file and what to do."""
    try:
        yield
    except OutputError:
        raise
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(
                f"{path}: no space left on the device; free some and run the same command again to continue"
            ) from e
        raise OutputError(f"{path}: cannot write: {e.strerror}") from e
