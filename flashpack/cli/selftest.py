"""flashpack selftest"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

import typer

from flashpack.cli.console import answer_json, note, say
from flashpack.errors import DeviceError

if TYPE_CHECKING:
    from flashpack.kernels.metal.selftest import Report
    from flashpack.kernels.metal.speed import LayerSpeed, Speed


_COLUMNS = 8
"""Formats side by side."""


def selftest(
    device: str = typer.Option("mps", help="Whose kernels: mps (Metal)."),
    json: bool = typer.Option(False, "--json", help="Print the findings as one JSON object."),
) -> None:
    """Compare the kernels of a GPU with the processor. It times them, too: a block to paste into a report.

    Ends with 0 if all of them pass, with 1 if not: `run` computes with torch in their place.
    """
    from flashpack.kernels import check_device

    check_device(device)
    if device != "mps":
        raise DeviceError(f"device {device!r} has no self-test: it is tested where it is built")
    from flashpack.kernels.metal import device as metal
    from flashpack.kernels.metal import selftest, speed

    gpu = metal.Mps()
    if not json:
        note("compiling and comparing; this takes a while")
    report = selftest.remember(gpu)
    found = speed.measure(gpu, report.refused)
    if json:
        answer_json(report.to_json() | {"speed": found.to_json()})
    else:
        for line in _lines(report, found):
            say(line)
    if not report.passed:
        raise typer.Exit(1)


def _lines(report: Report, speed: Speed) -> list[str]:
    m = report.machine
    count = len(report.errors | report.refused)
    result = f"all {count} kernels pass" if not report.refused else f"{len(report.refused)} of {count} kernels FAIL"
    lines = [
        f"flashpack {m['flashpack']}, self-test of Metal: {result}",
        f"{m['chip']}, {m['memory']}, {m['system']}, torch {m['torch']}, Python {m['python']}, source {m['source']}"
        + (", fast math" if m["fast math"] != "0" else ""),
    ]
    lines += [f"FAILS  {name}: {why}" for name, why in sorted(report.refused.items())]
    lines += [f"WRONG  {line}" for line in report.wrong]
    right = sum(wrong is None for wrong in report.common.values())
    lines.append(f"{right} of {len(report.common)} other checks pass (shared memory, results that depend on company)")
    lines += _errors(report)
    rates = (f"{name} {rate / 1e9:.0f}" for name, rate in speed.products.items())
    lines += _wrapped("GB/s of a matrix times one token: ", rates)
    lines.append(f"a launch {1e6 * speed.launch:.1f} us, a launch and a wait {1e6 * speed.wait:.0f} us")
    if speed.token:
        lines.append("Qwen3.5-397B, 4 bits, 10 experts, all in memory")
        lines += [f"  {kind} layer: {_layer(x)}" for kind, x in speed.layers.items()]
        lines.append(f"  60 layers: {_layer(speed.token)}")
    return lines


def _errors(report: Report) -> list[str]:
    """Tables of products by format, and a line of the others; "-" where a kernel did not run."""
    from flashpack.kernels.metal.source import FORMATS, PRODUCTS

    def shown(name: str) -> str:
        return f"{report.errors[name]:.0e}" if name in report.errors else "-"

    lines = ["largest errors, relative"]
    for start in range(0, len(FORMATS), _COLUMNS):
        some = list(FORMATS)[start : start + _COLUMNS]
        lines.append(f"{'':18}" + "".join(f"{form:>12}" for form in some))
        lines += [f"{kernel:18}" + "".join(f"{shown(f'{kernel}_{form}'):>12}" for form in some) for kernel in PRODUCTS]
    others = report.errors.keys() - {f"{kernel}_{form}" for kernel in PRODUCTS for form in FORMATS}
    return lines + _wrapped("", (f"{name} {shown(name)}" for name in sorted(others)))


def _layer(x: LayerSpeed) -> str:
    return f"{x.launches} launches, {x.waits} waits, {1e3 * x.seconds:.2f} ms, {x.rate / 1e9:.0f} GB/s"


def _wrapped(title: str, items: Iterable[str]) -> list[str]:
    return textwrap.wrap(title + ", ".join(items), 110, subsequent_indent="  ", break_on_hyphens=False)
