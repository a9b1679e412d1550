"""Derives the LayerGraph of a model whose layers save only their inputs and repeat their forward in
the backward (activation recomputation)."""

from __future__ import annotations

from dataclasses import replace

from meshwright.model.spec import Division, Layer, LayerGraph, Moment, Tensor, with_temporaries

REPEATED_TRAFFIC = 4 / 3
"""The activation bytes moved with a repeated forward, over those without: a backward counts as two
forwards."""


def recomputed(layer: int, layers: int) -> bool:
    """True if a stage with recomputation repeats layer number `layer` of a model with `layers`
    layers: every one but the last, whose backward directly follows its forward."""
    return layer < layers - 1


def with_recomputation(model: LayerGraph) -> LayerGraph:
    """Returns the model with every layer that has a backward, except the last, recomputed (Chen et
    al. 2016).

    backward FLOPs += forward FLOPs; backward all-reduces += forward all-reduces
    traffic *= 4/3
    saved bytes = inputs only; everything else that was saved becomes workspace of the backward
    """
    layers = tuple(_recomputed(model, index) for index in range(len(model.layers)))
    return replace(model, layers=layers, tensors=tuple(_kept(model, t) for t in model.tensors))


def _kept(model: LayerGraph, tensor: Tensor) -> Tensor:
    first = tensor.consumers[0] if tensor.consumers else None
    again = first is not None and recomputed(first, len(model.layers))
    if first is None or not (again and model.layers[first].has_backward):
        return tensor
    return replace(tensor, kept=True)


def _recomputed(model: LayerGraph, index: int) -> Layer:
    layer = model.layers[index]
    if not (recomputed(index, len(model.layers)) and layer.has_backward):
        return layer
    again = replace(
        layer,
        signature=f"{layer.signature}-recomputed",
        backward_flops=layer.backward_flops + layer.forward_flops + layer.attention_flops,
        traffic_bytes=layer.traffic_bytes * REPEATED_TRAFFIC,
        parallel=tuple(map(_repeating, layer.parallel)),
    )
    reads_layers = any(index in tensor.consumers for tensor in model.tensors)
    return _keeping_inputs(model, again, index) if reads_layers else again


def _repeating(division: Division) -> Division:
    """Lets the backward repeat the traffic and the collectives of the forward."""
    return replace(
        division,
        traffic_bytes=division.traffic_bytes * REPEATED_TRAFFIC,
        backward_all_reduce_bytes=division.backward_all_reduce_bytes
        + division.forward_all_reduce_bytes,
    )


def _keeping_inputs(model: LayerGraph, layer: Layer, index: int) -> Layer:
    """Lets a layer save its inputs only, and makes the rest of what it saved temporary memory of
    its backward.

    A layer that reads only the batch is not changed: it saved its inputs already. A layer with
    frozen weights may not have saved its inputs, as frozen weights need no gradient.
    """
    inputs = [t for t in model.tensors if t.consumers and t.consumers[0] == index]
    kept = sum(t.bytes for t in inputs)
    already = sum(t.bytes for t in inputs if t.kept or not layer.frozen_parameters)
    again = with_temporaries(
        layer, layer.saved_bytes - already, divided=lambda division: division.saved_bytes
    )
    fixed = layer.fixed_saved_bytes
    return replace(
        again,
        saved_bytes=kept,
        fixed_saved_bytes=0.0,
        moments=_with_fixed(again.moments, fixed),
        parallel=tuple(
            replace(each, saved_bytes=0.0, moments=_with_fixed(each.moments, fixed))
            for each in again.parallel
        ),
    )


def _with_fixed(moments: tuple[Moment, ...], fixed_bytes: float) -> tuple[Moment, ...]:
    return tuple(replace(moment, fixed=moment.fixed + fixed_bytes) for moment in moments)
