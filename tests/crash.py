"""What a power failure may leave of a folder: a recorder of file operations, and a POSIX file system at its worst.

The recorder stands where Python calls the system (module ``os``), so no code can pass it by: in the end the model must
equal the real folder. The model promises only what POSIX does:

- What was written to a file is durable after fsync of that file. Before, each sector of each write and each change of
  size may be there or not, and where the file has grown there may be zeros.
- A name (made, renamed, removed) is durable after fsync of its folder. Before, each may be there or not, independently
  of the others and of the data. A rename is one step: both names change, or none.
"""

from __future__ import annotations

import fcntl
import operator
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

SECTOR = 512  # what a drive writes at once; smaller than a page, so the worse case
SEEDS = 3

Tree = dict[str, bytes | None]
"""The content of each file below a folder by its path; None for a folder."""


class Killed(BaseException):
    """The recorded process was killed: nothing that it does from here on changes a file."""


def tree_of(folder: Path) -> Tree:
    paths = sorted(folder.rglob("*"))
    return {p.relative_to(folder).as_posix(): None if p.is_dir() else p.read_bytes() for p in paths}


@dataclass(frozen=True)
class Op:
    """One operation on ``node``. ``path``: where it was called so; of a rename, the new name."""

    kind: str  # "write", "resize", "sync", or what changes names: "create", "mkdir", "rename", "unlink", "rmdir"
    node: int
    path: str
    offset: int = 0
    data: bytes = b""
    names: tuple[tuple[str, int | None], ...] = ()
    thread: tuple[int, int] = (0, 0)  # which of which process

    def __str__(self) -> str:
        return f"{self.kind} {self.path}"

    def on(self, content: bytearray) -> None:
        """Do a "write", or a "resize" to ``offset`` bytes."""
        if self.kind == "resize":
            del content[self.offset :]
        content.extend(bytes(max(0, self.offset + len(self.data) - len(content))))
        content[self.offset : self.offset + len(self.data)] = self.data

    def sectors(self) -> Iterator[Op]:
        """A write in the pieces that reach the drive one by one."""
        end = self.offset + len(self.data)
        starts = [self.offset, *range(self.offset - self.offset % SECTOR + SECTOR, end, SECTOR)]
        for start, stop in zip(starts, [*starts[1:], end], strict=True):
            yield Op(self.kind, self.node, self.path, start, self.data[start - self.offset : stop - self.offset])


@dataclass
class Node:
    """A file (``data``) or folder (``names``): what of it is durable, and what was done since."""

    data: bytes | None = None
    names: dict[str, int] = field(default_factory=dict)
    pending: list[Op] = field(default_factory=list)
    _now: bytes | None = None

    def add(self, op: Op) -> None:
        self.pending.append(op)
        self._now = None

    def content(self) -> bytes:
        """All that was written."""
        if self._now is None:
            content = bytearray(self.data or b"")
            for op in self.pending:
                op.on(content)
            self._now = bytes(content)
        return self._now

    def zeroed(self) -> bytes:
        """The file has grown, but nothing of its data is there."""
        return (self.data or b"").ljust(len(self.content()), b"\0")

    def without(self, which: int) -> bytes:
        """Zeros, or what was there before, in one sector of each write."""
        content = bytearray(self.data or b"")
        for op in self.pending:
            if op.kind == "write":
                pieces = list(op.sectors())
                lost = pieces.pop(which)
                content.extend(bytes(max(0, lost.offset + len(lost.data) - len(content))))
            for piece in pieces if op.kind == "write" else [op]:
                piece.on(content)
        return bytes(content)

    def torn(self, chance: random.Random) -> bytes:
        """Some of what was written."""
        content, likely = bytearray(self.data or b""), chance.choice((0.2, 0.5, 0.9))
        for op in self.pending:
            for piece in op.sectors() if op.kind == "write" else [op]:
                if chance.random() < likely:
                    piece.on(content)
                elif piece.kind == "write" and chance.random() < 0.5:
                    content.extend(bytes(max(0, piece.offset + len(piece.data) - len(content))))
        return bytes(content)

    def entries(self, keeps: Callable[[Op], bool] = lambda op: True) -> dict[str, int]:
        """The names in the folder if only these changes took place."""
        names: dict[str, int | None] = dict(self.names)
        for op in filter(keeps, self.pending):
            names |= dict(op.names)
        return {name: node for name, node in names.items() if node is not None}

    def settle(self) -> None:
        if self.data is None:
            self.names = self.entries()
        else:
            self.data = self.content()
        self.pending = []


