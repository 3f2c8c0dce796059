"""A reader of flashpack packs from SPEC.md alone: python read_pack.py PACK [--expert LAYER EXPERT] [--tensor NAME]

Trust is built in this order: the manifest proves itself with its digest, positions and headers follow from the manifest
(pack_rules.py), every other byte has a digest. So nothing is believed that a damaged or hostile file says about itself.
What stored bytes mean is in pack_encodings.py.
"""

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from pack_encodings import FLOATS, PackError, decode, need, stored_parts
from pack_rules import PAGE, derive, nbytes, read_manifest, up

NUMPY = {"U8": "<u1", "U32": "<u4", "I32": "<i4", "I64": "<i8", "BF16": "<u2", "F16": "<f2", "F32": "<f4"}


def values(raw: bytes, dtype: str, shape: list[int], offset: int = 0) -> np.ndarray:
    """Stored bytes as an array: floats as float32, integers as they are."""
    array = np.frombuffer(raw[offset : offset + nbytes(dtype, shape)], NUMPY[dtype])
    if dtype == "BF16":  # the upper half of a float32
        array = (array.astype("<u4") << 16).view("<f4")
    return (array.astype("<f4") if dtype in FLOATS else array).reshape(shape)


class Pack:
    """An open pack. Opening proves all but the records and tensors, which are proven when they are read."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path, proof = self.folder / "flashpack.json", self.folder / "flashpack.json.b3"
        need(path.is_file() and not path.is_symlink(), f"{folder} has no manifest", "not-a-pack")
        need(path.stat().st_size <= 33554432, "the manifest is too large")  # before memory is taken for it
        raw = path.read_bytes()
        self.identity = blake3(raw).hexdigest()
        plain = proof.is_file() and not proof.is_symlink()
        need(plain and proof.stat().st_size == 65, "the manifest's digest is missing or odd", "integrity")
        need(proof.read_bytes() == f"{self.identity}\n".encode(), "the manifest is damaged", "integrity")
        self.manifest = read_manifest(raw)
        self.files = {file["path"]: file for file in self.manifest["files"]}
        self.tensors = {tensor["name"]: tensor for tensor in self.manifest["tensors"]}
        self.matrices = {matrix["name"]: matrix for matrix in self.manifest["matrices"]}
        for path, file in self.files.items():
            copy = file["digests"].get("file")
            data = self._read(path, 0, file["size"] if copy else 0)
            need(copy in (None, blake3(data).hexdigest()), f"{path} is damaged", "integrity")
        self._open_dense()
        self.layers = {layer["index"]: self._open_shard(layer) for layer in self.manifest["layers"]}

    def _read(self, path: str, offset: int, size: int) -> bytes:
        """Bytes of a listed file, which must be a plain file of the listed size, on a way without symbolic links."""
        place = self.folder
        for part in path.split("/"):
            place /= part
            need(not place.is_symlink(), f"{place} is a symbolic link", "integrity")
        need(place.is_file(), f"{path} is missing or no plain file", "integrity")
        need(place.stat().st_size == self.files[path]["size"], f"{path} has another size", "integrity")
        with place.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        need(len(data) == size, f"{path} is cut off", "integrity")
        return data

    def _check_header(self, path: str, metadata: dict[str, str], tensors: list[Any], aligned: bool) -> dict[str, int]:
        """Where the tensors of a file start: its header is compared with the derived one, never parsed."""
        header, starts, size = derive(metadata, tensors, aligned)
        need(blake3(header).hexdigest() == self.files[path]["digests"]["header"], f"odd digest of the header of {path}")
        need(size == self.files[path]["size"], f"the size of {path} does not follow from its tensors")
        need(self._read(path, 0, len(header)) == header, f"the header of {path} is damaged", "integrity")
        return starts

    def _open_dense(self) -> None:
        """Section 7: the tensors of a dense file, in the order of their offsets, fill it."""
        inside: dict[str, list[Any]] = {path: [] for path, file in self.files.items() if file["role"] == "dense"}
        for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor["offset"]):
            inside[tensor["path"]].append(tensor)
        for path, tensors in inside.items():
            entries = [(t["name"], t["dtype"], t["shape"]) for t in tensors]
            starts = self._check_header(path, {"flashpack": "dense"}, entries, aligned=True)
            need(all(starts[t["name"]] == t["offset"] for t in tensors), f"offsets in {path} do not follow")
            for (name, start), (_, end) in pairwise(starts.items()):
                pad = self._read(path, start, end - start) if name.startswith("__pad__") else b""
                need(not any(pad), f"padding in {path} is not zero", "integrity")

    def _open_shard(self, layer: Any) -> list[tuple[Any, ...]]:
        """Section 5: each expert's kind, the shard, offset and size of its stored record, its digest, its content's."""
        path, counts = layer["path"], {k["kind"]: k["count"] for k in layer["kinds"]}
        kinds, total = {k: self.manifest["record_kinds"][k] for k in counts}, sum(counts.values())
        zstd = layer.get("codec") == "zstd"
        tail = [("table", "U32", [total, 2])] if len(counts) > 1 else []
        tail += [("sizes", "U32", [total]), ("contents", "U8", [total, 32])] if zstd else []
        tail += [("digests", "U8", [total, 32])]
        behind = sum(nbytes(dtype, shape) for _, dtype, shape in tail)
        frames = self.files[path]["size"] - PAGE - behind  # the only length that the manifest does not state itself
        need(frames > 0, f"{path} is too small for its experts")
        records = [(f"records.{k}", "U8", [count, kinds[k]["stride"]]) for k, count in counts.items()]
        metadata = {"flashpack": "experts", "layer": str(layer["index"]), "module": layer["module"]}
        tensors = ([("frames", "U8", [frames])] if zstd else records) + tail
        starts = self._check_header(path, metadata, tensors, aligned=False)
        begin = starts[tail[0][0]]
        raw, proof = self._read(path, begin, behind), self.files[path]["digests"]["tail"]
        need(blake3(raw).hexdigest() == proof, f"the tail of {path} is damaged", "integrity")
        stored = {name: values(raw, dtype, shape, starts[name] - begin).tolist() for name, dtype, shape in tail}
        rows = [[k, row] for k, count in counts.items() for row in range(count)]
        table = stored.get("table", rows)
        need(sorted(table) == sorted(rows), f"the expert table of {path} leaves records out, or names one twice")
        experts, position = [], starts.get("frames", 0)
        for expert, (k, row) in enumerate(table):
            size = stored["sizes"][expert] if zstd else kinds[k]["stride"]
            need(1 <= size <= kinds[k]["stride"], f"odd size of expert {expert} in {path}")
            offset = position if zstd else starts[f"records.{k}"] + row * size
            digests = [bytes(stored[name][expert]) for name in ("digests", "contents" if zstd else "digests")]
            experts.append((kinds[k], path, offset, size, *digests))
            position += up(size)
        need(not zstd or position == begin, f"the stored records do not fill the frames of {path}")
        return experts

    def read_record(self, layer: int, expert: int) -> bytes:
        """An expert's record: one read, compared with its digest before anything is made of it."""
        need(layer in self.layers and 0 <= expert < len(self.layers[layer]), "no such expert", "usage")
        kind, path, offset, size, digest, content = self.layers[layer][expert]
        record = self._read(path, offset, up(size))
        need(blake3(record).digest() == digest, f"expert {expert} of {path} is damaged", "integrity")
        need(not any(record[size:]), f"the padding of expert {expert} of {path} is not zero", "integrity")
        if size < kind["stride"]:
            record = decompress(record[:size], kind["stride"])
        need(blake3(record).digest() == content, f"the frame of expert {expert} of {path} holds another", "integrity")
        return record

    def read_expert(self, layer: int, expert: int) -> dict[str, np.ndarray]:
        """The matrices of an expert by the names of its projections, float32 [out, in]; biases [out] as NAME.bias."""
        record, kind = self.read_record(layer, expert), self.layers[layer][expert][0]
        stored = {s["name"]: values(record, s["dtype"], s["shape"], s["offset"]) for s in kind["sections"]}
        found = {name: array for name, array in stored.items() if name.endswith(".bias")}
        for p in kind["projections"]:
            parts = {part: stored[f"{p['name']}.{part}"] for part in stored_parts(p["encoding"], p["shape"])}
            found[p["name"]] = decode(p["encoding"], parts)
        return found

    def read_stored(self, name: str) -> np.ndarray:
        """A dense tensor as it is stored: floats as float32, integers as they are."""
        need(name in self.tensors, f"no tensor is called {name}", "usage")
        tensor = self.tensors[name]
        raw = self._read(tensor["path"], tensor["offset"], nbytes(tensor["dtype"], tensor["shape"]))
        need(blake3(raw).hexdigest() == tensor["digest"], f"the tensor {name} is damaged", "integrity")
        return values(raw, tensor["dtype"], tensor["shape"])

    def read_tensor(self, name: str) -> np.ndarray:
        """A dense tensor, or the float32 values of a quantized matrix."""
        if name not in self.matrices:
            return self.read_stored(name)
        encoding, shape = (self.matrices[name][key] for key in ("encoding", "shape"))
        stored = {part: self.read_stored(name[:-6] + part) for part in stored_parts(encoding, shape)}
        return decode(encoding, stored)


