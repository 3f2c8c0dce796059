"""flashpack inspect"""

from __future__ import annotations

from pathlib import Path

import typer

from flashpack.cli.console import answer_json, gb, say


def inspect(
    pack: Path = typer.Argument(..., help="Folder of the pack."),
    json: bool = typer.Option(False, "--json", help="Print identity and manifest as JSON."),
) -> None:
    """Show what is inside a pack. Model, layers, encodings, sizes, alignment, digests."""
    from flashpack.cli.quality import quality_lines
    from flashpack.formats import Pack
    from flashpack.formats import constants as C
    from flashpack.formats.header import parse_json
    from flashpack.formats.reader import manifest_bytes

    opened = Pack(pack)
    m = opened.manifest
    if json:
        answer_json({"identity": opened.identity, "manifest": parse_json(manifest_bytes(pack), C.MANIFEST)})
        return
    total = sum(f.size for f in m.files)
    say(f"{pack}: format version {C.VERSION}, {gb(total)}, {len(m.files)} files")
    say(f"identity   {opened.identity}")
    architecture, family, library = (m.model[k] for k in ("architecture", "model_type", "transformers"))
    say(f"model      {architecture} ({family}), names of transformers {library}")
    say("recipe     " + ", ".join(f"{k} {v}" for k, v in m.recipe.items()))
    say(f"experts    {gb(opened.expert_bytes)}: {sum(layer.experts for layer in m.layers)} in {len(m.layers)} layers")
    for i, kind in enumerate(m.record_kinds):
        say(f"  kind {i}: {kind.nbytes:,} bytes, stride {kind.stride:,} (16 KiB aligned)")
        for p in kind.projections:
            say(f"    {p.name:<5} {p.shape[0]} x {p.shape[1]}, {p.encoding}")
        for s in kind.sections:
            say(f"    {s.offset:>10,}  {s.name:<12} {s.dtype} {list(s.shape)}")
    files = opened.files
    for layer in m.layers:
        kinds = ", ".join(f"{count} of kind {kind}" for kind, count in layer.kinds)
        entry = files[layer.path]
        say(f"  {layer.path}: {kinds}; {gb(entry.size)} {layer.codec}, digest table {entry.digests['tail'][:16]}…")
    say(f"dense      {gb(opened.dense_bytes)}: {len(m.tensors)} tensors, {len(m.matrices)} matrices quantized")
    quantized = {mat.name: mat for mat in m.matrices}
    parts = {n for mat in m.matrices for part, n in mat.tensor_names().items() if part != "weight"}
    for t in m.tensors:
        if t.name not in parts:
            how = str(quantized[t.name].encoding) if t.name in quantized else t.dtype.lower()
            shape = quantized[t.name].shape if t.name in quantized else t.shape
            say(f"  {t.name:<60} {how:<10} {list(shape)}  {t.digest[:16]}…")
    say("copied     " + ", ".join(f.path for f in m.files if f.role == "copy"))
    for line in quality_lines(opened):
        say(line)
