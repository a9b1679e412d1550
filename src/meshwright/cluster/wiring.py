"""Reads how the GPUs of a machine are connected from the output of `nvidia-smi topo -m`."""

from __future__ import annotations

import re
from itertools import combinations

MOST_IN_MESH = 16
"""Largest number of GPUs among which a ring over NVLinks is looked for."""
_WEAKEST_FIRST = ("SYS", "NODE", "PHB", "PXB", "PIX")


def read_wiring(text: str) -> str | None:
    """Returns the weakest connection between two GPUs in the output of `nvidia-smi topo -m`."""
    return _weakest({cell for row in _wiring_rows(text) for cell in row} - {"X"})


def _wiring_rows(text: str) -> list[list[str]]:
    """Returns the connections of each GPU with every GPU; `X` with itself."""
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in text.splitlines()]
    gpus = [row for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) and "X" in row]
    return [row[1 : len(gpus) + 1] for row in gpus]


def _weakest(cells: set[str]) -> str | None:
    for weak in _WEAKEST_FIRST:
        if weak in cells:
            return weak
    lanes = [int(match[1]) for cell in cells if (match := re.fullmatch(r"NV(\d+)", cell))]
    return f"NV{min(lanes)}" if lanes else None


def read_islands(text: str, number: int) -> tuple[tuple[tuple[int, ...], ...], str | None]:
    """Returns the groups of GPUs, by index, that NVLink connects, or PCIe switches, or the socket
    of a processor, while others are connected less well, with the weakest connection inside them;
    no groups if GPUs of one would reach each other over a third only, or if the text is not about
    `number` GPUs. In a mesh of NVLinks they are groups in which every two GPUs are neighbours.

    The text is the output of `nvidia-smi topo -m`.
    """
    rows = _wiring_rows(text)
    if len(rows) != number:
        return (), None
    if _is_mesh(rows):
        return _neighbourhoods(rows), "NVLink"
    for good in (r"NV\d+", r"NV\d+|PIX|PXB", r"NV\d+|PIX|PXB|PHB|NODE"):
        near = [
            tuple(j for j, cell in enumerate(row) if cell == "X" or re.fullmatch(good, cell))
            for row in rows
        ]
        groups = tuple(dict.fromkeys(each for each in near if len(each) > 1))
        apart = all(near[index] == group for group in groups for index in group)
        if groups and apart and len(groups[0]) < len(rows):
            inside = {rows[i][j] for group in groups for i in group for j in group if i != j}
            return groups, _weakest(inside)
    return (), None


def read_mesh(text: str, number: int) -> int | None:
    """Returns the number of NVLinks that every GPU has at least, where a ring over NVLinks passes
    all GPUs though not every two are neighbours, as in a cube mesh; None for other machines."""
    rows = _wiring_rows(text)
    if len(rows) != number or not _is_mesh(rows):
        return None
    return min(sum(_lanes(cell) for cell in row) for row in rows)


def _lanes(cell: str) -> int:
    match = re.fullmatch(r"NV(\d+)", cell)
    return int(match[1]) if match else 0


def _is_mesh(rows: list[list[str]]) -> bool:
    """Returns True if NVLinks join not all pairs, and a ring over NVLinks passes every GPU."""
    joined = [{j for j, cell in enumerate(row) if _lanes(cell)} for row in rows]
    if len(rows) < 3 or all(len(each) == len(rows) - 1 for each in joined):
        return False
    if min(map(len, joined)) < 2 or len(rows) > MOST_IN_MESH:
        return False

    def goes_round(at: int, passed: frozenset[int]) -> bool:
        if len(passed) == len(rows):
            return 0 in joined[at]
        return any(goes_round(to, passed | {to}) for to in joined[at] - passed)

    return goes_round(0, frozenset({0}))


def _neighbourhoods(rows: list[list[str]]) -> tuple[tuple[int, ...], ...]:
    """Returns groups, as large as may be and of one size, of GPUs that are all neighbours."""

    def divided(left: tuple[int, ...], size: int) -> tuple[tuple[int, ...], ...] | None:
        if not left:
            return ()
        for others in combinations(left[1:], size - 1):
            group = (left[0], *others)
            if all(_lanes(rows[a][b]) for a, b in combinations(group, 2)):
                rest = divided(tuple(each for each in left if each not in group), size)
                if rest is not None:
                    return (group, *rest)
        return None

    every = tuple(range(len(rows)))
    for size in range(len(rows) // 2, 1, -1):
        found = divided(every, size) if len(rows) % size == 0 else None
        if found:
            return found
    return ()
