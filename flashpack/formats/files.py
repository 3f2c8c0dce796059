"""Positional reads and durable writes. Everything that touches a file of a pack goes through here."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from flashpack.errors import FormatError, OutputError

READ_CHUNK = 4 * 2**20

_BLOCK = 4096  # what direct reads are aligned to; a multiple of every drive's blocks
_thread = threading.local()
_making = threading.Lock()


def open_inside(folder: Path, path: str, flags: int = 0) -> int:
    """A descriptor of the plain file ``path`` ("a/b") below ``folder``, for reading.

    Nothing below ``folder`` may be a symbolic link, so a pack cannot lead its reader elsewhere; ``folder`` itself
    may. Raises ``OSError``, also for what is no plain file (opening a pipe would wait for ever).
    """
    *folders, name = path.split("/")
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in folders:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = inner
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, dir_fd=at)
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a plain file")
    return fd


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
    """Read exactly ``size`` bytes; memory is taken only for bytes that the file has."""
    there = os.fstat(fd).st_size
    if offset + size > there:
        raise FormatError(f"{what}: file ends at byte {there}, {offset + size - there} bytes missing")
    data = bytearray(size)
    pread_into(fd, memoryview(data), offset, what)
    return data


def open_direct(folder: Path, path: str) -> int:
    """``open_inside`` for reading past the page cache, where the file system can: for data that is read once.

    Reads through it must be aligned, as those of ``chunks`` are. It checks what is on the drive, and copies nothing.
    """
    return _without_cache(lambda flags: open_inside(folder, path, flags))


def without_cache(path: str) -> int:
    """``open_direct`` for a file that is no part of a pack; links are followed."""
    return _without_cache(lambda flags: os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags))


def _without_cache(open_with: Callable[[int], int]) -> int:
    if sys.platform == "linux":
        try:
            return open_with(os.O_DIRECT)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
    fd = open_with(0)
    if sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
    return fd


def chunks(fd: int, offset: int, size: int, what: str) -> Iterator[memoryview]:
    """The bytes [offset, offset + size) in pieces of at most ``READ_CHUNK``; a short file is a ``FormatError``.

    Pieces lie in a buffer of the calling thread: each is valid until the next, and one iteration runs at a time.
    """
    if not hasattr(_thread, "buffer"):
        _thread.buffer = memoryview(mmap.mmap(-1, READ_CHUNK))
    buffer: memoryview = _thread.buffer
    end = offset + size
    at = offset - offset % _BLOCK
    while at < end:
        got = os.preadv(fd, [buffer[: min(READ_CHUNK, end - at + -(end - at) % _BLOCK)]], at)
        if at + got < end:
            got -= got % _BLOCK  # the next read must be aligned, too
        if got == 0:
            raise FormatError(f"{what}: file ends before byte {end}")
        yield buffer[max(0, offset - at) : min(got, end - at)]
        at += got


def aligned_pread_into(fd: int, buffer: memoryview, offset: int, what: str) -> None:
    """``pread_into`` through ``chunks``, for descriptors that need aligned reads."""
    target = np.frombuffer(buffer, dtype=np.uint8)
    done = 0
    for piece in chunks(fd, offset, len(target), what):
        target[done : done + len(piece)] = np.frombuffer(piece, dtype=np.uint8)  # lets other threads run
        done += len(piece)


def create(path: Path, root: Path) -> int:
    """A descriptor of a new, empty file, for writing and reading; an old one is emptied.

    Folders below ``root`` are made. ``root`` is not: a pack that is moved away while it is written does not come back.
    """
    below = [p for p in path.parents if p.is_relative_to(root) and p != root]
    with _making:
        for missing in [p for p in below if not p.is_dir()][::-1]:
            missing.mkdir()
            sync_folder(missing.parent)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


def make_folder(folder: Path) -> None:
    """Make what is missing of ``folder`` and the folders above it, durably. From any thread."""
    with _making:  # whoever finds it there may rely on its name
        for missing in [p for p in (folder, *folder.parents) if not p.is_dir()][::-1]:
            missing.mkdir(exist_ok=True)
            sync_folder(missing.parent)


def resize(fd: int, size: int) -> None:
    """Make the file ``size`` bytes long; what is new is zero."""
    os.ftruncate(fd, size)


def pwrite(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``."""
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def without_cache_for_writing(path: Path) -> int | None:
    """A second descriptor of a file, for writes that ``is_aligned``; None where the file system has no such thing."""
    if sys.platform == "linux":
        try:
            return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
    return None


def is_aligned(data: bytes | bytearray | memoryview, offset: int) -> bool:
    """Whether place, size and address are those of whole blocks, so that ``data`` can be written past the cache."""
    if not data:
        return False
    address = np.frombuffer(data, dtype=np.uint8).ctypes.data
    return not (offset | len(data) | address) % _BLOCK


def write_behind(fd: int, offset: int, size: int) -> None:
    """Have the drive begin with what has been written there, so that ``sync`` finds little to do. Only a hint."""
    if sys.platform == "linux":
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)


def read_ahead(fd: int, size: int) -> None:
    """Have the drive begin with a file that is needed soon, in the background. Only a hint."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # not every file system takes hints
            os.posix_fadvise(fd, 0, size, os.POSIX_FADV_WILLNEED)


def sync(fd: int) -> None:
    """Force a file or folder to the drive itself (F_FULLFSYNC on macOS, where fsync stops at the drive's cache)."""
    if sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def publish(partial: Path, path: Path) -> None:
    """Give a finished file its name, durably."""
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in ``folder`` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        sync(fd)
    finally:
        os.close(fd)


def write_durably(root: Path, name: str, data: bytes, suffix: str) -> None:
    """Replace the file ``name`` below ``root`` by ``data``: write ``name + suffix``, sync, rename, sync the folder."""
    path = root / name
    partial = path.with_name(path.name + suffix)
    with output_errors(path):
        fd = create(partial, root)
        try:
            pwrite(fd, data, 0)
            sync(fd)
        finally:
            os.close(fd)
        publish(partial, path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the only writer's lock on a folder; ``OutputError`` if somebody else does. A kill releases it."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise OutputError(f"{folder}: another process is writing here; wait for it, or stop it") from e
        except OSError as e:  # some network file systems lock no folders
            raise OutputError(f"{folder}: cannot be locked: {e.strerror}; work on a copy on a local disk") from e
        yield
    finally:
        os.close(fd)


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
