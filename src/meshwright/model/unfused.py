"""Changes a LayerGraph to unfused attention, which writes its scores to memory (as implementations
before FlashAttention did); for comparison with published measurements of such models."""

from __future__ import annotations

from dataclasses import replace

from meshwright.model.spec import Division, Layer, LayerGraph, with_temporaries
from meshwright.model.transformer.counted_graph import SIZES

SAVED = 2.5
"""Numbers saved per score: the outputs of softmax and dropout, and a mask of one byte, which is
half a number (Korthikanti et al. 2022: 5 bytes per score in 16-bit precision)."""
MOVED = 6.5
"""Numbers that the forward reads or writes per score: written by the first product, read and
written by the fused masked softmax, read and written by dropout with its mask of one byte, read by
the second product."""


def with_unfused_attention(model: LayerGraph, heads: int) -> LayerGraph:
    """Adds the heads * S^2 scores of every attention layer to what it saves and moves.

        saved += 2.5 a heads S^2, moved += 6.5 a heads S^2     (a: bytes of an activation)

    Like the heads, the scores are divided among tensor-parallel ranks.
    """
    size = SIZES[model.precision][0]
    scores = float(heads * model.sequence**2 * size)

    def saving(division: Division) -> Division:
        divided = scores if division.flops or division.saved_bytes else 0.0
        return replace(
            division,
            traffic_bytes=division.traffic_bytes + MOVED * divided,
            saved_bytes=division.saved_bytes + SAVED * divided,
        )

    def unfused(layer: Layer) -> Layer:
        if not layer.attention_flops:
            return layer
        again = with_temporaries(layer, 2 * scores, divided=lambda _: 2 * scores)
        return replace(
            again,
            signature=f"{layer.signature}-unfused",
            traffic_bytes=layer.traffic_bytes + MOVED * scores,
            saved_bytes=layer.saved_bytes + SAVED * scores,
            parallel=tuple(map(saving, again.parallel)),
        )

    return replace(model, layers=tuple(unfused(layer) for layer in model.layers))
