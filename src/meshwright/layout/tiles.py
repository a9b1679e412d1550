"""Describes which slice (tile) of a tensor each rank of a mesh holds, and the intersections of two
such layouts."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, product
from math import prod

from meshwright.records import record

Tile = tuple[tuple[int, int], ...]
"""A slice of a tensor: [first, last) along every dimension."""


@record
class Layout:
    """A tensor laid out over ranks; ranks with equal tiles are replicas of each other."""

    shape: tuple[int, ...]
    tiles: Mapping[int, Tile]
    """Tile of each rank; some may be empty."""


@record
class UnitTask:
    """A tile to be moved that lies within one tile of the source and one of the target."""

    tile: Tile
    holders: tuple[int, ...]
    """Ranks that hold it."""
    receivers: tuple[int, ...]
    """Ranks that need it and do not hold it."""


def even_cuts(size: int, parts: int) -> tuple[int, ...]:
    """Return the boundaries, from 0 to `size`, of `parts` slices whose sizes differ by at most
    one."""
    return tuple(k * size // parts for k in range(parts + 1))


def layout(
    shape: Sequence[int],
    ranks: Sequence[int],
    mesh: Sequence[int],
    divided: Sequence[Sequence[int]],
    cuts: Mapping[int, Sequence[int]] | None = None,
) -> Layout:
    """Return the layout of a tensor on a mesh of `ranks` (row-major, axes of sizes `mesh`).

    `divided` lists, for each dimension of the tensor, the mesh axes that divide it, outermost
    first; over all other axes it is replicated. Slices are even (they differ by at most one) unless
    `cuts` gives the boundaries of a dimension's slices, from 0 to its size.
    """
    ends = {
        dim: (cuts or {}).get(dim) or even_cuts(size, prod(mesh[axis] for axis in axes))
        for dim, (size, axes) in enumerate(zip(shape, divided, strict=True))
    }
    tiles = {}
    for rank, place in zip(ranks, product(*map(range, mesh)), strict=True):
        indices = [_index(place, mesh, axes) for axes in divided]
        tiles[rank] = tuple((ends[dim][k], ends[dim][k + 1]) for dim, k in enumerate(indices))
    return Layout(shape=tuple(shape), tiles=tiles)


def _index(place: Sequence[int], mesh: Sequence[int], axes: Sequence[int]) -> int:
    index = 0
    for axis in axes:
        index = index * mesh[axis] + place[axis]
    return index


def elements(tile: Tile) -> int:
    """Return the number of elements in a tile."""
    return prod(last - first for first, last in tile)


def common(one: Tile, other: Tile) -> Tile:
    """Return the intersection of two tiles; it has an empty slice if they share nothing."""
    return tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))


def is_empty(tile: Tile) -> bool:
    """True if a tile has no element."""
    return any(last <= first for first, last in tile)


def unit_tasks(source: Layout, target: Layout) -> tuple[UnitTask, ...]:
    """Return everything that must move: each distinct tile of the target is split into pieces that
    each lie within one distinct tile of the source.

    These are the unit tasks of "On Optimizing the Communication of Model Parallelism", section 3. A
    receiver gets each element in exactly one of them.
    """
    found = []
    holders = _by_tile(source)
    near = _Sorted(sorted(holders)) if source.shape else None
    for tile, wanting in sorted(_by_tile(target).items()):
        candidates = near.beside(tile) if near else iter(holders)
        for held in candidates:
            piece = common(held, tile)
            have = holders[held]
            receivers = tuple(rank for rank in wanting if rank not in have)
            if receivers and not is_empty(piece):
                found.append(UnitTask(tile=piece, holders=have, receivers=receivers))
    return tuple(found)


def _by_tile(layout: Layout) -> dict[Tile, tuple[int, ...]]:
    """Group the ranks by the tile that they hold."""
    found: dict[Tile, list[int]] = {}
    for rank, tile in layout.tiles.items():
        if not is_empty(tile):
            found.setdefault(tile, []).append(rank)
    return {tile: tuple(ranks) for tile, ranks in found.items()}


class _Sorted:
    """Sorted tiles, searched by their first dimension."""

    def __init__(self, tiles: Sequence[Tile]) -> None:
        self.tiles = tiles
        self.firsts = [tile[0][0] for tile in tiles]
        self.lasts = list(accumulate((tile[0][1] for tile in tiles), max))

    def beside(self, tile: Tile) -> Iterator[Tile]:
        """Return the tiles that may intersect a tile, in order."""
        first, last = tile[0]
        start, end = bisect_right(self.lasts, first), bisect_left(self.firsts, last)
        return iter(self.tiles[start:end])
