"""Computes the rotary frequency of each pair of features of a head, with all scalings."""

from __future__ import annotations

import math

from meshwright.model.transformer.spec import Rotary, Scaling


def frequencies(rotary: Rotary, tokens: int) -> tuple[list[float], float]:
    """Gives the frequency of each pair (radians per position) and the factor of cosines and sines,
    for sequences of `tokens` tokens."""
    pairs = range(0, rotary.features, 2)
    plain = [rotary.base ** (-pair / rotary.features) for pair in pairs]
    scaling = rotary.scaling
    if scaling is None:
        return plain, 1.0
    return _KINDS[scaling.kind](plain, scaling, rotary, tokens), scaling.magnitude


def _linear(plain: list[float], s: Scaling, _rotary: Rotary, _tokens: int) -> list[float]:
    return [each / s.factor for each in plain]


def _llama3(plain: list[float], s: Scaling, _rotary: Rotary, _tokens: int) -> list[float]:
    """Divides low frequencies by the factor, keeps high ones, and interpolates between (Llama
    3.1)."""

    def changed(each: float) -> float:
        length = 2 * math.pi / each
        if length > s.original / s.low:
            return each / s.factor
        if length < s.original / s.high:
            return each
        share = (s.original / length - s.low) / (s.high - s.low)
        return (1 - share) * each / s.factor + share * each

    return [changed(each) for each in plain]


def _yarn(plain: list[float], s: Scaling, rotary: Rotary, _tokens: int) -> list[float]:
    """Keeps pairs with many rotations within the original length, divides pairs with few by the
    factor, and interpolates linearly between (YaRN, Peng et al. 2023)."""

    def pair_that_turns(times: float) -> float:
        length = s.original / (times * 2 * math.pi)
        return rotary.features * math.log(length) / (2 * math.log(rotary.base))

    low, high = pair_that_turns(s.high), pair_that_turns(s.low)
    if s.truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.features - 1)
    high = high + 0.001 if low == high else high

    def changed(number: int, each: float) -> float:
        slow = min(max((number - low) / (high - low), 0.0), 1.0)
        return each / s.factor * slow + each * (1 - slow)

    return [changed(number, each) for number, each in enumerate(plain)]


def _longrope(plain: list[float], s: Scaling, _rotary: Rotary, tokens: int) -> list[float]:
    """Divides each frequency by a number of its own, with a second set of numbers for sequences
    longer than those of the original training."""
    divisors = s.long if tokens > s.original else s.short
    return [each / divisor for each, divisor in zip(plain, divisors, strict=True)]


_KINDS = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
