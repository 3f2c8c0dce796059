"""Plots of the quality page: inline SVG, coloured by classes of the page's style sheet.

Only exactly rounded arithmetic, no logarithms of the system's library: the same bytes on any machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 440.0, 220.0
"""Of a plot, in units of which a letter has about ten: small, so that a phone shows it readably."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 8.0, 10.0, 36.0

Series = tuple[str, list[tuple[float, float]]]
"""A CSS class and its points."""


@dataclass(frozen=True)
class Axes:
    """Ranges of both axes and what they are called, with units."""

    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str
    y_label: str
    x_step: float
    y_step: float

    def across(self, x: float) -> float:
        return _LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - _LEFT - _RIGHT)

    def down(self, y: float) -> float:
        return HEIGHT - _BOTTOM - (y - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - _TOP - _BOTTOM)

    def svg(self, title: str, content: str) -> str:
        """The whole plot around ``content``."""
        lines = []
        for value in _ticks(self.y, self.y_step):
            y = self.down(value)
            lines.append(f'<path class="grid" d="M{_LEFT:.1f} {y:.1f}H{WIDTH - _RIGHT:.1f}"/>')
            lines.append(f'<text class="end" x="{_LEFT - 5:.1f}" y="{y + 4:.1f}">{value:,.6g}</text>')
        for value in _ticks(self.x, self.x_step):
            lines.append(f'<text class="mid" x="{self.across(value):.1f}" y="{HEIGHT - 21:.1f}">{value:,.6g}</text>')
        lines.append(
            f'<text class="mid" x="{(_LEFT + WIDTH - _RIGHT) / 2:.1f}" y="{HEIGHT - 5:.1f}">{self.x_label}</text>'
        )
        middle = (_TOP + HEIGHT - _BOTTOM) / 2
        lines.append(f'<text class="mid" transform="translate(11 {middle:.1f}) rotate(-90)">{self.y_label}</text>')
        return _svg(title, HEIGHT, "".join(lines) + content)


def lines(title: str, x_label: str, y_label: str, means: list[Series], largest: list[Series]) -> str:
    """Lines through ``means``, a ring at each of ``largest``. x are whole numbers, y from 0 on."""
    points = [point for _, series in (*means, *largest) for point in series]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    top = max(y for _, y in points)
    step = nice(top / 4)
    axes = Axes(
        (first - 0.5, last + 0.5), (0.0, step * (top // step + 1)), x_label, y_label,
        max(1.0, nice((last - first) / 8)), step,
    )  # fmt: skip
    drawn = []
    for style, series in means:
        places = [f"{axes.across(x):.1f} {axes.down(y):.1f}" for x, y in series]
        drawn.append(f'<path class="line {style}" d="M{"L".join(places)}"/>')
        drawn += [f'<circle class="dot {style}" cx="{p.split()[0]}" cy="{p.split()[1]}" r="2"/>' for p in places]
    for style, series in largest:
        drawn += [
            f'<circle class="ring {style}" cx="{axes.across(x):.1f}" cy="{axes.down(y):.1f}" r="3"/>' for x, y in series
        ]
    return axes.svg(title, "".join(drawn))


def histogram(title: str, x_label: str, y_label: str, groups: list[tuple[str, list[float]]]) -> str:
    """How many values of each group, (CSS class, values), lie in each of some 25 bins of equal width."""
    values = [value for _, group in groups for value in group]
    step = nice((max(values) - min(values)) / 25) or nice(max(values) / 25)
    first = int(min(values) / step)
    bins = int(max(values) / step) - first + 1
    counts = {}
    for style, group in groups:
        counts[style] = [0] * bins
        for value in group:
            counts[style][min(bins - 1, max(0, int(value / step) - first))] += 1
    top = max(count for row in counts.values() for count in row)
    tick = max(1.0, nice(top / 4))
    axes = Axes(
        (first * step, (first + bins) * step), (0.0, tick * (top // tick + 1)), x_label, y_label,
        nice(bins * step / 6), tick,
    )  # fmt: skip
    drawn = []
    for style, row in counts.items():
        path = f"M{axes.across(first * step):.1f} {axes.down(0):.1f}"
        for at, count in enumerate(row):
            path += f"V{axes.down(count):.1f}H{axes.across((first + at + 1) * step):.1f}"
        drawn.append(f'<path class="area {style}" d="{path}V{axes.down(0):.1f}Z"/>')
    return axes.svg(title, "".join(drawn))


def heatmap(title: str, rows: Sequence[tuple[int, Sequence[int]]], x_label: str, y_label: str) -> str:
    """A row for each (number of a layer, class of each column); runs of one class are one piece of a path."""
    columns = max(len(cells) for _, cells in rows)
    across, down = (WIDTH - _LEFT - _RIGHT) / columns, min(14.0, max(4.0, 240.0 / len(rows)))
    height = _TOP + len(rows) * down + _BOTTOM
    paths: dict[int, str] = {}
    labels = []
    every = -(-len(rows) * 12 // max(12, int(len(rows) * down)))
    for at, (number, cells) in enumerate(rows):
        y = _TOP + at * down
        if at % every == 0:
            labels.append(f'<text class="end" x="{_LEFT - 5:.1f}" y="{y + down / 2 + 4:.1f}">{number}</text>')
        start = 0
        for end in range(1, len(cells) + 1):
            if end == len(cells) or cells[end] != cells[start]:
                left, width = _LEFT + start * across, (end - start) * across
                run = f"M{left:.2f} {y:.1f}h{width:.2f}v{down * 0.9:.1f}h-{width:.2f}z"
                paths[cells[start]] = paths.get(cells[start], "") + run
                start = end
    step = max(1.0, nice(columns / 8))
    for value in _ticks((0.0, columns - 1.0), step):
        x = _LEFT + (value + 0.5) * across
        labels.append(f'<text class="mid" x="{x:.1f}" y="{height - 21:.1f}">{value:,.6g}</text>')
    labels.append(f'<text class="mid" x="{(_LEFT + WIDTH - _RIGHT) / 2:.1f}" y="{height - 5:.1f}">{x_label}</text>')
    middle = (_TOP + height - _BOTTOM) / 2
    labels.append(f'<text class="mid" transform="translate(11 {middle:.1f}) rotate(-90)">{y_label}</text>')
    drawn = [f'<path class="heat h{style}" d="{d}"/>' for style, d in sorted(paths.items())]
    return _svg(title, height, "".join(drawn + labels))


def nice(value: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is no smaller; 0 for 0."""
    if value <= 0:
        return 0.0
    mantissa, exponent = f"{value:.6e}".split("e")
    factor = next(f for f in ("1", "2", "2.5", "5", "10") if float(mantissa) <= float(f))
    return float(f"{factor}e{exponent}")


def _ticks(span: tuple[float, float], step: float) -> list[float]:
    """Multiples of ``step`` in a range."""
    first = -int(-span[0] // step) if span[0] > 0 else 0
    found = []
    while first * step <= span[1] * (1 + 1e-9):
        found.append(first * step)
        first += 1
    return found


def _svg(title: str, height: float, content: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{title}"><title>{title}</title>'
        f"{content}</svg>"
    )
