"""Checks and reads `[matrix]`: the links of an irregular cluster, pair by pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations

from meshwright import units
from meshwright.cluster.entries import MatrixEntry
from meshwright.cluster.ranges import BANDWIDTH, LATENCY, out_of_range
from meshwright.cluster.spec import DirectLink, Link
from meshwright.errors import Problem

NONE = "-"
"""The entry of a pair that has no direct link and goes through the network."""

Rows = tuple[tuple[str, ...], ...]


def _latencies(matrix: MatrixEntry) -> Rows:
    """Returns all rows of latencies, even if the file gives one latency for all pairs."""
    if len(matrix.latency) == 1 and len(matrix.latency[0]) == 1 and len(matrix.nodes) > 1:
        return tuple(
            tuple(NONE if given == NONE else matrix.latency[0][0] for given in row)
            for row in matrix.bandwidth
        )
    return matrix.latency


def matrix_problems(matrix: MatrixEntry, names: set[str], source: str) -> Iterator[Problem]:
    """Yields the mistakes in the node names, the shape, the symmetry and the entries."""
    seen: set[str] = set()
    for index, name in enumerate(matrix.nodes):
        if name not in names:
            yield Problem(source, f"matrix.nodes[{index}]", repr(name), "the name of a node")
        if name in seen:
            yield Problem(source, f"matrix.nodes[{index}]", f"{name!r} again", "each node once")
        seen.add(name)
    size = len(matrix.nodes)
    shapes = [
        *_shape_problems("matrix.bandwidth", matrix.bandwidth, size, source),
        *_shape_problems("matrix.latency", _latencies(matrix), size, source),
    ]
    yield from shapes
    if shapes:
        return
    for row, column in combinations(range(size), 2):
        yield from _cell_problems(matrix, row, column, source)


def _shape_problems(field: str, rows: Rows, size: int, source: str) -> Iterator[Problem]:
    if len(rows) != size:
        wanted = f"{size} rows, one per node"
        yield Problem(source, field, f"{len(rows)} rows", wanted)
    for index, row in enumerate(rows):
        if len(row) != size:
            wanted = f"{size} entries, one per node"
            yield Problem(source, f"{field}[{index}]", f"{len(row)} entries", wanted)
        elif len(rows) == size and row[index] != NONE:
            where = f"{field}[{index}][{index}]"
            yield Problem(
                source, where, repr(row[index]), f"{NONE!r}: a node has no link to itself"
            )


def _cell_problems(matrix: MatrixEntry, row: int, column: int, source: str) -> Iterator[Problem]:
    latencies = _latencies(matrix)
    bandwidth = _mirrored("matrix.bandwidth", matrix.bandwidth, row, column)
    latency = _mirrored("matrix.latency", latencies, row, column)
    for field, there, back, read, allowed in (
        (*bandwidth, units.parse_bandwidth, BANDWIDTH),
        (*latency, units.parse_seconds, LATENCY),
    ):
        try:
            value, other = _read_cell(there, read), _read_cell(back, read)
        except ValueError as failure:
            yield Problem(source, field, f"{there!r} (mirrored: {back!r})", str(failure))
            continue
        if value != other:
            wanted = f"the same as in [{column}][{row}], {back!r}: links are symmetric"
            yield Problem(source, field, repr(there), wanted)
        elif value is not None:
            yield from out_of_range(field, value, allowed, source)
    if (matrix.bandwidth[row][column] == NONE) != (latencies[row][column] == NONE):
        wanted = f"a latency where there is a bandwidth, else {NONE!r}"
        yield Problem(source, latency[0], repr(latencies[row][column]), wanted)


def _mirrored(field: str, rows: Rows, row: int, column: int) -> tuple[str, str, str]:
    return f"{field}[{row}][{column}]", rows[row][column], rows[column][row]


def _read_cell(text: str, read: Callable[[str], float]) -> float | None:
    return None if text == NONE else read(text)


def matrix_links(matrix: MatrixEntry) -> Iterator[DirectLink]:
    """Yields the direct link of each pair that has one. The matrix must be free of problems."""
    latencies = _latencies(matrix)
    for row, column in combinations(range(len(matrix.nodes)), 2):
        if matrix.bandwidth[row][column] != NONE:
            link = Link(
                bandwidth=units.parse_bandwidth(matrix.bandwidth[row][column]),
                latency=units.parse_seconds(latencies[row][column]),
            )
            yield DirectLink(between=(matrix.nodes[row], matrix.nodes[column]), link=link)
