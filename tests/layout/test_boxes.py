"""Boxes, compared with sets of numpy indices."""

from __future__ import annotations

from math import prod

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from meshwright.layout.boxes import (
    Box,
    common,
    difference,
    elements,
    inside,
    is_empty,
    lengths,
    moved,
    run_of_elements,
    whole,
)

SHAPE = (4, 5, 3)


def boxes(shape: tuple[int, ...] = SHAPE) -> st.SearchStrategy[Box]:
    """Boxes of a tensor, empty ones included."""
    ends = [
        st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda two: (min(two), max(two)))
        for size in shape
    ]
    return st.tuples(*ends)


def covered(box: Box, shape: tuple[int, ...] = SHAPE) -> NDArray[np.int64]:
    """How often each element of a tensor lies in a box: 0 or 1."""
    found = np.zeros(shape, dtype=np.int64)
    found[tuple(slice(*ends) for ends in box)] += 1
    return found


@given(boxes(), boxes())
def test_intersection_and_difference_are_those_of_sets(one: Box, other: Box) -> None:
    both = common(one, other)
    wanted = covered(one) * covered(other)
    assert is_empty(both) == (wanted.sum() == 0)
    assert is_empty(both) or np.array_equal(covered(both), wanted)
    rest = sum((covered(each) for each in difference(one, other)), np.zeros(SHAPE, dtype=np.int64))
    assert np.array_equal(rest, covered(one) * (1 - covered(other)))
    assert elements(one) == covered(one).sum() == prod(lengths(one))


@given(boxes(), boxes())
def test_a_box_inside_another_indexes_the_same_elements(box: Box, outer: Box) -> None:
    numbers = np.arange(prod(SHAPE)).reshape(SHAPE)
    both = common(box, outer)
    if not is_empty(both):
        cut = numbers[tuple(slice(*ends) for ends in outer)]
        found = cut[tuple(slice(*ends) for ends in inside(both, outer))]
        assert np.array_equal(found, numbers[tuple(slice(*ends) for ends in both)])
        assert moved(inside(both, outer), whole(SHAPE), outer) == both


@given(st.lists(st.integers(1, 5), max_size=4).map(tuple), st.data())
def test_a_run_of_elements_is_a_few_boxes_in_row_major_order(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    size = prod(shape)
    first, last = sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))
    numbers = np.arange(size).reshape(shape)
    found = list(run_of_elements(shape, first, last))
    parts = [numbers[tuple(slice(*ends) for ends in box)].ravel().tolist() for box in found]
    assert [number for part in parts for number in part] == list(range(first, last))
    assert len(found) <= max(1, 2 * len(shape) - 1)
