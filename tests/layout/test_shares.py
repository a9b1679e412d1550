"""Shares of what is divided."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from meshwright.layout.shares import common_shares, cut, flat_share, holder, own_share


@given(size=st.integers(0, 300), width=st.integers(1, 20))
def test_shares_are_consecutive_and_differ_by_one_at_most(size: int, width: int) -> None:
    shares = [cut(size, own_share(width, index)) for index in range(width)]
    assert shares[0][0] == 0
    assert shares[-1][1] == size
    assert all(a[1] == b[0] for a, b in pairwise(shares))
    sizes = [last - first for first, last in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[0] == max(sizes)


@given(
    size=st.integers(0, 300),
    widths=st.lists(st.integers(1, 12), min_size=1, max_size=4, unique=True),
)
def test_common_shares_are_whole_shares_of_every_width(size: int, widths: list[int]) -> None:
    """Whatever the size, also where no width divides it."""
    shares = common_shares(widths)
    for width in widths:
        for index in range(width):
            mine = [cut(size, share) for share in shares if holder(share, width) == index]
            assert (mine[0][0], mine[-1][1]) == cut(size, own_share(width, index))
            assert all(a[1] == b[0] for a, b in pairwise(mine))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(1, 6))
def test_flat_shares_are_equal_pieces_of_all_tensors_end_to_end(
    sizes: list[int], width: int
) -> None:
    """Each element belongs to one rank, and none has more than its piece of the filled length."""
    flat = [(k, n) for k, size in enumerate(sizes) for n in range(size)]
    length = -(-len(flat) // width)
    for index in range(width):
        spans = flat_share(sizes, width, index)
        found = [(k, n) for k, span in enumerate(spans) for n in range(*span)]
        assert found == flat[index * length : (index + 1) * length]
