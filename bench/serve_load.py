"""200 mixed requests against a server in this process, a third of them malformed, oversized, aborted or slow.

python bench/serve_load.py PACK
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import socket
import threading
import time
from collections import Counter

from flashpack.runtime.memory import usage
from flashpack.runtime.sampling import Sampling
from flashpack.runtime.session import Session
from flashpack.server.guard import Limits
from flashpack.server.serving import Service, bound, hosts_of

TEXTS = ["Hi", "What is 922 plus 291?", "Tell me of rain.", "Set an alarm for 18:00 Monday.", "Translate see you."]
CHAT = "/v1/chat/completions"


def body_of(text: str, **how: object) -> bytes:
    message = {"role": "user", "content": text}
    return json.dumps({"messages": [message], "max_tokens": 24, "temperature": 0, **how}).encode()


def send(port: int, data: bytes, pause: float = 0, keep: bool = True) -> bytes:
    """The answer; in two halves with a pause between, or left after the first piece of it."""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as link:
        half = len(data) // 2 if pause else len(data)
        link.sendall(data[:half])
        if pause:
            time.sleep(pause)
            link.sendall(data[half:])
        if not keep:
            return link.recv(10)
        return b"".join(iter(lambda: link.recv(65536), b""))


def request(body: bytes) -> bytes:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def one(port: int, i: int, right: dict[str, str], seen: Counter[str]) -> None:
    bad = ("malformed", "oversized", "aborted", "slow")
    kind = ("plain", "stream", bad[i // 3 % 4])[i % 3]
    text = TEXTS[i % len(TEXTS)]
    for _ in range(200):
        if kind == "malformed":
            answer = send(port, request(b'{"messages": [' * 50))
        elif kind == "oversized":
            answer = send(port, request(b" " * 150_000))
        elif kind == "aborted":
            send(port, request(body_of(text, stream=True, max_tokens=500)), keep=False)
            seen[kind] += 1
            return
        else:
            data = request(body_of(text, stream=kind == "stream"))
            answer = send(port, data, 1.0 if kind == "slow" else 0)
        status = answer[9:12].decode()
        seen[f"{kind} {status}"] += 1
        if status != "429":
            break
        time.sleep(random.uniform(0.1, 0.5))
    if kind in ("plain", "slow", "stream") and status == "200":
        payload = answer.split(b"\r\n\r\n", 1)[1]
        if kind == "stream":
            lines = [x[6:] for x in payload.decode().split("\n") if x.startswith("data: {")]
            got = "".join(json.loads(x)["choices"][0]["delta"].get("content") or "" for x in lines)
        else:
            got = json.loads(payload)["choices"][0]["message"]["content"]
        seen["right" if got == right[text] else "WRONG"] += 1


def load(port: int, right: dict[str, str], count: int, service: Service) -> tuple[Counter[str], int, int]:
    seen: Counter[str] = Counter()
    numbers = iter(range(count))
    lock, longest = threading.Lock(), 0

    def client() -> None:
        nonlocal longest
        while True:
            with lock:
                i = next(numbers, None)
            if i is None:
                return
            try:
                one(port, i, right, seen)
            except OSError as e:
                seen[f"{type(e).__name__}"] += 1
            longest = max(longest, service.worker.waiting())

    clients = [threading.Thread(target=client, daemon=True) for _ in range(16)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(240)
    return seen, longest, sum(thread.is_alive() for thread in clients)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pack")
    parser.add_argument("--requests", type=int, default=200)
    options = parser.parse_args()
    session = Session(options.pack, saved=20_000_000, context=2048, memory="smallest")
    right = {}
    for text in TEXTS:
        message = {"role": "user", "content": text}
        right[text] = session.answer([message], sampling=Sampling(), max_tokens=24)[0].content
    listening = bound("127.0.0.1", 0)
    service = Service(session, listening, Limits(100_000, hosts=hosts_of("127.0.0.1", ())), 4)
    port = listening.getsockname()[1]
    thread = threading.Thread(target=service.serve_all)
    thread.start()
    while not service.started:
        time.sleep(0.01)
    for name in ("warm-up", "measured"):
        gc.collect()
        before = usage().anonymous, len(os.listdir("/proc/self/fd"))
        begun = time.monotonic()
        seen, longest, hung = load(port, right, options.requests, service)
        while service.worker.busy() or service.worker.waiting():
            time.sleep(0.05)
        time.sleep(1)
        gc.collect()
        after = usage().anonymous, len(os.listdir("/proc/self/fd"))
        print(f"{name}: {options.requests} requests in {time.monotonic() - begun:.1f} s; {dict(sorted(seen.items()))}")
        print(f"  memory {before[0] / 1e6:.1f} -> {after[0] / 1e6:.1f} MB, descriptors {before[1]} -> {after[1]}, "
              f"hung clients {hung}, longest queue seen {longest} of 4")  # fmt: skip
    service.stop()
    thread.join()


if __name__ == "__main__":
    main()
