"""Prices the forwards that a stage with recomputation repeats in its backwards."""

from __future__ import annotations

import numpy as np

from meshwright.cost.times import Array, ReplicaWork
from meshwright.model.spec import LayerGraph
from meshwright.techniques.activation_checkpointing.model import recomputed


def layer_seconds(work: ReplicaWork, forward: Array, backward: Array) -> tuple[Array, Array]:
    """Adds each repeated forward to the backward of its layer, if the stage recomputes."""
    if work.stage is None or not work.stage.recompute:
        return forward, backward
    return forward, backward + repeated_seconds(work.model, work.layers, forward)


def repeated_seconds(model: LayerGraph, layers: tuple[int, int], forward: Array) -> Array:
    """Returns the seconds that recomputation adds to the backward of each layer: those of its
    forward."""
    repeats = np.array(
        [
            recomputed(layer, len(model.layers)) and model.layers[layer].has_backward
            for layer in range(*layers)
        ]
    )
    result: Array = forward * repeats
    return result
