"""Describes which part (tile) of a tensor each rank holds, and what must move from one layout to
another."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from meshwright.layout.boxes import Box, common, difference, inside, is_empty, moved
from meshwright.records import record

Tile = tuple[Box, ...]
"""The part of a tensor that a rank holds: disjoint boxes that differ along one dimension. The rank
keeps them as one tensor, joined along that dimension."""
Layout = Mapping[int, Tile]
"""The tile of each rank. Ranks that hold the same box are copies of each other."""


@record
class UnitTask:
    """Describes a box that must be moved as one piece: it lies within one box of the source layout
    and one of the target layout."""

    box: Box
    holders: tuple[int, ...]
    """Ranks that hold it."""
    receivers: tuple[int, ...]
    """Ranks that need it and do not hold it."""


def joint(tile: Tile) -> int:
    """Returns the dimension along which a rank joins the boxes of its tile into one tensor."""
    first = tile[0]
    return next((dim for box in tile for dim, at in enumerate(box) if at != first[dim]), 0)


def joined(tile: Tile) -> Tile:
    """Returns where each box of a tile lies in the one tensor in which a rank stores the tile."""
    dim, found, end = joint(tile), [], 0
    for box in tile:
        place = inside(box, box)
        start, end = end, end + place[dim][1] if box else 0
        found.append((*place[:dim], (start, end), *place[dim + 1 :]) if box else box)
    return tuple(found)


def shape_of(tile: Tile) -> tuple[int, ...]:
    """Returns the shape of the one tensor in which a rank stores its tile."""
    last = joined(tile)[-1]
    return tuple(end for _, end in last)


def within(own: Tile, part: Tile) -> Tile:
    """Returns where `part`, a part of a rank's tile, lies in the tensor in which the rank stores
    the tile, box by box."""
    places = zip(part, own, joined(own), strict=True)
    return tuple(moved(box, mine, place) for box, mine, place in places)


def placed(tile: Tile, local: Box) -> Iterator[tuple[Box, Box]]:
    """Yields the boxes of the whole tensor that `local`, a box of the tensor in which a rank stores
    its tile, covers, each with its place in the stored tensor."""
    for box, place in zip(tile, joined(tile), strict=True):
        both = common(place, local)
        if not is_empty(both):
            yield moved(both, place, box), both


def holders_of(layout: Layout) -> dict[Box, tuple[int, ...]]:
    """Returns disjoint boxes, sorted, that cover all that is held, each with its holders. The first
    of them in the layout comes first, and is the one to read the box from.

    A box is cut where a box of another rank covers only a part of it.
    """
    found = dict(sorted(_by_box(layout).items()))
    if not _Sorted(list(found)).overlap():
        return found
    pieces: list[Box] = []
    for box in found:
        rest = [box]
        for piece in pieces:
            rest = [left for each in rest for left in difference(each, piece)]
        cuts = [(piece, common(piece, box)) for piece in pieces]
        pieces = [
            each
            for piece, both in cuts
            for each in ([piece] if is_empty(both) else [both, *difference(piece, both)])
        ] + rest
    return {
        piece: tuple(
            rank for rank, tile in layout.items() if any(common(b, piece) == piece for b in tile)
        )
        for piece in sorted(pieces)
    }


def unit_tasks(source: Layout, target: Layout) -> tuple[UnitTask, ...]:
    """Returns everything that must move: each distinct box of the target is split into pieces that
    each lie within one distinct box of the source.

    These are the unit tasks of "On Optimizing the Communication of Model Parallelism", section 3. A
    receiver gets each element in exactly one of them.
    """
    found = []
    holders = holders_of(source)
    held = _Sorted(list(holders))
    apart = source.keys().isdisjoint(target)
    for box, wanting in sorted(_by_box(target).items()):
        for near in held.beside(box):
            piece, have = box if near == box else common(near, box), holders[near]
            needing = wanting if apart else tuple(rank for rank in wanting if rank not in have)
            if needing and (piece is box or not is_empty(piece)):
                found.append(UnitTask(box=piece, holders=have, receivers=needing))
    return tuple(found)


def _by_box(layout: Layout) -> dict[Box, tuple[int, ...]]:
    """Groups the ranks by the boxes that they hold."""
    found: dict[Box, list[int]] = {}
    for rank, tile in layout.items():
        for box in tile:
            if not is_empty(box):
                found.setdefault(box, []).append(rank)
    return {box: tuple(ranks) for box, ranks in found.items()}


class _Sorted:
    """Keeps boxes sorted by their first dimension, so that those that may intersect another box are
    found quickly."""

    def __init__(self, boxes: Sequence[Box]) -> None:
        self.boxes = boxes
        self.firsts = [box[0][0] for box in boxes if box]
        self.lasts = list(accumulate((box[0][1] for box in boxes if box), max))

    def beside(self, box: Box) -> Sequence[Box]:
        """Returns the boxes that may intersect a box, in order."""
        if not box:
            return self.boxes
        first, last = box[0]
        return self.boxes[bisect_right(self.lasts, first) : bisect_left(self.firsts, last)]

    def overlap(self) -> bool:
        """True if any two of the boxes share elements."""
        if all(last <= first for last, first in zip(self.lasts, self.firsts[1:], strict=False)):
            return False
        return any(
            box != other and not is_empty(common(box, other))
            for box in self.boxes
            for other in self.beside(box)
        )
