"""The reader in examples, written from SPEC.md alone: what it reads and refuses shows whether SPEC.md is complete."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.conftest import extract

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
FILES = [EXAMPLES / "read_pack.py", EXAMPLES / "pack_rules.py", EXAMPLES / "pack_encodings.py"]
VECTORS = ROOT / "tests" / "vectors"
INDEX = json.loads((VECTORS / "index.json").read_text())

# The folder is sound for this reader, which hands it to no library: section 2 asks only a check to report such a file.
ALLOWED = {name for name, row in INDEX["invalid"].items() if row["rule"] == "unlisted-file"}


def load() -> ModuleType:
    """As `python examples/read_pack.py` loads it: with its own folder on the path."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("read_pack", FILES[0])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


read_pack = load()


def unpacked(kind: str, name: str, folder: Path) -> Path:
    archive = VECTORS / kind / f"{name}.tar.gz"
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == INDEX[kind][name]["sha256"]
    extract(archive, folder)
    return folder


def digest(array: np.ndarray) -> str:
    assert array.dtype in (np.float32, np.uint8, np.uint32, np.int32, np.int64)
    if array.dtype == np.float32:
        array = np.where(np.isnan(array), np.uint32(0x7FC00000), array.view(np.uint32))
    return hashlib.sha256(array.tobytes()).hexdigest()


@pytest.mark.parametrize("name", sorted(INDEX["valid"]))
def test_every_valid_vector_has_the_stated_values(name: str, tmp_path: Path) -> None:
    expected = INDEX["valid"][name]
    pack = read_pack.Pack(unpacked("valid", name, tmp_path))
    assert pack.identity == expected["identity"]
    experts = {
        f"{layer}/{expert}/{projection}": digest(matrix)
        for layer, places in pack.layers.items()
        for expert in range(len(places))
        for projection, matrix in pack.read_expert(layer, expert).items()
    }
    assert experts == expected["experts"]
    assert {tensor: digest(pack.read_stored(tensor)) for tensor in pack.tensors} == expected["tensors"]
    assert {matrix: digest(pack.read_tensor(matrix)) for matrix in pack.matrices} == expected["matrices"]


def read_all(folder: Path) -> None:
    pack = read_pack.Pack(folder)
    for layer, places in pack.layers.items():
        for expert in range(len(places)):
            pack.read_expert(layer, expert)
    for tensor in pack.tensors:
        pack.read_tensor(tensor)


@pytest.mark.parametrize("name", sorted(INDEX["invalid"].keys() - ALLOWED))
def test_every_invalid_vector_is_refused(name: str, tmp_path: Path) -> None:
    folder = unpacked("invalid", name, tmp_path)
    expected = INDEX["invalid"][name]
    with pytest.raises(read_pack.PackError) as caught:
        read_all(folder) if expected["at"] != "open" else read_pack.Pack(folder)
    # Findings that only a check has to make (no code) are, to this reader, bytes that do not match.
    assert caught.value.code == (expected["error"] or "integrity")


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_what_only_a_check_has_to_report_is_read(name: str, tmp_path: Path) -> None:
    assert INDEX["invalid"][name]["at"] not in ("open", "shard", "read")
    read_all(unpacked("invalid", name, tmp_path))


def test_a_folder_without_a_manifest_is_not_a_pack(tmp_path: Path) -> None:
    with pytest.raises(read_pack.PackError) as caught:
        read_pack.Pack(tmp_path)
    assert caught.value.code == "not-a-pack"


def test_the_command_lists_and_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(unpacked("valid", "base", tmp_path))

    def run(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["read_pack.py", folder, *options])
        read_pack.main()
        return capsys.readouterr().out

    listing = run()
    assert "layer 3: 3 experts" in listing
    assert all(f"\n{tensor} " in listing for tensor in INDEX["valid"]["base"]["tensors"])
    assert "'down': array" in run("--expert", "3", "2")
    assert run("--tensor", next(iter(INDEX["valid"]["base"]["matrices"]))).startswith("[[")
    with pytest.raises(SystemExit, match="no such expert"):
        run("--expert", "1", "0")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_stays_short_and_stands_alone(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 200
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).partition(".")[0])
    assert imported <= sys.stdlib_module_names | {"numpy", "blake3", "zstandard", "pack_rules", "pack_encodings"}
