"""Ranges of files over HTTP: retried, continued where they stopped, and refused where they are not what was asked for.

What a server answers is never trusted further than it can be compared: the range, the size of the whole file and its
tag (ETag or time) must be those of the first answer. URLs may hold secrets (``?token=``, signatures), so no message
shows one: messages have ``RemoteFile.where``.
"""

from __future__ import annotations

import email.utils
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn
from urllib.parse import urljoin, urlsplit

import httpx2

from flashpack.converter.folder import Stopped, changed_error
from flashpack.errors import SourceError

CONNECTIONS = 8
"""Requests at once."""

WHOLE_BYTES = 2**20
"""A server that ignores ranges is put up with for files up to this size: they are sent whole."""

_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 5
_AGAIN = (408, 425, 429)
"""Refusals of a request that may succeed later; so may all 5xx but these:"""
_NEVER = (501, 505)


@dataclass(frozen=True)
class Policy:
    """How long to try. Times in seconds.

    ``first_attempts``: failures until a server that has never answered is given up. ``attempts``: failures in a row,
    without progress in between, until it is given up; progress is ``progress`` bytes or the rest. The wait doubles from
    ``first_wait`` to ``longest_wait``, each shortened at random by up to a half; a server's Retry-After comes first, if
    it is no longer than ``longest_retry_after``. ``connect`` and ``read`` are for each step; a body slower than
    ``slowest`` bytes in ``read`` seconds counts as cut off.
    """

    first_attempts: int = 4
    attempts: int = 10
    progress: int = 2**16
    first_wait: float = 0.5
    longest_wait: float = 30.0
    longest_retry_after: float = 900.0
    connect: float = 15.0
    read: float = 30.0
    slowest: int = 2**14


POLICY = Policy()


@dataclass
class RemoteFile:
    """A file of a source. ``where`` is shown, ``url`` never.

    ``size`` and ``tag`` are what every answer must agree with; None until known. ``linked``: what a hub that redirects
    must say the file is (its ETag); ``resolved``: where the last redirect led.
    """

    where: str
    url: str
    size: int | None = None
    tag: str | None = None
    linked: str | None = None
    resolved: str | None = None


class Missing(SourceError):
    """The server has no such file."""


class Denied(SourceError):
    """The server keeps the file from us."""


