"""A checkpoint behind http(s): read by ranges, never stored. ``UrlFolder`` is a plain folder of a web server."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from flashpack.converter.folder import Reader, Span, shown
from flashpack.converter.source import CONFIG, COPIED, INDEX
from flashpack.converter.transfer import CONNECTIONS, Denied, Missing, RemoteFile, Transfer
from flashpack.converter.window import HELD_BYTES, Budget, Window
from flashpack.errors import SourceError

Result = TypeVar("Result")

SMALL_BYTES = 256 * 2**20
"""Files that are read as a whole are not larger: configuration, index, tokenizer."""

_PROBED = (
    *sorted(COPIED),
    INDEX,
    "model.safetensors",
    "model-00001-of-00001.safetensors",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
)
"""A web server lists no files, so these are asked for by name; shards are those that the index names."""


class RemoteFolder:
    """What all folders behind http have in common: ranges, retries, reading ahead. ``_files``: those that there are."""

    def __init__(self, name: str, transfer: Transfer) -> None:
        self.name = name
        self.origin: dict[str, str] = {}
        self._transfer = transfer
        self._files: dict[str, RemoteFile] = {}
        self._small: dict[str, bytes] = {}
        self._budget = Budget(HELD_BYTES)
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._starting = threading.Lock()

    def where(self, file: str) -> str:
        return f"{self.name}/{file}"

    def files(self) -> list[str]:
        # A name comes from the server: what could not be a file's here is none of the checkpoint's.
        return sorted(name for name in self._files if "/" not in name and name.isprintable())

    def size(self, file: str) -> int:
        size = self._file(file).size
        assert size is not None
        return size

    def state(self, file: str) -> dict[str, Any]:
        """Size and tag. Every answer is compared with these when it comes, so they are not asked for anew."""
        found = self._file(file)
        return {"size": found.size, "tag": found.tag}

    def read(self, file: str) -> bytes:
        """All bytes of a small file. Read once, so that what is planned with is what is copied."""
        if file not in self._small:
            size = self.size(file)
            if size > SMALL_BYTES:
                raise SourceError(f"{self.where(file)}: {size:,} bytes are too many for a file of this name")
            data = bytearray(size)
            self.read_into(file, 0, memoryview(data))
            self._small[file] = self._proven(file, bytes(data))
        return self._small[file]

    def _proven(self, file: str, data: bytes) -> bytes:
        """``data`` if it is what the server promised, where it did."""
        return data

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        self._transfer.read_into(self._inside(file, offset, buffer), offset, buffer)

    def _inside(self, file: str, offset: int, buffer: memoryview) -> RemoteFile:
        found = self._file(file)
        if found.size is not None and offset + buffer.nbytes > found.size:
            missing = offset + buffer.nbytes - found.size
            raise SourceError(f"{self.where(file)}: file ends at byte {found.size}, {missing} bytes missing")
        return found

    def _file(self, file: str) -> RemoteFile:
        try:
            return self._files[file]
        except KeyError:
            raise SourceError(f"{self.where(file)}: not found") from None

    @contextmanager
    def steps(self, spans: Callable[[int], list[Span]], count: int, stop: threading.Event) -> Iterator[Window]:
        reader: Reader = self
        window = Window(reader, self._fetch, self._budget, spans, count, stop)
        try:
            yield window
        finally:
            window.close()

    def _fetch(self, file: str, offset: int, buffer: memoryview, stop: threading.Event) -> Future[None]:
        """Begin to fill ``buffer``."""
        found = self._inside(file, offset, buffer)
        return self._submit(lambda: self._transfer.read_into(found, offset, buffer, stop))

    def _submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Have a thread of the folder's own do some work."""
        future: Future[Result] = Future()

        def task() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as e:
                future.set_exception(e)

        with self._starting:
            if not self._threads:
                # No pool of the library: its threads would keep an interrupted process until the last answer.
                self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(CONNECTIONS)]
                for thread in self._threads:
                    thread.start()
        self._tasks.put(task)
        return future

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()

    def close(self) -> None:
        self._transfer.closed.set()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(timeout=1)
        self._transfer.close()


class UrlFolder(RemoteFolder):
    """The folder at a URL; what stands behind ``?`` goes to every file and is shown nowhere."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        super().__init__(
            shown(url), Transfer({}, "check the address, and what it needs to be let in (?token=..., user:password@)")
        )
        if not parts.hostname:
            raise SourceError(f"{self.name}: not the address of a folder")
        self._base = parts._replace(path=parts.path.rstrip("/"), fragment="")
        try:
            self._probe([CONFIG], optional=False)
            self._probe([name for name in _PROBED if name != CONFIG], optional=True)
            if INDEX in self._files:
                self._probe(sorted(self._shards() - set(self._files)), optional=False)
        except BaseException:
            self.close()
            raise

    def _shards(self) -> set[str]:
        """What the index names, as far as it can be understood; ``source`` checks it."""
        with suppress(ValueError, AttributeError, KeyError):
            named = json.loads(self.read(INDEX))["weight_map"].values()
            return {name for name in named if isinstance(name, str) and 0 < len(name.encode(errors="replace")) < 256}
        return set()

    def _probe(self, names: list[str], optional: bool) -> None:
        """Find out which of these files there are."""

        def find(name: str) -> RemoteFile | None:
            url = urlunsplit(self._base._replace(path=f"{self._base.path}/{quote(name, safe='')}"))
            file = RemoteFile(self.where(name), url)
            try:
                self._transfer.probe(file)
            except Missing:
                return None
            except Denied:
                if optional:  # an object store that lists nothing denies what is not there
                    return None
                raise
            return file

        found = {name: self._submit(partial(find, name)) for name in names}
        self._files |= {name: file for name, future in found.items() if (file := future.result())}
