"""The quality report of a conversion: how far every matrix of the pack is from its source. Data; the page shows it.

It depends on source and recipe alone: no times, hosts or paths, nothing of the codec, and numbers are rounded to four
digits, so that the same conversion has the same report on any machine.
"""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from flashpack.converter.plan import DensePlan, LayerPlan, Plan
from flashpack.converter.quality_page import page
from flashpack.converter.quantize import Error, Errors
from flashpack.formats import constants as C
from flashpack.formats.records import Encoding, RecordKind

QUALITY_FILES = (C.QUALITY, C.QUALITY_PAGE)
"""What the report is in a pack."""

VERSION = 1
"""Of the report's form."""

WORST = 20


def quality_files(plan: Plan, errors: dict[str, list[Errors]]) -> dict[str, bytes]:
    """The report as it stands in the pack: name -> content.

    ``errors``: path of each shard and dense file -> errors of each expert or tensor, in order.
    """
    report = quality_report(plan, errors)
    text = json.dumps(report, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {C.QUALITY: text.encode() + b"\n", C.QUALITY_PAGE: page(report)}


def quality_report(plan: Plan, errors: dict[str, list[Errors]]) -> dict[str, Any]:
    """The report as JSON values.

    Errors are relative: |stored - source| / |source|, Frobenius norms over one matrix; null where it is exact.
    ``weighted`` is the same of what the matrix gives for the calibration tokens; null if it was not calibrated.
    """
    encodings = _encodings(plan)
    layers = [_layer(p, errors[p.layer.path], encodings) for p in plan.layers]
    dense = [
        _dense(tensor, found.get(tensor.name), encodings)
        for path, tensors in plan.dense_files.items()
        for tensor, found in zip(tensors, errors[path], strict=True)
    ]
    return {
        "version": VERSION,
        "model": {key: plan.model[key] for key in ("architecture", "model_type")},
        "recipe": plan.recipe,
        "sizes": _sizes(plan),
        "encodings": [{"name": str(e), "bits": _rounded(e.bits_per_weight())} for e in encodings],
        "layers": layers,
        "dense": dense,
        "summary": _summary(layers, dense),
        "worst": _worst(layers),
    }


def _layer(plan: LayerPlan, errors: Sequence[Errors], encodings: dict[Encoding, int]) -> dict[str, Any]:
    """A MoE layer; lists are by expert."""
    everything = [error for of_expert in errors for error in of_expert.values()]
    calibrated = any(error.tokens is not None for error in everything)
    projections = {}
    for at, projection in enumerate(plan.kinds[0].projections):
        found = [of_expert.get(projection.name) for of_expert in errors]
        projections[projection.name] = {
            "encoding": [encodings[kind.projections[at].encoding] for kind in plan.kinds],
            "error": [error and _rounded(error.relative()) for error in found],
            **_spread(found),
        }
        if calibrated:
            projections[projection.name]["weighted"] = [error and _rounded(error.weighted) for error in found]
    row: dict[str, Any] = {"index": plan.layer.index, "projections": projections, **_spread(everything)}
    if calibrated:
        row["tokens"] = [max((e.tokens or 0 for e in of_expert.values()), default=0) for of_expert in errors]
    return row


def _dense(plan: DensePlan, error: Error | None, encodings: dict[Encoding, int]) -> dict[str, Any]:
    return {
        "name": plan.name,
        "shape": list(plan.source.shape),
        "encoding": encodings[plan.encoding],
        "error": error and _rounded(error.relative()),
    }


def _summary(layers: list[dict[str, Any]], dense: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each projection of the experts, and one for the dense part."""
    rows = []
    names = [name for layer in layers[:1] for name in layer["projections"]]
    for name in names:
        of_layers = [layer["projections"][name] for layer in layers if name in layer["projections"]]
        matrices = [pair for p in of_layers for pair in zip(p["encoding"], p["error"], strict=True)]
        rows.append({"part": name, **_row(matrices)})
        weighted = [w for p in of_layers for w in p.get("weighted", []) if w is not None]
        if weighted:
            rows[-1]["weighted"] = _rounded(math.fsum(weighted) / len(weighted))
    return [*rows, {"part": "dense", **_row([(t["encoding"], t["error"]) for t in dense])}]


def _row(matrices: list[tuple[int, float | None]]) -> dict[str, Any]:
    """``encodings``: number of matrices or tensors of each, as pairs."""
    relative = [error for _, error in matrices if error is not None]
    return {
        "encodings": sorted(Counter(encoding for encoding, _ in matrices).items()),
        "rounded": len(relative),
        "exact": len(matrices) - len(relative),
        "mean": _rounded(math.fsum(relative) / len(relative)) if relative else None,
        "max": max(relative, default=None),
    }


def _worst(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The experts with the largest error in one of their matrices, the largest first."""
    experts = []
    for layer in layers:
        for expert in range(len(next(iter(layer["projections"].values()))["error"])):
            found = [(p["error"][expert] or 0.0, name) for name, p in layer["projections"].items()]
            error, name = max(found, key=lambda pair: pair[0])
            if error:
                experts.append((-error, layer["index"], expert, name))
    return [
        {"layer": index, "expert": expert, "projection": name, "error": -error}
        for error, index, expert, name in heapq.nsmallest(WORST, experts)
    ]


def _sizes(plan: Plan) -> dict[str, Any]:
    """Of experts and dense part: values, bytes that hold them, bytes in the pack with padding but not compressed."""
    kinds = Counter(kind for p in plan.layers for kind in p.kinds)
    sizes = plan.file_sizes()
    return {
        "experts": _size(
            sum(kind.weights * count for kind, count in kinds.items()),
            sum(_section_bytes(kind) * count for kind, count in kinds.items()),
            sum(kind.stride * count for kind, count in kinds.items()),
        ),
        "dense": _size(
            sum(math.prod(t.source.shape) for t in plan.dense()),
            sum(spec.nbytes for t in plan.dense() for spec in t.specs()),
            sum(sizes[path] for path in plan.dense_files),
        ),
    }


def _size(weights: int, nbytes: int, padded: int) -> dict[str, Any]:
    """Bits are per weight."""
    return {
        "weights": weights,
        "bytes": nbytes,
        "padded_bytes": padded,
        "bits": _rounded(8 * nbytes / weights) if weights else 0.0,
        "padded_bits": _rounded(8 * padded / weights) if weights else 0.0,
    }


def _section_bytes(kind: RecordKind) -> int:
    return sum(section.nbytes for section in kind.sections)


def _encodings(plan: Plan) -> dict[Encoding, int]:
    """Every encoding of the pack, numbered in the order of the plan."""
    found = [p.encoding for kind in plan.kinds for p in kind.projections] + [t.encoding for t in plan.dense()]
    return {encoding: number for number, encoding in enumerate(dict.fromkeys(found))}


def _spread(errors: Iterable[Error | None]) -> dict[str, float | None]:
    """Mean and largest relative error of what was rounded."""
    relative = [error.relative() for error in errors if error]
    if not relative:
        return {"mean": None, "max": None}
    return {"mean": _rounded(math.fsum(relative) / len(relative)), "max": _rounded(max(relative))}


def _rounded(value: float | None) -> Any:
    """To four digits; None stays."""
    return value if value is None else float(f"{value:.4g}")
