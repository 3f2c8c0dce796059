"""Repair from another copy: by content digest, from a folder or a URL, proven, and never for the worse."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import pytest

import flashpack
from flashpack.converter.recode import recode
from flashpack.errors import IntegrityError, NotAPackError, OutputError, SourceError
from flashpack.formats import Pack, verify
from flashpack.formats.constants import MANIFEST, MANIFEST_DIGEST
from flashpack.formats.donor import PackDonor
from flashpack.formats.repair import repair
from tests import commands
from tests.conftest import CHECKPOINTS, PackOf, contents
from tests.formats.test_verify import flip

Copy = Callable[..., Path]


def extent(pack: Path, layer: int, expert: int) -> tuple[Path, int, int]:
    """File, first byte and bytes of a stored record."""
    opened = Pack(pack)
    with opened.open_shard(opened.layer(layer)) as shard:
        return shard.path, *shard.extent(expert)


def damage_record(pack: Path) -> None:
    path, offset, _ = extent(pack, 1, 3)
    flip(path, offset + 11)


def damage_every_record_of_a_layer(pack: Path) -> None:
    places = [extent(pack, 0, e) for e in range(8)]
    for path, offset, _ in places:
        flip(path, offset)


def damage_header_of_shard(pack: Path) -> None:
    flip(pack / "experts" / "layer-0001.safetensors", 9)


def damage_tail(pack: Path) -> None:
    path = pack / "experts" / "layer-0002.safetensors"
    flip(path, path.stat().st_size - 7)


def damage_tail_and_record(pack: Path) -> None:
    damage_record(pack)
    path = pack / "experts" / "layer-0001.safetensors"
    flip(path, path.stat().st_size - 7)


def remove_shard(pack: Path) -> None:
    (pack / "experts" / "layer-0000.safetensors").unlink()


def remove_experts(pack: Path) -> None:
    shutil.rmtree(pack / "experts")


def truncate_shard(pack: Path) -> None:
    os.truncate(pack / "experts" / "layer-0000.safetensors", 40_000)


def lengthen_shard(pack: Path) -> None:
    with open(pack / "experts" / "layer-0000.safetensors", "ab") as f:
        f.write(b"more")


def link_shard(pack: Path) -> None:
    path = pack / "experts" / "layer-0000.safetensors"
    moved = pack.parent / "moved"
    path.rename(moved)
    path.symlink_to(moved)


def damage_tensors(pack: Path) -> None:
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        t = Pack(pack).tensors[name]
        flip(pack / t.path, t.offset)


def damage_dense_header(pack: Path) -> None:
    flip(pack / "dense-00001.safetensors", 60)


def truncate_dense(pack: Path) -> None:
    os.truncate(pack / "dense-00001.safetensors", 20_000)


def damage_copies(pack: Path) -> None:
    flip(pack / "config.json", 5)
    (pack / "tokenizer.json").unlink()


def damage_manifest(pack: Path) -> None:
    flip(pack / MANIFEST, 100)


def remove_manifest(pack: Path) -> None:
    (pack / MANIFEST).unlink()


def damage_manifest_digest(pack: Path) -> None:
    flip(pack / MANIFEST_DIGEST, 3)


def everything(pack: Path) -> None:
    damage_every_record_of_a_layer(pack)
    damage_tail(pack)
    damage_tensors(pack)
    damage_copies(pack)
    truncate_shard(pack)
    damage_manifest(pack)


ALL = [
    damage_record, damage_every_record_of_a_layer, damage_header_of_shard, damage_tail, damage_tail_and_record,
    remove_shard, remove_experts, truncate_shard, lengthen_shard, link_shard, damage_tensors,
    damage_dense_header, truncate_dense, damage_copies, damage_manifest, remove_manifest,
    damage_manifest_digest, everything,
]  # fmt: skip


@pytest.mark.parametrize("damage", ALL)
def test_every_damage_is_mended_from_another_copy(
    pack_copy: Copy, pack_of: PackOf, damage: Callable[[Path], None]
) -> None:
    pack, good = pack_copy("qwen3_moe"), pack_of("qwen3_moe")
    damage(pack)
    done = repair(pack, PackDonor(str(good)))
    assert done.findings == []
    assert done.files
    assert contents(pack) == contents(good)
    assert repair(pack, PackDonor(str(good))).files == []


def test_bytes_that_must_be_zero_become_zero(pack_copy: Copy, pack_of: PackOf) -> None:
    pack, good = pack_copy("trained"), pack_of("trained")
    tensors = sorted(Pack(pack).manifest.tensors, key=lambda t: t.offset)
    gap = next(a.offset + a.nbytes for a, b in pairwise(tensors) if a.offset + a.nbytes < b.offset)
    flip(pack / tensors[0].path, gap)
    assert [f.code for f in verify(pack)] == ["padding"]
    assert repair(pack, PackDonor(str(good))).findings == []
    assert contents(pack) == contents(good)


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_a_copy_with_another_codec_serves_as_well(tmp_path: Path, codec: str) -> None:
    """Pieces are found by the digest of their content; records large enough that compression saves pages."""
    raw, packed = tmp_path / "raw", tmp_path / "zstd"
    flashpack.convert(CHECKPOINTS / "mixtral", raw, experts="source", dense="source")
    recode(raw, packed, "zstd")
    whole = {"raw": raw, "zstd": packed}
    other = whole["zstd" if codec == "raw" else "raw"]
    broken = Path(shutil.copytree(whole[codec], tmp_path / "broken"))
    path, offset, _ = extent(broken, 1, 2)
    flip(path, offset)
    tensor = Pack(broken).manifest.tensors[0]
    flip(broken / tensor.path, tensor.offset)
    done = repair(broken, PackDonor(str(other)))
    assert (done.findings, done.pieces) == ([], 2)
    assert contents(broken) == contents(whole[codec])


class RangeHandler(BaseHTTPRequestHandler):
    """Files of a folder with byte ranges, as every real file server has them."""

    ranges = True

    def __init__(self, folder: Path, *args: object) -> None:
        self.folder = folder
        super().__init__(*args)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.ranges else None
        part = data[int(match[1]) : int(match[2]) + 1] if match else data
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {match[1]}-{int(match[1]) + len(part) - 1}/{len(data)}")
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[Path], str]]:
    servers = []

    def start(folder: Path) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeHandler, folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_copy_behind_a_url_serves_and_only_the_needed_parts_are_read(
    pack_copy: Copy, pack_of: PackOf, serve: Callable[[Path], str]
) -> None:
    pack, good = pack_copy("qwen3_moe"), pack_of("qwen3_moe")
    everything(pack)
    donor = PackDonor(serve(good.parent) + "/" + good.name)
    done = repair(pack, donor)
    donor.close()
    assert done.findings == []
    assert contents(pack) == contents(good)


def test_a_url_without_a_pack_and_a_server_that_is_not_there_are_said_in_one_line(
    serve: Callable[[Path], str], tmp_path: Path
) -> None:
    with pytest.raises(NotAPackError, match=r"no flashpack.json there"):
        PackDonor(serve(tmp_path))
    with pytest.raises(SourceError, match="cannot be read") as caught:
        PackDonor("http://127.0.0.1:9")
    assert "\n" not in str(caught.value)
    with pytest.raises(SourceError, match="cannot be opened"):
        PackDonor("gopher://example/x")


def test_another_pack_is_refused_and_nothing_changes(pack_copy: Copy, pack_of: PackOf) -> None:
    pack = pack_copy("qwen3_moe")
    damage_record(pack)
    before = contents(pack)
    with pytest.raises(SourceError, match=r"nothing of .* can be mended from it.*layer 1, expert 3"):
        repair(pack, PackDonor(str(pack_of("olmoe"))))
    assert contents(pack) == before


def test_two_damaged_copies_mend_each_other(pack_copy: Copy, pack_of: PackOf, tmp_path: Path) -> None:
    pack, good = pack_copy("qwen3_moe"), pack_of("qwen3_moe")
    other = Path(shutil.copytree(good, tmp_path / "other"))
    damage_record(pack)
    damage_tail(other)
    damage_tensors(other)
    assert repair(pack, PackDonor(str(other))).findings == []
    assert repair(other, PackDonor(str(pack))).findings == []
    assert contents(pack) == contents(other) == contents(good)


def test_what_nobody_has_stays_as_it_was_and_is_reported(pack_copy: Copy, pack_of: PackOf, tmp_path: Path) -> None:
    pack, other = pack_copy("qwen3_moe"), Path(shutil.copytree(pack_of("qwen3_moe"), tmp_path / "other"))
    damage_every_record_of_a_layer(pack)
    path, offset, _ = extent(other, 0, 5)
    flip(path, offset + 1)
    lost = extent(pack, 0, 5)[0].read_bytes()[offset : offset + 64]
    done = repair(pack, PackDonor(str(other)))
    assert [(f.code, f.layer, f.expert) for f in done.findings] == [("record-digest", 0, 5)]
    assert done.pieces == 7
    assert extent(pack, 0, 5)[0].read_bytes()[offset : offset + 64] == lost
    # A shard that is missing altogether is not put there with a hole, which would open as if it were whole.
    path.unlink()
    remove_shard(pack)
    with pytest.raises(SourceError, match="missing"):
        repair(pack, PackDonor(str(pack_of("olmoe"))))
    assert not (pack / "experts" / "layer-0000.safetensors").exists()


def test_manifest_and_digest_that_contradict_each_other_need_a_witness(pack_copy: Copy, pack_of: PackOf) -> None:
    pack = pack_copy("qwen3_moe")
    identity = Pack(pack).identity
    damage_manifest_digest(pack)
    with pytest.raises(IntegrityError, match="--expect"):
        repair(pack, PackDonor(str(pack_of("olmoe"))))
    assert repair(pack, PackDonor(str(pack_of("olmoe"))), expect=identity).files == [MANIFEST]
    assert verify(pack) == []


def test_unlisted_files_are_reported_and_left_alone(pack_copy: Copy, pack_of: PackOf) -> None:
    pack = pack_copy("qwen3_moe")
    (pack / "notes.txt").write_text("mine")
    done = repair(pack, PackDonor(str(pack_of("qwen3_moe"))))
    assert [f.code for f in done.findings] == ["unlisted-file"]
    assert (pack / "notes.txt").read_text() == "mine"


def test_a_linked_folder_is_not_followed(pack_copy: Copy, pack_of: PackOf, tmp_path: Path) -> None:
    pack = pack_copy("qwen3_moe")
    elsewhere = tmp_path / "elsewhere"
    (pack / "experts").rename(elsewhere)
    (pack / "experts").symlink_to(elsewhere)
    before = contents(elsewhere)
    with pytest.raises(SourceError, match="cannot be opened as a plain file"):
        repair(pack, PackDonor(str(pack_of("qwen3_moe"))))
    assert contents(elsewhere) == before


def test_no_space_for_the_new_file_changes_nothing(
    pack_copy: Copy, pack_of: PackOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = pack_copy("qwen3_moe")
    damage_record(pack)
    before = contents(pack)
    usage = shutil.disk_usage(pack)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match="a repair needs"):
        repair(pack, PackDonor(str(pack_of("qwen3_moe"))))
    assert contents(pack) == before


KILLED = """
import os, signal, sys
from flashpack.formats import repair as module
from flashpack.formats.donor import PackDonor
count = 0
def step(name):
    real = getattr(module, name)
    def call(*args):
        global count
        count += 1
        if count == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    setattr(module, name, call)
