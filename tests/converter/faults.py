"""What servers do wrong, and what becomes of the conversion: docs/streaming.md shows the list, the tests prove it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.http_server import Fault, Handler, Request, tag_of


@dataclass(frozen=True)
class Case:
    """``server``: what it does; ``fault``: how. ``refused``: the message that ends the conversion, as a pattern;
    without one the pack is byte for byte that of the local folder."""

    server: str
    fault: Fault
    outcome: str
    refused: str = ""


RETRIED = "asked again; same pack"
CONTINUED = "continued at the byte where it stopped; same pack"
TAKEN = "the part is taken from the whole; same pack"
CHANGED = "refused as changed during the conversion"


def first(count: int, fault: Fault) -> Fault:
    """The fault in the first ``count`` requests for data."""
    return lambda handler, request, content: request.number in range(1, count + 1) and fault(handler, request, content)


def third(fault: Fault) -> Fault:
    """The fault from the third request for data on."""
    return lambda handler, request, content: request.number > 2 and fault(handler, request, content)


def data(fault: Fault) -> Fault:
    return lambda handler, request, content: request.number > 0 and fault(handler, request, content)


def status(code: int, headers: dict[str, str] | None = None) -> Fault:
    def fault(handler: Handler, request: Request, content: bytes) -> bool:
        handler.answer(code, headers)
        return True

    return fault


def part(**changes: object) -> Fault:
    def fault(handler: Handler, request: Request, content: bytes) -> bool:
        handler.part(request, content, **changes)  # type: ignore[arg-type]
        return True

    return fault


def drop_in_body(handler: Handler, request: Request, content: bytes) -> bool:
    handler.part(request, content, stop=(request.last - request.first) // 2 + 1)
    return True


def hang_up(handler: Handler, request: Request, content: bytes) -> bool:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True
    return True


def half_an_answer(handler: Handler, request: Request, content: bytes) -> bool:
    handler.wfile.write(b"HTTP/1.1 206 Partial Con")
    return hang_up(handler, request, content)


def other_length(by: int) -> Fault:
    def fault(handler: Handler, request: Request, content: bytes) -> bool:
        handler.part(request, content, length=request.last + 1 - request.first + by)
        return True

    return fault


def more_than_asked(handler: Handler, request: Request, content: bytes) -> bool:
    body = content[request.first : request.last + 1] + b"more"
    handler.send_response(206)
    handler.send_header("ETag", tag_of(content))
    handler.send_header("Content-Range", f"bytes {request.first}-{request.last}/{len(content)}")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
    return True


def less_than_asked(handler: Handler, request: Request, content: bytes) -> bool:
    request.last -= (request.last - request.first) // 2
    handler.part(request, content)
    return True


def stall(handler: Handler, request: Request, content: bytes) -> bool:
    time.sleep(1.0)
    return hang_up(handler, request, content)


def trickle(handler: Handler, request: Request, content: bytes) -> bool:
    handler.part(request, content, stop=1)
    try:
        for at in range(request.first + 1, request.first + 40):
            time.sleep(0.05)
            handler.wfile.write(content[at : at + 1])
    except OSError:
        pass  # it was cut off, as it should be
    return True


def changed(change: Callable[[bytes], bytes]) -> Fault:
    def fault(handler: Handler, request: Request, content: bytes) -> bool:
        content = change(content)
        if request.first >= len(content):
            handler.answer(416, {"Content-Range": f"bytes */{len(content)}"})
        else:
            handler.part(request, content)
        return True

    return fault


def whole(handler: Handler, request: Request, content: bytes) -> bool:
    handler.whole(request, content)
    return True


def zipped(handler: Handler, request: Request, content: bytes) -> bool:
    handler.part(request, content, headers={"Content-Encoding": "gzip"})
    return True


def no_tag(handler: Handler, request: Request, content: bytes) -> bool:
    body = content[request.first : request.last + 1]
    handler.answer(206, {"Content-Range": f"bytes {request.first}-{request.last}/{len(content)}"}, body)
    return True


def no_range(handler: Handler, request: Request, content: bytes) -> bool:
    handler.answer(206, {"ETag": tag_of(content)}, content[request.first : request.last + 1])
    return True


def redirect(to: str) -> Fault:
    return status(302, {"Location": to})


SHARD = r"model-0000\d-of-0000\d.safetensors: "
GIVEN_UP = rf"{SHARD}reading at byte \d+: the server answers 503 \(4 failures in a row\); run the same command again"

CASES = {
    "drop": Case("drops the connection in the body", first(5, drop_in_body), CONTINUED),
    "hang-up": Case("drops the connection before it answers", first(3, hang_up), RETRIED),
    "half-head": Case("drops the connection in the headers", first(3, half_an_answer), RETRIED),
    "429": Case("429 with Retry-After: 1", first(1, status(429, {"Retry-After": "1"})), "waits as told; same pack"),
    "408": Case("408", first(2, status(408)), RETRIED),
    "500": Case("500", first(3, status(500)), RETRIED),
    "502": Case("502", first(3, status(502)), RETRIED),
    "503": Case("503 once, with a Retry-After that is no time", first(1, status(503, {"Retry-After": "x"})), RETRIED),
    "503-ever": Case("503 for ever", third(status(503)), "given up after some attempts", GIVEN_UP),
    "retry-later": Case(
        "503 with a Retry-After of a day",
        third(status(503, {"Retry-After": "86400"})),
        "given up at once",
        rf"{SHARD}.*the server answers 503, and asks to wait 86400 s; run the same command again",
    ),
    "long-length": Case("Content-Length larger than the body", first(3, other_length(7)), RETRIED),
    "short-length": Case("Content-Length smaller than the body", first(3, other_length(-7)), RETRIED),
    "more": Case("sends more than was asked for", first(2, more_than_asked), RETRIED),
    "less": Case("sends the first half of the range", first(5, less_than_asked), CONTINUED),
    "stall": Case("does not answer", first(1, stall), RETRIED),
    "trickle": Case("sends a byte now and then", first(1, trickle), CONTINUED),
    "same-size": Case(
        "the file changes, its size does not", third(changed(lambda c: c[:-1] + bytes([c[-1] ^ 1]))), CHANGED,
        rf"{SHARD}changed during the conversion: tag .* -> ",
    ),
    "longer": Case("the file grows", third(changed(lambda c: c + b"x")), CHANGED, rf"{SHARD}changed.*: size \d+ -> "),
    "shorter": Case("the file shrinks", third(changed(lambda c: c[:9])), CHANGED, rf"{SHARD}changed.*: size \d+ -> 9"),
    "whole-small": Case("ignores ranges, the file is small (1 MiB)", data(whole), TAKEN),
    "whole": Case(
        "ignores ranges, the file is larger", data(whole), "refused", rf"{SHARD}the server ignores range requests"
    ),
    "shifted": Case("sends another range", data(part(shift=8)), "refused", rf"{SHARD}the server sends bytes \d+-\d+ "),
    "no-range": Case("206 without Content-Range", data(no_range), "refused", f"{SHARD}the server answers 206 with"),
    "gzip": Case("compresses on the way", data(zipped), "refused", rf"{SHARD}the server compresses the file"),
    "no-tag": Case(
        "neither ETag nor Last-Modified", no_tag, "refused", "neither ETag nor Last-Modified, so a change would not"
    ),
    "401": Case("401", data(status(401)), "refused", rf"{SHARD}access denied \(401\); check the address"),
    "403": Case("403", data(status(403)), "refused", rf"{SHARD}access denied \(403\); check the address"),
    "404": Case("404: a shard has gone", data(status(404)), "refused", rf"{SHARD}not found \(404\)"),
    "400": Case("another 4xx", data(status(400)), "refused at once", f"{SHARD}the server answers 400"),
    "loop": Case("redirects for ever", data(redirect("?again")), "refused", f"{SHARD}the server redirects for ever"),
    "astray": Case("redirects to file://", data(redirect("file:///etc/hosts")), "refused", f"{SHARD}.* from https"),
}  # fmt: skip


def table() -> str:
    """As docs/streaming.md has it."""
    rows = [f"| {case.server} | {case.outcome} |" for case in CASES.values()]
    return "\n".join(["| the server | the conversion |", "|---|---|", *rows])
