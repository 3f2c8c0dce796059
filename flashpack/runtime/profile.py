"""What ``tune`` found best for a pack on this machine, kept in the user's cache folder, and used by ``load``; threads
by the commands that run a pack, before they load it.

It changes how fast a result comes, never the result. A file that cannot be read or does not fit is as good as none.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashpack import user_cache
from flashpack.errors import FormatError
from flashpack.formats.header import parse_json
from flashpack.runtime.reads import READ_THREADS

if TYPE_CHECKING:
    from flashpack.formats import Pack

MAX_READERS = 64

_MAX_BYTES = 2**20
_VERSION = 1


@dataclass(frozen=True)
class Profile:
    """``readers``: reads in flight. ``io``: "direct", "buffered", or None: tried at each start. ``prefetch``: whether
    experts that will probably be asked for are read ahead. ``threads``: of computing, None: one per processor."""

    readers: int = READ_THREADS
    io: str | None = None
    prefetch: bool = True
    threads: int | None = None

    def words(self) -> str:
        """What is other than without a profile."""
        changed = {name: value for name, value in asdict(self).items() if value != getattr(Profile(), name)}
        return ", ".join(f"{name} {value}" for name, value in changed.items()) or "what is used without a profile"


def usable_cores() -> int:
    """Processors that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def path_of(pack: Pack) -> Path:
    """The file about this pack, wherever it lies."""
    return user_cache.folder() / _name(pack)


def _name(pack: Pack) -> str:
    return f"profiles/{pack.identity[:32]}.json"


def profile_of(pack: Pack) -> Profile:
    """What ``tune`` found, unless the environment variable FLASHPACK_PROFILE is 0; or else what is used without it."""
    found = read(pack) if os.environ.get("FLASHPACK_PROFILE", "1") != "0" else None
    return found or Profile()


def read(pack: Pack) -> Profile | None:
    """The profile of ``pack``; None if there is no sound one for this drive and number of processors."""
    try:
        path = path_of(pack)
        with open(path, "rb") as f:
            raw = f.read(_MAX_BYTES + 1)
        return _parse(parse_json(raw, str(path)), pack) if len(raw) <= _MAX_BYTES else None
    except (OSError, RuntimeError, FormatError, ValueError, LookupError, TypeError):  # RuntimeError: no home
        return None


def write(pack: Pack, profile: Profile, evidence: Any) -> None:
    """Use ``profile`` from now on; ``evidence``, JSON, is kept for people to look at."""
    data = {
        "version": _VERSION,
        "pack": pack.identity,
        "processors": usable_cores(),
        "device": _device(pack),
        "profile": asdict(profile),
    }
    user_cache.write(_name(pack), json.dumps(data | {"evidence": evidence}, indent=1))


def remove(pack: Pack) -> None:
    """Forget it."""
    user_cache.remove(_name(pack))


def _device(pack: Pack) -> int:
    """The number of the file system that the pack is on."""
    return os.stat(pack.folder).st_dev


def _parse(data: object, pack: Pack) -> Profile:
    """Raises ``ValueError``, ``LookupError`` or ``TypeError`` if ``data`` is not a profile of ``pack`` here."""
    if not isinstance(data, dict) or data.get("version") != _VERSION or data.get("pack") != pack.identity:
        raise ValueError("another version or pack")
    if (data["processors"], data["device"]) != (usable_cores(), _device(pack)):
        raise ValueError("another machine, or another drive")
    found = Profile(**data["profile"])
    if type(found.readers) is not int or not 1 <= found.readers <= MAX_READERS:
        raise ValueError(f"{found.readers} readers")
    if found.io not in (None, "direct", "buffered") or type(found.prefetch) is not bool:
        raise ValueError(f"{found.io}, {found.prefetch}")
    if found.threads is not None and (type(found.threads) is not int or not 1 <= found.threads <= data["processors"]):
        raise ValueError(f"{found.threads} threads")
    return found