class _Again(Exception):
    """This answer will not do; the next may. ``wait``: seconds, where the server says so."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Attempts:
    """Counts failures of one piece of work and waits between them; ``stop`` ends a wait with ``Stopped``.

    ``answered`` is set as soon as the server has answered anything.
    """

    def __init__(self, what: str, policy: Policy, stop: list[threading.Event], answered: threading.Event) -> None:
        self._what, self._policy, self._stop, self._answered = what, policy, stop, answered
        self._failures = 0

    def succeeded(self) -> None:
        """There was progress."""
        self._failures = 0

    def failed(self, reason: str, wait: float | None = None) -> float:
        """Wait before the next attempt; the time waited. Raises ``SourceError`` after too many."""
        self._failures += 1
        policy = self._policy
        if wait is not None and wait > policy.longest_retry_after:
            self._give_up(f"{reason}, and asks to wait {wait:.0f} s")
        if self._failures >= (policy.attempts if self._answered.is_set() else policy.first_attempts):
            self._give_up(f"{reason} ({self._failures} failures in a row)")
        if wait is None:
            wait = min(policy.first_wait * 2 ** (self._failures - 1), policy.longest_wait)
            wait *= random.uniform(0.5, 1)
        pause(wait, self._stop)
        return wait

    def _give_up(self, why: str) -> NoReturn:
        raise SourceError(f"{self._what}: {why}; run the same command again to continue") from None


class Transfer:
    """A pool of connections. Every method may be called from any thread. ``headers`` go to the files' own host only."""

    def __init__(self, headers: dict[str, str], denied: str, policy: Policy | None = None) -> None:
        self.policy = policy or POLICY
        self.closed = threading.Event()
        self.answered = threading.Event()
        self._headers = headers
        self._denied = denied
        self._not_before = 0.0
        self._client = httpx2.Client(
            timeout=httpx2.Timeout(self.policy.read, connect=self.policy.connect, pool=None),
            limits=httpx2.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS),
            follow_redirects=False,
        )

    def close(self) -> None:
        """Close all connections."""
        self.closed.set()
        self._client.close()

    def probe(self, file: RemoteFile) -> None:
        """Ask for size and tag. Raises ``Missing`` or ``Denied`` for a file that is not to be had."""
        self._try(file, 0, memoryview(bytearray(1)), [self.closed], probing=True)

    def read_into(self, file: RemoteFile, offset: int, buffer: memoryview, stop: threading.Event | None = None) -> None:
        """Fill ``buffer`` from byte ``offset``; ``stop`` ends it with ``Stopped``."""
        self._try(file, offset, buffer, [self.closed, *([stop] if stop else [])])

    def _try(
        self, file: RemoteFile, offset: int, buffer: memoryview, stop: list[threading.Event], probing: bool = False
    ) -> None:
        done = paid = 0
        attempts = Attempts(f"{file.where}: reading at byte {offset}", self.policy, stop, self.answered)
        while done < len(buffer):
            pause(self._not_before - time.monotonic(), stop)
            wait = None
            try:
                for chunk in self._body(file, offset + done, offset + len(buffer), probing):
                    if done + len(chunk) > len(buffer):
                        raise _Again("the server sends more than was asked for")
                    buffer[done : done + len(chunk)] = chunk
                    done += len(chunk)
                    _check(stop)
                    if done == len(buffer):
                        return
                if probing and file.size == 0:
                    return
                reason = "the answer ends early"
            except httpx2.TransportError as e:
                reason = f"{_NAMES.get(type(e).__name__, 'the connection failed')}{_detail(e)}"
            except _Again as e:
                reason, wait = str(e), e.wait
            if done - paid >= self.policy.progress:
                attempts.succeeded()
                paid = done
            if wait:
                # What one request is told holds for all: the server counts them together.
                self._not_before = max(self._not_before, time.monotonic() + min(wait, self.policy.longest_retry_after))
            attempts.failed(reason, wait)

    def _body(self, file: RemoteFile, start: int, end: int, probing: bool) -> Iterator[bytes]:
        """The bytes [start, end) of one answer, as far as they come."""
        with self._open(file, start, end) as response:
            if response.status_code == 416 and probing and _total(response) == 0:
                self._agree(file, response, 0)
                return
            if probing and response.headers.get("content-type", "").startswith("text/html"):
                raise Missing(f"{file.where}: the server answers with a page, not with a file")
            skip = self._check_range(file, response, start, end)
            begun, come = time.monotonic(), 0
            for chunk in response.iter_raw():
                come += len(chunk)
                now = time.monotonic()
                if now - begun >= self.policy.read:
                    if come < self.policy.slowest:
                        raise _Again(f"only {come} bytes came in {self.policy.read:.0f} s")
                    begun, come = now, 0
                chunk, skip = chunk[skip:], max(0, skip - len(chunk))
                if response.status_code == 200:
                    chunk = chunk[: end - start]
                    start += len(chunk)
                if chunk:
                    yield chunk

    def _check_range(self, file: RemoteFile, response: httpx2.Response, start: int, end: int) -> int:
        """The answer must be what was asked for; returns how many of its first bytes were not."""
        status, headers = response.status_code, response.headers
        if headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise SourceError(
                f"{file.where}: the server compresses the file unasked ({headers['content-encoding'][:40]}); "
                f"download the checkpoint and convert the folder"
            )
        length = headers.get("content-length", "")
        if status == 200:
            if not length.isdecimal():
                raise SourceError(f"{file.where}: the server does not tell the size of the file")
            self._agree(file, response, int(length))
            if int(length) > WHOLE_BYTES and (start, end) != (0, int(length)):
                raise SourceError(
                    f"{file.where}: the server ignores range requests and sends all {int(length):,} bytes each time; "
                    f"download the checkpoint and convert the folder"
                )
            return start
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("content-range", ""))
        if status != 206 or not found:
            raise SourceError(
                f"{file.where}: the server answers {status} with the range "
                f"{headers.get('content-range', 'missing')[:60]!r} to a request for bytes {start}-{end - 1}"
            )
        first, last, total = map(int, found.groups())
        self._agree(file, response, total)
        if first != start or not start <= last < end:
            raise SourceError(
                f"{file.where}: the server sends bytes {first}-{last} instead of {start}-{end - 1}; "
                f"download the checkpoint and convert the folder"
            )
        if length and length != str(last + 1 - first):
            raise _Again(f"the server says that {last + 1 - first} bytes are {length[:20]}")
        return 0

    def _agree(self, file: RemoteFile, response: httpx2.Response, size: int) -> None:
        """Compare size and tag of this answer with those of the first."""
        tag = response.headers.get("etag") or response.headers.get("last-modified")
        if file.size is None:
            if tag is None:
                raise SourceError(
                    f"{file.where}: the server sends neither ETag nor Last-Modified, so a change would not be noticed; "
                    f"download the checkpoint and convert the folder"
                )
            file.tag = tag
            file.size = size
        if size != file.size:
            raise changed_error(file.where, f"size {file.size} -> {size}")
        if file.tag is not None and tag != file.tag:
            raise changed_error(file.where, f"tag {file.tag[:80]} -> {str(tag)[:80]}")

    @contextmanager
    def _open(self, file: RemoteFile, start: int, end: int) -> Iterator[httpx2.Response]:
        """The answer to a request for [start, end) that is 200 or 206 (or 416 where that says the file is empty)."""
        known = file.resolved
        url = known or file.url
        for _ in range(_MOST_REDIRECTS):
            headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
            if _origin(url) == _origin(file.url):
                headers |= self._headers
            try:
                request = self._client.build_request("GET", url, headers=headers)
            except httpx2.InvalidURL:
                raise SourceError(f"{file.where}: the server leads to an address that is none") from None
            response = self._client.send(request, stream=True)
            self.answered.set()
            try:
                if response.status_code in _REDIRECTS:
                    url = self._follow(file, url, response)
                    continue
                if response.status_code in (200, 206) or (response.status_code == 416 and _total(response) == 0):
                    if url != file.url:
                        file.resolved = url
                    yield response
                    return
                status = response.status_code
                if known is not None and 400 <= status < 500 and status not in _AGAIN:
                    # The address was good once: it was signed, and has expired.
                    file.resolved = None
                    raise _Again(f"the address that the server led to has expired ({status})", 0)
                if url != file.url and status in (401, 403):  # it may have expired on the way
                    raise _Again(f"access denied where the server leads to ({status})")
                self._refuse(file, response)
            finally:
                response.close()
        raise SourceError(f"{file.where}: the server redirects for ever")

    def _follow(self, file: RemoteFile, url: str, response: httpx2.Response) -> str:
        """Where a redirect leads."""
        headers = response.headers
        tag, size = headers.get("x-linked-etag"), headers.get("x-linked-size")
        tag = tag and tag.removeprefix("W/").strip('"')
        if file.linked is not None and tag is not None and tag != file.linked:
            raise changed_error(file.where, f"hash {file.linked[:80]} -> {tag[:80]}")
        if file.size is not None and size is not None and size != str(file.size):
            raise changed_error(file.where, f"size {file.size} -> {size[:20]}")
        to = urljoin(url, headers.get("location", ""))
        if urlsplit(to).scheme not in ("https", urlsplit(url).scheme):
            raise SourceError(f"{file.where}: the server leads away from https; not followed")
        if headers.get("content-length", "x").isdecimal() and int(headers["content-length"]) <= 2**16:
            response.read()  # so that the connection can be used again
        return to

    def _refuse(self, file: RemoteFile, response: httpx2.Response) -> NoReturn:
        status = response.status_code
        if status in _AGAIN or (status >= 500 and status not in _NEVER):
            raise _Again(f"the server answers {status}", retry_after(response.headers.get("retry-after")))
        if status in (404, 410):
            raise Missing(f"{file.where}: not found ({status})")
        if status in (401, 403):
            raise Denied(f"{file.where}: access denied ({status}); {self._denied}")
        if status == 416 and file.size is not None:
            raise changed_error(file.where, f"size {file.size} -> {_total(response)}")
        raise SourceError(f"{file.where}: the server answers {status}")


_NAMES = {
    "ConnectTimeout": "no connection in time",
    "ConnectError": "no connection",
    "ReadTimeout": "no answer in time",
    "RemoteProtocolError": "the connection was cut off",
    "ReadError": "the connection was cut off",
}


def _detail(error: httpx2.TransportError) -> str:
    text = re.sub(r"\S+://\S+", "...", str(error))[:120]
    return f": {text}" if text else ""


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _total(response: httpx2.Response) -> int | None:
    """The size of the whole file that a 416 tells."""
    found = re.fullmatch(r"bytes \*/(\d+)", response.headers.get("content-range", ""))
    return int(found[1]) if found else None


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number or a date; None if it is neither."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def pause(seconds: float, stop: list[threading.Event]) -> None:
    """Wait, but no longer than until one of ``stop`` is set, and then raise ``Stopped``."""
    end = time.monotonic() + seconds
    while True:
        _check(stop)
        left = end - time.monotonic()
        if left <= 0:
            return
        stop[-1].wait(min(left, 0.1))


def _check(stop: list[threading.Event]) -> None:
    if any(event.is_set() for event in stop):
        raise Stopped
