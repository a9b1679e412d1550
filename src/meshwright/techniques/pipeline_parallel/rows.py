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
from meshwright.plan.ranks import StagePlacement
from meshwright.plan.spec import BoundaryKind
from meshwright.records import record


@record
class Move:
    """Says which rows one rank sends to another."""

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
    source: StagePlacement,
    target: StagePlacement,
    kind: BoundaryKind = "direct",
    *,
    only: Container[int] | None = None,
) -> tuple[Move, ...]:
    """Returns the moves that give every target rank its rows once, whatever the two meshes look
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
    """Returns the rows whose parts several ranks must all-gather, with these ranks in ascending
    order."""
    found: dict[Range, dict[int, None]] = {}
    for move in moves:
        if move.part is not None:
            found.setdefault(move.rows, {})[move.target] = None
    return tuple((rows, tuple(sorted(ranks))) for rows, ranks in found.items() if len(ranks) > 1)


def _tasks(
    source: StagePlacement, target: StagePlacement, only: Container[int] | None
) -> Iterator[UnitTask]:
    """Yields the unit tasks between two stages that have no rank in common."""
    ranks = [placement.rank for stage in (source, target) for placement in stage.mesh.members]
    tasks, touching = _numbered_tasks(_rows(source), _rows(target))
    if only is not None:
        wanted = {
            task
            for placement, rank in enumerate(ranks)
            if rank in only
            for task in touching[placement]
        }
        tasks = tuple(tasks[number] for number in sorted(wanted))
    for task in tasks:
        yield UnitTask(
            box=task.box,
            holders=tuple(ranks[placement] for placement in task.holders),
            receivers=tuple(ranks[placement] for placement in task.receivers),
        )


def _rows(stage: StagePlacement) -> tuple[Range, ...]:
    return tuple(placement.rows for placement in stage.mesh.members)


@lru_cache(maxsize=8)  # the cuts of a plan have few different pairs of meshes
def _numbered_tasks(
    source: tuple[Range, ...], target: tuple[Range, ...]
) -> tuple[tuple[UnitTask, ...], tuple[tuple[int, ...], ...]]:
    """Returns the unit tasks between placements with these rows, and the tasks in which each
    placement takes part.

    Seats are numbered from 0: first those of the source, then those of the target."""
    holding: Layout = {placement: ((rows,),) for placement, rows in enumerate(source)}
    wanting: Layout = {placement: ((rows,),) for placement, rows in enumerate(target, len(source))}
    tasks = unit_tasks(holding, wanting)
    touching: list[list[int]] = [[] for _ in (*source, *target)]
    for number, task in enumerate(tasks):
        for placement in (*task.holders, *task.receivers):
            touching[placement].append(number)
    return tasks, tuple(map(tuple, touching))


def _layout(stage: StagePlacement) -> Layout:
    return {placement.rank: ((placement.rows,),) for placement in stage.mesh.members}


def _direct(task: UnitTask) -> list[Move]:
    (rows,) = task.box
    return [
        Move(source=task.holders[t % len(task.holders)], target=rank, rows=rows)
        for t, rank in enumerate(task.receivers)
    ]


def _broadcasts(source: StagePlacement, target: StagePlacement) -> Iterator[Move]:
    nodes = {
        placement.rank: node_of(placement.device)
        for stage in (source, target)
        for placement in stage.mesh.members
    }
    for transfer in reshard(_layout(source), _layout(target), nodes):
        (rows,) = transfer.box
        several = len(transfer.receivers) > 1
        chain = (transfer.source, *transfer.receivers) if several else ()
        for rank in transfer.receivers:
            yield Move(source=transfer.source, target=rank, rows=rows, chain=chain)


def _scattered(task: UnitTask) -> list[Move]:
    """Returns the moves of a flattened tensor from even parts over the holders to even parts over
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
