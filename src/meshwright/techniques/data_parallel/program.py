"""Places the reductions of gradients among the actions of a rank."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import RankPlacement, StagePlacement
from meshwright.plan.spec import Job
from meshwright.program.compile import Emission, PipelineRank, Placed, suffix_minima
from meshwright.program.instructions import Instruction, summed_layers
from meshwright.techniques.data_parallel.buckets import (
    Bucket,
    GradientSum,
    gradient_buckets,
    sums_of,
    usual_bucket_bytes,
)
from meshwright.techniques.data_parallel.operations import REDUCE_GRAD


def emission(
    stages: Sequence[StagePlacement], job: Job, model: LayerGraph, bucket_bytes: int | None
) -> Emission:
    """Returns a function that places the reductions of a rank ahead of the backwards that complete
    them."""
    size = bucket_bytes or usual_bucket_bytes(model, job)
    buckets = gradient_buckets(model, job, stages, size)

    def emit(group: PipelineRank, placement: RankPlacement) -> Placed:
        return _reductions(group, tuple(sums_of(placement.rank, buckets)), model)

    return emit


def _reductions(
    group: PipelineRank, sums: Sequence[tuple[Bucket, GradientSum]], model: LayerGraph
) -> dict[int, list[Instruction]]:
    """Returns the gradient reductions, keyed by the index of the action that they precede.

    All ranks post them in one common order.
    """
    completing = [_completing(group, bucket, model) for bucket, _ in sums]
    posted = suffix_minima([group.last_backward[s] for s in completing])
    found: dict[int, list[Instruction]] = {}
    for (bucket, own), s, index in zip(sums, completing, posted, strict=True):
        reduction = Instruction(
            op=REDUCE_GRAD,
            stage=group.stages[s].number,
            layers=bucket.layers,
            tied=bucket.tied,
            tile=own.tile,
            ranks=own.ranks,
            bytes=own.bytes,
        )
        found.setdefault(index, []).append(reduction)
    return found


def _completing(group: PipelineRank, bucket: Bucket, model: LayerGraph) -> int:
    """Returns the stage of a pipeline rank whose backward is the last to add to a bucket."""
    layers = summed_layers(bucket.layers, bucket.tied, model)
    holders = [
        s
        for s, stage in group.stages.items()
        if any(stage.layers[0] <= layer < stage.layers[1] for layer in layers)
    ]
    return max(holders, key=lambda s: group.last_backward[s])
