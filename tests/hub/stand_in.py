"""A hub on this machine: what huggingface_hub asks of one when it makes, fills, describes and reads a repository.

It is as the client sees it, and no more: commits are whole trees, large files go the way of LFS (``basic`` transfers,
addresses of their own for upload and download), small ones into the commit. There is no Xet, which real hubs prefer.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.http_server import Handler, Request, Server, Site, tag_of

TOKEN = "hf_secret"
LARGE = 20_000
"""Bytes from which on a file is LFS, and by suffix .safetensors."""


@dataclass
class Hub(Site):
    """``refs``: (repository, branch) -> commit. ``commits``: path -> content. ``stored``: LFS objects by SHA-256.
    ``log``: method and path of each request. ``failing``: method and a part of the path that are answered with 503."""

    refs: dict[tuple[str, str], str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    log: list[tuple[str, str]] = field(default_factory=list)
    failing: tuple[str, str, int] | None = None
    uploads: int = 10**9

    def record(self, repo: str, branch: str, tree: dict[str, bytes]) -> str:
        content = json.dumps([repo, branch, len(self.commits), sorted((p, tag_of(c)) for p, c in tree.items())])
        name = hashlib.sha1(content.encode()).hexdigest()
        self.commits[name] = tree
        self.refs[repo, branch] = name
        return name

    def tree(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """The files there are now."""
        return self.commits[self.refs[repo, branch]]

    def put(self, repo: str, folder: Path, branch: str = "main", **others: bytes) -> str:
        """Have a repository hold the files below ``folder``."""
        paths = [p for p in folder.rglob("*") if p.is_file()]
        return self.record(repo, branch, {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths} | others)


def is_large(path: str, content: bytes) -> bool:
    return path.endswith(".safetensors") or len(content) >= LARGE


def git_name(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubHandler(Handler):
    site: Hub

    def do_GET(self) -> None:
        self.begin()

    do_HEAD = do_POST = do_PUT = do_GET

    def begin(self) -> None:
        parts = urlsplit(self.path)
        request = Request(parts.path, parse_qs(parts.query), {k.lower(): v for k, v in self.headers.items()})
        length = int(request.headers.get("content-length", 0))
        self.body = self.rfile.read(length) if length else self.chunked(request)
        with self.site.lock:
            self.site.requests.append(request)
            self.site.log.append((self.command, parts.path))
        try:
            failing = self.site.failing
            if failing and self.command == failing[0] and failing[1] in parts.path:
                self.answer(failing[2])
            else:
                self.route(request)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def chunked(self, request: Request) -> bytes:
        body = b""
        if request.headers.get("transfer-encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def json(self, value: Any, status: int = 200) -> None:
        self.answer(status, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def route(self, request: Request) -> None:
        site, path = self.site, request.path
        if path.startswith("/store/"):
            self.store(request)
            return
        if site.token and request.headers.get("authorization") != f"Bearer {site.token}":
            writes = self.command in ("POST", "PUT")
            self.answer(401, {} if writes else {"X-Error-Code": "RepoNotFound"})
            return
        if path == "/api/validate-yaml":
            self.json({"warnings": [], "errors": []})
        elif path == "/api/repos/create":
            self.create(json.loads(self.body))
        elif found := re.fullmatch(r"/(org/[^/]+)\.git/info/lfs/objects/batch", path):
            self.batch(json.loads(self.body)["objects"])
        elif found := re.fullmatch(r"/api/models/(org/[^/]+)/tree/([^/]+)(?:/(.+))?", path):
            self.listing(found[1], unquote(found[2]), unquote(found[3] or ""))
        elif found := re.fullmatch(r"/api/models/(org/[^/]+)(?:/([\w-]+)/([^/]+))?", path):
            self.api(found[1], found[2] or "revision", unquote(found[3] or "main"))
        elif found := re.fullmatch(r"/(org/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(request, found[1], unquote(found[2]), unquote(found[3]))
        else:
            self.answer(404, {"X-Error-Code": "RepoNotFound"})

    def create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        if (repo, "main") in self.site.refs:
            self.json({"error": "there already", "url": f"{self.site.url}/{repo}"}, 409)
            return
        if asked.get("visibility") == "private":
            self.site.private.add(repo)
        self.site.record(repo, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.json({"url": f"{self.site.url}/{repo}", "name": repo, "id": "1"})

    def api(self, repo: str, what: str, revision: str) -> None:
        site = self.site
        if (repo, "main") not in site.refs:
            self.answer(404, {"X-Error-Code": "RepoNotFound"})
            return
        if what == "branch":
            known = (repo, revision) in site.refs
            site.refs.setdefault((repo, revision), site.refs[repo, "main"])
            self.json({}, 409 if known else 200)
            return
        commit = site.refs.get((repo, revision), revision)
        if commit not in site.commits:
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
            return
        tree = site.commits[commit]
        if what == "revision":
            self.json({"_id": "1", "id": repo, "modelId": repo, "sha": commit, "siblings": [*map(entry, tree.items())]})
        elif what == "preupload":
            self.json({"files": [self.mode(f, tree) for f in json.loads(self.body)["files"]]})
        elif what == "commit":
            lines = [json.loads(line) for line in self.body.splitlines()]
            self.committed(repo, revision, dict(tree), lines)
        else:
            self.answer(404)

    def listing(self, repo: str, revision: str, folder: str) -> None:
        """Files and folders of one folder."""
        tree = self.site.commits.get(self.site.refs.get((repo, revision), revision), {})
        inside = {p: c for p, c in tree.items() if p.startswith(f"{folder}/" if folder else "")}
        depth = folder.count("/") + 1 if folder else 0
        folders = sorted({"/".join(p.split("/")[: depth + 1]) for p in inside if p.count("/") > depth})
        found = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders]
        self.json([*found, *(described(p, c) for p, c in inside.items() if p.count("/") == depth)])

    def mode(self, asked: dict[str, Any], tree: dict[str, bytes]) -> dict[str, Any]:
        path = asked["path"]
        large = path.endswith(".safetensors") or asked["size"] >= LARGE
        found = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if path in tree:
            found["oid"] = hashlib.sha256(tree[path]).hexdigest() if large else git_name(tree[path])
        return found

    def committed(self, repo: str, branch: str, tree: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.site.stored:
                    self.json({"error": "LFS pointer to an object that is not there"}, 400)
                    return
                tree[value["path"]] = self.site.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        name = self.site.record(repo, branch, tree)
        self.json({"commitUrl": f"{self.site.url}/{repo}/commit/{name}", "commitOid": name})

    def batch(self, objects: list[dict[str, Any]]) -> None:
        answers = []
        for one in objects:
            answers.append(dict(one))
            if one["oid"] not in self.site.stored:
                answers[-1]["actions"] = {"upload": {"href": f"{self.site.url}/store/{one['oid']}?signature=secret"}}
        self.json({"transfer": "basic", "objects": answers})

    def store(self, request: Request) -> None:
        """The store of large files, which wants a signature and no token."""
        site = self.site
        if "authorization" in request.headers or request.query.get("signature") != ["secret"]:
            self.answer(400)
        elif self.command == "PUT":
            if site.uploads <= 0:
                self.answer(403)
                return
            site.uploads -= 1
            assert hashlib.sha256(self.body).hexdigest() == request.name
            site.stored[request.name] = self.body
            self.answer(200)
        else:
            self.content(request, site.files[request.name])

    def resolve(self, request: Request, repo: str, revision: str, path: str) -> None:
        commit = self.site.refs.get((repo, revision), revision)
        content = self.site.commits.get(commit, {}).get(path)
        if content is None:
            self.answer(404, {"X-Error-Code": "EntryNotFound"})
        elif is_large(path, content):
            name = hashlib.sha256(content).hexdigest()
            self.site.files[name] = content
            headers = {
                "Location": f"{self.site.url.replace('127.0.0.1', 'localhost')}/store/{name}?signature=secret",
                "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{name}"',
                "X-Linked-Size": str(len(content)),
            }
            self.answer(302, headers)
        else:
            self.content(request, content, {"X-Repo-Commit": commit, "ETag": f'"{git_name(content)}"'})

    def content(self, request: Request, content: bytes, headers: dict[str, str] | None = None) -> None:
        """A file, or the range of it that is asked for; bytes X-Y and X-."""
        if self.command == "HEAD":
            self.send_response(200)
            for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
                self.send_header(key, value)
            self.end_headers()
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        request.first = int(found[1]) if found else 0
        request.last = int(found[2]) if found and found[2] else len(content) - 1
        if self.site.fault is not None and self.site.fault(self, request, content):
            return
        if found:
            self.part(request, content, headers={k: v for k, v in (headers or {}).items() if k != "ETag"})
        else:
            self.whole(request, content, headers)


def entry(item: tuple[str, bytes]) -> dict[str, Any]:
    path, content = item
    found: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": git_name(content)}
    if is_large(path, content):
        found["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 134}
    return found


def described(path: str, content: bytes) -> dict[str, Any]:
    """The same where single paths are asked for."""
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_name(content)}
    if is_large(path, content):
        found["lfs"] = {"size": len(content), "oid": hashlib.sha256(content).hexdigest(), "pointerSize": 134}
    return found


def serve_hub(folder: Path) -> tuple[Hub, Server]:
    """On a port of its own; shut it down when done."""
    hub = Hub(folder)
    server = Server(("127.0.0.1", 0), type("Bound", (HubHandler,), {"site": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return hub, server
