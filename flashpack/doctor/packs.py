"""One pack: whether it is whole, what it needs to run here, and what was left beside it."""

from __future__ import annotations

import datetime
import importlib.util
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flashpack.doctor import disk
from flashpack.doctor.remark import Remark
from flashpack.errors import FlashpackError, FormatError, MemoryBudgetError, NotAPackError, VersionError
from flashpack.formats import Pack
from flashpack.formats import constants as C
from flashpack.formats.header import parse_json
from flashpack.formats.reader import manifest_bytes
from flashpack.formats.verify import verify
from flashpack.sizes import gb

if TYPE_CHECKING:
    from flashpack.runtime.rates import Rate

_SHOWN = 3
_FILES_PER_LAYER = 3  # while the way to read is chosen
_OTHER_FILES = 64

_TOKENIZERS = {"tokenizer.model": ("sentencepiece", "google.protobuf"), "tiktoken.model": ("tiktoken",)}
"""Files that need packages of their own, where there is no tokenizer.json."""


class Whole:
    """A pack that may be anything. ``opened``: set by ``check`` if it can be looked into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.opened: Pack | None = None
        self.rates: list[Rate] = []

    def check(self) -> Iterator[Remark]:
        """What it is, and its structure."""
        try:
            found = verify(self.folder, "quick")
        except NotAPackError as e:
            yield self._no_pack(e)
            return
        except VersionError as e:
            yield Remark("problem", "pack", "format", str(e), "install the newest flashpack-moe")
            return
        except FormatError as e:
            yield Remark("problem", "pack", "format", str(e), "get another copy, or convert the checkpoint again")
            return
        if found:
            some = "; ".join(f"[{f.code}] {replace(f, expected=None, found=None)}" for f in found[:_SHOWN])
            more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            todo = f"flashpack repair {self.folder} --from COPY_OR_CHECKPOINT (flashpack verify lists everything)"
            if all(f.code == "unlisted-file" for f in found):
                todo = "remove what is no part of the pack; until then `run` refuses it"
            data = {"findings": [f.to_json() for f in found]}
            yield Remark("problem", "pack", "structure", f"{some}{more}", todo, data)
            return
        self.opened = Pack(self.folder)
        self.opened.check_copies()
        yield self._identity(self.opened)
        text = f"whole; its data was not read (flashpack verify {self.folder} does that)"
        yield Remark("ok", "pack", "structure", text, data={"findings": []})

    def _no_pack(self, error: NotAPackError) -> Remark:
        if (self.folder / C.JOURNAL).exists():
            text, todo = f"{self.folder}: an unfinished conversion", "run the same convert command again to finish it"
        elif (self.folder / "config.json").exists():
            text, todo = f"{self.folder}: a checkpoint, not a pack", f"flashpack convert {self.folder}"
        elif self.folder.exists() and not self.folder.is_dir():
            text, todo = f"{self.folder}: a file, not a folder", "name the folder that flashpack convert made"
        else:
            text, todo = str(error), "name the folder that flashpack convert made"
        return Remark("problem", "pack", "format", text, todo)

    def _identity(self, pack: Pack) -> Remark:
        m = pack.manifest
        manifest = parse_json(manifest_bytes(self.folder), C.MANIFEST)
        size = sum(f.size for f in m.files)
        experts, dense = (str(m.recipe.get(part, "unknown"))[:40] for part in ("experts", "dense"))
        text = (
            f"{m.model['architecture'][:60]}, {gb(size)}, experts {experts}, dense part {dense}; "
            f"format {manifest['version']}, identity {pack.identity[:16]}..."
        )
        data = {"identity": pack.identity, "version": manifest["version"], "bytes": size, "model": m.model}
        return Remark("ok", "pack", "format", text, data=data | {"recipe": m.recipe})

    def speed(self) -> Iterator[Remark]:
        """Measure the pack's own files."""
        from flashpack.runtime.rates import SIZES, measure

        assert self.opened is not None
        record = _largest_record(self.opened)
        paths = [layer.path for layer in self.opened.manifest.layers]
        sizes = sorted({record, *SIZES}, key=lambda s: (s != record, s))  # what counts comes first
        self.rates = sorted(measure(self.folder, paths, sizes), key=lambda r: r.size)
        yield from disk.told(self.rates, "the pack", record)

    def needs(self) -> Iterator[Remark]:
        """Memory, files, tokenizer and reading; and what earlier runs left."""
        assert self.opened is not None
        yield from _kernels(self.opened)
        yield from self._memory(self.opened)
        yield from _open_files(self.opened)
        yield _tokenizer(self.folder)
        yield from _history(self.opened)

    def _memory(self, pack: Pack) -> Iterator[Remark]:
        from flashpack.runtime import budget as budgets
        from flashpack.runtime.forecast import smallest_of
        from flashpack.runtime.memory import spare

        m = pack.manifest
        try:
            least, context, top_k = smallest_of(pack)
        except FlashpackError as e:
            text = f"transformers {m.model['transformers']} made it, and it does not run here: {e}"
            yield Remark("problem", "pack", "model", text, f"pip install transformers=={m.model['transformers']}")
            return
        data = {"smallest": least.to_json(), "context": context, "experts": pack.expert_bytes}
        text = f"{gb(least.total)} at the least, with a context of {context} tokens"
        try:
            budget = budgets.divide(pack, least.base, least.kv, least.work, None, spare())
        except MemoryBudgetError:
            there = f"{gb(least.base + spare())} can be taken"
            todo = "close other programs, lower --context, or raise the cgroup's limit"
            yield Remark("problem", "pack", "memory", f"needs {text}, and {there}", todo, data)
            return
        share = budget.arena / pack.expert_bytes
        data["share"] = share
        fit = "all experts fit" if share >= 1 else f"{share:.0%} of the experts ({gb(pack.expert_bytes)}) fit"
        yield Remark("ok", "pack", "memory", f"{text}; in what is free now {fit}", data=data)
        yield from self._bound(pack, top_k, share)

    def _bound(self, pack: Pack, top_k: int, share: float) -> Iterator[Remark]:
        """Seconds of reading for a token if nothing were in memory."""
        record = _largest_record(pack)
        rate = next((r.drive for r in self.rates if r.size == record), None)
        if not rate:
            return
        size = bytes_per_token(pack, top_k)
        seconds = size / rate
        text = (
            f"{gb(size)} of experts per token, {seconds:.2g} s at the measured rate if none were in memory: a bound, "
            f"not a promise; experts that stay in memory are not read"
        )
        data = {"bytes_per_token": size, "rate": rate, "seconds_per_token": seconds}
        if share < 1 and seconds * (1 - share) > 1:
            todo = "a faster drive, more --memory, or fewer bits for the experts (flashpack plan shows what there is)"
            yield Remark("note", "pack", "reading", text, todo, data)
        else:
            yield Remark("ok", "pack", "reading", text, data=data)


