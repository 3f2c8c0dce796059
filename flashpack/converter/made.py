"""A folder with files that were made for the pack, in place of or beside those that it has."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from flashpack.converter.folder import SourceFolder, Span, Steps


class MadeFolder:
    """``folder`` with the files ``made`` (name -> content)."""

    def __init__(self, folder: SourceFolder, made: dict[str, bytes]) -> None:
        self._folder, self._made = folder, made
        self.name = folder.name
        self.origin = folder.origin

    def where(self, file: str) -> str:
        return f"{self.name} ({file}, made from other files)" if file in self._made else self._folder.where(file)

    def files(self) -> list[str]:
        return sorted({*self._folder.files(), *self._made})

    def size(self, file: str) -> int:
        return len(self._made[file]) if file in self._made else self._folder.size(file)

    def state(self, file: str) -> dict[str, Any]:
        return {"size": len(self._made[file])} if file in self._made else self._folder.state(file)

    def read(self, file: str) -> bytes:
        return self._made[file] if file in self._made else self._folder.read(file)

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        self._folder.read_into(file, offset, buffer)

    def steps(
        self, spans: Callable[[int], list[Span]], count: int, stop: threading.Event
    ) -> AbstractContextManager[Steps]:
        return self._folder.steps(spans, count, stop)

    def close(self) -> None:
        self._folder.close()
