"""Computes with boxes: blocks of a tensor, given by a range of indices along every dimension."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

Range = tuple[int, int]
"""Indices [first, last)."""
Box = tuple[Range, ...]
"""A block of a tensor: a range along each dimension. A scalar's only box is ()."""


def whole(shape: Sequence[int]) -> Box:
    """Returns the box of a whole tensor."""
    return tuple((0, size) for size in shape)


def lengths(box: Box) -> tuple[int, ...]:
    """Returns the shape of a box."""
    return tuple(last - first for first, last in box)


def elements(box: Box) -> int:
    """Returns the number of elements in a box."""
    return prod(last - first for first, last in box)


def is_empty(box: Box) -> bool:
    """True if a box has no element."""
    return any(last <= first for first, last in box)


def common(one: Box, other: Box) -> Box:
    """Returns the intersection of two boxes; it is empty along some dimension if they share no
    element."""
    return tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))


def difference(one: Box, other: Box) -> Iterator[Box]:
    """Yields disjoint boxes that together are what `one` holds and `other` does not."""
    both = common(one, other)
    if is_empty(both):
        yield one
        return
    for dim, ((a, b), (c, d)) in enumerate(zip(one, both, strict=True)):
        for side in ((a, c), (d, b)):
            if side[0] < side[1]:
                yield (*both[:dim], side, *one[dim + 1 :])


def moved(box: Box, origin: Box, to: Box) -> Box:
    """Returns a box after the move that takes the first element of `origin` to that of `to`."""
    return tuple(
        (first - a + c, last - a + c)
        for (first, last), (a, _), (c, _) in zip(box, origin, to, strict=True)
    )


def inside(box: Box, outer: Box) -> Box:
    """Returns where a box lies in a tensor that holds just the elements of `outer`."""
    return tuple((first - a, last - a) for (first, last), (a, _) in zip(box, outer, strict=True))


def run_of_elements(shape: Sequence[int], first: int, last: int) -> Iterator[Box]:
    """Yields the boxes that elements [first, last) of a tensor fill, in order; elements are counted
    in row-major order. Example: elements 2 to 11 of a 3 x 4 tensor fill the end of row 0, all of
    row 1 and the start of row 2."""
    if not shape and first < last:
        yield ()
    size = prod(shape[1:])
    while first < last and shape:
        row, start = divmod(first, size)
        end = last // size
        if start or row == end:
            stop = min(last - row * size, size)
            yield from (((row, row + 1), *box) for box in run_of_elements(shape[1:], start, stop))
            first = row * size + stop
        else:
            yield ((row, end), *whole(shape[1:]))
            first = end * size
