"""Where a checkpoint lies: a folder of files that are read by position. Local here; others have the same methods."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flashpack.errors import FormatError, SourceError
from flashpack.formats.files import pread_into


class SourceFolder(Protocol):
    """A folder of files; every method may be called from any thread. All raise ``SourceError``."""

    name: str
    """Path or URL, for messages."""

    def where(self, file: str) -> str:
        """Path or URL of a file, for messages."""
        ...

    def files(self) -> list[str]:
        """Names of the plain files, sorted; not those of subfolders."""
        ...

    def size(self, file: str) -> int:
        """Bytes of a file."""
        ...

    def state(self, file: str) -> dict[str, Any]:
        """What tells one version of a file from another and can be had without reading it, as JSON: its size, and a
        time, a hash or a tag. Asked anew each time."""
        ...

    def read(self, file: str) -> bytes:
        """All bytes of a small file."""
        ...

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset``."""
        ...

    def close(self) -> None:
        """Close connections and files; those that are needed again are opened again."""
        ...


def open_folder(src: str | os.PathLike[str]) -> SourceFolder:
    """The folder ``src`` names."""
    return LocalFolder(Path(src))


class LocalFolder:
    """A folder on this machine. Can be pickled: files are opened where they are read."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise SourceError(f"{path}: no such folder")
        self.path = path
        self.name = str(path)
        self._fds: dict[str, int] = {}

    def where(self, file: str) -> str:
        return str(self.path / file)

    def files(self) -> list[str]:
        with source_errors(self.name):
            return sorted(p.name for p in self.path.iterdir() if p.is_file())

    def size(self, file: str) -> int:
        size: int = self.state(file)["size"]
        return size

    def state(self, file: str) -> dict[str, Any]:
        """Size in bytes and modified time (UTC, with nanoseconds); two states are only ever compared."""
        with source_errors(self.where(file)):
            status = (self.path / file).stat()
        return {"size": status.st_size, "modified": str(np.datetime64(status.st_mtime_ns, "ns"))}

    def read(self, file: str) -> bytes:
        with source_errors(self.where(file)):
            return (self.path / file).read_bytes()

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        where = self.where(file)
        fd = self._fds.get(file)
        if fd is None:
            try:
                # Two threads may open the same file at once; the loser's descriptor is closed.
                fd = os.open(where, os.O_RDONLY)
            except OSError as e:
                raise SourceError(f"{where}: cannot be read: {e.strerror}") from e
            kept = self._fds.setdefault(file, fd)
            if kept != fd:
                os.close(fd)
                fd = kept
        try:
            pread_into(fd, buffer, offset, where)
        except FormatError as e:
            raise SourceError(f"{e}; the source changed or is damaged") from e
        except OSError as e:
            raise SourceError(f"{where}: reading at byte {offset} failed: {e.strerror}") from e

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __reduce__(self) -> tuple[type[LocalFolder], tuple[Path]]:
        return LocalFolder, (self.path,)


@contextlib.contextmanager
def source_errors(where: str) -> Iterator[None]:
    """Turn what goes wrong in reading ``where`` into a ``SourceError``."""
    try:
        yield
    except FormatError as e:
        raise SourceError(str(e)) from e
    except OSError as e:
        raise SourceError(f"{where}: cannot be read: {e.strerror}") from e
