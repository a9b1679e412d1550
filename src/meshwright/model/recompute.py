"""Recomputation: blocks that keep their input alone and repeat their forward in the backward."""

from __future__ import annotations

from dataclasses import replace

from meshwright.model.spec import Layer, LayerGraph, with_temporaries


def with_recomputation(model: LayerGraph) -> LayerGraph:
    """The model with every layer that has attention recomputed (Chen et al. 2016).

    backward FLOPs += forward FLOPs; backward all-reduces += forward ones
    bytes moved x 4/3, of which a backward is counted to move two thirds
    kept: the input alone; what the forward made becomes workspace of the backward
    """
    return replace(
        model, layers=tuple(_recomputed(model, index) for index in range(len(model.layers)))
    )


def _recomputed(model: LayerGraph, index: int) -> Layer:
    layer = model.layers[index]
    if not layer.attention_flops:
        return layer
    kept = sum(tensor.bytes for tensor in model.tensors if index in tensor.consumers)
    split = kept * layer.split_saved_bytes / layer.saved_bytes if layer.saved_bytes else 0.0
    return replace(
        with_temporaries(layer, layer.saved_bytes - kept, divided=layer.split_saved_bytes - split),
        signature=f"{layer.signature}-recomputed",
        backward_flops=layer.backward_flops + layer.forward_flops + layer.attention_flops,
        traffic_bytes=layer.traffic_bytes * 4 / 3,
        saved_bytes=kept,
        split_saved_bytes=split,
        backward_all_reduce_bytes=layer.backward_all_reduce_bytes + layer.forward_all_reduce_bytes,
    )
