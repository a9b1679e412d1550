"""Finds what a layer does when tensor ranks divide it, from its runs as one of them.

A layer is run at the width 1 and at those of `measured_widths`, by tracing or by counting. Rank 0
then holds the slices of the parameters that the table of `model.shard` gives it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Literal

from meshwright.layout.shares import own_share
from meshwright.layout.tiles import shape_of
from meshwright.model.amounts import RowCosts, peak_moments_of
from meshwright.model.shard import Split, divided_dim, tile_of
from meshwright.model.spec import Division, Layer, with_division
from meshwright.model.transformer.module_specs import ParameterSpec

AXIS: Literal["tensor"] = "tensor"


def smallest_width(units: int, table: Mapping[str, Split]) -> int:
    """Gives the smallest legal tensor-parallel width above 1; 1 if there is none, or if the table
    divides nothing."""
    if not table or units == 1:
        return 1
    return next(width for width in range(2, units + 2) if units % width == 0) if units else 2


def measured_widths(units: int, table: Mapping[str, Split]) -> tuple[int, ...]:
    """Gives the tensor-parallel widths to run a layer at: 1 and up to two more, whose difference
    separates what is divided from what is replicated."""
    first = smallest_width(units, table)
    second = 2 * first if units % (2 * first) == 0 else first
    return tuple(sorted({1, first, second} if first > 1 else {1}))


def division(
    units: int, amounts: Mapping[int, RowCosts], parameters: Sequence[ParameterSpec]
) -> Division:
    """Finds the divided costs of a layer, without its parameter counts.

    `amounts` are the costs of a row on one rank, by tensor-parallel width; 1 is among the widths.
    `parameters` include the tied ones. What a rank of the smallest larger width saves of a cost
    tells which part of it tensor parallelism divides. That is at most all of it, even where the
    ranks do the same by fewer operations (the loss over a divided vocabulary).
    """
    whole = amounts[1]
    several = {width: each for width, each in amounts.items() if width > 1}
    first = min(several, default=1)
    share, left = amounts[first], _held_share(parameters, first)

    def divided(full: float, rest: float) -> float:
        return (full - rest) / (1 - left) if left < 1 else 0.0

    flops = whole.forward_flops + whole.attention_flops
    return Division(
        axis=AXIS,
        units=units,
        flops=divided(flops, share.forward_flops + share.attention_flops),
        traffic_bytes=min(divided(whole.traffic_bytes, share.traffic_bytes), whole.traffic_bytes),
        saved_bytes=divided(whole.saved_bytes, share.saved_bytes),
        moments=peak_moments_of(several) if several else (),
        forward_all_reduce_bytes=whole.forward_all_reduce_bytes,
        backward_all_reduce_bytes=whole.backward_all_reduce_bytes,
    )


def with_divided_parameters(layer: Layer, own: Iterable[ParameterSpec]) -> Layer:
    """Adds the counts of the divided parameters to a layer that has these of its own."""
    divided = [p for p in own if is_divided(p)]
    return with_division(
        layer,
        replace(
            layer.along(AXIS),
            parameters=sum(prod(p.shape) for p in divided if p.trained),
            frozen_parameters=sum(prod(p.shape) for p in divided if not p.trained),
        ),
    )


def dividing_axes(p: ParameterSpec) -> tuple[str, ...]:
    """Gives the axes along which a parameter is divided."""
    return (AXIS,) if is_divided(p) else ()


def is_divided(p: ParameterSpec) -> bool:
    """True if tensor parallelism divides the parameter."""
    return divided_dim(p.split, p.name.rpartition(".")[2]) is not None


def _held_share(parameters: Iterable[ParameterSpec], width: int) -> float:
    """Gives the share of the divided weights that rank 0 of `width` holds: 1 / width, or slightly
    more if the vocabulary is not a multiple of `width`; 1 if nothing is divided."""
    full = own = 0
    for p in parameters:
        attribute = p.name.rpartition(".")[2]
        if (dim := divided_dim(p.split, attribute)) is not None:
            full += p.shape[dim]
            own += shape_of(tile_of(p.split, attribute, p.shape, own_share(width, 0)))[dim]
    return own / full if full else 1.0