class Disk:
    """A folder as the drive and the page cache have it."""

    def __init__(self, tree: Tree) -> None:
        self.nodes = [Node()]
        for path, data in sorted(tree.items()):
            folder, _, name = path.rpartition("/")
            self.nodes[self.find(folder)].names[name] = len(self.nodes)
            self.nodes.append(Node(data))

    def find(self, path: str, start: int = 0) -> int:
        """The node of "a/b" below another; "" is that one itself."""
        for name in filter(None, path.split("/")):
            start = self.nodes[start].entries()[name]
        return start

    def apply(self, op: Op) -> None:
        if op.kind == "sync":
            self.nodes[op.node].settle()
            return
        self.nodes[op.node].add(op)
        if op.kind in ("create", "mkdir"):
            self.nodes.append(Node(None if op.kind == "mkdir" else b""))

    def left(self, keeps: Callable[[Op], bool], content: Callable[[Node], bytes | None]) -> Tree:
        """What a power failure leaves if these changes of names took place and files had this content."""
        tree: Tree = {}
        todo = [("", 0)]
        while todo:
            path, number = todo.pop()
            for name, inner in self.nodes[number].entries(keeps).items():
                node, where = self.nodes[inner], f"{path}/{name}".lstrip("/")
                tree[where] = None if node.data is None else content(node)
                if node.data is None:
                    todo.append((where, inner))
        return tree

    def durable(self) -> Tree:
        return self.left(lambda op: False, lambda node: node.data)

    def whole(self) -> Tree:
        return self.left(lambda op: True, Node.content)

    def outcomes(self, seed: int) -> Iterator[tuple[str, Tree]]:
        """What a power failure may leave now: the extremes, each name by itself, and something in between."""
        names = [op for node in self.nodes if node.data is None for op in node.pending]
        yield "only what is durable", self.durable()
        yield "all", self.whole()
        if not any(node.pending for node in self.nodes):
            return
        yield "names without data", self.left(lambda op: True, lambda node: node.data)
        yield "names with zeros", self.left(lambda op: True, Node.zeroed)
        yield "data without names", self.left(lambda op: False, Node.content)
        yield "data without its first sectors", self.left(lambda op: True, partial(Node.without, which=0))
        yield "data without its last sectors", self.left(lambda op: True, partial(Node.without, which=-1))
        for one in names if len(names) > 1 else []:
            yield f"only {one}", self.left(partial(operator.is_, one), lambda node: node.data)
            yield f"all but {one}", self.left(partial(operator.is_not, one), Node.content)
        for number in range(seed * SEEDS, (seed + 1) * SEEDS):
            chance = random.Random(number)
            likely = chance.choice((0.2, 0.5, 0.9))
            lost = {id(op) for op in names if chance.random() > likely}
            yield f"seed {number}", self.left(partial(_is_kept, lost), partial(Node.torn, chance=chance))


def _is_kept(lost: set[int], op: Op) -> bool:
    return id(op) not in lost


