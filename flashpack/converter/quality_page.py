"""The quality report as a page to read: one HTML file that loads nothing, runs nothing, and fits a phone.

Names in a report come from a stranger's files: ``_text`` writes them so that nothing of them is markup.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable
from typing import Any

from flashpack.converter.quality_plots import heatmap, histogram, lines

_DENSE_SHOWN = 10
_SHADES = 6

_STYLE = """
:root{--ink:#1c2430;--soft:#5b6675;--line:#d9dee5;--paper:#fff;--panel:#f6f8fa;--a:#1f5fd0;--b:#c2570c;--c:#0a7d55}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ee;--soft:#9aa6b5;--line:#343c48;--paper:#12161c;--panel:#1a2029;
--a:#6ea8fe;--b:#f5a04c;--c:#4fd1a0}}
body{margin:0 auto;max-width:62rem;padding:1rem;font:16px/1.5 system-ui,sans-serif;color:var(--ink);
background:var(--paper);overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:.5rem 0}h2{font-size:1.15rem;margin:2rem 0 .5rem}p,figcaption{margin:.4rem 0;max-width:44rem}
.soft,figcaption{color:var(--soft)}figcaption{font-size:.9rem}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:1rem}
figure{margin:0;padding:.75rem;background:var(--panel);border-radius:.5rem;min-width:0}
svg{display:block;width:100%;height:auto;font-size:11.5px}svg text{fill:var(--soft)}
.end{text-anchor:end}.mid{text-anchor:middle}.grid{stroke:var(--line)}
.gate{--hue:var(--a)}.up{--hue:var(--b)}.down{--hue:var(--c)}
.line,.ring{fill:none;stroke:var(--hue)}.line{stroke-width:1.5}.dot{fill:var(--hue)}
.area{fill:var(--hue);fill-opacity:.18;stroke:var(--hue)}
.line.up,.area.up{stroke-dasharray:6 3}.line.down,.area.down{stroke-dasharray:2 2}
.key{display:inline-block;width:.8em;height:.8em;margin-right:.35em;border-radius:.2em;background:var(--hue)}
.keys span{white-space:nowrap;margin-right:1em}.heat{fill:var(--a)}
SHADES
table{border-collapse:collapse;font-size:.92rem}th,td{padding:.25rem .7rem .25rem 0;text-align:left;vertical-align:top}
th{color:var(--soft);font-weight:600}tr+tr>td{border-top:1px solid var(--line)}
th,td{overflow-wrap:normal;min-width:3.5rem}td:nth-child(2):not(.n){min-width:6.5rem}
.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}.big{display:flex;flex-wrap:wrap;gap:.75rem;margin:1rem 0}
.big div{background:var(--panel);border-radius:.5rem;padding:.6rem .9rem;flex:1 1 9rem}
.big b{display:block;font-size:1.4rem;font-variant-numeric:tabular-nums}
"""


def page(report: dict[str, Any]) -> bytes:
    """The page of a report, as ``quality_report`` makes it."""
    name = _text(report["model"]["architecture"])
    body = [f"<h1>Quality report: {name}</h1>", _opening(report), _numbers(report), _summary(report)]
    if any(layer["max"] is not None for layer in report["layers"]):
        body += [_plots(report), _worst(report)]
    body += [_dense(report), _recipe(report)]
    shades = "".join(
        f".h{i}{{fill-opacity:{(i + 0.8) / (_SHADES - 0.2):.2f}}}"
        f".keys .h{i}{{opacity:{(i + 0.8) / (_SHADES - 0.2):.2f};background:var(--a)}}"
        for i in range(_SHADES)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>Quality report: {name}</title><style>{_STYLE.replace("SHADES", shades)}</style>'
        f"</head><body>\n{chr(10).join(body)}\n</body></html>\n"
    ).encode()


def _opening(report: dict[str, Any]) -> str:
    if not any(row["rounded"] for row in report["summary"]):
        return (
            "<p>Nothing was rounded: every weight in this pack has exactly the value that the source gives, so the "
            "model is the source's own.</p>"
        )
    return (
        '<p class="soft">The error of a matrix is |stored &minus; source| / |source|, the square root of its squared '
        "error over its squared norm, in percent. It compares layers and recipes; what it does to answers, "
        "<code>flashpack eval</code> measures.</p>"
    )


def _numbers(report: dict[str, Any]) -> str:
    """The few numbers that matter most."""
    experts, dense = report["sizes"]["experts"], report["sizes"]["dense"]
    weights = experts["weights"] + dense["weights"]
    cells = [
        (f"{experts['bits']:.2f}", "bits per weight of the experts"),
        (f"{dense['bits']:.2f}", "bits per weight of the dense part"),
        (f"{8 * (experts['bytes'] + dense['bytes']) / weights:.2f}", "bits per weight of the whole model"),
        (f"{8 * (experts['padded_bytes'] + dense['padded_bytes']) / weights:.2f}", "the same with padding, on disk"),
    ]
    return '<div class="big">' + "".join(f"<div><b>{n}</b>{what}</div>" for n, what in cells) + "</div>"


def _summary(report: dict[str, Any]) -> str:
    calibrated = any("weighted" in row for row in report["summary"])
    rows = []
    for row in report["summary"]:
        stored = ", ".join(f"{report['encodings'][e]['name']} ({count:,})" for e, count in row["encodings"])
        what = "dense part" if row["part"] == "dense" else f"experts' {row['part']}"
        cells = [f"{row['rounded']:,}", f"{row['exact']:,}", _percent(row["mean"]), _percent(row["max"])]
        if calibrated:
            cells.append(_percent(row.get("weighted")))
        rows.append((what, _text(stored), *cells))
    head = ["matrices", "stored as (number)", "rounded", "exact", "mean error", "largest error"]
    if calibrated:
        head.append("mean output error")
    note = ""
    if calibrated:
        note = (
            '<p class="soft">Output error: the same ratio for what a matrix gives for its calibration tokens; this is '
            "what calibration keeps small, at the cost of the plain error.</p>"
        )
    return f"<h2>Summary</h2>{_table(head, rows, 2)}{note}"


def _plots(report: dict[str, Any]) -> str:
    layers = report["layers"]
    names = list(dict.fromkeys(name for layer in layers for name in layer["projections"]))

    def of(name: str, key: str) -> list[tuple[float, float]]:
        found = ((x["index"], x["projections"].get(name, {}).get(key)) for x in layers)
        return [(index, 100 * value) for index, value in found if value is not None]

    means = [(name, of(name, "mean")) for name in names if of(name, "mean")]
    every = [
        (name, [100 * e for x in layers for e in x["projections"].get(name, {}).get("error", []) if e is not None])
        for name, _ in means
    ]
    keys = "".join(f'<span><i class="key {name}"></i>{name}</span>' for name, _ in means)
    keys = f'<span class="keys">{keys}</span>'
    figures = [
        _figure(
            "Error of each layer",
            lines("Error of each layer", "layer", "error, %", means, [(name, of(name, "max")) for name, _ in means]),
            f"{keys} Lines: mean over the layer's experts. Rings: its worst expert.",
        ),
        _figure(
            "Errors of all experts",
            histogram("Errors of all experts", "error, %", "matrices", every),
            f"{keys} How many matrices have which error.",
        ),
    ]
    bits = [(layer["index"], _bits(report, layer)) for layer in layers]
    counts = Counter(b for _, row in bits for b in row)
    if len(counts) > 1:
        kinds = sorted(counts)
        shade = {b: at * (_SHADES - 1) // (len(kinds) - 1) for at, b in enumerate(kinds)}
        plot = heatmap("Bits per weight", [(i, [shade[b] for b in row]) for i, row in bits], "expert", "layer")
        figures.append(
            _figure(
                "Bits per weight of each expert",
                plot,
                _shades((shade[b], f"{b:.2f} bits: {counts[b]:,}") for b in kinds),
            )
        )
    tokens = [(layer["index"], layer["tokens"]) for layer in layers if "tokens" in layer]
    if tokens:
        figures.append(_tokens(tokens, layers))
    return '<h2>Where the error is</h2><div class="plots">' + "".join(figures) + "</div>"


def _bits(report: dict[str, Any], layer: dict[str, Any]) -> list[float]:
    """Of each expert; its matrices have the same number of values."""
    columns = [[report["encodings"][e]["bits"] for e in p["encoding"]] for p in layer["projections"].values()]
    return [round(sum(bits) / len(bits), 2) for bits in zip(*columns, strict=True)]


def _tokens(tokens: list[tuple[int, list[int]]], layers: list[dict[str, Any]]) -> str:
    """How often calibration saw each expert, in shades of four times as often."""
    top = 4 ** (_SHADES - 1)
    while top <= max(count for _, row in tokens for count in row):
        top *= 4
    bounds = [top // 4 ** (_SHADES - 1 - i) for i in range(_SHADES - 1)]
    rows = [(index, [sum(count >= bound for bound in bounds) for count in row]) for index, row in tokens]
    counts = Counter(shade for _, row in rows for shade in row)
    spans = [(low, high - 1) for low, high in zip([0, *bounds], [*bounds, top], strict=True)]
    named = ((i, f"{low:,}&ndash;{high:,}: {counts[i]:,}") for i, (low, high) in enumerate(spans) if counts[i])
    few = sum(
        any(p["error"][e] is not None and p["weighted"][e] is None for p in layer["projections"].values())
        for layer in layers
        if "tokens" in layer
        for e in range(len(layer["tokens"]))
    )
    without = (
        f" {few:,} experts saw too few for at least one of their matrices, which is rounded without calibration."
        if few
        else ""
    )
    return _figure(
        "Calibration tokens of each expert",
        heatmap("Calibration tokens of each expert", rows, "expert", "layer"),
        f"{_shades(named)} Tokens, and how many experts saw so many.{without}",
    )


def _worst(report: dict[str, Any]) -> str:
    layers = {layer["index"]: layer for layer in report["layers"]}
    rows = []
    for row in report["worst"]:
        layer, expert = layers[row["layer"]], row["expert"]
        projection = layer["projections"][row["projection"]]
        stored = report["encodings"][projection["encoding"][expert]]["name"]
        cells = [str(row["layer"]), str(expert), row["projection"], _text(stored), _percent(row["error"])]
        if "tokens" in layer:
            cells += [_percent(projection["weighted"][expert]), f"{layer['tokens'][expert]:,}"]
        rows.append(cells)
    head = ["layer", "expert", "worst matrix", "stored as", "error", "output error", "calibration tokens"]
    head = head[: len(rows[0])]
    return f"<h2>The {len(rows)} worst experts</h2>{_table(head, rows, 4)}"


def _dense(report: dict[str, Any]) -> str:
    rounded = sorted((t for t in report["dense"] if t["error"] is not None), key=lambda t: (-t["error"], t["name"]))
    if not rounded:
        return ""
    rows = [
        (
            _text(t["name"]),
            " &times; ".join(f"{n:,}" for n in t["shape"]),
            _text(report["encodings"][t["encoding"]]["name"]),
            _percent(t["error"]),
        )
        for t in rounded[:_DENSE_SHOWN]
    ]
    title = f"The {len(rows)} worst of {len(rounded):,} rounded dense matrices"
    return f"<h2>{title}</h2>{_table(['matrix', 'shape', 'stored as', 'error'], rows, 3)}"


def _recipe(report: dict[str, Any]) -> str:
    sizes = report["sizes"]
    rows = [
        (f"{part}: {what}", f"{sizes[part][key]:,} {unit}")
        for part in ("experts", "dense")
        for key, what, unit in (
            ("weights", "weights", ""),
            ("bytes", "what holds them", "bytes"),
            ("padded_bytes", "with padding, before compression", "bytes"),
        )
    ]
    told = [(_text(str(k)), _text(_plain(v))) for k, v in (*report["model"].items(), *report["recipe"].items())]
    return (
        f"<h2>Sizes</h2>{_table(['what', 'size'], rows, 1)}"
        f"<h2>Model and recipe</h2>{_table(['', ''], told, 9)}"
        '<p class="soft">All numbers of this page and more, by expert, are in quality.json.</p>'
    )


def _figure(title: str, plot: str, caption: str) -> str:
    return f"<figure><b>{title}</b>{plot}<figcaption>{caption}</figcaption></figure>"


def _shades(named: Iterable[tuple[int, str]]) -> str:
    keys = "".join(f'<span><i class="key h{shade}"></i>{label}</span>' for shade, label in named)
    return f'<span class="keys">{keys}</span>'


def _table(head: list[str], rows: Iterable[Iterable[str]], numbers: int) -> str:
    """``numbers``: the column from which on cells are numbers, to the right. Cells are HTML."""

    def line(tag: str, cells: Iterable[str]) -> str:
        return "".join(
            f'<{tag} class="n">{cell}</{tag}>' if at >= numbers else f"<{tag}>{cell}</{tag}>"
            for at, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    top = f"<tr>{line('th', head)}</tr>" if any(head) else ""
    return f'<div class="scroll"><table>{top}{body}</table></div>'


def _percent(error: float | None) -> str:
    return "&ndash;" if error is None else f"{f'{100 * error:#.3g}'.rstrip('.')} %"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return str(value)


def _text(text: str) -> str:
    """Text of a stranger's file, as text: no markup, and what a reader would not see is written out."""
    seen = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return html.escape(seen, quote=True)
