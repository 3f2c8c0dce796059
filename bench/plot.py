"""A line chart as an SVG file, without any library."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 40, 52
COLORS = ("#1f5fa8", "#c0561a", "#3c8a3c", "#7a4ea0")

Points = list[tuple[float, float]]


def chart(path: Path, title: str, across: str, up: str, lines: dict[str, Points]) -> None:
    """Write ``lines`` (points by name) to ``path``; both axes begin at 0. ``across`` and ``up`` name the axes."""
    points = [point for line in lines.values() for point in line]
    most_x, most_y = (_round_up(max(values)) for values in zip(*points, strict=True))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + x / most_x * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - y / most_y * (HEIGHT - TOP - BOTTOM),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(WIDTH / 2, 22, title, "middle"),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, across, "middle"),
        f'<g transform="rotate(-90 16 {HEIGHT / 2})">{_text(16, HEIGHT / 2, up, "middle")}</g>',
    ]
    for i in range(6):
        x, y = most_x * i / 5, most_y * i / 5
        (left, base), (right, _), (across_x, _) = place(0, y), place(most_x, y), place(x, 0)
        parts.append(f'<line x1="{left:.1f}" y1="{base:.1f}" x2="{right:.1f}" y2="{base:.1f}" stroke="#ddd"/>')
        parts.append(_text(left - 6, base + 4, f"{y:g}", "end"))
        parts.append(_text(across_x, HEIGHT - BOTTOM + 18, f"{x:g}", "middle"))
    for i, (name, line) in enumerate(lines.items()):
        color = COLORS[i % len(COLORS)]
        places = [place(*point) for point in sorted(line)]
        path_of = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path_of}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places]
        parts.append(f'<rect x="{LEFT + 12}" y="{TOP + 6 + 18 * i}" width="12" height="4" fill="{color}"/>')
        parts.append(_text(LEFT + 30, TOP + 12 + 18 * i, name, "start"))
    path.write_text("\n".join([*parts, "</svg>\n"]))


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5 or 10 times a power of ten."""
    unit = 10.0 ** math.floor(math.log10(value))
    return next(step * unit for step in (1, 2, 2.5, 5, 10) if value <= step * unit * (1 + 1e-9))