def _largest_record(pack: Pack) -> int:
    return max((kind.stride for kind in pack.manifest.record_kinds), default=0)


def bytes_per_token(pack: Pack, top_k: int) -> int:
    """Stored bytes of the experts that a token uses, on average over those of a layer."""
    size = 0.0
    for layer in pack.manifest.layers:
        kinds = sum(count * pack.manifest.record_kinds[kind].stride for kind, count in layer.kinds)
        stored = kinds if layer.codec == "raw" else pack.manifest.shard_layout(layer).frames
        size += stored * top_k / layer.experts
    return int(size)


def _kernels(pack: Pack) -> Iterator[Remark]:
    """Formats of the experts that the processor's native kernels do not know."""
    from flashpack.kernels import best_device
    from flashpack.kernels.cpu.native import compute

    used = {p.encoding for kind in pack.manifest.record_kinds for p in kind.projections}
    slow = sorted({str(e) for e in used if e.quantized and e.name not in compute.KINDS})
    if slow and best_device() == "cpu" and not isinstance(compute.library(), str):
        text = f"experts in {', '.join(slow)} have no native kernels: torch computes, several times slower"
        todo = "convert with --experts q4 or another of docs/quality.md, if rounding is acceptable"
        yield Remark("note", "pack", "kernels", text, todo, {"formats": slow})


def _open_files(pack: Pack) -> Iterator[Remark]:
    needed = _FILES_PER_LAYER * len(pack.manifest.layers) + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    may = hard == resource.RLIM_INFINITY or hard >= needed
    todo = f"ulimit -n {needed}" + ("" if may else f", for which an administrator must raise the hard limit of {hard}")
    text = f"{len(pack.manifest.layers)} layers need up to {needed} open files, {soft} are allowed"
    yield Remark("problem", "pack", "open files", text, todo, {"needed": needed, "soft": soft})


def _tokenizer(folder: Path) -> Remark:
    from flashpack.runtime.tokenizer import load_tokenizer

    missing = _missing_packages(folder)
    if missing:
        text = f"the pack's tokenizer needs {' and '.join(missing)}"
        return Remark("problem", "pack", "tokenizer", text, f"pip install {' '.join(missing)}", {"missing": missing})
    try:
        tokenizer = load_tokenizer(folder)
    except FormatError as e:
        todo = "convert again from a checkpoint that has one; eval and the Python functions work without"
        return Remark("problem", "pack", "tokenizer", str(e), todo)
    if not tokenizer.chat_template:
        text = "loads; the pack has no chat template"
        return Remark("note", "pack", "tokenizer", text, "flashpack run --raw continues plain text")
    return Remark("ok", "pack", "tokenizer", "loads, with a chat template")


def _missing_packages(folder: Path) -> list[str]:
    """Packages that the tokenizer needs and that are not installed, by the names that pip knows."""
    if (folder / "tokenizer.json").is_file():
        return []
    needed = [name for file, names in _TOKENIZERS.items() if (folder / file).is_file() for name in names]
    return [name.rpartition(".")[2] for name in needed if not _there(name)]


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package it would be in
        return False


def _history(pack: Pack) -> Iterator[Remark]:
    from flashpack.runtime import warm

    known = warm.read(pack) if warm.wanted(None) else {}
    if known:
        path = warm.history_path(pack)
        when = datetime.datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
        text = f"{len(known)} experts that earlier runs used most are read first; from {when}, {path}"
        yield Remark("ok", "pack", "history", text, data={"experts": len(known), "path": str(path)})


def unfinished(pack: Path | None) -> Iterator[Remark]:
    """Conversions that did not come to their end: beside ``pack``, or in the current folder."""
    parent = disk.existing(Path() if pack is None else pack.absolute().parent)
    left = sorted(p.parent for p in parent.glob(f"*/{C.JOURNAL}") if pack is None or p.parent != pack.absolute())
    if left:
        names = ", ".join(p.name for p in left[:_SHOWN]) + (f" and {len(left) - _SHOWN} more" if left[_SHOWN:] else "")
        size = sum(f.stat().st_size for p in left for f in p.rglob("*") if f.is_file() and not f.is_symlink())
        text = f"unfinished conversions in {parent}: {names} ({gb(size)})"
        todo = "run the same convert command again to finish, or remove the folder"
        yield Remark("note", "pack", "unfinished", text, todo, {"folders": [str(p) for p in left], "bytes": size})
