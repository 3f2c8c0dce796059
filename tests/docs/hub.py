"""The hub of the pages: on this machine, with the checkpoint that they speak of, and room for what they push."""

from __future__ import annotations

import contextlib
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.docs.place import checkpoint
from tests.http_server import Request, Server
from tests.hub.stand_in import Hub, HubHandler


class OwnersHandler(HubHandler):
    """The stand-in has the repositories of ``org``: here all owners are that one."""

    def route(self, request: Request) -> None:
        request.path = re.sub(r"^(/api/models)?/(?!api/|store/)[^/]+/", r"\1/org/", request.path)
        super().route(request)

    def create(self, asked: dict[str, Any]) -> None:
        super().create(asked | {"organization": "org"})


@contextlib.contextmanager
def hub() -> Iterator[dict[str, str]]:
    """The environment in which huggingface_hub finds it."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder) / "model")
        site = Hub(Path(folder))
        site.put("org/Qwen3-30B-A3B", Path(folder) / "model")
    server = Server(("127.0.0.1", 0), type("Bound", (OwnersHandler,), {"site": site}))
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield {"HF_ENDPOINT": site.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    finally:
        server.shutdown()
        server.server_close()
