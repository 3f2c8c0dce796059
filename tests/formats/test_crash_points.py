"""No crash point yields a pack that opens and is wrong: power failures at every operation of whole runs, simulated."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import flashpack
from flashpack.converter.recode import recode
from flashpack.errors import FormatError, IntegrityError, NotAPackError, OutputError
from flashpack.formats import Manifest, Pack, verify
from flashpack.formats.constants import JOURNAL, MANIFEST, MANIFEST_DIGEST, PARTIAL_SUFFIX
from flashpack.formats.donor import PackDonor
from flashpack.formats.findings import Finding
from flashpack.formats.repair import repair
from flashpack.formats.verify import regions_of
from tests.conftest import CHECKPOINTS, PackOf
from tests.crash import Disk, Op, Recorder, Tree, tree_of
from tests.formats.test_repair import damage_record, damage_tensors, everything, remove_experts
from tests.formats.test_verify import flip

SMALL = CHECKPOINTS / "qwen3_moe"
OUT = "packs/out"  # below the recorded folder; "packs" is to be made, too

Run = Callable[[Path], object]


@dataclass(frozen=True)
class Record:
    """What was done from ``before`` on, operation by operation, to come to the pack ``final``; ``again`` continues."""

    before: Tree
    ops: list[Op]
    final: Tree
    again: Run

    start: int = 0  # the first operation of the run that came to its end

    def moments(self) -> Iterator[tuple[int, Disk]]:
        """The disk before each operation of the last run, and after its end."""
        disk = Disk(self.before)
        for number, op in enumerate(self.ops):
            if number >= self.start:
                yield number, disk
            disk.apply(op)
        yield len(self.ops), disk

    def outcomes(self) -> Iterator[tuple[str, Tree]]:
        """What a power failure at any moment may leave, each state once, and how it came about."""
        seen = set()
        for number, disk in self.moments():
            last = self.ops[number - 1] if number else "nothing"
            for what, tree in disk.outcomes(number):
                key = frozenset(tree.items())
                if key not in seen:
                    seen.add(key)
                    yield f"{what}, after operation {number}: {last}", tree


class Scratch:
    """Folders with a given content, put together of links to files that are written once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[bytes, Path] = {}
        self._verdicts: dict[frozenset[tuple[str, bytes | None]], list[Finding] | None] = {}

    def put(self, tree: Tree, copies: bool = False) -> Path:
        """``copies``: the folder will be written to."""
        folder = self.folder / "state"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path, data in sorted(tree.items()):
            if data is None:
                (folder / path).mkdir()
            elif copies:
                (folder / path).write_bytes(data)
            else:
                if data not in self._files:
                    self._files[data] = self.folder / f"file{len(self._files)}"
                    self._files[data].write_bytes(data)
                os.link(self._files[data], folder / path)
        return folder

    def findings(self, tree: Tree) -> list[Finding] | None:
        """What is wrong with the pack in ``OUT``, but for left-overs; None if it does not open.

        States that differ only in the content of left-overs, which no reader opens, are judged once.
        """
        left_over = (PARTIAL_SUFFIX, JOURNAL)
        key = frozenset((path, b"" if path.endswith(left_over) else data) for path, data in tree.items())
        if key not in self._verdicts:
            self._verdicts[key] = self._judge(self.put(tree) / OUT)
        return self._verdicts[key]

    @staticmethod
    def _judge(folder: Path) -> list[Finding] | None:
        try:
            Pack(folder)
        except (NotAPackError, FormatError, IntegrityError):
            return None
        return [f for f in verify(folder) if f.code != "unlisted-file" or not f.file.endswith(PARTIAL_SUFFIX)]


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Scratch]:
    yield Scratch(tmp_path / "scratch")
    shutil.rmtree(tmp_path)


def below(tree: Tree, folder: str = OUT) -> Tree:
    return {path.removeprefix(f"{folder}/"): data for path, data in tree.items() if path.startswith(f"{folder}/")}


@pytest.fixture(scope="module", autouse=True)
def _planned_once() -> Iterator[None]:
    """Planning takes longer than converting."""
    module = importlib.import_module("flashpack.converter.convert")
    plans = {experts: flashpack.converter.plan(SMALL, module.Options(experts)) for experts in ("auto", "q3")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "plan", lambda source, options: replace(plans[options.experts], notices=[]))
        yield


