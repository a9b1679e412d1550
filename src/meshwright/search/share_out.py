"""Shares a batch out among pipelines: whole micro-batches for each, near its speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

NEAR = 12
"""Micro-batches more or fewer than a pipeline's ideal number that are tried with two pipelines."""

TRIED = 160
"""About how many combinations are tried with more pipelines."""


def counts_near(
    speeds: Sequence[float], rows: Sequence[int], batch: int
) -> Iterator[tuple[int, ...]]:
    """Yields numbers of micro-batches that add up to the batch.

    `speeds` are the pipelines' rows per second, `rows` those of their micro-batches. All but the
    last pipeline take a number near their ideal one, the last takes what is left.
    """
    ideals = [batch * speed / sum(speeds) / each for speed, each in zip(speeds, rows, strict=True)]
    others = len(rows) - 1
    near = NEAR if others == 1 else int((TRIED ** (1 / others) - 1) / 2) if others else 0
    options = [
        range(max(1, round(ideal) - near), max(1, round(ideal)) + near + 1) for ideal in ideals[:-1]
    ]
    for counts in product(*options):
        left = batch - sum(c * each for c, each in zip(counts, rows[:-1], strict=True))
        last, rest = divmod(left, rows[-1])
        if left > 0 and not rest:
            yield *counts, last
