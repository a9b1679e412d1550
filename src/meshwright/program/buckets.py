"""Which gradients are summed together, by whom, and in which order they become complete."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import ceil

from meshwright.model.shard import UNDIVIDED, Tile, common_tiles, holder
from meshwright.model.spec import LayerGraph, num_parameters
from meshwright.plan.ranks import StageSeats
from meshwright.plan.spec import Job
from meshwright.program.instructions import Instruction
from meshwright.records import record

MOST_BYTES, LEAST_BYTES = 25 * 2**20, 2**20
BUCKETS = 16
"""Of a whole model's gradients, at least."""

Ranks = tuple[int, ...]


@record
class Sum:
    """One collective of a bucket."""

    ranks: Ranks
    """Members, ascending; each holds all that is summed."""
    bytes: int
    """On each member."""
    tile: Tile | None = None
    """As Instruction.tile."""


@record
class Bucket:
    """Gradients that are complete, and begin to be summed, at once."""

    layers: tuple[int, int] | None
    """Whole layers, [first, last); None for a tied parameter."""
    tied: str | None
    sums: tuple[Sum, ...]
    """In the order in which every rank starts those that it takes part in.

    Where all replicas are of one tensor width, one for each tensor index: rank t of every replica
    holds the same. Else one for each common tile, over the rank of every replica that holds it,
    and before them one, over all ranks, for what is not divided: a rank of width t gives 1 / t of
    its gradients to that, so that every replica counts once."""


def gradient_bytes(job: Job) -> int:
    """Bytes of one gradient: gradients are kept in the precision of the weights."""
    return 8 if job.precision == "fp64" else 4


def usual_bucket_bytes(model: LayerGraph, job: Job) -> int:
    """Gradients are summed in buckets of at least this size: large enough for full bandwidth, small
    enough to start early. 25 MiB, the default of DistributedDataParallel, would leave a small model
    nothing to hide its sums behind."""
    share = gradient_bytes(job) * num_parameters(model) // BUCKETS
    return max(LEAST_BYTES, min(share, MOST_BYTES))


def gradient_buckets(
    model: LayerGraph, job: Job, stages: Sequence[StageSeats], bucket_bytes: int
) -> tuple[Bucket, ...]:
    """All buckets, in the order in which a backward from the last layer completes them.

    A bucket never crosses a cut of any pipeline, so all its layers have the same holders, and every
    holder forms the same buckets. Buckets with a single holder are left out. A tied parameter
    stands at its first user, whose holder is the last to complete it. All ranks keep to this one
    order, or groups that overlap would wait for each other.
    """
    width = gradient_bytes(job)
    found: list[tuple[int, Bucket]] = []
    cuts = sorted({cut for stage in stages for cut in stage.layers})
    for first, last in pairwise(cuts):
        replicas = replicas_of(stages, range(first, last))
        end, undivided, divided = last, 0, 0
        for layer in reversed(range(first, last)):
            facts = model.layers[layer]
            undivided += width * (facts.parameters - facts.split_parameters)
            divided += width * facts.split_parameters
            size = undivided + divided / max(map(len, replicas))
            if size >= bucket_bytes or layer == first:
                sums = _sums(replicas, undivided, divided)
                found.append((layer, Bucket(layers=(layer, end), tied=None, sums=sums)))
                end, undivided, divided = layer, 0, 0
    for tied in model.tied:
        size = width * tied.parameters
        replicas = replicas_of(stages, tied.layers)
        sums = _sums(replicas, *((0, size) if tied.split else (size, 0)))
        found.append((tied.layers[0], Bucket(layers=None, tied=tied.name, sums=sums)))
    found.sort(key=lambda each: -each[0])
    return tuple(bucket for _, bucket in found if bucket.sums)


def replicas_of(stages: Sequence[StageSeats], layers: Sequence[int]) -> tuple[Ranks, ...]:
    """Tensor ranks of every replica that holds any of the layers."""
    held = [s for s in stages if any(s.layers[0] <= layer < s.layers[1] for layer in layers)]
    found = (tuple(seat.rank for seat in replica) for stage in held for replica in stage.seats)
    return tuple(dict.fromkeys(found))


def _sums(replicas: Sequence[Ranks], undivided: int, divided: int) -> tuple[Sum, ...]:
    """The collectives of a bucket, of so many bytes in all that tensor ranks hold whole, and so
    many that they divide."""
    widths = {len(replica) for replica in replicas}
    if len(widths) == 1:
        tensor = widths.pop()
        size = round(undivided + divided / tensor)
        sums = [
            Sum(ranks=tuple(sorted(group)), bytes=size) for group in zip(*replicas, strict=True)
        ]
    else:
        everyone = tuple(sorted(rank for replica in replicas for rank in replica))
        sums = [Sum(ranks=everyone, bytes=undivided, tile=UNDIVIDED)]
        for tile in common_tiles(widths):
            ranks = tuple(sorted(replica[holder(tile, len(replica))] for replica in replicas))
            size = ceil(divided * (tile.last - tile.first) / tile.of)
            sums.append(Sum(ranks=ranks, bytes=size, tile=tile))
    return tuple(each for each in sums if each.bytes > 0 and len(each.ranks) > 1)


def sums_of(rank: int, buckets: Sequence[Bucket]) -> Iterator[tuple[Bucket, Sum]]:
    """What one rank takes part in, in the order of all."""
    for bucket in buckets:
        for each in bucket.sums:
            at = bisect_left(each.ranks, rank)
            if at < len(each.ranks) and each.ranks[at] == rank:
                yield bucket, each


def completing_layer(reduction: Instruction, layers: tuple[int, int], model: LayerGraph) -> int:
    """The layer of a stage whose backward completes the gradients that a REDUCE_GRAD sums: the
    first of its layers, or the stage's first user of a tied parameter."""
    if reduction.layers is not None:
        return reduction.layers[0]
    users = next(tied.layers for tied in model.tied if tied.name == reduction.tied)
    return min(layer for layer in users if layers[0] <= layer < layers[1])
