"""Gradients that are copied while they are summed, where replicas differ in tensor width."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import Seat, StageSeats
from meshwright.plan.spec import Job
from meshwright.program.buckets import gradient_bytes


def copied_gradient_bytes(
    model: LayerGraph, job: Job, stages: Sequence[StageSeats], stage: StageSeats, seat: Seat
) -> float:
    """Most bytes of tiles of gradients that a rank copies at the end of its last backward.

    It does so with what tensor ranks divide of layers that another replica cuts where it does not;
    then no activations are left but those of the last micro-batch.
    """
    width = len(stage.seats[seat.replica])
    copied = 0.0
    if all(len(replica) == width for s in stages for replica in s.seats):
        return copied
    for layer in range(*stage.layers):
        holders = (s for s in stages if s.layers[0] <= layer < s.layers[1])
        if any(width % len(replica) for s in holders for replica in s.seats):
            copied += model.layers[layer].split_parameters / width
    return copied * gradient_bytes(job)
