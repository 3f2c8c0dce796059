"""The card of a pack: what the page of its repository says. Numbers come from the pack, names from whoever knows them.

Its beginning is YAML that hubs read (base model, license, tags); values are written as JSON, which is YAML.
"""

from __future__ import annotations

import hashlib
import html
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flashpack.errors import UsageError
from flashpack.formats import Pack
from flashpack.formats import constants as C
from flashpack.formats.files import chunks, open_direct
from flashpack.hub.source import BaseModel
from flashpack.runtime.forecast import smallest_of
from flashpack.sizes import gb

README = "README.md"

SUFFIX = ".flashpack"
"""Of folders of packs."""

_DIVERGENCE = {
    "windows": "windows", "length": "tokens each", "kld": "KLD mean", "p99": "KLD 99 %", "top1": "same best token",
    "perplexity": "perplexity", "reference_perplexity": "of the original",
}  # fmt: skip
"""Columns, by names in what ``flashpack eval --json`` prints."""


def checksums(pack: Pack, progress: Callable[[int], object] | None = None) -> dict[str, str]:
    """SHA-256 of every file of the pack, manifest included, in hex: what ``sha256sum`` and the hub's pages show.

    Reads the whole pack; ``progress`` is called with bytes, from several threads.
    """

    def of(path: str) -> str:
        fd = open_direct(pack.folder, path)
        try:
            hashed = hashlib.sha256()
            for piece in chunks(fd, 0, os.fstat(fd).st_size, path):
                hashed.update(piece)
                if progress:
                    progress(len(piece))
        finally:
            os.close(fd)
        return hashed.hexdigest()

    paths = sorted([*pack.files, C.MANIFEST, C.MANIFEST_DIGEST])
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return dict(zip(paths, pool.map(of, paths), strict=True))


def read_evaluation(path: Path) -> dict[str, Any]:
    """What ``flashpack eval --json`` printed into a file. Raises ``UsageError`` if it is something else."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as e:
        raise UsageError(f"--eval {path}: cannot be read: {e.strerror}") from e
    except ValueError as e:
        raise UsageError(f"--eval {path}: not JSON: {e}") from e
    match data:
        case {"divergence": dict(found), "tools": None | dict()} if all(_is_number(found.get(k)) for k in _DIVERGENCE):
            return dict(data)
    raise UsageError(f"--eval {path}: not what 'flashpack eval --against ... --json' prints")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def card(
    pack: Pack,
    sums: dict[str, str],
    repo: str | None = None,
    base: BaseModel | None = None,
    evaluations: dict[str, dict[str, Any]] | None = None,
    weights: Sequence[str] = (),
) -> str:
    """The card as text. ``sums``: of ``checksums``. ``repo``: where the pack will be, org/name. ``evaluations``: by the
    name of the text, what ``read_evaluation`` gives. ``weights``: lines about the errors of the weights.

    Raises ``FormatError`` where this version cannot run the model.
    """
    base = base or BaseModel()
    title = repo.partition("/")[2] if repo else pack.folder.resolve().name
    parts = [
        _front_matter(pack, base),
        f"# {_text(title)}",
        "A pack for [flashpack](https://pypi.org/project/flashpack-moe/), which runs Mixture-of-Experts models within "
        "a memory budget far below their size: it maps the dense part and reads the experts that a token needs.",
        _table(["", ""], _facts(pack, base)),
        _how_to_run(pack, title, repo),
        *_quality(evaluations or {}, weights),
        *_left_out(base),
        _files(pack, sums),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(pack: Pack, base: BaseModel) -> str:
    fields: dict[str, Any] = {}
    if base.name:
        fields |= {"base_model": base.name, "base_model_relation": "quantized"}
    fields |= {"library_name": "flashpack", "pipeline_tag": "text-generation", **(base.license or {})}
    fields["tags"] = ["flashpack", "mixture-of-experts", str(pack.manifest.model["model_type"])]
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in fields.items()) + "---"


def _facts(pack: Pack, base: BaseModel) -> Iterator[tuple[str, str]]:
    m = pack.manifest
    if base.name:
        link = f"[{base.name}](https://huggingface.co/{base.name})"
        yield "base model", link + (f", revision {_code(base.revision)}" if base.revision else "")
    else:
        yield "base model", "not recorded in the pack"
    yield (
        "model",
        f"{_code(m.model['architecture'])}, {sum(x.experts for x in m.layers):,} experts in {len(m.layers)} layers",
    )
    yield "recipe", ", ".join(f"{_text(key)} {_code(str(value))}" for key, value in m.recipe.items())
    stored = sum(f.size for f in m.files)
    yield "size", f"{gb(stored)}: experts {gb(pack.expert_bytes)}, dense part {gb(pack.dense_bytes)}"
    least, context, _ = smallest_of(pack)
    yield "least memory", f"{gb(least.total)} for the whole process, with a context of {context} tokens"
    yield "identity", _code(pack.identity)


def _how_to_run(pack: Pack, title: str, repo: str | None) -> str:
    folder = title if title.endswith(SUFFIX) else title + SUFFIX
    lines = ["pip install flashpack-moe"]
    if repo:
        lines.append(f"flashpack pull {repo} --expect {pack.identity}")
    lines.append(f'flashpack run {shlex.quote(folder)} --prompt "Why is the sky blue?"')
    text = (
        "`--memory 6GB` sets a budget for the whole process; without it, what is free is used. The identity says that "
        "this is the pack you were promised: compare it with one that you learned elsewhere."
    )
    return "## How to run\n\n```sh\n" + "\n".join(lines) + f"\n```\n\n{text}"


def _quality(evaluations: dict[str, dict[str, Any]], weights: Sequence[str]) -> Iterator[str]:
    if evaluations or weights:
        yield "## Quality"
    if evaluations:
        rows = []
        for name, found in evaluations.items():
            numbers = [f"{found['divergence'][key]:.4g}" for key in _DIVERGENCE]
            tools = found["tools"]
            calls = f"{tools['calls']}: {tools['valid']} valid JSON, {tools['exact']} exact" if tools else ""
            rows.append((_text(name), *numbers, calls))
        yield _table(["text", *_DIVERGENCE.values(), "tool calls"], rows)
        yield "Against the original, by `flashpack eval`; KLD is in nats per token."
    if weights:
        yield "Of the weights, relative to the original:"
        yield "\n".join(f"- {_text(line)}" for line in weights)


def _left_out(base: BaseModel) -> Iterator[str]:
    if base.dropped:
        yield "## What is not in it"
        rows = [(_code(d.pattern), f"{d.tensors:,}", gb(d.nbytes)) for d in base.dropped]
        yield _table(["tensors of the base model", "number", "size there"], rows)
    elif base.dropped is not None:
        yield "All tensors of the base model are in the pack."


def _files(pack: Pack, sums: dict[str, str]) -> str:
    rows = [(_code(path), f"{(pack.folder / path).stat().st_size:,}", _code(sums[path])) for path in sorted(sums)]
    text = (
        "`flashpack verify` checks every expert and tensor by checksums of its own, and names what is damaged; "
        "`sha256sum` gives these:"
    )
    return f"## Files\n\n{text}\n\n" + _table(["file", "bytes", "SHA-256"], rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(text: str) -> str:
    """``text``, of which nothing is markup: a pack that was passed on may say anything."""
    plain = "".join(c if c.isprintable() else " " for c in html.escape(str(text)))
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", plain)


def _code(text: str) -> str:
    """The same in another script."""
    plain = "".join(c for c in text if c.isprintable() and c not in "`|")
    return f"`{plain}`"