def converting(workers: int = 1, experts: str = "auto", overwrite: bool = False) -> Run:
    return lambda base: flashpack.convert(SMALL, base / OUT, experts, overwrite=overwrite, workers=workers)


def recoding(codec: str, overwrite: bool = False) -> Run:
    return lambda base: recode(base / "raw", base / OUT, codec, overwrite, workers=1)


def record(base: Path, run: Run, killed: tuple[str, Run] | None = None, begin: Run | None = None) -> Record:
    """``begin`` makes what is there before, durably; another run may be ``killed`` after an operation; then ``run``."""
    base.mkdir()
    if begin:
        begin(base)
    recorder = Recorder(base)
    if killed:
        with recorder.recording(kill_after=killed[0]):
            killed[1](base)
    start = len(recorder.ops)
    with recorder.recording():
        run(base)
    done = tree_of(base)
    shutil.rmtree(base)
    return Record(recorder.before, recorder.ops, done, run, start)


def copy_of(pack: Path, to: str = OUT) -> Run:
    return lambda base: shutil.copytree(pack, base / to)  # with the folders above


def unfinished(base: Path) -> None:
    """A conversion with other options that was killed in its middle, long ago."""
    with Recorder(base).recording(kill_after=f"rename {OUT}/experts/layer-0001.safetensors"):
        converting(experts="q3")(base)


KILLS = [
    f"create {OUT}/{JOURNAL}",
    f"write {OUT}/{JOURNAL}",
    f"sync {OUT}/{JOURNAL}",
    f"sync {OUT}",
    f"rename {OUT}/dense-00001.safetensors",
    f"mkdir {OUT}/experts",
    f"rename {OUT}/experts/layer-0001.safetensors",
    f"sync {OUT}/experts",
    f"rename {OUT}/{MANIFEST_DIGEST}",
    f"create {OUT}/{MANIFEST}.part",
    f"rename {OUT}/{MANIFEST}",
]
RUNS = ["convert", "two workers", "over a pack", "over a conversion", "recode"]
CONTINUED = ["discard", "recode", *KILLS]


@pytest.fixture(scope="module")
def record_of(pack_of: PackOf, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Record]:
    folder = tmp_path_factory.mktemp("recorded")
    made: dict[str, Record] = {}

    def make(name: str) -> Record:
        plain, over, recoded = converting(), converting(overwrite=True), recoding("zstd")
        old, raw = copy_of(pack_of("qwen3_moe", "q3")), copy_of(pack_of("qwen3_moe"), "raw")
        recipes: dict[str, tuple[Run, tuple[str, Run] | None, Run | None]] = {
            "convert": (plain, None, None),
            "two workers": (converting(workers=2), None, None),
            "over a pack": (over, None, old),
            "over a conversion": (over, None, unfinished),
            "recode": (recoded, None, raw),
            "continued discard": (plain, (f"unlink {OUT}/{MANIFEST}", over), old),
            "continued recode": (recoded, (f"rename {OUT}/{MANIFEST}", recoded), raw),
        }
        recipes |= {f"continued {kill}": (plain, (kill, plain), None) for kill in KILLS}
        if name not in made:
            shutil.rmtree(folder / "base", ignore_errors=True)  # one that failed
            made[name] = record(folder / "base", *recipes[name])
        return made[name]

    return make


def judged(scratch: Scratch, work: Record) -> int:
    """How many states open; raises if one is wrong."""
    count = 0
    for what, tree in work.outcomes():
        found = scratch.findings(tree)
        assert not found, f"{what}: {'; '.join(map(str, found))}"
        count += found is not None
    return count


@pytest.mark.parametrize("name", [*RUNS, *(f"continued {name}" for name in CONTINUED)])
def test_no_crash_point_yields_a_pack_that_opens_and_is_wrong(
    record_of: Callable[[str], Record], scratch: Scratch, name: str
) -> None:
    assert judged(scratch, record_of(name)) > 0


