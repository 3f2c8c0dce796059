"""Charts with matplotlib, which is an extra: SVG or PNG by the file's name, equal bytes for equal numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashpack.errors import UsageError
from flashpack.formats import constants as C
from flashpack.formats.files import make_folder, output_errors, write_durably

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png")

_WIDTH, _HEIGHT = 7.2, 4.4
"""Of a chart, in inches."""

COLORS = ("#3d7fb8", "#d98b2b", "#4f9d5d", "#8e6bb0", "#b01030", "#444444")
MARKERS = ("o", "s", "^", "D", "v", "P")
"""Of lines, in their order: markers for those who cannot tell the colours apart."""

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "grid.color": "#dddddd",
    "hatch.color": "white",
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "savefig.dpi": 150,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "flashpack",  # names of its parts are random else
}

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """Points, and how they are drawn: ``dashed`` for what is a bound, ``bold`` for what the chart is about."""

    points: Points
    dashed: bool = False
    bold: bool = False


@dataclass(frozen=True)
class Chart:
    """``above``: what a second scale at the top is called, and how much of it one unit of x is."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Line]
    x_end: float | None = None
    y_end: float | None = None
    above: tuple[str, float] | None = None


@dataclass(frozen=True)
class Bars:
    """Stacked bars: one for each of ``names``, of ``parts`` (values by name, from the bottom)."""

    title: str
    x_label: str
    y_label: str
    names: Sequence[str]
    parts: Mapping[str, Sequence[float]]


def check_plot(path: Path) -> None:
    """Raise ``UsageError``, before any work, if a chart cannot be written to ``path``."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {path}: the name must end with {' or '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise UsageError("--plot needs the extra 'plot': pip install 'flashpack-moe[plot]'") from e


def draw(path: Path, *charts: Chart | Bars) -> None:
    """Write charts, one below the other; all axes begin at 0.

    Raises ``UsageError`` (``check_plot``) and ``OutputError``.
    """
    check_plot(path)
    import io

    import matplotlib
    from matplotlib.figure import Figure

    data = io.BytesIO()
    kind = path.suffix.lower().removeprefix(".")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 4.4 * len(charts)), layout="constrained")
        for part, chart in zip(figure.subfigures(len(charts), 1, squeeze=False)[:, 0], charts, strict=True):
            axes = part.add_subplot()
            axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
            if isinstance(chart, Chart):
                _fill(axes, chart)
            else:
                _stack(axes, chart)
        figure.savefig(data, format=kind, metadata={"Date": None} if kind == "svg" else None)
    with output_errors(path):
        make_folder(path.parent)
    write_durably(path.parent, path.name, data.getvalue(), C.PARTIAL_SUFFIX)


def _stack(axes: Axes, bars: Bars) -> None:
    below = [0.0] * len(bars.names)
    for i, (name, values) in enumerate(bars.parts.items()):
        hatch = "//" if i >= len(COLORS) else None
        axes.bar(bars.names, values, bottom=below, label=name, color=COLORS[i % len(COLORS)], hatch=hatch, width=0.6)
        below = [low + value for low, value in zip(below, values, strict=True)]
    axes.grid(False, axis="x")
    axes.set_axisbelow(True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4)


def _fill(axes: Axes, chart: Chart) -> None:
    for i, (name, line) in enumerate(chart.lines.items()):
        across, up = zip(*sorted(line.points), strict=True)
        how: dict[str, Any] = {"linestyle": "--"} if line.dashed else {"marker": MARKERS[i % len(MARKERS)]}
        width = 2.4 if line.bold else None
        axes.plot(across, up, label=name, color=COLORS[i % len(COLORS)], linewidth=width, clip_on=False, **how)
    axes.set_xlim(0, chart.x_end)
    axes.set_ylim(0, chart.y_end)
    axes.legend()
    if chart.above is not None:
        label, factor = chart.above

        def there(x: Any) -> Any:
            return x * factor

        def back(x: Any) -> Any:
            return x / factor

        top = axes.secondary_xaxis("top", functions=(there, back))
        top.set_xlabel(label)
