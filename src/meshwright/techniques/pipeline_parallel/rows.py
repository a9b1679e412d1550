"""Computes the moves of a row-sharded, tensor-replicated activation between two stages of any
widths."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from functools import lru_cache
from math import lcm

from meshwright.cluster.spec import node_of
from meshwright.layout.boxes import Range
from meshwright.layout.reshard import reshard
from meshwright.layout.shares import Share
from meshwright.layout.tiles import Layout, UnitTask, unit_tasks
from meshwright.plan.ranks import StageSeats
from meshwright.plan.spec import BoundaryKind
from meshwright.records import record


@record
class Move:
    """Rows that one rank sends to another."""

    source: int
    target: int
    rows: Range
    """Rows [first, last) within the micro-batch."""
    part: Share | None = None
    """The share that is sent of each tensor's flattened rows, cut into equal pieces; None for
    all."""
    chain: tuple[int, ...] = ()
    """Ranks of a broadcast chain: the source, then all receivers; empty if the move is no
    broadcast."""


def boundary_moves(
    source: StageSeats,
    target: StageSeats,
    kind: BoundaryKind = "direct",
    *,
    only: Container[int] | None = None,
) -> tuple[Move, ...]:
    """Return the moves that give every target rank its rows once, whatever the two meshes look
    like.

    Activations at a boundary are the same on all tensor ranks of a replica. `direct`: target tensor
    rank t takes its rows from source tensor rank t modulo the source's width, so equal widths pair
    off and a wider source spreads its senders. `scatter_gather`: each tensor rank of the source
    sends an equal part, each of the target receives one, and the target's ranks then all-gather
    them. `broadcast`: one tensor rank of the source sends to all of the target's; senders and order
    are chosen so that the nodes' interfaces are equally busy and rarely wait for each other. With
    `only`, moves between two other ranks may be missing.
    """
    if kind == "broadcast":
        return tuple(_broadcasts(source, target))
    tasks = _tasks(source, target, only if kind == "direct" else None)
    moves = _scattered if kind == "scatter_gather" else _direct
    return tuple(move for task in tasks for move in moves(task))


def gathered(moves: Sequence[Move]) -> tuple[tuple[Range, tuple[int, ...]], ...]:
    """Return the rows whose parts several ranks must all-gather, with these ranks in ascending
    order."""
    found: dict[Range, dict[int, None]] = {}
    for move in moves:
        if move.part is not None:
            found.setdefault(move.rows, {})[move.target] = None
    return tuple((rows, tuple(sorted(ranks))) for rows, ranks in found.items() if len(ranks) > 1)


def _tasks(
    source: StageSeats, target: StageSeats, only: Container[int] | None
) -> Iterator[UnitTask]:
    """Yield the unit tasks between two stages that no rank holds both of."""
    ranks = [seat.rank for stage in (source, target) for each in stage.seats for seat in each]
    tasks, touching = _numbered_tasks(_rows(source), _rows(target))
    if only is not None:
        wanted = {
            task for seat, rank in enumerate(ranks) if rank in only for task in touching[seat]
        }
        tasks = tuple(tasks[number] for number in sorted(wanted))
    for task in tasks:
        yield UnitTask(
            box=task.box,
            holders=tuple(ranks[seat] for seat in task.holders),
            receivers=tuple(ranks[seat] for seat in task.receivers),
        )


def _rows(stage: StageSeats) -> tuple[Range, ...]:
    return tuple(seat.rows for replica in stage.seats for seat in replica)


@lru_cache(maxsize=8)  # the cuts of a plan have few different pairs of meshes
def _numbered_tasks(
    source: tuple[Range, ...], target: tuple[Range, ...]
) -> tuple[tuple[UnitTask, ...], tuple[tuple[int, ...], ...]]:
    """Return the unit tasks between seats with these rows, and the tasks in which each seat takes
    part.

    Seats are numbered from 0: first those of the source, then those of the target.
    """
    holding: Layout = {seat: ((rows,),) for seat, rows in enumerate(source)}
    wanting: Layout = {seat: ((rows,),) for seat, rows in enumerate(target, len(source))}
    tasks = unit_tasks(holding, wanting)
    touching: list[list[int]] = [[] for _ in (*source, *target)]
    for number, task in enumerate(tasks):
        for seat in (*task.holders, *task.receivers):
            touching[seat].append(number)
    return tasks, tuple(map(tuple, touching))


def _layout(stage: StageSeats) -> Layout:
    return {seat.rank: ((seat.rows,),) for replica in stage.seats for seat in replica}


def _direct(task: UnitTask) -> list[Move]:
    (rows,) = task.box
    return [
        Move(source=task.holders[t % len(task.holders)], target=rank, rows=rows)
        for t, rank in enumerate(task.receivers)
    ]


def _broadcasts(source: StageSeats, target: StageSeats) -> Iterator[Move]:
    nodes = {
        seat.rank: node_of(seat.device)
        for stage in (source, target)
        for replica in stage.seats
        for seat in replica
    }
    for transfer in reshard(_layout(source), _layout(target), nodes):
        (rows,) = transfer.box
        several = len(transfer.receivers) > 1
        chain = (transfer.source, *transfer.receivers) if several else ()
        for rank in transfer.receivers:
            yield Move(source=transfer.source, target=rank, rows=rows, chain=chain)


def _scattered(task: UnitTask) -> list[Move]:
    """Return the moves of a flattened tensor from even parts over the holders to even parts over
    the receivers."""
    (rows,) = task.box
    of = lcm(len(task.holders), len(task.receivers))
    if of == 1:
        return _direct(task)
    pieces = unit_tasks(_divided(of, task.holders), _divided(of, sorted(task.receivers)))
    return [
        Move(
            source=piece.holders[0],
            target=piece.receivers[0],
            rows=rows,
            part=Share(first=piece.box[0][0], last=piece.box[0][1], of=of),
        )
        for piece in pieces
    ]


def _divided(size: int, ranks: Sequence[int]) -> Layout:
    step = size // len(ranks)
    return {rank: (((k * step, (k + 1) * step),),) for k, rank in enumerate(ranks)}