@pytest.mark.parametrize("name", [*RUNS, *(f"continued {name}" for name in CONTINUED)])
def test_after_a_crash_the_same_command_ends_with_the_same_pack(
    record_of: Callable[[str], Record], scratch: Scratch, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = record_of(name)
    states = list(work.outcomes())
    # Single lost names and torn data are the rarer and harder cases.
    hard = [
        state for state in states if state[0].startswith(("only c", "only r", "only u", "all but", "data without its"))
    ]
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    chosen = random.Random(name)
    for what, tree in [*chosen.sample(hard, min(len(hard), 8)), *chosen.sample(states, 4)]:
        base = scratch.put(tree, copies=True)
        refusal = ""
        try:
            work.again(base)
        except OutputError as e:
            refusal = str(e)
        done = tree_of(base)
        if refusal:  # it had come to its end, or had not touched the old pack yet
            assert "holds a finished pack" in refusal, f"{what}: {refusal}"
            there = {path: data for path, data in below(done).items() if path != JOURNAL}
            assert there in (below(work.final), below(work.before)), what
        else:
            assert done == work.final, what


def violations(work: Record) -> list[str]:
    """Where a step of SPEC.md section 9 began before the one before it was durable."""
    final = below(work.final)
    found = []
    for number, disk in work.moments():
        there = below(disk.durable())
        missing = {path for path in final if there.get(path, b"absent") != final[path]}
        if number < len(work.ops):
            op = work.ops[number]
            rules = rules_of(op, op.path.removeprefix(f"{OUT}/"), disk, there, missing, final)
            found += [
                f"operation {number}: {op}, but not yet durable: {what}" for what, kept in rules.items() if not kept
            ]
    found += [f"not durable in the end: {path}" for path in missing | (set(there) - set(final))]
    return found


def rules_of(op: Op, path: str, disk: Disk, there: Tree, missing: set[str], final: Tree) -> dict[str, bool]:
    """What must be durable before this operation of the last run, and whether it is."""
    lines = [json.loads(line) for line in (there.get(JOURNAL) or b"").split(b"\n")[:-1]]
    discarding = any("discard" in line for line in lines)
    renamed = [p for node in disk.nodes for p in node.pending if p.kind == "rename" and p.thread == op.thread]
    rules = {"the name given before it": op.kind == "sync" or not renamed}
    if op.kind in ("create", "mkdir") and op.path.startswith(f"{OUT}/") and path != JOURNAL:
        rules["the journal's first line"] = bool(lines) and "flashpack" in lines[0] and not discarding
    if op.kind == "rename":
        rules["its data"] = disk.nodes[op.names[-1][1] or 0].data == final[path]
    if op.kind == "write" and path == JOURNAL and b'"file"' in op.data:
        rules["the file it records"] = json.loads(op.data)["file"]["path"] not in missing
    if op.kind == "write" and path == JOURNAL:
        rules["what the journal has"] = not any(
            p.kind == "write" and p.thread[0] == op.thread[0] for p in disk.nodes[op.node].pending
        )
        rules["the text of a line that nothing proves"] = b'"digest"' in op.data or op.data.find(b"\n") < 1
    if op.kind == "resize" and path == JOURNAL and not op.offset and lines:
        rules["the removal of all else"] = set(there) == {JOURNAL}
    if op.kind == "create" and path == MANIFEST_DIGEST + PARTIAL_SUFFIX:
        rules["all other files"] = missing <= {MANIFEST, MANIFEST_DIGEST}
        rules["the journal"] = (there.get(JOURNAL) or b"") == disk.nodes[disk.find(f"{OUT}/{JOURNAL}")].content()
    if op.kind == "create" and path == MANIFEST + PARTIAL_SUFFIX:
        rules["the digest file"] = missing <= {MANIFEST}
    if op.kind == "unlink" and path == JOURNAL:
        rules["the pack"] = not missing
    elif op.kind in ("unlink", "rmdir"):
        rules["the intent to discard"] = discarding
        rules["the removal of the manifest"] = path == MANIFEST or MANIFEST not in there
    return rules


@pytest.mark.parametrize("name", [*RUNS, *(f"continued {name}" for name in CONTINUED)])
def test_each_step_is_durable_before_the_next_begins(record_of: Callable[[str], Record], name: str) -> None:
    work = record_of(name)
    assert violations(work) == []
    renamed = [op.path.removeprefix(f"{OUT}/") for op in work.ops if op.kind == "rename"]
    assert renamed[-2:] == [MANIFEST_DIGEST, MANIFEST]
    recorded = {
        json.loads(op.data)["file"]["path"] for op in work.ops if b'"file": ' in op.data and b'"digest"' in op.data[:9]
    }
    assert recorded >= {path for path in below(work.final) if path.endswith(".safetensors")}
    assert [op.kind for op in work.ops if op.path == f"{OUT}/{JOURNAL}"][-1] == "unlink"


# Where two threads write (a worker and the one that records, in recode), one may sync for the other.
@pytest.mark.parametrize("name", [name for name in RUNS if name != "two workers" and not name.startswith("recode")])
def test_the_check_of_the_order_notices_each_missing_sync(record_of: Callable[[str], Record], name: str) -> None:
    work = record_of(name)
    busy = [number for number, disk in work.moments() if number < len(work.ops) and is_busy(disk, work.ops[number])]
    assert len(busy) > 30
    for number in busy:
        without = replace(work, ops=work.ops[:number] + work.ops[number + 1 :])
        assert violations(without), f"{number}: {work.ops[number]}"


def is_busy(disk: Disk, op: Op) -> bool:
    """Whether it is a sync with something to do."""
    return op.kind == "sync" and bool(disk.nodes[op.node].pending)


def test_a_data_file_that_is_not_synced_is_found_as_a_wrong_pack(
    record_of: Callable[[str], Record], scratch: Scratch
) -> None:
    work = record_of("convert")
    files = {f"{OUT}/{path}{PARTIAL_SUFFIX}" for path, data in below(work.final).items() if data is not None}
    for path in files:
        ops = [op for op in work.ops if (op.kind, op.path) != ("sync", path)]
        states = list(replace(work, ops=ops, start=len(ops)).outcomes())
        found = [scratch.findings(tree) for _, tree in states]
        if path.endswith((f"/{MANIFEST}.part", f"/{MANIFEST_DIGEST}.part")):
            assert None in found, path  # the pack was reported whole, and does not open
        else:
            assert any(found), path


def pieces(manifest: Manifest, tree: Tree, good: Tree) -> set[tuple[str, int]]:
    """Of the regions of all files (header, records or tensors, tail; a small file is one): those that are whole."""
    whole = set()
    for path, right in good.items():
        data, entry = tree.get(path), manifest.by_path.get(path)
        bounds = {0}
        if entry and entry.role == "experts":
            layout = manifest.shard_layout(manifest.layer_of(path))
            bounds |= {layout.tail, *(r.offset for r in regions_of(manifest, entry, (right or b"")[layout.tail :]))}
        elif entry and entry.role == "dense":
            bounds |= {r.offset for r in regions_of(manifest, entry)}
        for start, end in itertools.pairwise([*sorted(bounds), len(right or b"")]):
            if right is not None and data is not None and data[start:end] == right[start:end]:
                whole.add((path, start))
    return whole


def damage_without_closing(pack: Path) -> None:
    """A pack that still opens."""
    damage_record(pack)
    damage_tensors(pack)
    flip(pack / "config.json", 5)


@pytest.mark.parametrize("damage", [damage_without_closing, everything, remove_experts])
def test_a_repair_that_crashes_leaves_nothing_worse_and_the_next_one_ends_it(
    pack_of: PackOf, scratch: Scratch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Run
) -> None:
    good = pack_of("qwen3_moe")
    right, manifest = tree_of(good), Pack(good).manifest

    def begin(base: Path) -> None:
        copy_of(good)(base)
        damage(base / OUT)

    def mend(base: Path) -> None:
        assert repair(base / OUT, PackDonor(str(good))).findings == []

    work = record(tmp_path / "base", mend, begin=begin)
    assert below(work.final) == right
    *_, (_, disk) = work.moments()
    assert disk.durable() == work.final, "reported as mended, but not durable"
    before, opened = pieces(manifest, below(work.before), right), scratch.findings(work.before)
    states = list(work.outcomes())
    for what, tree in states:
        assert before <= pieces(manifest, below(tree), right), what
        if opened is not None:
            found = scratch.findings(tree)
            assert found is not None, what
            assert set(found) <= set(opened), what
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    for what, tree in random.Random(0).sample(states, 10):
        base = scratch.put(tree, copies=True)
        mend(base)
        assert below(tree_of(base)) == right, what
