"""Layouts and what two of them have in common."""

from __future__ import annotations

from itertools import pairwise, product

from hypothesis import given
from hypothesis import strategies as st

from meshwright.layout.tiles import Layout, elements, even_cuts, layout, unit_tasks


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], first: int) -> Layout:
    """A tensor on a mesh of up to 3 axes, each of which divides one dimension or none."""
    mesh = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    divided: list[list[int]] = [[] for _ in shape]
    for axis in range(len(mesh)):
        dim = draw(st.integers(-1, len(shape) - 1))
        if dim >= 0:
            divided[dim].append(axis)
    count = 1
    for size in mesh:
        count *= size
    return layout(shape, range(first, first + count), mesh, divided)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Layout, Layout]:
    """Two layouts of one tensor, on meshes apart or overlapping."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    return draw(layouts(shape, 0)), draw(layouts(shape, draw(st.sampled_from([0, 1, 30]))))


def points(tile: tuple[tuple[int, int], ...]) -> list[tuple[int, ...]]:
    return list(product(*(range(*ends) for ends in tile)))


@given(pairs())
def test_every_element_arrives_exactly_once(pair: tuple[Layout, Layout]) -> None:
    source, target = pair
    got: dict[int, list[tuple[int, ...]]] = {rank: [] for rank in target.tiles}
    for task in unit_tasks(source, target):
        for rank in task.holders:
            assert set(points(task.tile)) <= set(points(source.tiles[rank]))
        for rank in task.receivers:
            assert rank not in task.holders
            got[rank] += points(task.tile)
    for rank, tile in target.tiles.items():
        own = set(points(source.tiles[rank])) if rank in source.tiles else set()
        assert sorted(got[rank]) == sorted(set(points(tile)) - own)


@given(st.integers(0, 50), st.integers(1, 9))
def test_cuts_are_even(size: int, parts: int) -> None:
    ends = even_cuts(size, parts)
    sizes = {b - a for a, b in pairwise(ends)}
    assert (ends[0], ends[-1]) == (0, size)
    assert max(sizes) - min(sizes) <= 1


def test_unequal_slices_and_two_axes_on_one_dimension() -> None:
    rows = layout((4, 6), (0, 1, 2, 3), (2, 2), ((0,), ()), {0: (0, 3, 4)})
    assert [rows.tiles[rank][0] for rank in range(4)] == [(0, 3), (0, 3), (3, 4), (3, 4)]
    both = layout((6,), (0, 1, 2, 3), (2, 2), ((1, 0),))
    assert [both.tiles[rank][0] for rank in range(4)] == [(0, 1), (3, 4), (1, 3), (4, 6)]


def test_paper_unit_tasks() -> None:
    """Case 6: two slices against three leave four pieces."""
    source = layout((3072, 1024, 170), range(8), (2, 4), ((0,), (), ()))
    target = layout((3072, 1024, 170), range(8, 20), (3, 4), ((0,), (), ()))
    tasks = unit_tasks(source, target)
    assert [elements(task.tile) // (1024 * 170) for task in tasks] == [1024, 512, 512, 1024]
    assert [len(task.receivers) for task in tasks] == [4, 4, 4, 4]
