"""What an interrupted conversion has finished: one JSON line per file, after a line that names source and recipe.

Only files that are complete and durable are listed, so a second run can trust every line; a last line cut off by a
kill is ignored.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from flashpack.errors import OutputError
from flashpack.formats import constants as C
from flashpack.formats.files import output_errors, sync, sync_folder


class Journal:
    """Open for appending; ``done`` holds what earlier runs finished: path -> entry."""

    def __init__(self, folder: Path, start: dict[str, Any]) -> None:
        self.path = folder / C.JOURNAL
        self.done: dict[str, dict[str, Any]] = {}
        lines, length = self._read()
        if lines:
            changed = sorted(k for k in {*start, *lines[0]} if start.get(k) != lines[0].get(k))
            if changed:
                raise OutputError(
                    f"{folder}: an unfinished conversion with another {', '.join(changed)}; "
                    f"finish it with its own options, or use --overwrite to start anew"
                )
            self.done = {line["file"]["path"]: line for line in lines[1:]}
        with output_errors(self.path):
            self._file = open(self.path, "ab")  # noqa: SIM115 - closed by close()
            self._file.truncate(length)
            if not lines:
                self._write(start)
            sync_folder(folder)

    def _read(self) -> tuple[list[dict[str, Any]], int]:
        """The whole lines and their length in bytes."""
        lines: list[dict[str, Any]] = []
        length = 0
        if self.path.is_file():
            for text in self.path.read_bytes().splitlines(keepends=True):
                if not text.endswith(b"\n"):
                    break
                try:
                    lines.append(json.loads(text))
                except ValueError as e:
                    raise OutputError(f"{self.path}: damaged; use --overwrite to start anew") from e
                length += len(text)
        return lines, length

    def append(self, entry: dict[str, Any]) -> None:
        """Record a finished file."""
        with output_errors(self.path):
            self._write(entry)

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
        self._file.flush()
        sync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """The pack is committed: the journal has served."""
        self.close()
        os.unlink(self.path)
        sync_folder(self.path.parent)
