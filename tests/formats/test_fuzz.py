"""Structured fuzzing: any valid pack is read back, and no other bytes do harm: one clear error, or findings.

``fuzz/`` has the generators, and the targets of the coverage-guided fuzzer, whose inputs are tried again here.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashpack.errors import FlashpackError, FormatError, LimitError
from flashpack.formats import Encoding, Manifest, Pack, Projection, RecordKind, codecs, verify
from flashpack.formats import constants as C
from flashpack.formats.checksums import digest, hexdigest
from flashpack.formats.entries import FileEntry, Layer
from flashpack.formats.header import parse_header
from flashpack.formats.layout import ShardLayout, dense_header
from flashpack.formats.manifest import canonical
from flashpack.formats.writer import commit
from fuzz import frames, stranger, targets
from fuzz.mutate import mutate
from fuzz.packs import Written, write_random_pack

FUZZ = Path(targets.__file__).parent
SEEDS = sorted((FUZZ / "corpus" / "pack").iterdir())
RANDOMS = st.randoms(use_true_random=False)


def bounded(examples: int) -> settings:
    """The same examples each time, everywhere; the long search is the coverage-guided fuzzer's."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )


@contextmanager
def room(size: int = 2**29) -> Iterator[None]:
    """The block may take only so much more address space (on Linux): many times what these packs need."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def random_pack(rng: random.Random) -> Iterator[tuple[Path, Written]]:
    with targets.memory_folder() as folder:
        yield folder, write_random_pack(folder, rng)


@bounded(60)
@given(RANDOMS)
def test_any_valid_pack_is_read_back_byte_by_byte(rng: random.Random) -> None:
    with random_pack(rng) as (folder, written):
        assert targets.pack_in(folder)
        pack = Pack(folder)
        assert pack.manifest.to_bytes() == written.manifest.to_bytes()
        for layer in pack.manifest.layers:
            with pack.open_shard(layer) as shard:
                for expert in range(layer.experts):
                    record = bytearray(shard.kind(expert).stride)
                    offset, span = shard.extent(expert)
                    shard.decode(expert, memoryview(os.pread(shard.fd, span, offset)), memoryview(record))
                    assert record == written.records.pop((layer.index, expert))
        assert not written.records
        assert {t.name: pack.map_tensor(t.name).tobytes() for t in pack.manifest.tensors} == written.tensors
        assert {path: (folder / path).read_bytes() for path in written.copies} == written.copies


@bounded(25)
@given(RANDOMS, st.sampled_from(C.CODECS))
def test_any_valid_pack_can_be_recoded_and_back(rng: random.Random, codec: str) -> None:
    from flashpack.converter.recode import recode

    with random_pack(rng) as (folder, _), targets.memory_folder() as out:
        recode(folder, out / "other", codec)
        assert verify(out / "other", workers=1) == []
        recode(out / "other", out / "plain", "raw")
        recode(folder, out / "direct", "raw")
        assert (out / "plain" / C.MANIFEST).read_bytes() == (out / "direct" / C.MANIFEST).read_bytes()


@bounded(400)
@given(st.sampled_from(SEEDS), RANDOMS, st.integers(0, 127))
def test_a_manifest_changed_anywhere_by_a_stranger_does_no_harm(seed: Path, rng: random.Random, leave: int) -> None:
    raw, _, patches = seed.read_bytes()[1:].partition(b"\0")
    changed = json.dumps(mutate(json.loads(raw), rng), sort_keys=True, indent=1).encode() + b"\n"
    with room():
        targets.manifest(changed)
        # Digests as the stranger makes them, all but those that he leaves.
        targets.pack(bytes([leave if leave & 1 else 0]) + changed + b"\0" + patches)


@bounded(250)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2**17), st.binary(min_size=1, max_size=40)), min_size=1),
    st.booleans(),
    st.integers(0, 127),
)
def test_bytes_spliced_into_files_with_right_digests_do_no_harm(
    seed: Path, splices: list[tuple[int, int, bytes]], late: bool, leave: int
) -> None:
    files = json.loads(seed.read_bytes()[1:].partition(b"\0")[0])["files"]
    patches = b"".join(
        # Half of them close to the start or the end, where headers and tails are.
        stranger.PATCH.pack(
            n % max(1, len(files)) + stranger.LATE * late,
            at if not files or at % 4 < 2 else max(0, files[n % len(files)]["size"] - at % 400),
            len(data),
        )
        + data
        for n, at, data in splices
    )
    with room():
        targets.pack(bytes([leave]) + seed.read_bytes()[1:] + patches)


@bounded(250)
@given(
    st.permutations([(0, 0), (0, 1), (1, 0)]),
    st.lists(
        st.sampled_from([0, 1, 100, C.PAGE, C.PAGE + 1, 2 * C.PAGE, 6 * C.PAGE, 2**32 - 1]), min_size=3, max_size=3
    ),
    st.sampled_from([0, 0, 0, 1, -1]),
    st.integers(0, 3),
    st.binary(max_size=4),
)
def test_places_in_a_shard_lie_apart_and_fill_it_or_are_refused(
    table: list[tuple[int, int]], sizes: list[int], off: int, form: int, splice: bytes
) -> None:
    rows = b"".join(n.to_bytes(4, "little") for row in table for n in row) if form & 2 else b""
    tail = rows + (b"".join(n.to_bytes(4, "little") for n in sizes) if form & 1 else b"")
    needed = sum(-(-n // C.PAGE) for n in sizes)
    pages = min(max(0, needed + off), 63)
    most = [C.PAGE * targets.RECORD_PAGES[kind if form & 2 else 1] for kind, _ in table]
    fits = all(0 < n <= limit for n, limit in zip(sizes, most, strict=True))
    assert targets.tail(bytes([form | pages << 2]) + tail) == (not form & 1 or (fits and needed == pages))
    targets.tail(bytes([form | pages << 2]) + tail[: 4 * len(splice)] + splice + tail[5 * len(splice) :])


@bounded(250)
@given(st.sampled_from(sorted(frames.GOOD)), RANDOMS)
def test_damaged_frames_decode_to_their_size_or_are_refused(name: str, rng: random.Random) -> None:
    record, stored = frames.GOOD[name]
    damaged = bytearray(stored)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(min(len(damaged), 300))
        damaged[at : at + rng.randint(0, 2)] = rng.choice((b"", b"\0", b"\xff", b"\x28\xb5\x2f\xfd", stored[:50]))
    with room(2**25):
        targets.frame(len(record).to_bytes(3, "little") + damaged)


@pytest.mark.parametrize("name", sorted(frames.GOOD))
def test_frames_of_any_writer_decode(name: str) -> None:
    record, stored = frames.GOOD[name]
    decoded = bytearray(b"\xff" * len(record))
    with room(2**25):
        codecs.decode(memoryview(stored), memoryview(decoded), "frame")
    assert decoded == record


@pytest.mark.parametrize("name", sorted(frames.BAD))
def test_bombs_and_other_frames_are_refused_without_memory(name: str) -> None:
    record = bytearray(frames.RECORD)
    with room(2**25), pytest.raises(FormatError, match=r"^frame: (the frame|not a zstd frame)"):
        codecs.decode(memoryview(frames.BAD[name]), memoryview(record), "frame")
    assert record == frames.RECORD


def write_bomb(folder: Path, stored: bytes) -> None:
    """A pack whose only record has 2 GiB and is stored as these bytes, all digests right."""
    kind = RecordKind(tuple(Projection(name, (2**10, 2**19), Encoding("raw", "BF16")) for name in ("up", "down")))
    layer = Layer(0, "m", "s", ((0, 1),), "zstd")
    padded = stored.ljust(-(-len(stored) // C.PAGE) * C.PAGE, b"\0")
    layout = ShardLayout(layer, (kind,), len(padded))
    tail = len(stored).to_bytes(4, "little") + digest(b"") + digest(padded)
    entry = FileEntry("s", "experts", layout.size, {"header": hexdigest(layout.header_bytes), "tail": hexdigest(tail)})
    (folder / "s").write_bytes(layout.header_bytes + padded + tail)
    model = {"architecture": "A", "model_type": "m", "name_schema": C.NAME_SCHEMA, "transformers": "5"}
    commit(folder, Manifest(model, {}, (kind,), (layer,), (), (), (entry,)))


@pytest.mark.parametrize(("stated", "code"), [(2**31, "unreadable-file"), (2**31 - 1, "frame"), (2**60, "frame")])
def test_a_bomb_in_a_pack_is_a_finding(tmp_path: Path, stated: int, code: str) -> None:
    write_bomb(tmp_path, frames.zeros(2**31, stated))
    with room():
        assert [f.code for f in verify(tmp_path, workers=1)] == [code]


def test_a_frame_with_a_dictionary_is_refused_as_such() -> None:
    with pytest.raises(FormatError, match=r"^e: the frame needs a dictionary$"):
        codecs.content(memoryview(frames.BAD["names-a-dictionary"]), len(frames.RECORD), "e")


def test_a_record_that_does_not_fit_in_memory_is_said_in_one_line() -> None:
    if sys.platform != "linux":
        pytest.skip("memory cannot be limited here")
    with room(), pytest.raises(LimitError, match=r"^e: not enough memory for a record of 2147483648 bytes$"):
        codecs.content(memoryview(frames.zeros(2**31)), 2**31, "e")


@pytest.mark.parametrize("where", ["recipe", "record_kinds", "unknown"])
def test_any_depth_of_nesting_is_accepted_or_refused(where: str) -> None:
    data = json.loads(SEEDS[0].read_bytes()[1:].partition(b"\0")[0])
    for depth in (*range(900, 1700, 20), 100_000):
        data[where] = {"a": "@"}
        raw = json.dumps(data, sort_keys=True, indent=1).replace('"@"', "[" * depth + "]" * depth) + "\n"
        with pytest.raises(FormatError):
            Manifest.from_bytes(raw.encode())
    with pytest.raises(FormatError, match="nested too deep"):
        canonical(_nested(100_000))


def _nested(depth: int) -> list[object]:
    value: list[object] = []
    for _ in range(depth):
        value = [value]
    return value


def test_a_large_manifest_takes_memory_like_its_size() -> None:
    raw, header = dense_header([], "d")
    entry = {"role": "dense", "size": header.size, "digests": {"header": hexdigest(raw)}}
    data = json.loads(SEEDS[0].read_bytes()[1:].partition(b"\0")[0])
    data |= {key: [] for key in ("record_kinds", "layers", "tensors", "matrices", "required_features")}
    data["min_reader"] = C.FIRST_READER
    data["files"] = [entry | {"path": f"dense-{i:05d}"} for i in range(1000)]
    text = canonical(data)
    tracemalloc.start()
    try:
        assert len(Manifest.from_bytes(text).files) == 1000
        assert tracemalloc.get_traced_memory()[1] < 20 * len(text)
    finally:
        tracemalloc.stop()


def test_time_is_linear_in_what_is_parsed() -> None:
    sizes = b",".join([b"4611686018427387903"] * 100_000)
    text = b'{"a":{"dtype":"U8","shape":[' + sizes + b'],"data_offsets":[0,0]}}'
    begun = time.process_time()
    with pytest.raises(FormatError, match=r"^f: tensor a: 100000 dimensions are more than 8$"):
        parse_header(text, 8 + len(text), "f")
    data = json.loads(SEEDS[0].read_bytes()[1:].partition(b"\0")[0])
    data["tensors"] = [{"name": "t", "path": "d", "dtype": "U8", "offset": 0, "digest": "0" * 64}]
    data["tensors"][0]["shape"] = [2**62 - 1] * 100_000
    with pytest.raises(FormatError, match="too many dimensions"):
        Manifest.from_bytes(canonical(data))
    assert time.process_time() - begun < 3


def test_no_file_lies_below_another() -> None:
    data = json.loads(SEEDS[0].read_bytes()[1:].partition(b"\0")[0])
    data |= {key: [] for key in ("record_kinds", "layers", "tensors", "matrices", "required_features")}
    data["min_reader"] = C.FIRST_READER

    def parse(*paths: str) -> Manifest:
        rows = [{"path": path, "role": "copy", "size": 0, "digests": {"file": "0" * 64}} for path in sorted(paths)]
        return Manifest.from_bytes(canonical(data | {"files": rows}))

    assert len(parse("A", "a-/b", "a-b", "a.b/c", "ab", "b/a", "b/a-", "b/b").files) == 8
    for below in ("a/b", "a/b/c/d", "A/-"):
        with pytest.raises(FormatError, match=f"{below.lower()} lies below a file"):
            parse("a", "a-b", "a.b", below)


def test_folders_deeper_than_calls_can_be_are_no_trouble(tmp_path: Path) -> None:
    with random_pack(random.Random(0)) as (folder, _):
        at = os.open(folder, os.O_RDONLY)
        for _ in range(1100):  # in all, longer than any path may be
            os.mkdir("deep", dir_fd=at)
            inner = os.open("deep", os.O_RDONLY, dir_fd=at)
            os.close(at)
            at = inner
        os.close(at)
        try:
            (finding,) = verify(folder)
        finally:
            subprocess.run(["rm", "-r", folder / "deep"], check=True)
    assert finding.code == "unlisted-file"
    assert finding.file.startswith("deep/deep/")


def inputs(target: str) -> list[Path]:
    return sorted(p for kind in ("corpus", "found") for p in (FUZZ / kind / target).glob("*"))


@pytest.mark.parametrize("target", sorted(targets.TARGETS))
def test_the_inputs_of_the_fuzzer_do_no_harm(target: str) -> None:
    accepted = {p.name: targets.TARGETS[target](p.read_bytes()) for p in inputs(target)}
    # Seeds are what a writer makes, but for those whose name says more.
    seeds = {p.name for p in (FUZZ / "corpus" / target).iterdir() if not p.name.startswith(("bad-", "other-"))}
    assert {name for name, good in accepted.items() if good} >= seeds
    assert seeds


def test_the_seeds_are_those_of_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fuzz import seeds

    monkeypatch.setattr(seeds, "CORPUS", tmp_path)
    seeds.main()
    assert {p.relative_to(tmp_path) for p in tmp_path.rglob("*")} == {
        p.relative_to(FUZZ / "corpus") for p in (FUZZ / "corpus").rglob("*")
    }


def test_a_target_lets_other_errors_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("any")

    monkeypatch.setattr(targets, "parse_header", broken)
    with pytest.raises(KeyError):
        targets.header(b"\0\0\0\0{}")
    assert not issubclass(KeyError, FlashpackError)
