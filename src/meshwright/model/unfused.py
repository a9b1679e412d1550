"""Attention that writes its scores to memory, as everybody's did before FlashAttention."""

from __future__ import annotations

from dataclasses import replace

from meshwright.model.spec import Layer, LayerGraph, with_temporaries
from meshwright.model.transformer.counted_graph import SIZES

SAVED = 2.5
"""Numbers kept per score: softmax's and dropout's outputs, and a mask of one byte (Korthikanti et
al. 2022: 5 bytes of 16-bit numbers)."""
MOVED = 6.5
"""Numbers moved per score by the forward: written by the product, read and written by the fused
masked softmax, read and written by dropout with its mask of bytes, read by the second product."""


def with_unfused_attention(model: LayerGraph, heads: int) -> LayerGraph:
    """The model with heads * S^2 scores of every attention layer kept and moved.

        saved += 2.5 a heads S^2, moved += 8 a heads S^2     (a bytes of an activation)

    All of them are divided among tensor ranks, as the heads are.
    """
    size = SIZES[model.precision][0]
    scores = float(heads * model.sequence**2 * size)

    def unfused(layer: Layer) -> Layer:
        if not layer.attention_flops:
            return layer
        divided = SAVED * scores if layer.split_saved_bytes else 0.0
        return replace(
            with_temporaries(layer, 2 * scores, divided=2 * scores),
            signature=f"{layer.signature}-unfused",
            traffic_bytes=layer.traffic_bytes + MOVED * scores,
            saved_bytes=layer.saved_bytes + SAVED * scores,
            split_saved_bytes=layer.split_saved_bytes + divided,
        )

    return replace(model, layers=tuple(unfused(layer) for layer in model.layers))
