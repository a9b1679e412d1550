"""Makes the Layer record of a graph from the costs and the parameters of a layer.

Tracing (`model.trace`) and counting (`model.transformer.counted_graph`) find these two in different
ways; from there on they share this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod

from meshwright.model.amounts import RowCosts, peak_moments_of
from meshwright.model.spec import Layer
from meshwright.model.transformer.module_specs import ParameterSpec
from meshwright.techniques.tensor_parallel.model import division, with_divided_parameters


def with_parameters(layer: Layer, own: Sequence[ParameterSpec]) -> Layer:
    """Adds the counts of the parameters that belong to the layer alone."""

    def numbers(chosen: Iterable[ParameterSpec]) -> int:
        return sum(prod(p.shape) for p in chosen)

    trained = [p for p in own if p.trained]
    frozen = [p for p in own if not p.trained]
    counted = replace(
        layer,
        parameters=numbers(trained),
        cast_parameters=numbers(p for p in trained if p.linear),
        frozen_parameters=numbers(frozen),
        cast_frozen=numbers(p for p in frozen if p.linear),
    )
    return with_divided_parameters(counted, own)


def layer_record(
    name: str,
    signature: str,
    units: int,
    amounts: Mapping[int, RowCosts],
    parameters: Sequence[ParameterSpec],
) -> Layer:
    """Makes the Layer of one layer, without its parameter counts and constants.

    `amounts` are the costs of a row on one rank, by tensor-parallel width; 1 is among the widths.
    `parameters` include the tied ones.
    """
    whole = amounts[1]
    return Layer(
        name=name,
        signature=signature,
        forward_flops=whole.forward_flops,
        attention_flops=whole.attention_flops,
        unfused_flops=whole.unfused_flops,
        backward_flops=whole.backward_flops,
        traffic_bytes=whole.traffic_bytes,
        parameters=0,
        saved_bytes=whole.saved_bytes,
        workspace_bytes=whole.workspace_bytes,
        fixed_saved_bytes=whole.fixed_saved_bytes,
        moments=peak_moments_of({1: whole}),
        parallel=(division(units, amounts, parameters),),
    )
