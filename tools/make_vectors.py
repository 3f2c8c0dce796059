"""Make the packs of the conformance suite, tests/vectors: python tools/make_vectors.py

Vectors are frozen: one that exists is never changed, because a later version must still read (or refuse) what an
earlier one wrote. This adds what is missing and its row in index.json.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import vector_edges
import vector_faults
import vector_fields
import vector_floats
import vector_packs

from flashpack.formats import Pack
from flashpack.formats.dtypes import NUMPY, to_float32
from flashpack.formats.encodings import decode
from flashpack.version import __version__

VALID = vector_packs.VALID | vector_edges.MORE_VALID | vector_floats.FLOAT_VALID
FAULTS = vector_faults.FAULTS + vector_fields.MORE_FAULTS + vector_floats.FLOAT_FAULTS
ROOT = Path(__file__).resolve().parent.parent
VECTORS = ROOT / "tests" / "vectors"


def archive(folder: Path) -> bytes:
    """The folder as .tar.gz, names sorted, without times and owners."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(folder.rglob("*")):
            info = tar.gettarinfo(path, path.relative_to(folder).as_posix())
            info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
            info.mode = 0o755 if info.isdir() else 0o644
            if info.isfile():
                tar.addfile(info, io.BytesIO(path.read_bytes()))
            else:
                tar.addfile(info)
    return gzip.compress(plain.getvalue(), 9, mtime=0)


def digest(values: np.ndarray) -> str:
    """SHA-256 of values as float32, row by row, every NaN as one; of integers as they are stored."""
    if values.dtype == np.float32:
        values = np.where(np.isnan(values), np.array(0x7FC00000, "<u4").view("<f4"), values)
    return sha256(np.ascontiguousarray(values).tobytes())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def values(folder: Path) -> dict[str, object]:
    """Digests of all that a reader can decode.

    Matrices of experts by "layer/expert/projection", their biases with ".bias" behind; tensors and matrices by name.
    """
    pack = Pack(folder)
    experts: dict[str, str] = {}
    for layer in pack.manifest.layers:
        with pack.open_shard(layer) as shard:
            for e in range(layer.experts):
                kind = shard.kind(e)
                offset, span = shard.extent(e)
                record = memoryview(bytearray(kind.stride))
                shard.decode(e, memoryview(shard.path.read_bytes())[offset : offset + span], record)
                arrays = {
                    s.name: np.frombuffer(record[s.offset : s.offset + s.nbytes], NUMPY[s.dtype]).reshape(s.shape)
                    for s in kind.sections
                }
                for p in kind.projections:
                    parts = {n.split(".")[1]: a for n, a in arrays.items() if n.startswith(f"{p.name}.")}
                    experts[f"{layer.index}/{e}/{p.name}"] = digest(decode(p.encoding, parts, p.shape))
                    if p.bias:
                        experts[f"{layer.index}/{e}/{p.name}.bias"] = digest(to_float32(parts["bias"], p.bias))
    tensors: dict[str, str] = {}
    for t in pack.manifest.tensors:
        array = pack.map_tensor(t.name)
        floats = t.dtype in ("BF16", "F16", "F32")
        tensors[t.name] = digest(to_float32(array, t.dtype) if floats else array)
    matrices = {}
    for m in pack.manifest.matrices:
        parts = {part: pack.map_tensor(name) for part, name in m.tensor_names().items()}
        matrices[m.name] = digest(decode(m.encoding, parts, m.shape))
    return {"identity": pack.identity, "experts": experts, "tensors": tensors, "matrices": matrices}


def sections() -> dict[str, int]:
    """Rule -> section of SPEC.md."""
    found, section = {}, 0
    for line in (ROOT / "SPEC.md").read_text().splitlines():
        if heading := re.match(r"## (\d+)\.", line):
            section = int(heading[1])
        found |= dict.fromkeys(re.findall(r"`\[([a-z0-9-]+)\]`", line), section)
    return found


def main() -> None:
    index_path = VECTORS / "index.json"
    index = json.loads(index_path.read_text()) if index_path.exists() else {"valid": {}, "invalid": {}}
    rules = sections()
    made = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name, build in VALID.items():
            if name not in index["valid"]:
                folder = Path(scratch) / name
                folder.mkdir()
                build(folder)
                row = {"since": __version__, "what": build.__doc__, **values(folder)}
                index["valid"][name] = row | {"sha256": store(f"valid/{name}.tar.gz", archive(folder))}
                made += 1
        for number, fault in enumerate(FAULTS):
            if fault.name not in index["invalid"]:
                folder = Path(scratch) / f"fault-{number}" / fault.valid
                folder.mkdir(parents=True)
                VALID[fault.valid](folder)
                fault.put(folder)
                seen = {"error": fault.error, "at": fault.at, "finding": fault.finding}
                row = {"since": __version__, "rule": fault.rule, "section": rules[fault.rule], **seen}
                index["invalid"][fault.name] = row | {"sha256": store(f"invalid/{fault.name}.tar.gz", archive(folder))}
                made += 1
    index_path.write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
    print(f"{made} vectors made, {len(index['valid']) + len(index['invalid'])} in all")


def store(path: str, data: bytes) -> str:
    """Write a new archive; its digest."""
    target = VECTORS / path
    if target.exists():
        sys.exit(f"{target}: exists, but index.json does not list it; vectors are never changed")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return sha256(data)


if __name__ == "__main__":
    main()