for name in ("create", "pwrite", "resize", "sync", "publish", "write_durably", "commit_bytes"):
    step(name)
module.repair(sys.argv[1], PackDonor(sys.argv[2]))
print("done")
"""


@pytest.mark.parametrize("moment", [1, 3, 5, 9, 14, 20, 26, 32, 60])
def test_a_killed_repair_leaves_nothing_worse_and_the_next_one_ends_it(
    pack_copy: Copy, pack_of: PackOf, moment: int
) -> None:
    pack, good = pack_copy("qwen3_moe"), pack_of("qwen3_moe")
    everything(pack)
    script = [commands.python(), "-c", KILLED, str(pack), str(good), str(moment)]
    subprocess.run(script, check=False, capture_output=True)
    if (pack / MANIFEST).exists():
        kinds = {
            "manifest-digest",
            "record-digest",
            "tail-digest",
            "tensor-digest",
            "file-digest",
            "missing-file",
            "size",
        }
        assert {f.code for f in verify(pack)} <= kinds | {"unlisted-file"}
    # Partial files of the killed run are finished or replaced: nothing stays behind.
    assert repair(pack, PackDonor(str(good))).findings == []
    assert contents(pack) == contents(good)


def test_only_one_repair_works_on_a_pack(pack_copy: Copy, pack_of: PackOf) -> None:
    from flashpack.formats.files import locked

    pack = pack_copy("qwen3_moe")
    with locked(pack), pytest.raises(OutputError, match="another process is writing here"):
        repair(pack, PackDonor(str(pack_of("qwen3_moe"))))


def test_a_pack_that_is_being_repaired_is_not_overwritten(pack_copy: Copy, pack_of: PackOf) -> None:
    from flashpack.formats.files import locked

    pack, good = pack_copy("qwen3_moe"), pack_of("qwen3_moe")
    with locked(pack), pytest.raises(OutputError, match="another process is writing here"):
        flashpack.convert(CHECKPOINTS / "qwen3_moe", pack, overwrite=True)
    assert {k: v for k, v in contents(pack).items() if k != "flashpack.journal"} == contents(good)
