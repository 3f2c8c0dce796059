"""Notes in the journal of how far a file has come, so that a kill in the middle of gigabytes loses little.

A note follows what it is about to the drive. A later run trusts it only as far as the partial file still has what the
note says, digest by digest.
"""

from __future__ import annotations

import time
from typing import Any

from flashpack.converter.journal import Journal
from flashpack.converter.quantize import Errors, errors_from_json, errors_to_json
from flashpack.errors import FormatError
from flashpack.formats.entries import Layer
from flashpack.formats.writer import DenseWriter, ShardWriter, StoredRecord

NOTE_SECONDS = 5.0
"""Time between notes: a kill loses no more of each file, beside what was read ahead. Quick files have no notes."""

Part = dict[str, Any]


class Notes:
    """The parts of one file that is being written, in order, from ``writer.done`` on; without a journal nothing."""

    def __init__(self, journal: Journal | None, path: str, writer: ShardWriter | DenseWriter) -> None:
        self._journal, self._path, self._writer = journal, path, writer
        self._first = writer.done
        self._parts: list[Part] = []
        self._last = time.monotonic()

    def add(self, part: Part) -> None:
        """A part has been written."""
        if self._journal is None:
            return
        self._parts.append(part)
        if time.monotonic() - self._last < NOTE_SECONDS:
            return
        self._writer.flush()
        self._journal.append({"begun": {"path": self._path, "first": self._first, "parts": self._parts}})
        self._first += len(self._parts)
        self._parts = []
        self._last = time.monotonic()


def part_of_layer(record: StoredRecord, errors: Errors) -> Part:
    """An expert: what its shard knows of it, and the errors of its matrices."""
    return {"record": record.to_json(), "errors": errors_to_json(errors)}


def begun_layer(journal: Journal | None, layer: Layer) -> list[tuple[StoredRecord, Errors]]:
    """What ``part_of_layer`` noted in earlier runs, as far as it can be read."""
    found = []
    for part in (journal.begun.get(layer.path, []) if journal else [])[: layer.experts]:
        try:
            found.append((StoredRecord.from_json(part["record"]), errors_from_json(part["errors"])))
        except (FormatError, KeyError, TypeError):
            break
    return found


def part_of_dense(digests: dict[str, str], errors: Errors) -> Part:
    """A tensor or matrix: digests of what is stored, and its error."""
    return {"tensors": digests, "errors": errors_to_json(errors)}


def begun_dense(journal: Journal | None, path: str) -> list[tuple[dict[str, str], Errors]]:
    """What ``part_of_dense`` noted in earlier runs, as far as it can be read."""
    found = []
    for part in journal.begun.get(path, []) if journal else []:
        try:
            digests = {str(name): str(digest) for name, digest in part["tensors"].items()}
            found.append((digests, errors_from_json(part["errors"])))
        except (AttributeError, KeyError, TypeError, FormatError):
            break
    return found
