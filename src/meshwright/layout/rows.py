"""Moves of a row-sharded, tensor-replicated activation between two stages of any widths."""

from __future__ import annotations

from itertools import islice

from meshwright.plan.ranks import StageSeats
from meshwright.records import record


@record
class Move:
    """Rows that one rank hands to another."""

    source: int
    target: int
    rows: tuple[int, int]
    """[first, last) within the micro-batch."""


def boundary_moves(source: StageSeats, target: StageSeats) -> tuple[Move, ...]:
    """Every target rank receives its rows once, whatever the two meshes look like.

    Activations at a boundary are the same on all tensor ranks of a replica, so target tensor rank
    t takes its rows from source tensor rank t modulo the source's width: equal widths pair off, a
    wider source spreads its senders.
    """
    moves = []
    first = 0
    for target_replica in target.seats:
        while source.seats[first][0].rows[1] <= target_replica[0].rows[0]:
            first += 1
        for source_replica in islice(source.seats, first, None):
            low = max(target_replica[0].rows[0], source_replica[0].rows[0])
            high = min(target_replica[0].rows[1], source_replica[0].rows[1])
            if low >= high:
                break
            for t, seat in enumerate(target_replica):
                sender = source_replica[t % len(source_replica)]
                moves.append(Move(source=sender.rank, target=seat.rank, rows=(low, high)))
    return tuple(moves)
