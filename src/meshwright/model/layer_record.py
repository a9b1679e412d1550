"""Makes the Layer record of a graph from the costs and the parameters of a layer.

Tracing (`model.trace`) and counting (`model.transformer.counted_graph`) find these two in different
ways; from there on they share this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod

from meshwright.layout.shares import own_share
from meshwright.layout.tiles import shape_of
from meshwright.model.amounts import RowCosts, peak_moments_of
from meshwright.model.shard import divided_dim, tile_of
from meshwright.model.spec import Layer
from meshwright.model.transformer.module_specs import ParameterSpec


def is_divided(p: ParameterSpec) -> bool:
    """True if tensor parallelism divides the parameter."""
    return divided_dim(p.split, p.name.rpartition(".")[2]) is not None


def held_share(parameters: Iterable[ParameterSpec], width: int) -> float:
    """Gives the share of the divided weights that rank 0 of `width` holds: 1 / width, or slightly
    more if the vocabulary is not a multiple of `width`; 1 if nothing is divided."""
    full = own = 0
    for p in parameters:
        attribute = p.name.rpartition(".")[2]
        if (dim := divided_dim(p.split, attribute)) is not None:
            full += p.shape[dim]
            own += shape_of(tile_of(p.split, attribute, p.shape, own_share(width, 0)))[dim]
    return own / full if full else 1.0


def with_parameters(layer: Layer, own: Sequence[ParameterSpec]) -> Layer:
    """Adds the counts of the parameters that belong to the layer alone."""

    def numbers(chosen: Iterable[ParameterSpec]) -> int:
        return sum(prod(p.shape) for p in chosen)

    trained = [p for p in own if p.trained]
    frozen = [p for p in own if not p.trained]
    return replace(
        layer,
        parameters=numbers(trained),
        cast_parameters=numbers(p for p in trained if p.linear),
        split_parameters=numbers(filter(is_divided, trained)),
        frozen_parameters=numbers(frozen),
        cast_frozen=numbers(p for p in frozen if p.linear),
        split_frozen=numbers(filter(is_divided, frozen)),
    )


def layer_record(
    name: str,
    signature: str,
    units: int,
    amounts: Mapping[int, RowCosts],
    parameters: Sequence[ParameterSpec],
) -> Layer:
    """Makes the Layer of one layer, without its parameter counts and constants.

    `amounts` are the costs of a row on one rank, by tensor-parallel width; 1 is among the widths.
    `parameters` include the tied ones. What a rank of the smallest larger width saves of a cost
    tells which part of it tensor parallelism divides.
    """
    whole = amounts[1]
    several = {width: each for width, each in amounts.items() if width > 1}
    first = min(several, default=1)
    share, left = amounts[first], held_share(parameters, first)

    def divided(full: float, rest: float) -> float:
        return (full - rest) / (1 - left) if left < 1 else 0.0

    flops = whole.forward_flops + whole.attention_flops
    return Layer(
        name=name,
        signature=signature,
        forward_flops=whole.forward_flops,
        attention_flops=whole.attention_flops,
        backward_flops=whole.backward_flops,
        traffic_bytes=whole.traffic_bytes,
        parameters=0,
        saved_bytes=whole.saved_bytes,
        workspace_bytes=whole.workspace_bytes,
        fixed_saved_bytes=whole.fixed_saved_bytes,
        moments=peak_moments_of({1: whole}),
        tensor_moments=peak_moments_of(several) if several else (),
        tensor_units=units,
        split_flops=divided(flops, share.forward_flops + share.attention_flops),
        split_saved_bytes=divided(whole.saved_bytes, share.saved_bytes),
        forward_all_reduce_bytes=whole.forward_all_reduce_bytes,
        backward_all_reduce_bytes=whole.backward_all_reduce_bytes,
    )
