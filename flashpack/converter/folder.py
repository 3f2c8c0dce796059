"""Where a checkpoint lies: a folder of files that are read by position. Local here; others have the same methods."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import numpy as np

from flashpack.errors import FormatError, SourceError
from flashpack.formats.files import aligned_pread_into, pread_into, without_cache

DIRECT_BYTES = 2**16
"""Reads of a local file from this size on go past the page cache."""


GGUF = ".gguf"

Source = str | os.PathLike[str]
"""Where a checkpoint is: a path of a folder or a GGUF file, ``hf://org/model[@revision]``, or an http(s) URL of a
folder."""

Span = tuple[str, int, int]
"""File, first byte, bytes."""


class Stopped(Exception):
    """The work was called off, because other work failed; this is not the cause."""


class Reader(Protocol):
    """Bytes of files by position, from any thread. Raises ``SourceError``."""

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset``."""
        ...


class Steps(Protocol):
    """Reading in steps that are known before."""

    def step(self, number: int) -> AbstractContextManager[Reader]:
        """For the reads of a step. Steps begin in order, each once; several may be under way at once."""
        ...


class SourceFolder(Reader, Protocol):
    """A folder of files; every method may be called from any thread. All raise ``SourceError``."""

    name: str
    """Path or URL, for messages."""

    origin: dict[str, str]
    """What a later run must ask for to get the same files, where a name is not enough; it goes into the journal."""

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

    def steps(
        self, spans: Callable[[int], list[Span]], count: int, stop: threading.Event
    ) -> AbstractContextManager[Steps]:
        """Reads of ``spans(0)``, ``spans(1)``, ... ``spans(count - 1)``, so that what is far away can be fetched before
        it is needed. ``stop`` ends waits with ``Stopped``."""
        ...

    def close(self) -> None:
        """Close connections and files. A local folder opens them again where it must."""
        ...


def open_folder(src: Source) -> SourceFolder:
    """The folder ``src`` names."""
    match _scheme(src):
        case "":
            return LocalFolder(Path(src))
        case "hf":
            from flashpack.converter.hub import open_hub

            return open_hub(src if isinstance(src, str) else os.fspath(src))  # one that is pinned stays so
        case "http" | "https":
            from flashpack.converter.remote import UrlFolder

            return UrlFolder(str(src))
        case other:
            raise SourceError(f"{other}://: only folders, hf:// and http(s):// are read")


def pinned(src: Source, origin: dict[str, Any]) -> Source:
    """``src`` as a conversion that continues reads it. ``origin`` is that of the one that began: a branch may have
    moved since."""
    if _scheme(src) == "hf":
        from flashpack.converter.hub import pin

        return pin(str(src), origin)
    return src


def is_remote(src: Source) -> bool:
    """Whether ``src`` is no path."""
    return bool(_scheme(src))


def _scheme(src: Source) -> str:
    """What stands before ``://``; empty for a path."""
    scheme, separator, _ = str(src).partition("://")
    return scheme.lower() if separator and scheme.isalnum() else ""


def gguf_name(src: Source) -> str | None:
    """The file's name if ``src`` is the path of a GGUF file."""
    path = Path(src)
    return path.name if not _scheme(src) and path.name.endswith(GGUF) and path.is_file() else None


def shown(src: Source) -> str:
    """``src`` without what may be secret: user and password, and what stands behind ``?``."""
    if _scheme(src) not in ("http", "https"):
        return str(src)
    parts = urlsplit(str(src))
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")


def base_name(src: Source) -> str:
    """The last part of where a checkpoint is, for the name of its pack."""
    match _scheme(src):
        case "" if name := gguf_name(src):
            return re.sub(r"-\d{5}-of-\d{5}$", "", name.removesuffix(GGUF))
        case "":
            return Path(src).resolve().name
        case "hf":
            return str(src).partition("://")[2].partition("@")[0].rstrip("/").rpartition("/")[2]
        case _:
            parts = urlsplit(str(src))
            return unquote(parts.path).rstrip("/").rpartition("/")[2] or parts.hostname or "checkpoint"


def changed_error(where: str, how: str) -> SourceError:
    """The file ``where`` is not what it was when the conversion began."""
    return SourceError(
        f"{where}: changed during the conversion: {how}; "
        f"put the original back and run the same command again, or start anew with --overwrite"
    )


class LocalFolder:
    """A folder on this machine. Can be pickled: files are opened where they are read."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            if path.exists():
                raise SourceError(f"{path}: neither a folder nor a GGUF file; name the checkpoint's folder")
            raise SourceError(f"{path}: no such folder")
        self.path = path
        self.name = str(path)
        self.origin: dict[str, str] = {}
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
        # A checkpoint is read once. Past the page cache that takes a tenth of the time of the processor.
        direct = buffer.nbytes >= DIRECT_BYTES
        key = f"{file}/direct" if direct else file
        fd = self._fds.get(key)
        if fd is None:
            try:
                # Two threads may open the same file at once; the loser's descriptor is closed.
                fd = without_cache(where) if direct else os.open(where, os.O_RDONLY)
            except OSError as e:
                raise SourceError(f"{where}: cannot be read: {e.strerror}") from e
            kept = self._fds.setdefault(key, fd)
            if kept != fd:
                os.close(fd)
                fd = kept
        try:
            (aligned_pread_into if direct else pread_into)(fd, buffer, offset, where)
        except FormatError as e:
            raise SourceError(f"{e}; the source changed or is damaged") from e
        except OSError as e:
            raise SourceError(f"{where}: reading at byte {offset} failed: {e.strerror}") from e

    def steps(
        self, spans: Callable[[int], list[Span]], count: int, stop: threading.Event
    ) -> AbstractContextManager[Steps]:
        return contextlib.nullcontext(_Direct(self))  # the system reads ahead

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __reduce__(self) -> tuple[type[LocalFolder], tuple[Path]]:
        return LocalFolder, (self.path,)


class _Direct:
    """Steps that need no preparation."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def step(self, number: int) -> AbstractContextManager[Reader]:
        return contextlib.nullcontext(self._reader)


@contextlib.contextmanager
def source_errors(where: str) -> Iterator[None]:
    """Turn what goes wrong in reading ``where`` into a ``SourceError``."""
    try:
        yield
    except FormatError as e:
        raise SourceError(str(e)) from e
    except OSError as e:
        raise SourceError(f"{where}: cannot be read: {e.strerror}") from e
