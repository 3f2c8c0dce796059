"""What the bench scripts measure, each function in a process of its own: ``common.part`` runs it and reads its answer.

    python bench/parts.py speed '{"pack": "PACK", "memory": 2500000000}'

Tokens are random, so routing is nearly uniform and no cache policy can do better than chance; with a trace
(``routing.Trace``) it is that of a trained model.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import drop_cache
from passes import convert, verify
from split import split

from flashpack.formats import Pack
from flashpack.performance.replay import Burst, Replay, largest_record, replay_bytes

if TYPE_CHECKING:
    from flashpack.runtime.load import Runtime

WARM_TOKENS = 4
"""Decoded before anything is timed."""


class Again(Replay):
    """Not from the page cache: a pack that is read through it is dropped from it before every run."""

    def __init__(self, folder: Path, direct: bool) -> None:
        super().__init__(Pack(folder), direct)
        self._dropped = None if direct else folder

    def run(self, bursts: Iterable[Burst]) -> list[float]:
        if self._dropped:
            drop_cache(self._dropped)
        return super().run(bursts)


class Session:
    """A loaded model that is fed random tokens; ``trace``: a file of recorded routing to follow."""

    def __init__(self, pack: str, memory: int | None, context: int, trace: str | None = None) -> None:
        import torch
        from replay import ReadLog

        import flashpack

        self.pack = Path(pack)
        self.log = ReadLog()
        model: Any = flashpack.load(self.pack, memory=memory, context=context)
        self.model = model
        runtime: Runtime = model.flashpack
        self.runtime = runtime
        self.store = runtime.store
        self.trace = None
        if trace is not None:
            from routing import Trace

            self.trace = Trace(trace, model)
        self._torch = torch
        self._generator = torch.Generator().manual_seed(0)
        self._context = context
        self._cache: Any = None

    def feed(self, tokens: int) -> float:
        """Seconds for the next ``tokens`` random tokens at once; a full context is begun anew."""
        torch = self._torch
        ids = torch.randint(0, self.model.config.vocab_size, (1, tokens), generator=self._generator)
        if self._cache is not None and self._cache.get_seq_length() + tokens > self._context:
            self._cache = None
        begun = time.perf_counter()
        with torch.inference_mode():
            answer = self.model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        seconds = time.perf_counter() - begun
        self._cache = answer.past_key_values
        if self.trace is not None:
            self.trace.position += tokens
        return seconds

    def restart(self) -> None:
        """Begin with an empty context."""
        self._cache = None

    def about(self) -> dict[str, Any]:
        runtime = self.runtime
        return {
            "kernels": runtime.kernels,
            "decoding": runtime.decoding,
            "budget": runtime.budget.to_json(),
            "experts": runtime.pack.expert_bytes,
            "io": f"{self.store.stats.io} ({self.store.stats.why})",
        }


def speed(
    pack: str,
    memory: int | None = None,
    prompt: int = 256,
    tokens: int = 64,
    rounds: int = 1,
    warm: int = WARM_TOKENS,
    replay: bool = False,
    trace: str | None = None,
    at: int = 1,
) -> dict[str, Any]:
    """A prompt of ``prompt`` tokens, and ``rounds`` of decoding ``tokens`` tokens after ``at`` others, in seconds.

    An equal prompt comes before the one that is timed, and ``warm`` tokens before the first round. With ``replay``, the
    reads of every round, and of the prompt, are then repeated without computing.
    """
    from flashpack.runtime.reads import READ_THREADS

    if memory is not None and replay:
        memory -= replay_bytes(Pack(pack))
    session = Session(pack, memory, max(prompt, at + warm + rounds * tokens), trace)
    stats = session.store.stats
    again = Again(session.pack, stats.io == "direct") if replay else None
    answer = session.about()
    session.feed(prompt)
    session.restart()
    session.log.take()
    seconds = session.feed(prompt)
    bursts = session.log.take()
    keys = [key for burst in bursts for key in burst]
    answer["prompt"] = {
        "seconds": seconds,
        "records": len(keys),
        "most_reads": max(map(keys.count, set(keys)), default=0),
        "replay": sum(again.run(bursts)) if again and bursts else None,
    }
    session.restart()
    session.feed(at)
    for _ in range(warm):
        session.feed(1)
    answer["rounds"] = []
    for _ in range(rounds):
        session.log.take()
        stats.reset()
        times = [session.feed(1) for _ in range(tokens)]
        total, bursts = stats.total(), session.log.take()
        # What is being read ahead when a round ends was noted, but has not been counted yet, or the other way round.
        if again and abs(again.size(bursts) - total.bytes_read) > READ_THREADS * largest_record(Pack(session.pack)):
            sys.exit(f"noted reads of {again.size(bursts)} bytes, the store counted {total.bytes_read}")
        answer["rounds"].append(
            {
                "seconds": sum(times) / tokens,
                "median": sorted(times)[tokens // 2],
                "hits": stats.hit_rate,
                "read": total.bytes_read / tokens,
                "misses": total.misses / tokens,
                "wait": total.wait_seconds / tokens,
                "own": total.own_seconds / tokens,
                "replay": sum(again.run(bursts)) / tokens if again and bursts else None,
            }
        )
    return answer


def start(pack: str, memory: int | None = None, prompt: int = 8) -> dict[str, Any]:
    """From imports done to the first token of a short prompt, with a cold page cache; then the same reads alone."""
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from replay import ReadLog

    import flashpack
    from flashpack.runtime import budget, dense, experts, kv, lean, store, threads  # noqa: F401
    from flashpack.runtime.generate import generate
    from flashpack.runtime.tokenizer import load_tokenizer

    folder = Path(pack)
    log = ReadLog()
    drop_cache(folder)
    begun = time.perf_counter()
    model: Any = flashpack.load(folder, memory=memory and memory - replay_bytes(Pack(folder)), context=512)
    loaded = time.perf_counter()
    generate(model, load_tokenizer(folder), list(range(10, 10 + prompt)), max_tokens=1)
    seconds = time.perf_counter() - begun
    bursts = log.take()
    again = Again(folder, model.flashpack.store.stats.io == "direct")
    return {
        "seconds": seconds,
        "load": loaded - begun,
        "dense": model.flashpack.pack.dense_bytes,
        "first": again.size(bursts),
        "replay": sum(again.run(bursts)),
    }


def bandwidth(threads: int, size: int = 2**30, rounds: int = 9) -> dict[str, Any]:
    """Bytes per second of plainly reading ``size`` bytes of memory by ``threads`` threads: the best and the median."""
    import numpy as np

    data = np.ones(size // 8, dtype=np.int64)
    pieces = np.array_split(data, threads)
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            begun = time.perf_counter()
            for _ in pool.map(np.bitwise_or.reduce, pieces):
                pass
            rates.append(data.nbytes / (time.perf_counter() - begun))
    return {"best": max(rates), "median": sorted(rates)[rounds // 2]}


PARTS = {f.__name__: f for f in (speed, start, split, bandwidth, convert, verify)}


def main() -> None:
    name, arguments = sys.argv[1:]
    print(json.dumps(PARTS[name](**json.loads(arguments))))


if __name__ == "__main__":
    main()
