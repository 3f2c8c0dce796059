"""flashpack's folder among the user's caches: small files that may be lost, or not be written, and that is no error."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path


def folder() -> Path:
    """Where the files are; nothing is made."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    if chosen and Path(chosen).is_absolute():  # others are to be ignored, says the standard
        return Path(chosen) / "flashpack"
    return Path("~/Library/Caches" if sys.platform == "darwin" else "~/.cache").expanduser() / "flashpack"


def write(name: str, text: str) -> None:
    """Replace the file ``name`` ("a/b") of the folder at once, if that is possible. Only its owner can read it."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home
        path = folder() / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A name of its own: other processes may write at the same time.
        fd, partial = tempfile.mkstemp(prefix=".", dir=path.parent)
        try:
            with open(fd, "w") as f:
                f.write(text)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise


def remove(name: str) -> None:
    """Have no file ``name``, if that is possible."""
    with contextlib.suppress(OSError, RuntimeError):
        (folder() / name).unlink()
