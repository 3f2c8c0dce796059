"""Work units in other processes, on this machine or others, through any ``concurrent.futures.Executor``.

Each worker reads the source's headers and makes the plan itself, so little is sent: where to read, where to write, and
what the conversion must be of. All write to the same folder, which they share. A worker that is lost, or thought lost,
does no harm: its unfinished file has a name of its own, and a finished one is the same file whoever made it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import uuid
from collections.abc import Generator, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashpack.converter.folder import pinned
from flashpack.converter.options import Options
from flashpack.converter.plan import Plan
from flashpack.converter.source import differences
from flashpack.converter.units import Outcome, Site, write
from flashpack.errors import FlashpackError, OutputError, SourceError, UnsupportedError, UsageError
from flashpack.formats import constants as C


@dataclass(frozen=True)
class Job:
    """A conversion as a worker needs to know it: source, options, the pack's folder (both as every worker sees them),
    and the first line of its journal as JSON text."""

    src: str
    options: Options
    out: str
    start: str

    def check(self) -> None:
        """Raise ``OutputError`` if the conversion in the folder is not, or no longer, this one."""
        try:
            with open(Path(self.out) / C.JOURNAL, "rb") as f:
                begun = json.loads(f.readline())
        except (OSError, ValueError) as e:
            raise OutputError(f"{self.out}: no unfinished conversion here, as this worker sees the folder") from e
        if begun != json.loads(self.start):
            raise OutputError(f"{self.out}: another conversion has begun here")


@dataclass(frozen=True)
class Elsewhere:
    """An executor and what its workers work on."""

    executor: Executor
    job: Job


def run(job: Job, path: str) -> Outcome:
    """Make the file ``path`` of the pack, in a worker."""
    job.check()
    plan = _plan(job)
    site = Site(Path(job.out), plan.checkpoint.folder, lambda count: None, job.check, token=uuid.uuid4().hex[:12])
    return write(plan, path, site)


@functools.lru_cache(maxsize=1)
def _plan(job: Job) -> Plan:
    # The plan's makers import this module.
    from flashpack.converter.allocation import Allocation
    from flashpack.converter.convert import bound, start

    expected: dict[str, Any] = json.loads(job.start)
    source = bound(pinned(job.src, expected["origin"]))
    made = source.plan(job.options)
    if job.options.bpw:
        made = source.plan(job.options, Allocation.read(Path(job.out), made))
    found = json.loads(json.dumps(start(made)))
    if found != expected:
        raise SourceError(f"{job.src}: a worker has another {', '.join(differences(expected, found)[:3])}")
    return made


@contextlib.contextmanager
def lost_workers(path: str) -> Iterator[None]:
    """Say in one line that the workers of an executor are lost, and how to go on."""
    try:
        yield
    except FlashpackError:
        raise
    except Exception as e:
        # Dask cancels what is waited for when its scheduler is lost.
        if isinstance(e, (BrokenExecutor, CancelledError)) or type(e).__module__.startswith("distributed."):
            why = " ".join(str(e).split())[:200] or type(e).__name__
            raise OutputError(f"{path}: its workers were lost ({why}); run the same command again to continue") from e
        raise


@contextlib.contextmanager
def scheduler(address: str) -> Generator[Executor]:
    """The workers of a Dask cluster, by the address of its scheduler (``tcp://host:8786``)."""
    try:
        from distributed import Client
    except ImportError as e:
        raise UnsupportedError("--scheduler needs the extra 'cluster': pip install 'flashpack-moe[cluster]'") from e
    if not re.match(r"\w+://.", address):
        raise UsageError(f"--scheduler {address}: not an address such as tcp://HOST:8786")
    try:
        client: Any = Client(address, timeout="10s", set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as e:
        raise UsageError(f"--scheduler {address}: no Dask scheduler answers there") from e
    with client:
        yield client.get_executor(pure=False)
