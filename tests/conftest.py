"""Shared fixtures: the bundled trained model, the tiny checkpoints, packs made of them."""

from __future__ import annotations

import os

# Before torch is imported: several test processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# No test reads or writes the user's history of hot experts, or depends on the test before it.
os.environ["FLASHPACK_WARM"] = "0"
os.environ["FLASHPACK_PROFILE"] = "0"

import gc
import hashlib
import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# A shell that runs the tests in the background has them ignore Ctrl-C, and what they start, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A deadline measures the machine: the first example imports torch, and cores are shared.
settings.register_profile("flashpack", deadline=None)
settings.load_profile("flashpack")

ROOT = Path(__file__).resolve().parent.parent
TRAINED = ROOT / "examples" / "tiny-qwen3.5-moe"
CHECKPOINTS = ROOT / "tests" / "data" / "checkpoints"

PackOf = Callable[..., Path]


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Models are cycles: what the tests of a file left open is closed before those of the next."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()


def source_of(name: str) -> Path:
    """The checkpoint folder of a name: "trained", or one of the tiny ones."""
    return TRAINED if name == "trained" else CHECKPOINTS / name


def extract(archive: Path, folder: Path) -> None:
    """All that a vector holds, links that lead out of the folder among it; without the argument of ``extractall`` that
    Python 3.11 has from 3.11.4 on only."""
    with tarfile.open(archive) as tar:
        tar.extraction_filter = lambda member, path: member
        tar.extractall(folder)


def contents(folder: Path) -> dict[str, str]:
    """Every file below ``folder`` and its digest."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="session")
def pack_of(tmp_path_factory: pytest.TempPathFactory) -> PackOf:
    """``pack_of(name, experts=, dense=, group_size=, quality=)``: a pack, made once for all workers. Do not change
    it."""
    from filelock import FileLock

    import flashpack

    made: set[Path] = set()
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # all workers'
    folder /= "packs"
    folder.mkdir(exist_ok=True)

    def make(
        name: str, experts: str = "auto", dense: str = "auto", group_size: int = 64, quality: str = "default"
    ) -> Path:
        out = folder / f"{name}-{experts}-{dense}-{group_size}-{quality}"
        if out.parent != folder:
            raise ValueError(f"{name} is a path: the pack would lie beside it, not among those of the tests")
        if out not in made:
            with FileLock(f"{out}.lock"):
                if not out.exists():
                    flashpack.convert(source_of(name), out, experts, dense, group_size, quality=quality)
            made.add(out)
        return out

    return make


@pytest.fixture
def pack_copy(pack_of: PackOf, tmp_path: Path) -> Callable[..., Path]:
    """Like ``pack_of``, but a copy that the test may damage."""

    def make(name: str, **options: str) -> Path:
        return Path(shutil.copytree(pack_of(name, **options), tmp_path / f"{name}.flashpack"))

    return make


@pytest.fixture
def source_copy(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a checkpoint folder that the test may change."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(source_of(name), tmp_path / name))

    return make
