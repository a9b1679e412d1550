"""Gradients that are copied while they are summed, where replicas differ in tensor width."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import StageSeats
from meshwright.plan.spec import Job
from meshwright.program.buckets import gradient_bytes

Widths = tuple[frozenset[int], ...]
"""By layer: the tensor widths of the replicas that hold it."""


def tensor_widths(model: LayerGraph, stages: Sequence[StageSeats]) -> Widths:
    """The tensor widths in which a plan's stages hold each layer."""
    found: list[set[int]] = [set() for _ in model.layers]
    for stage in stages:
        widths = {len(replica) for replica in stage.seats}
        for layer in range(*stage.layers):
            found[layer] |= widths
    return tuple(map(frozenset, found))


def copied_gradient_bytes(
    model: LayerGraph, job: Job, held: Widths, stage: StageSeats, width: int
) -> float:
    """Most bytes of tiles of gradients that a rank of a stage, in a replica `width` wide, copies at
    the end of its last backward.

    It does so with what tensor ranks divide of layers that another replica cuts where it does not;
    then no activations are left but those of the last micro-batch.
    """
    copied = 0.0
    for layer in range(*stage.layers):
        if any(width % other for other in held[layer]):
            copied += model.layers[layer].split_parameters / width
    return copied * gradient_bytes(job)
