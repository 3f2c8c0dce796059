"""A web server for the tests that speaks ranges, counts what it sends, and misbehaves on order.

It can also be a hub: the interface that huggingface_hub asks, files behind redirects to signed addresses that expire.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Request:
    """What was asked for: ``first`` and ``last`` are bytes; ``number`` counts the requests for data of shards."""

    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    first: int = 0
    last: int = 0
    number: int = 0

    @property
    def name(self) -> str:
        return unquote(self.path).rpartition("/")[2]


Fault = Callable[["Handler", Request, bytes], bool]
"""Answers a request itself and returns True, or leaves it alone. The bytes are those of the whole file."""


@dataclass
class Site:
    """The folder that is served; ``sent``: (file, first byte, bytes) of each body as far as it was sent."""

    folder: Path
    fault: Fault | None = None
    token: str | None = None
    gated: bool = False
    commit: str = COMMIT
    uses: int | None = None
    used: dict[str, int] = field(default_factory=dict)
    linked: str | None = None
    sent: list[tuple[str, int, int]] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    data: int = 0
    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    limit: float = 0.0

    def content(self, name: str) -> bytes | None:
        if name not in self.files:
            path = self.folder / name
            if not path.is_file():
                return None
            self.files[name] = path.read_bytes()
        return self.files[name]

    def expired(self, signature: str) -> bool:
        """Counts a use of an address, of which each is good for ``uses``."""
        with self.lock:
            self.used[signature] = self.used.get(signature, 0) + 1
            return self.uses is not None and self.used[signature] > self.uses

    def bytes_of(self, suffix: str = ".safetensors") -> int:
        return sum(count for name, _, count in self.sent if name.endswith(suffix))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        request = Request(parts.path, parse_qs(parts.query), {k.lower(): v for k, v in self.headers.items()})
        with self.site.lock:
            self.site.requests.append(request)
        try:
            self.route(request)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def route(self, request: Request) -> None:
        self.send_file(request)

    def send_file(self, request: Request) -> None:
        site = self.site
        content = site.content(request.name)
        if content is None:
            self.answer(404)
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
        request.first, request.last = (int(found[1]), int(found[2])) if found else (0, len(content) - 1)
        is_data = request.name.endswith(".safetensors") and request.last - request.first > 7
        with site.lock:
            site.data += is_data
            request.number = site.data if is_data else 0
        if site.fault is not None and site.fault(self, request, content):
            return
        if request.first >= len(content):
            self.answer(416, {"Content-Range": f"bytes */{len(content)}"})
            return
        self.part(request, content)

    def part(
        self,
        request: Request,
        content: bytes,
        *,
        shift: int = 0,
        stop: int | None = None,
        length: int | None = None,
        headers: dict[str, str] | None = None,
        pace: Callable[[int], None] | None = None,
    ) -> None:
        """A 206, as it should be or with changes: another range, a body that ends early, another length."""
        last = min(request.last, len(content) - 1)
        body = content[request.first : last + 1]
        self.send_response(206)
        self.send_header("ETag", tag_of(content))
        self.send_header("Content-Range", f"bytes {request.first + shift}-{last + shift}/{len(content)}")
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        body = body[:stop]
        for at in range(0, len(body), 2**16):
            if self.site.limit:
                time.sleep(min(2**16, len(body) - at) / self.site.limit)
            if pace:
                pace(at)
            self.wfile.write(body[at : at + 2**16])
        self.sent(request, len(body))
        if stop is not None or length is not None:
            self.close_connection = True

    def sent(self, request: Request, count: int) -> None:
        with self.site.lock:
            self.site.sent.append((request.name, request.first, count))

    def whole(self, request: Request, content: bytes, headers: dict[str, str] | None = None) -> None:
        """A 200 with all of the file."""
        self.answer(200, {"ETag": tag_of(content), **(headers or {})}, content)
        self.sent(request, len(content))

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class HubHandler(Handler):
    """As huggingface_hub and a hub speak with each other; shards lie elsewhere, behind signed addresses."""

    def route(self, request: Request) -> None:
        site = self.site
        if request.path.startswith("/cdn/"):
            if "authorization" in request.headers:
                self.answer(400, body=b"a token for strangers")
            elif site.expired(request.query["signature"][0]):
                self.answer(403)
            else:
                self.send_file(request)
            return
        found = re.fullmatch(r"/(api/models/)?(org/[^/]+)(?:/(?:revision|resolve)/([^/]+))?(/.*)?", request.path)
        if found is None or found[2] != "org/model":
            self.answer(401 if site.token else 404, {"X-Error-Code": "RepoNotFound"})
            return
        if site.gated:
            self.answer(403, {"X-Error-Code": "GatedRepo"})
            return
        if site.token and request.headers.get("authorization") != f"Bearer {site.token}":
            self.answer(401, {"X-Error-Code": "RepoNotFound"})
            return
        if unquote(found[3] or "main") not in ("main", "refs/pr/1", COMMIT, site.commit):
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
            return
        if found[1]:
            if site.fault is None or not site.fault(self, request, b""):
                self.answer(200, {"Content-Type": "application/json"}, json.dumps(self.info(found[3])).encode())
            return
        content = site.content(request.name)
        if content is None or not request.name.endswith(".safetensors"):
            self.send_file(request)
            return
        headers = {
            "Location": f"{site.url.replace('127.0.0.1', 'localhost')}/cdn/{request.name}?signature=secret-"
            f"{uuid.uuid4()}",
            "X-Repo-Commit": site.commit,
            "X-Linked-Etag": f'"{site.linked or hashlib.sha256(content).hexdigest()}"',
            "X-Linked-Size": str(len(content)),
        }
        self.answer(302, headers)

    def info(self, revision: str | None) -> dict[str, Any]:
        files = []
        for path in sorted(p for p in self.site.folder.iterdir() if p.is_file()):
            content = self.site.content(path.name) or b""
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry: dict[str, Any] = {"rfilename": path.name, "size": len(content), "blobId": blob}
            if path.suffix == ".safetensors":
                entry["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 134}
            files.append(entry)
        for other in ("original/params.json", "tokenizer\0.json"):  # neither is a file of the checkpoint
            files.append({"rfilename": other, "size": 3, "blobId": "0" * 40})
        commit = revision if revision in (COMMIT, self.site.commit) else self.site.commit
        return {"_id": "1", "id": "org/model", "modelId": "org/model", "sha": commit, "siblings": files}


def tag_of(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that went away


def serve(folder: Path, hub: bool = False) -> tuple[Site, Server]:
    """A server on a port of its own; shut it down when done."""
    site = Site(folder)
    handler = type("Bound", (HubHandler if hub else Handler,), {"site": site})
    server = Server(("127.0.0.1", 0), handler)
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return site, server


if __name__ == "__main__":
    import sys

    served, running = serve(Path(sys.argv[1]), "--hub" in sys.argv)
    sys.stdout.write(served.url + "\n")
    sys.stdout.flush()
    threading.Event().wait()
