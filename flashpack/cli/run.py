"""flashpack run"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from flashpack.cli.console import answer_json, gb, harmless, note, quiet_libraries
from flashpack.errors import UsageError

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
    thinking: str | None = typer.Option(None, help="on or off, where the chat template knows it."),
    max_tokens: int = typer.Option(512, min=1, help="Most tokens to generate."),
    context: int | None = typer.Option(None, min=1, help="Tokens of context. Default: the model's, at most 8192."),
    memory: str | None = typer.Option(None, help="For the whole process: 6GB, 6GiB or smallest. Default: free memory."),
    temperature: float = typer.Option(0.0, min=0.0, help="0 is greedy."),
    top_p: float = typer.Option(1.0, min=0.0, max=1.0, help="Nucleus sampling."),
    top_k: int = typer.Option(0, min=0, help="Sample from the k likeliest tokens; 0 is all."),
    seed: int = typer.Option(0, help="Seed of sampling."),
    threads: int | None = typer.Option(None, min=1, help="Compute threads. Default: one per processor."),
    device: str | None = typer.Option(None, help="cpu, or mps (Metal). Default: mps where it is there."),
    check: str = typer.Option("first", help="Compare experts with their checksums: first (read), always or never."),
    experts_per_token: int | None = typer.Option(
        None, min=1, help="Fewer experts per token than the model was trained with: faster, and another model's output."
    ),
    prefer_cached: float | None = typer.Option(
        None, help="Experts in memory replace absent ones from this share of their weight on (0 to 1): another output."
    ),
    timing: bool = typer.Option(False, help="Say where the time of decoding went; decoding takes longer."),
    reference: bool = typer.Option(False, help="Compute with torch and transformers alone: slow, to compare with."),
    expect: str | None = typer.Option(None, help="Identity that the pack must have; any other pack is refused."),
    json: bool = typer.Option(False, "--json", help="Print text and statistics as one JSON object."),
) -> None:
    """Answer a prompt within a memory budget. Text goes to stdout, statistics to stderr."""
    if thinking not in (None, "on", "off"):
        raise UsageError(f"--thinking {thinking}: on or off")
    quiet_libraries()
    from flashpack.kernels import first_use
    from flashpack.runtime import load, template

    if not raw:
        template.start()  # is ready by the time the model is
    text = sys.stdin.read() if prompt == "-" else prompt
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if not reference and (line := first_use(device)):
        note(line)
    model = load(
        pack, device=device, memory=memory, context=context, check=check, expect=expect, reference=reference,
        experts_per_token=experts_per_token, prefer_cached=prefer_cached,
    )  # fmt: skip
    runtime: Any = model.flashpack
    used, own = runtime.experts_per_token
    if used != own:
        note(f"{used} of the model's {own} experts per token: the output is not the model's own")
    if prefer_cached is not None:
        note(f"experts in memory preferred, from {prefer_cached:g} of the weight: the output is not the model's own")
    said = 0 if reference else _say(runtime.notices)

    from flashpack.runtime.generate import generate
    from flashpack.runtime.messages import encode_prompt
    from flashpack.runtime.sampling import Sampling
    from flashpack.runtime.timing import Timing
    from flashpack.runtime.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(pack)
    ids = encode_prompt(tokenizer, text, raw, None if thinking is None else thinking == "on")

    terminal = sys.stdout.isatty()

    def show(piece: str) -> None:
        sys.stdout.write(harmless(piece) if terminal else piece)
        sys.stdout.flush()

    sampling = Sampling(temperature, top_p=top_p, top_k=top_k, seed=seed)
    split = Timing(model) if timing else None
    result = generate(model, tokenizer, ids, max_tokens, sampling, None if json else show, split)
    if not reference:
        _say(runtime.notices[said:])  # of what was needed since
    if json:
        answer_json(result.to_json())
    else:
        print()
        note(_statistics(result))
        if timing:
            _show_split(result.split)


def _say(notices: list[str]) -> int:
    """Print them; how many there are."""
    for line in notices:
        note(line)
    return len(notices)


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
