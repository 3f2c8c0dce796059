"""flashpack run"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from flashpack.cli import loading
from flashpack.cli.console import answer_json, gb, harmless, note, quiet_libraries

if TYPE_CHECKING:
    from flashpack.runtime.generate import Result
    from flashpack.runtime.timing import Split

_PARTS = {
    "attention": "attention",
    "recurrent": "recurrent layers' part",
    "router": "routers",
    "hits": "experts in memory: computing",
    "waits": "experts not in memory: waiting for reads",
    "misses": "experts not in memory: computing",
    "sums": "experts: sums, and the store itself",
    "blocks": "blocks without experts",
}


def run(
    pack: Path = typer.Argument(..., help="Folder of the pack."),
    prompt: str = typer.Option(..., "--prompt", "-p", help="The prompt; '-' reads it from standard input."),
    raw: bool = typer.Option(False, help="Continue the text as it is, without the chat template."),
    thinking: loading.Thinking = None,
    max_tokens: int = typer.Option(512, min=1, help="Most tokens to generate."),
    context: loading.Context = None,
    memory: loading.Memory = None,
    temperature: float = typer.Option(0.0, min=0.0, help="0 is greedy."),
    top_p: float = typer.Option(1.0, min=0.0, max=1.0, help="Nucleus sampling."),
    top_k: int = typer.Option(0, min=0, help="Sample from the k likeliest tokens; 0 is all."),
    seed: int = typer.Option(0, help="Seed of sampling."),
    threads: loading.Threads = None,
    device: loading.Device = None,
    check: loading.Check = "first",
    experts_per_token: loading.ExpertsPerToken = None,
    prefer_cached: loading.PreferCached = None,
    timing: bool = typer.Option(False, help="Say where the time of decoding went; decoding takes longer."),
    reference: bool = typer.Option(False, help="Compute with torch and transformers alone: slow, to compare with."),
    expect: loading.Expect = None,
    json: bool = typer.Option(False, "--json", help="Print text and statistics as one JSON object."),
) -> None:
    """Answer a prompt within a memory budget. Text goes to stdout, statistics to stderr."""
    thinks = loading.switch(thinking)
    quiet_libraries()
    from flashpack.runtime import load, template

    if not raw:
        template.start()  # is ready by the time the model is
    text = sys.stdin.read() if prompt == "-" else prompt
    loading.compute_with(threads, pack)
    if not reference:
        loading.say_first_use(device)
    model = load(
        pack, device=device, memory=memory, context=context, check=check, expect=expect, reference=reference,
        experts_per_token=experts_per_token, prefer_cached=prefer_cached,
    )  # fmt: skip
    runtime: Any = model.flashpack
    loading.say_loaded(runtime)
    said = 0 if reference else loading.say_notices(runtime)

    from flashpack.runtime.generate import generate
    from flashpack.runtime.messages import encode_prompt
    from flashpack.runtime.sampling import Sampling
    from flashpack.runtime.timing import Timing
    from flashpack.runtime.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(pack)
    ids = encode_prompt(tokenizer, text, raw, thinks)

    terminal = sys.stdout.isatty()

    def show(piece: str) -> None:
        sys.stdout.write(harmless(piece) if terminal else piece)
        sys.stdout.flush()

    sampling = Sampling(temperature, top_p=top_p, top_k=top_k, seed=seed)
    split = Timing(model) if timing else None
    result = generate(model, tokenizer, ids, max_tokens, sampling, None if json else show, split)
    if not reference:
        loading.say_notices(runtime, said)  # of what was needed since
    if json:
        answer_json(result.to_json())
    else:
        print()
        note(_statistics(result))
        if timing:
            _show_split(result.split)


def _statistics(r: Result) -> str:
    total = r.store["total"]
    return (
        f"[prompt {r.prompt_tokens} tokens, {r.prompt_rate:.1f}/s; generated {r.generated_tokens}, "
        f"{r.generate_rate:.1f}/s; experts {r.store['hit_rate']:.1%} hits, {gb(total['bytes_read'])} read "
        f"({r.store['io']}); {r.kernels}; peak memory {gb(r.peak.anonymous)} + {gb(r.peak.file)} mapped]"
    )


def _show_split(split: Split | None) -> None:
    if split is None:
        note("--timing: no token was decoded after the first")
        return
    how = "waited for" if split.waited else "done"
    note(f"milliseconds per token, mean of {split.tokens}; each part is {how} by itself: slower than without --timing")
    note(f"{'':42}{'token':>9}{'layer':>9}{'layers':>8}{'share':>7}")
    for name, (seconds, layers) in split.total.items():
        note(f"{_PARTS[name]:42}{_ms(seconds)}{_ms(seconds / layers)}{layers:8}{seconds / split.whole:7.0%}")
    rest = f"the rest, with {split.left} layers of the library" if split.left else "embedding, head, sampling, the rest"
    note(f"{rest:42}{_ms(split.rest)}{'':17}{split.rest / split.whole:7.0%}")
    note(f"{'all':42}{_ms(split.whole)}")
    note(f"experts in memory {split.hit_rate:.1%}; {gb(split.read)} read per token")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:9.3f}"
