"""Where the time of a token goes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any


def split(pack: str, memory: int | None = None, tokens: int = 48, context: int = 512) -> dict[str, float]:
    """Seconds per token of sampled text, by what they went to."""
    import flashpack
    from flashpack.kernels.cpu.native import compute
    from flashpack.runtime.generate import Sampling, generate, load_tokenizer
    from flashpack.runtime.lean import LeanDecoder
    from flashpack.runtime.lean.attention import Attention
    from flashpack.runtime.lean.blocks import Router
    from flashpack.runtime.lean.recurrent import DeltaRule

    spent = dict.fromkeys(("attention", "router", "decoder", "kernels"), 0.0)

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args)
            finally:
                spent[name] += time.perf_counter() - begun

        return call

    library: Any = compute.library()
    for name in ("linear", "experts", "combine", "add_norm", "attend", "delta", "route"):
        setattr(library, f"flashpack_{name}", timed("kernels", getattr(library, f"flashpack_{name}")))
    methods: list[tuple[str, Any]] = [("attention", Attention), ("attention", DeltaRule), ("router", Router)]
    for name, kind in methods:
        kind.__call__ = timed(name, kind.__call__)
    decoder: Any = LeanDecoder
    decoder.logits = timed("decoder", decoder.logits)
    folder = Path(pack)
    model: Any = flashpack.load(folder, memory=memory, context=context)
    if not model.flashpack.decoding.startswith("lean"):
        sys.exit(f"time per token is split for the lean way of decoding only; this is {model.flashpack.decoding}")
    tokenizer = load_tokenizer(folder)
    prompt = [10 + i for i in range(256)]
    generate(model, tokenizer, prompt, max_tokens=8, sampling=Sampling(1.0))
    stats = model.flashpack.store.stats
    step, begun = model.forward, 0.0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal begun
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None and ids.shape[1] == 1 and not begun:  # the first token after the prompt: count from here
            stats.reset()
            spent.update(dict.fromkeys(spent, 0.0))
            begun = time.perf_counter()
        return step(*args, **kwargs)

    model.forward = forward
    result = generate(model, tokenizer, prompt[:32], max_tokens=tokens, sampling=Sampling(1.0, seed=1))
    whole = time.perf_counter() - begun
    count = result.generated_tokens - 1
    total = stats.total()
    parts = {
        "attention": spent["attention"],
        "router": spent["router"],
        "experts that were there": total.hit_seconds,
        "experts that were read": total.miss_seconds,
        "waiting for reads": total.wait_seconds,
        "the store itself": total.own_seconds,
    }
    parts["norms, embedding, head and Python"] = spent["decoder"] - sum(parts.values())
    parts["sampling and the library's loop"] = whole - spent["decoder"]
    outside = whole - spent["kernels"] - total.wait_seconds
    return {name: value / count for name, value in parts.items()} | {
        "all": whole / count,
        "outside kernels and waiting": outside / count,
        "hits": stats.hit_rate,
    }