def decompress(frame: bytes, stride: int) -> bytes:
    """The record in a zstd frame. Its header is looked at first, so that it cannot make us take more memory."""
    import zstandard  # here, because most packs do without

    try:
        header = zstandard.get_frame_parameters(frame)
        plain = frame[:4] == b"\x28\xb5\x2f\xfd" and header.dict_id == 0 and header.content_size == stride
        need(plain, "a frame of another size, of another kind or with a dictionary")
        return zstandard.ZstdDecompressor().decompress(frame, max_output_size=stride, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise PackError("format", f"not a single zstd frame: {error}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description="Check a flashpack pack and list it, or print an expert or a tensor.")
    parser.add_argument("pack")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--expert", nargs=2, type=int, metavar=("LAYER", "EXPERT"))
    part.add_argument("--tensor", metavar="NAME")
    options = parser.parse_args()
    try:
        pack = Pack(options.pack)
        lines: list[Any] = [f"layer {index}: {len(experts)} experts" for index, experts in pack.layers.items()]
        lines += [f"{name} {tensor['dtype']} {tensor['shape']}" for name, tensor in pack.tensors.items()]
        if options.expert or options.tensor:
            lines = [pack.read_expert(*options.expert) if options.expert else pack.read_tensor(options.tensor)]
    except PackError as error:
        raise SystemExit(str(error)) from None
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
