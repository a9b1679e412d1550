"""Weighs the gradients that are copied to be summed where replicas differ in tensor width."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import StagePlacement, gradient_bytes
from meshwright.plan.spec import Job

TensorWidths = tuple[frozenset[int], ...]
"""The tensor widths of the replicas that hold each layer, by layer."""


def tensor_widths(model: LayerGraph, stages: Sequence[StagePlacement]) -> TensorWidths:
    """Returns the tensor widths in which a plan's stages hold each layer."""
    found: list[set[int]] = [set() for _ in model.layers]
    for stage in stages:
        widths = {*stage.mesh.widths("tensor")}
        for layer in range(*stage.layers):
            found[layer] |= widths
    return tuple(map(frozenset, found))


def copied_gradient_bytes(
    model: LayerGraph, job: Job, held: TensorWidths, stage: StagePlacement, width: int
) -> float:
    """Returns the most bytes of gradients that a rank of a stage copies at the end of its last
    backward.

    The rank belongs to a replica `width` ranks wide. It copies its tile of the gradients of every
    layer, and of what layers share, where the cuts of another replica fall inside that tile. At
    that moment only the activations of the last micro-batch are left.
    """
    copied = 0.0
    for layer in range(*stage.layers):
        if any(width % other for other in held[layer]):
            copied += model.layers[layer].along("tensor").parameters / width
    for tied in model.tied:
        widths = frozenset[int]().union(*(held[layer] for layer in tied.layers))
        mine = any(layer in range(*stage.layers) for layer in tied.layers)
        if mine and "tensor" in tied.divided and any(width % other for other in widths):
            copied += tied.parameters / width
    return copied * gradient_bytes(job)
