"""The planner's growth drawn: CPU seconds over devices, both on logarithmic scales, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log10

from meshwright.report.palette import KINDS

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 20, 50
STYLE = """
  svg { --line: #c8ccd4; --ink: #1a1c20; --muted: #5c626d; font-family: system-ui, sans-serif; }
  @media (prefers-color-scheme: dark) {
    svg { --line: #454b57; --ink: #e8eaee; --muted: #9ba3b0; }
  }
  text { font-size: 12px; fill: var(--muted); }
  .name { font-weight: 600; fill: var(--ink); }
  .grid { stroke: var(--line); stroke-width: 1; }
  .line { fill: none; stroke-width: 2.5; }
"""

Points = Sequence[tuple[float, float]]
"""Devices, and CPU seconds."""


def growth_svg(measured: Mapping[str, Points], allowed: Points) -> str:
    """One line for each model, and a dashed one for what is allowed."""
    every = [point for points in (*measured.values(), allowed) for point in points]
    low_x, high_x = min(x for x, _ in every), max(x for x, _ in every)
    low_y = 10.0 ** int(log10(min(y for _, y in every)) - 0.999)
    high_y = 10.0 ** int(log10(max(y for _, y in every)) + 0.999)

    def place(x: float, y: float) -> tuple[float, float]:
        across = log10(x / low_x) / log10(high_x / low_x)
        up = log10(y / low_y) / log10(high_y / low_y)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )

    drawn = []
    tick = low_y
    while tick <= high_y * 1.001:
        x, y = place(low_x, tick)
        drawn.append(
            f'<line class="grid" x1="{x}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        drawn.append(f'<text x="{x - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g} s</text>')
        tick *= 10
    for devices, _ in allowed:
        x, y = place(devices, low_y)
        label = f"{devices:,.0f}"
        drawn.append(f'<text x="{x:.1f}" y="{y + 20:.1f}" text-anchor="middle">{label}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    drawn.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">devices</text>')
    colours = ("var(--muted)", *KINDS.values())
    lines = {"allowed": allowed, **measured}
    for (name, points), colour in zip(lines.items(), colours, strict=False):
        spots = [place(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        dash = ' stroke-dasharray="5 5"' if points is allowed else ""
        drawn.append(f'<polyline class="line" stroke="{colour}"{dash} points="{path}"/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in spots]
        x, y = spots[-1]
        drawn.append(f'<text class="name" x="{x + 10:.1f}" y="{y + 4:.1f}">{name}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="CPU seconds of the planner over devices">\n<style>{STYLE}</style>\n'
        + "\n".join(drawn)
        + "\n</svg>\n"
    )
