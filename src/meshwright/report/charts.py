"""Draws loss curves as SVG, with round numbers on the axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from meshwright.records import record
from meshwright.report.template import render

_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
WIDTH, HEIGHT = 640.0, 260.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 16.0, 14.0, 34.0


@record
class Curve:
    """Holds one loss curve, ready to be drawn."""

    name: str
    colour: str
    dashed: bool
    """True for all curves but the first, so that equal curves stay visible beneath each other."""
    points: str
    """The points of an SVG polyline: `x,y x,y ...`."""
    last: float


@record
class Tick:
    """Places a labelled value on an axis, at a position in pixels."""

    place: float
    text: str


def ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    """Returns about `count` round values (1, 2 or 5 times a power of ten) that span low to high."""
    span = high - low or abs(high) or 1.0
    rough = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return tuple(index * step for index in range(first, last + 1))


def loss_svg(losses: Mapping[str, Sequence[float]]) -> Markup:
    """Draws loss against step for every run, as inline SVG."""
    steps = max(len(values) for values in losses.values())
    finite = [v for values in losses.values() for v in values if math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    margin = 0.05 * (high - low) or 0.5
    low, high = low - margin, high + margin

    def across(step: float) -> float:
        share = (step - 1) / max(steps - 1, 1)
        return round(_LEFT + (WIDTH - _LEFT - _RIGHT) * share, 1)

    def down(loss: float) -> float:
        return round(_TOP + (HEIGHT - _TOP - _BOTTOM) * (high - loss) / (high - low), 1)

    curves = tuple(
        Curve(
            name=name,
            colour=_COLOURS[index % len(_COLOURS)],
            dashed=index > 0,
            points=" ".join(
                f"{across(step)},{down(value)}"
                for step, value in enumerate(values, start=1)
                if math.isfinite(value)
            ),
            last=values[-1],
        )
        for index, (name, values) in enumerate(losses.items())
        if values
    )
    whole = {round(value) for value in ticks(1, steps, 8)} | {1}
    return render(
        "losses.svg",
        width=WIDTH,
        height=HEIGHT,
        left=_LEFT,
        bottom=HEIGHT - _BOTTOM,
        right=WIDTH - _RIGHT,
        curves=curves,
        across=tuple(Tick(place=across(s), text=str(s)) for s in sorted(whole) if s >= 1),
        down=tuple(Tick(place=down(v), text=f"{v:.4g}") for v in ticks(low, high, 5)),
    )
