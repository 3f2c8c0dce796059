"""Finding what was built at installation."""

from __future__ import annotations

import ctypes
import importlib.machinery
from pathlib import Path


def load(name: str) -> ctypes.CDLL:
    """The library ``name`` of this folder; ``OSError`` says why there is none."""
    paths = [Path(__file__).parent / f"{name}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
        raise OSError("not built; install a C and C++ compiler, then flashpack again")
    return ctypes.CDLL(str(path))
