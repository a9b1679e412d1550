"""Divides gradients into buckets that are reduced together, over which ranks and in which order."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from meshwright.layout.shares import UNDIVIDED, Share
from meshwright.model.spec import LayerGraph, num_parameters
from meshwright.plan.mesh import copies
from meshwright.plan.ranks import StagePlacement, gradient_bytes, holders_of
from meshwright.plan.spec import Job
from meshwright.records import record

MOST_BYTES, LEAST_BYTES = 25 * 2**20, 2**20
"""The limits of the usual size of a bucket."""
BUCKETS = 16
"""The least number of buckets for the gradients of a whole model."""


@record
class GradientSum:
    """Describes one all-reduce of a bucket."""

    ranks: tuple[int, ...]
    """The members, ascending; each holds everything that is summed."""
    bytes: int
    """The bytes on each member."""
    tile: Share | None = None
    """The part of the divided gradients that is summed; see Instruction.tile."""


@record
class Bucket:
    """Describes gradients that are complete, and begin to be summed, at the same time."""

    layers: tuple[int, int] | None
    """Whole layers, [first, last); None for a tied parameter."""
    tied: str | None
    """The name of a tied parameter; None for layers."""
    sums: tuple[GradientSum, ...]
    """The all-reduces of the bucket, in the order in which every rank starts those it belongs to.

    If all replicas have the same tensor width, there is one for each tensor index: rank t of every
    replica holds the same gradients. Otherwise there is one for each common share, over the rank of
    every replica that holds it, and before these one over all ranks for the undivided gradients: a
    rank of tensor width t gives 1 / t of its gradients to that one, so that every replica counts
    once.
    """


def usual_bucket_bytes(model: LayerGraph, job: Job) -> int:
    """Returns the least size of a bucket: large enough for full bandwidth, small enough to overlap.

    The default of DistributedDataParallel, 25 MiB, would leave a small model no compute behind
    which to hide its reductions.
    """
    share = gradient_bytes(job) * num_parameters(model) // BUCKETS
    return max(LEAST_BYTES, min(share, MOST_BYTES))


def gradient_buckets(
    model: LayerGraph, job: Job, stages: Sequence[StagePlacement], bucket_bytes: int
) -> tuple[Bucket, ...]:
    """Returns all buckets, in the order in which a backward over the whole model completes them.

    A bucket never crosses a cut of any pipeline, so all its layers are held by the same ranks, and
    every one of these forms the same buckets. Gradients held by a single rank need no bucket. A
    tied parameter is placed at its first user, whose backward completes it last. All ranks keep to
    this one order: otherwise overlapping groups could wait for each other.
    """
    width = gradient_bytes(job)
    found: list[tuple[int, Bucket]] = []
    cuts = sorted({cut for stage in stages for cut in stage.layers})
    for first, last in pairwise(cuts):
        holders = _holders(stages, range(first, last))
        end, undivided, divided = last, 0, 0
        for layer in reversed(range(first, last)):
            facts = model.layers[layer]
            split = facts.along("tensor").parameters
            undivided += width * (facts.parameters - split)
            divided += width * split
            size = undivided + divided / holders.tensor
            if size >= bucket_bytes or layer == first:
                sums = _sums(holders, undivided, divided)
                found.append((layer, Bucket(layers=(layer, end), tied=None, sums=sums)))
                end, undivided, divided = layer, 0, 0
    for tied in model.tied:
        size = width * tied.parameters
        holders = _holders(stages, tied.layers)
        sums = _sums(holders, *((0, size) if "tensor" in tied.divided else (size, 0)))
        found.append((tied.layers[0], Bucket(layers=None, tied=tied.name, sums=sums)))
    found.sort(key=lambda each: -each[0])
    return tuple(bucket for _, bucket in found if bucket.sums)


@dataclass(frozen=True, slots=True)
class _Holders:
    """Lists the ranks that hold the same layers."""

    tensor: int
    """The width of the widest replica."""
    copies: tuple[tuple[tuple[int, ...], Share | None], ...]
    """The groups of ranks that hold the same, and which share of what is divided."""


def _holders(stages: Sequence[StagePlacement], layers: Sequence[int]) -> _Holders:
    mesh = holders_of(stages, layers)
    return _Holders(mesh.width("tensor"), tuple(copies(mesh)))


def _sums(holders: _Holders, undivided: int, divided: int) -> tuple[GradientSum, ...]:
    """Returns the all-reduces of a bucket.

    Every tensor rank holds `undivided` bytes whole; the tensor ranks of a replica divide `divided`
    bytes among them.
    """
    sums = []
    for ranks, share in holders.copies:
        if share is None:
            size = round(undivided + divided / holders.tensor)
        elif share == UNDIVIDED:
            size = undivided
        else:
            size = ceil(divided * (share.last - share.first) / share.of)
        sums.append(GradientSum(ranks=ranks, bytes=size, tile=share))
    return tuple(each for each in sums if each.bytes > 0 and len(each.ranks) > 1)


def sums_of(rank: int, buckets: Sequence[Bucket]) -> Iterator[tuple[Bucket, GradientSum]]:
    """Yields the all-reduces that one rank belongs to, with their buckets, in the order in which
    all ranks start them."""
    for bucket in buckets:
        for each in bucket.sums:
            at = bisect_left(each.ranks, rank)
            if at < len(each.ranks) and each.ranks[at] == rank:
                yield bucket, each
