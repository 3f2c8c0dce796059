"""The folder in which a page's commands are run: what its readers have is there, only smaller."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
from safetensors.numpy import load_file, save_file

from tests.conftest import ROOT, TRAINED

Put = Callable[[Path, Path], object]
"""Puts a thing of the shelf (its folder) where it is wanted."""

_TEXT = (ROOT / "tests/data/docs.txt").read_bytes()
_CALLS = b"".join((ROOT / "tests/data/toolcalls.jsonl").read_bytes().splitlines(keepends=True)[:1])
_TOOLS = b'''
def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b
'''


def shortened(folder: Path) -> None:
    """One layer of the bundled model with four of its experts: calibration takes no time."""
    assert ml_dtypes.bfloat16  # numpy knows the type by its import
    tensors: dict[str, Any] = {}
    for file in sorted(TRAINED.glob("*.safetensors")):
        tensors |= load_file(file)
    left_out = re.compile(r"layers\.[^2]\.|experts\.([4-9]|\d\d)\.")
    kept = {n.replace("layers.2.", "layers.0."): t for n, t in tensors.items() if not left_out.search(n)}
    kept |= {n: t[:4].copy() for n, t in kept.items() if n.endswith("mlp.gate.weight")}
    folder.mkdir(parents=True)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((TRAINED / "config.json").read_bytes())
    config |= {"num_hidden_layers": 1, "num_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"]}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(TRAINED / name, folder / name)


def checkpoint(folder: Path) -> None:
    """The bundled model under another name."""
    folder.mkdir(parents=True)
    for file in TRAINED.iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file)


def readers() -> dict[str, str]:
    """The environment of a reader who has set nothing of ours."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "FLASHPACK_", "PYTEST_", "GIT_"))}
    return kept | {"TERM": "dumb", "TRANSFORMERS_VERBOSITY": "error"}


@dataclass(frozen=True)
class Shelf:
    """What the pages have in common, made once: two packs of the bundled model, and the small checkpoint. ``settings``
    is the environment of all commands."""

    folder: Path
    programs: Path
    settings: dict[str, str]

    @classmethod
    def made(cls, folder: Path, programs: Path, settings: dict[str, str]) -> Shelf:
        shelf = cls(folder, programs, settings)
        shortened(folder / "small")
        shelf._flashpack("convert", str(TRAINED), "pack")
        shelf._flashpack("convert", str(TRAINED), "exact", "--experts", "source", "--dense", "source")
        return shelf

    @property
    def identity(self) -> str:
        """That of ``PACK``."""
        identity: str = json.loads(self._flashpack("inspect", "pack", "--json"))["identity"]
        return identity

    def _flashpack(self, *arguments: str) -> str:
        command = [str(self.programs / "flashpack"), *arguments]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment(self.folder), check=True, capture_output=True
        )
        return done.stdout.decode()

    def environment(self, home: Path) -> dict[str, str]:
        """A reader's, whose home is ``home``, with the prepared programs."""
        return self.settings | {"HOME": str(home), "PATH": f"{self.programs}{os.pathsep}{self.settings['PATH']}"}

    def furnish(self, place: Path, text: str) -> None:
        """Put into ``place`` what ``text`` names, and its reader's home."""
        checkpoint(place / "home" / "models" / "Qwen3-30B-A3B")
        for name in ("examples", "tests", "SPEC.md"):
            (place / name).symlink_to(ROOT / name)
        for name, put in _THINGS.items():
            if re.search(rf"(?<![\w./-]){re.escape(name)}(?![\w-])", text):
                put(self.folder, place / name)


def _copy(name: str) -> Put:
    return lambda shelf, target: shutil.copytree(shelf / name, target)


def _written(data: bytes) -> Put:
    return lambda _, target: target.write_bytes(data)


_THINGS: dict[str, Put] = {
    "PACK": _copy("pack"),
    "OTHER": _copy("pack"),
    "EXACT_PACK": _copy("exact"),
    "ORIGINAL": _copy("exact"),
    "CHECKPOINT": lambda _, target: checkpoint(target),
    "SRC": _copy("small"),
    "FILE": _written(_TEXT[:3000]),
    "text.txt": _written(_TEXT[:3000]),
    "own.txt": _written(_TEXT[:6000]),
    "held-out.txt": _written(_TEXT[6000:9000]),
    "CALLS": _written(_CALLS),
    "toolcalls.jsonl": _written(_CALLS),
    "my_tools.py": _written(_TOOLS),
}
"""By the names that pages use."""
