"""Where the time of a token goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAMES = {
    "attention": "attention",
    "recurrent": "recurrent layers' part",
    "router": "routers",
    "hits": "experts that were there",
    "misses": "experts that were read",
    "waits": "waiting for reads",
    "sums": "sums of experts, the store itself",
    "blocks": "blocks without experts",
}


def split(pack: str, memory: int | None = None, tokens: int = 48, context: int = 512) -> dict[str, float]:
    """Seconds per token of sampled text, by what they went to."""
    import flashpack
    from flashpack.runtime.generate import generate
    from flashpack.runtime.sampling import Sampling
    from flashpack.runtime.timing import Timing
    from flashpack.runtime.tokenizer import load_tokenizer

    folder = Path(pack)
    model: Any = flashpack.load(folder, memory=memory, context=context)
    tokenizer = load_tokenizer(folder)
    prompt = [10 + i for i in range(256)]
    generate(model, tokenizer, prompt, max_tokens=8, sampling=Sampling(1.0))
    found = generate(model, tokenizer, prompt[:32], tokens, Sampling(1.0, seed=1), timing=Timing(model)).split
    assert found is not None
    parts = {NAMES[name]: seconds for name, (seconds, _) in found.total.items()}
    return parts | {"embedding, head, sampling, the rest": found.rest, "all": found.whole, "hits": found.hit_rate}