class Recorder:
    """The ordered log of what is done below ``base``; ``before`` is what was there, durably.

    Several processes may be recorded one after the other: a kill leaves the page cache as it is, a power failure
    does not.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        self.before = tree_of(base)
        self.ops: list[Op] = []
        self._disk = Disk(self.before)
        self._kill_after: str | None = None
        self._dying = False
        self._process = 0
        self._paths: dict[int, str] = {}  # of the open descriptors
        self._lock = threading.RLock()

    @contextmanager
    def recording(self, kill_after: str | None = None) -> Iterator[None]:
        """Record a process. It ends without an error if ``str`` of an operation is ``kill_after``, and must then."""
        self._kill_after, self._dying = kill_after, False
        self._process += 1
        changes = {"pwrite": _pwrite, "ftruncate": _ftruncate, "fsync": _fsync, "mkdir": _mkdir, "replace": _replace}
        calls: dict[str, Callable[..., Any]] = changes | {
            "open": _open,
            "close": _close,
            "unlink": _unlink,
            "rmdir": _rmdir,
        }
        with ExitStack() as stack:
            for name, call in calls.items():
                stack.enter_context(mock.patch.object(os, name, partial(self._locked, call, getattr(os, name))))
            stack.enter_context(mock.patch.object(fcntl, "fcntl", partial(self._locked, _fcntl, fcntl.fcntl)))
            with suppress(Killed):
                yield
        assert self._dying == (kill_after is not None)
        self._paths.clear()
        assert self._disk.whole() == tree_of(self.base), "something passed the recorder by"

    def _locked(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        with self._lock:
            return call(self, *arguments, **options)

    def inside(self, path: Any, dir_fd: int | None = None) -> str | None:
        """A path below ``base``; "" for ``base`` itself, None for what is elsewhere."""
        if dir_fd is not None:
            return f"{self._paths[dir_fd]}/{path}".lstrip("/") if dir_fd in self._paths else None
        path = os.path.relpath(os.path.abspath(path), self.base)
        return None if path.startswith("..") else "" if path == "." else path

    def path_of(self, fd: int) -> str | None:
        return self._paths.get(fd)

    def opened(self, fd: int, path: str) -> None:
        self._paths[fd] = path

    def closed(self, fd: int) -> None:
        self._paths.pop(fd, None)

    def has(self, path: str) -> bool:
        try:
            self._disk.find(path)
        except KeyError:
            return False
        return True

    def alive(self) -> None:
        """Before each change; raises ``Killed``."""
        if self._dying:
            raise Killed

    def content(self, kind: str, path: str, offset: int = 0, data: bytes = b"") -> None:
        """Note what was done to a file, or a sync of anything."""
        self._note(Op(kind, self._disk.find(path), path, offset, data))

    def names(self, kind: str, path: str, *changes: tuple[str, int | None]) -> None:
        """Note a change of names in the folder of ``path``."""
        self._note(Op(kind, self._disk.find(path.rpartition("/")[0]), path, names=changes))

    def made(self, kind: str, path: str) -> None:
        """Note a new file or folder."""
        self.names(kind, path, (path.rpartition("/")[2], len(self._disk.nodes)))

    def renamed(self, old: str, new: str) -> None:
        assert old.rpartition("/")[0] == new.rpartition("/")[0], "the model has renames within a folder only"
        self.names("rename", new, (old.rpartition("/")[2], None), (new.rpartition("/")[2], self._disk.find(old)))

    def _note(self, op: Op) -> None:
        op = replace(op, thread=(self._process, threading.get_ident()))
        self.ops.append(op)
        self._disk.apply(op)
        self._dying |= str(op) == self._kill_after


# What stands in place of functions of ``os``; each gets the recorder and the real function first.


def _open(r: Recorder, real: Any, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
    inside = r.inside(path, dir_fd)
    if inside is not None and flags & (os.O_CREAT | os.O_TRUNC):
        r.alive()
    fd = int(real(path, flags, mode, dir_fd=dir_fd))
    if inside is not None:
        if not r.has(inside):
            r.made("create", inside)
        elif flags & os.O_TRUNC:
            r.content("resize", inside)
        r.opened(fd, inside)
    return fd


def _close(r: Recorder, real: Any, fd: int) -> None:
    r.closed(fd)
    real(fd)


def _pwrite(r: Recorder, real: Any, fd: int, data: Any, offset: int) -> int:
    path = r.path_of(fd)
    if path is None:
        return int(real(fd, data, offset))
    r.alive()
    done = int(real(fd, data, offset))
    r.content("write", path, offset, bytes(memoryview(data).cast("B")[:done]))
    return done


def _ftruncate(r: Recorder, real: Any, fd: int, size: int) -> None:
    path = r.path_of(fd)
    if path is not None:
        r.alive()
    real(fd, size)
    if path is not None:
        r.content("resize", path, size)


def _fsync(r: Recorder, real: Any, fd: int) -> None:
    path = r.path_of(fd)
    if path is None:
        real(fd)
    else:
        r.alive()
        r.content("sync", path)  # the real thing would only take time


def _fcntl(r: Recorder, real: Any, fd: int, command: int, *rest: Any) -> Any:
    if command == getattr(fcntl, "F_FULLFSYNC", None):  # which only macOS has
        return _fsync(r, lambda fd: real(fd, command), fd)
    return real(fd, command, *rest)


def _mkdir(r: Recorder, real: Any, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
    inside = r.inside(path, dir_fd)
    if inside is not None:
        r.alive()
    real(path, mode, dir_fd=dir_fd)
    if inside is not None:
        r.made("mkdir", inside)


def _replace(r: Recorder, real: Any, old: Any, new: Any) -> None:
    before, after = r.inside(old), r.inside(new)
    if before is not None:
        r.alive()
    real(old, new)
    if before is not None and after is not None:
        r.renamed(before, after)


def _removal(kind: str) -> Callable[..., None]:
    def remove(r: Recorder, real: Any, path: Any, *, dir_fd: int | None = None) -> None:
        inside = r.inside(path, dir_fd)
        if inside is not None:
            r.alive()
        real(path, dir_fd=dir_fd)
        if inside is not None:
            r.names(kind, inside, (inside.rpartition("/")[2], None))

    return remove


_unlink, _rmdir = _removal("unlink"), _removal("rmdir")
