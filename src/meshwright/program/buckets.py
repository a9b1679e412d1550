"""Which gradients are summed together, by whom, and in which order they become complete."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import StageSeats
from meshwright.plan.spec import Job
from meshwright.records import record

BUCKET_BYTES = 25 * 2**20
"""Gradients are reduced in buckets of at least this size: large enough for full bandwidth, small
enough to start early (the default of DistributedDataParallel)."""


@record
class Bucket:
    """Gradients that every member sums at once."""

    layers: tuple[int, int] | None
    """Whole layers, [first, last); None for a tied parameter."""
    tied: str | None
    ranks: tuple[tuple[int, ...], ...]
    """Members, by tensor index: rank t of every replica holds the same slice."""
    bytes: int
    """On each member."""
    first: int
    """Layer whose backward, on its last holder to get there, completes the gradients."""


def gradient_bytes(job: Job) -> int:
    """Bytes of one gradient: gradients are kept in the precision of the weights."""
    return 8 if job.precision == "fp64" else 4


def gradient_buckets(
    model: LayerGraph, job: Job, stages: Sequence[StageSeats], bucket_bytes: int = BUCKET_BYTES
) -> tuple[Bucket, ...]:
    """All buckets, in the order in which a backward from the last layer completes them.

    A bucket never crosses a cut of any pipeline, so all its layers have the same holders, and every
    holder forms the same buckets. Buckets with a single holder are left out.
    """
    width = gradient_bytes(job)
    cuts = {cut for stage in stages for cut in stage.layers}
    buckets: list[Bucket] = []
    end, size = len(model.layers), 0.0
    for layer in reversed(range(len(model.layers))):
        tensor = len(_holders(stages, (layer,))) or 1
        facts = model.layers[layer]
        size += width * (facts.parameters - facts.split_parameters * (1 - 1 / tensor))
        if size >= bucket_bytes or layer in cuts:
            buckets.append(
                Bucket(
                    layers=(layer, end),
                    tied=None,
                    ranks=_holders(stages, (layer,)),
                    bytes=round(size),
                    first=layer,
                )
            )
            end, size = layer, 0.0
    for tied in model.tied:
        holders = _holders(stages, tied.layers)
        share = len(holders) if tied.split else 1
        size = width * tied.parameters / share
        buckets.append(
            Bucket(
                layers=None,
                tied=tied.name,
                ranks=holders,
                bytes=round(size),
                first=tied.layers[0],
            )
        )
    return tuple(b for b in buckets if b.bytes > 0 and any(len(group) > 1 for group in b.ranks))


def _holders(stages: Sequence[StageSeats], layers: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Ranks that hold any of the layers, ascending, by tensor index."""
    held = [s for s in stages if any(s.layers[0] <= layer < s.layers[1] for layer in layers)]
    tensor = max((len(stage.seats[0]) for stage in held), default=0)
    return tuple(
        tuple(sorted({replica[t].rank for stage in held for replica in stage.seats}))
        for t in range(tensor)
    )


def buckets_of(rank: int, tensor_index: int, buckets: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """The buckets that one rank takes part in, in the order in which it reduces them.

    All ranks share one order, or groups that overlap would wait for each other: that in which a
    backward over the whole model completes them. A tied parameter stands at its first user, whose
    holder is the last to complete it. Stages of different tensor widths have buckets with different
    numbers of groups.
    """
    own = [
        bucket
        for bucket in buckets
        if tensor_index < len(bucket.ranks)
        and rank in bucket.ranks[tensor_index]
        and len(bucket.ranks[tensor_index]) > 1
    ]
    return tuple(sorted(own, key=lambda bucket: -bucket.first))
