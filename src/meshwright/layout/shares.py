"""Divides things among ranks: the share of a rank is the same fraction of everything divided."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from math import lcm

from meshwright.layout.boxes import Range
from meshwright.records import record


@record
class Share:
    """Describes a share of something that is cut into `of` equal parts: the parts [first, last).

    Rank 1 of 4 has the share first = 1, last = 2, of = 4.
    """

    first: int
    last: int
    of: int

    def __str__(self) -> str:
        """Returns the share as text: `1:2/4`."""
        return f"{self.first}:{self.last}/{self.of}"


UNDIVIDED = Share(first=0, last=0, of=1)
"""Stands for what is not divided, which every rank of a group holds in full."""


def own_share(width: int, index: int) -> Share:
    """Returns the share of rank `index` of `width` ranks."""
    return Share(first=index, last=index + 1, of=width)


def cut(size: int, share: Share) -> Range:
    """Returns the range of `size` indices that a share covers.

    The cut before share k of n lies at size * k / n, rounded up. Cuts for different n are therefore
    in the order of their fractions k / n, and equal fractions give the same cut.
    """
    return -(-size * share.first // share.of), -(-size * share.last // share.of)


def common_shares(widths: Iterable[int]) -> tuple[Share, ...]:
    """Returns the coarsest shares, in order, such that a rank of any of these widths has a whole
    number of them. Example: widths 2 and 3 give four shares, cut at 1/3, 1/2, 2/3."""
    distinct = set(widths)
    of = lcm(*distinct)
    cuts = sorted({of // width * index for width in distinct for index in range(width + 1)})
    return tuple(Share(first=first, last=last, of=of) for first, last in pairwise(cuts))


def holder(share: Share, width: int) -> int:
    """Returns the index of the rank, of `width` ranks, that has a common share."""
    return share.first * width // share.of


def flat_share(sizes: Sequence[int], width: int, index: int) -> list[Range]:
    """Lays tensors of these sizes end to end, cuts them into `width` equal shares (the last may be
    shorter), and returns which elements of each tensor rank `index` has. If it has none of a
    tensor, the range ends where it begins, or before."""
    length = -(-sum(sizes) // width)
    first, last = index * length, (index + 1) * length
    starts = (0, *accumulate(sizes))
    return [
        (max(first - start, 0), min(last - start, size))
        for start, size in zip(starts, sizes, strict=False)
    ]
