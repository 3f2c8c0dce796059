"""The folder of an unfinished conversion: who writes there, what it makes, and what it has finished.

The journal holds one JSON line that names source and recipe, then one line per finished file, and one now and then for
the finished parts of a file that takes long. Only what is durable is listed. Every line but the first carries its own
digest, so a damaged one is recognised and what it recorded is done again; a last line cut off by a kill is ignored. The
open journal is locked: one process writes in a folder at a time, and a kill releases the lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

from flashpack.converter.source import differences
from flashpack.errors import OutputError
from flashpack.formats import constants as C
from flashpack.formats.checksums import hexdigest
from flashpack.formats.files import locked, make_folder, output_errors, pwrite, resize, sync, sync_folder

Line = dict[str, Any]

_DISCARD: Line = {"discard": True}
"""A line that says: all else in this folder is being deleted. It is written before the first deletion and goes after
the last, so that a kill in between leaves nothing that a later conversion could take for its own."""

_SHOWN_CHANGES = 6


class Journal:
    """An output folder, open for this process alone.

    ``start`` says what is converted and how; an unfinished conversion that began otherwise is refused, with what
    changed. ``overwrite`` discards what is there. ``done`` holds what earlier runs finished: path -> entry; ``begun``
    the parts that they finished of other files: path -> parts, in order, from the first; ``notices`` are lines for the
    person. Raises ``OutputError``.
    """

    def __init__(self, folder: Path, start: Line, overwrite: bool = False) -> None:
        self.folder = folder
        self.path = folder / C.JOURNAL
        self.done: dict[str, Line] = {}
        self.begun: dict[str, list[Any]] = {}
        self.notices: list[str] = []
        self._fd, self._end = -1, 0
        self._appending = threading.Lock()
        try:
            with output_errors(self.path):
                self._open(overwrite)
                self._begin(json.loads(json.dumps(start)), overwrite)
        except BaseException:
            self.close()
            raise

    def _open(self, overwrite: bool) -> None:
        """Make the folder where it is missing, open the journal and lock it."""
        while not self._is_here():
            self.close()  # its owner finished and removed it between our open and lock
            check_folder(self.folder, overwrite)
            make_folder(self.folder)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise OutputError(f"{self.folder}: another flashpack convert is writing here{self._owner()}") from e
            except OSError as e:
                raise OutputError(f"{self.path}: cannot be locked: {e.strerror}; choose another disk") from e

    def _owner(self) -> str:
        """Who holds the lock, where that is known: on this machine, and past its first line."""
        processes = [line["process"] for line in self._read()[0] if line and "process" in line]
        try:
            os.kill(processes[-1], 0)
        except (IndexError, OverflowError, ProcessLookupError):
            return ""
        except PermissionError:
            pass  # alive, and somebody else's
        return f" (process {processes[-1]})"

    def _begin(self, start: Line, overwrite: bool) -> None:
        lines, self._end = self._read()
        others = {p.name for p in self.folder.iterdir()} - {C.JOURNAL}
        finished = C.MANIFEST in others
        if overwrite or (_DISCARD in lines and not finished):
            self._discard()
            lines = []
        elif others and not lines:
            # The journal is new: the conversion that was here when we looked has finished meanwhile.
            os.unlink(self.path)
            check_folder(self.folder, overwrite)
        elif finished and (lines[0] != start or _DISCARD in lines):
            raise _finished(self.folder)
        if lines:
            check_start(self.folder, lines[0], start)
        for number, line in enumerate(lines[1:], 2):
            if line is None:
                self.notices.append(f"{self.path}: line {number} is damaged; what it recorded is done again")
            elif "file" in line:
                self.done[line["file"]["path"]] = line
            elif "begun" in line:
                self._continue(**line["begun"])
        resize(self._fd, self._end)
        if not lines:
            # Nothing proves the first line, so it becomes a line only when all of it is there.
            self._write(_text(start))
            self._write(b"\n")
        # Also when continuing: a killed run may have come no further than to a name.
        sync_folder(self.folder)
        self.append({"process": os.getpid()})

    def _continue(self, path: str, first: int, parts: list[Any]) -> None:
        """Parts from ``first`` on; what was known of these was done again. Behind a line that is lost, all is lost."""
        known = self.begun.setdefault(path, [])
        if first <= len(known):
            known[first:] = parts

    def _read(self) -> tuple[list[Line | None], int]:
        """The whole lines (None for a damaged one) and their length in bytes."""
        with open(self._fd, "rb", closefd=False) as f:
            f.seek(0)
            whole = f.read().split(b"\n")[:-1]
        lines = [_parse(text, signed=number > 0) for number, text in enumerate(whole)]
        return lines, sum(len(text) + 1 for text in whole)

    def _discard(self) -> None:
        """Delete everything but the journal, in an order that a kill at any point does not harm."""
        resize(self._fd, self._end)
        self.append(_DISCARD)
        sync_folder(self.folder)
        # The manifest first: what is left of a pack without it never opens, and nobody begins to repair it.
        with locked(self.folder):
            (self.folder / C.MANIFEST).unlink(missing_ok=True)
            sync_folder(self.folder)
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != C.JOURNAL:
                path.unlink()
        sync_folder(self.folder)
        self._end = 0

    def append(self, entry: Line) -> None:
        """Record a finished file, or parts of one, durably. From any thread."""
        with output_errors(self.path), self._appending:
            self._write(_text(entry | {"digest": _digest(entry)}) + b"\n")

    def _write(self, data: bytes) -> None:
        pwrite(self._fd, data, self._end)
        sync(self._fd)
        self._end += len(data)

    def check(self) -> None:
        """Raise ``OutputError`` if the folder is no longer the one that was opened. From any thread."""
        if not self._is_here():
            raise OutputError(
                f"{self.folder}: the folder was removed or replaced during the conversion; run the same command again"
            )

    def _is_here(self) -> bool:
        """Whether the open journal is still the one in the folder."""
        if self._fd < 0:
            return False
        try:
            return os.path.samestat(os.fstat(self._fd), os.lstat(self.path))
        except OSError:
            return False

    def close(self) -> None:
        """Release the folder."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """The pack is committed: the journal has served."""
        self.check()
        with output_errors(self.path):
            os.unlink(self.path)
            sync_folder(self.folder)
        self.close()


def start_of(folder: Path) -> Line:
    """What an unfinished conversion in ``folder`` says that it is of; empty if there is none, or it cannot be read."""
    try:
        with open(folder / C.JOURNAL, "rb") as f:
            return _parse(f.readline(), signed=False) or {}
    except OSError:
        return {}


def origin_of(folder: Path) -> dict[str, Any]:
    """The origin of the source of an unfinished conversion in ``folder``; empty if there is none, or no origin."""
    origin = start_of(folder).get("origin")
    return origin if isinstance(origin, dict) else {}


def check_start(folder: Path, old: Line | None, start: Line) -> None:
    """Raise ``OutputError`` if the unfinished conversion in ``folder`` is not the one that ``start`` says."""
    if old is None:
        raise OutputError(f"{folder / C.JOURNAL}: damaged; use --overwrite to start anew")
    if old != start:
        changes = differences(old, start)
        more = f"; and {len(changes) - _SHOWN_CHANGES} more" if len(changes) > _SHOWN_CHANGES else ""
        raise OutputError(
            f"{folder}: an unfinished conversion differs from this one: "
            f"{'; '.join(changes[:_SHOWN_CHANGES])}{more}. "
            f"Finish it with its own source and options, or use --overwrite to start anew"
        )


def check_folder(folder: Path, overwrite: bool) -> None:
    """``folder`` must be absent, empty or an unfinished conversion; with ``overwrite`` also a pack."""
    if not os.path.lexists(folder):
        return  # asked first, because another conversion may make it at this moment
    if not folder.is_dir():
        raise OutputError(f"{folder}: exists and is not a folder")
    names = {p.name for p in folder.iterdir()}
    if C.JOURNAL in names or not names:
        return
    if C.MANIFEST in names and not overwrite:
        raise _finished(folder)
    if C.MANIFEST not in names:
        why = "--overwrite replaces packs only, and this folder is not one" if overwrite else "the folder is not empty"
        raise OutputError(f"{folder}: {why}; choose another or empty it")


def _finished(folder: Path) -> OutputError:
    return OutputError(f"{folder}: holds a finished pack; use --overwrite to replace it")


def _parse(text: bytes, signed: bool) -> Line | None:
    try:
        line = json.loads(text)
        if not isinstance(line, dict) or ((signed or "digest" in line) and not _is_sound(line)):
            return None
    except (ValueError, RecursionError):
        return None
    return line


def _is_sound(line: Line) -> bool:
    """Whether a line with a digest is what was written, in the form that it is used in."""
    if line.pop("digest", None) != _digest(line):
        return False
    file, begun = line.get("file", {"path": ""}), line.get("begun", {"path": "", "first": 0, "parts": []})
    types = {"path": str, "first": int, "parts": list}
    return (
        isinstance(file, dict)
        and isinstance(file.get("path"), str)
        and isinstance(begun, dict)
        and {key: type(value) for key, value in begun.items()} == types
        and begun["first"] >= 0
        and type(line.get("process", 1)) is int
    )


def _text(line: Line) -> bytes:
    return json.dumps(line, sort_keys=True).encode()


def _digest(line: Line) -> str:
    return hexdigest(_text(line))
