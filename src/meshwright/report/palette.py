"""Defines colours with the same meaning everywhere, also for readers with colour vision deficiency.

Kinds of work: Okabe and Ito, "Color Universal Design", 2008. Stages, which have an order: the
viridis ramp (van der Walt and Smith, 2015), whose lightness alone tells them apart.
"""

from __future__ import annotations

KINDS = {
    "F": "#0072b2",
    "B": "#e69f00",
    "I": "#f0c050",
    "W": "#f0e442",
    "OPTIMIZER_STEP": "#009e73",
    "send": "#56b4e9",
    "receive": "#d55e00",
    "reduce": "#cc79a7",
}
"""Colours of intervals: compute by operation, communication by stream."""

KIND_NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "backward, inputs",
    "W": "backward, weights",
    "OPTIMIZER_STEP": "optimizer step",
    "send": "send",
    "receive": "receive",
    "reduce": "reduce",
}

PARTS = {
    "compute": "#0072b2",
    "bubble": "#999999",
    "transfers": "#56b4e9",
    "reductions": "#cc79a7",
    "optimizer": "#009e73",
    "overhead": "#d55e00",
}
"""Colours of the parts of a step."""

MEMORY = {
    "parameters": "#0072b2",
    "gradients": "#e69f00",
    "optimizer": "#009e73",
    "activations": "#56b4e9",
    "buffers": "#cc79a7",
}
"""Colours of the kinds of memory."""

_RAMP = ((72, 40, 120), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def stage_colours(count: int) -> tuple[str, ...]:
    """Returns one colour for each of `count` stages, from violet to yellow."""
    return tuple(_ramp(index / max(count - 1, 1)) for index in range(count))


def _ramp(place: float) -> str:
    """Returns the colour at a place from 0 (first stop) to 1 (last stop), linear between stops."""
    scaled = place * (len(_RAMP) - 1)
    low = min(int(scaled), len(_RAMP) - 2)
    share = scaled - low
    channels = (round(a + (b - a) * share) for a, b in zip(_RAMP[low], _RAMP[low + 1], strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in channels)


def ink_on(colour: str) -> str:
    """Returns black or white, whichever is more readable on a colour: WCAG 2 relative luminance."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    luminance = 0.2126 * _linear(red) + 0.7152 * _linear(green) + 0.0722 * _linear(blue)
    return "#000000" if luminance > 0.179 else "#ffffff"


def _linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4
