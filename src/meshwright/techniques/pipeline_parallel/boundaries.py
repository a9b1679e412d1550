"""Lists the messages that a stage exchanges with its neighbours, as instructions."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from meshwright.layout.boxes import Range
from meshwright.model.spec import LayerGraph, tensors_across
from meshwright.plan.ranks import RankPlacement, StagePlacement, same_ranks
from meshwright.plan.spec import BoundaryKind
from meshwright.program.instructions import Instruction
from meshwright.program.operations import Op
from meshwright.records import record
from meshwright.techniques.pipeline_parallel.operations import GATHERS
from meshwright.techniques.pipeline_parallel.rows import Move, boundary_moves, gathered


@record
class RankMoves:
    """Holds the moves from one stage to another by rank, so that a rank finds its own without a
    walk through all of them."""

    sent: dict[int, list[Move]]
    received: dict[int, list[Move]]
    gathers: dict[int, list[tuple[Range, tuple[int, ...]]]]
    """The rows whose parts a rank all-gathers, with the ranks that do so together."""


@record
class Boundary:
    """Describes the transfers in one direction across one cut of a stage."""

    op: Op
    """The operation of this stage's ranks: a send or a receive."""
    moves: RankMoves
    row_bytes: float


@record
class Boundaries:
    """Holds what a stage receives from and sends to the stages before and after it."""

    incoming: dict[Op, Boundary]
    """What it receives, by the compute instruction that reads it."""
    outgoing: dict[Op, Boundary]
    """What it sends, by the compute instruction that produces it."""


MovesBetween = Callable[[StagePlacement, StagePlacement, BoundaryKind], RankMoves]
"""The moves from one stage to another over a boundary of a kind."""


def moves_once(only: Container[int] | None = None) -> MovesBetween:
    """Returns `boundary_moves` for the stages of one plan, which are computed once: both ends of a
    boundary ask for them."""
    known: dict[tuple[int, int], RankMoves] = {}

    def moves(source: StagePlacement, target: StagePlacement, kind: BoundaryKind) -> RankMoves:
        key = source.number, target.number
        if key not in known:
            known[key] = _by_rank(boundary_moves(source, target, kind, only=only))
        return known[key]

    return moves


def _by_rank(moves: Sequence[Move]) -> RankMoves:
    found = RankMoves(sent={}, received={}, gathers={})
    for move in moves:
        found.sent.setdefault(move.source, []).append(move)
        found.received.setdefault(move.target, []).append(move)
    for rows, ranks in gathered(moves):
        for rank in ranks:
            found.gathers.setdefault(rank, []).append((rows, ranks))
    return found


def boundaries_of(
    stage: StagePlacement,
    stages: Sequence[StagePlacement],
    model: LayerGraph,
    moves: MovesBetween,
) -> Boundaries:
    """Finds what a stage receives from other ranks and sends to them in each direction, with bytes
    per row.

    Nothing moves between stages on the same ranks.
    """
    before = None if stage.is_first else stages[stage.number - 1]
    after = None if stage.is_last else stages[stage.number + 1]
    incoming, outgoing = {}, {}
    if before is not None and not same_ranks(stage, before):
        arriving = moves(before, stage, stage.boundary)
        leaving = moves(stage, before, stage.boundary)
        forward, backward = _crossing(model, stage.layers[0])
        if forward is not None:
            incoming[Op.FORWARD] = Boundary(op=Op.RECV_F, moves=arriving, row_bytes=forward)
        if backward is not None:
            outgoing[Op.BACKWARD] = Boundary(op=Op.SEND_B, moves=leaving, row_bytes=backward)
    if after is not None and not same_ranks(stage, after):
        arriving = moves(after, stage, after.boundary)
        leaving = moves(stage, after, after.boundary)
        forward, backward = _crossing(model, stage.layers[1])
        if backward is not None:
            incoming[Op.BACKWARD] = Boundary(op=Op.RECV_B, moves=arriving, row_bytes=backward)
        if forward is not None:
            outgoing[Op.FORWARD] = Boundary(op=Op.SEND_F, moves=leaving, row_bytes=forward)
    return Boundaries(incoming=incoming, outgoing=outgoing)


def _crossing(model: LayerGraph, cut: int) -> tuple[float | None, float | None]:
    """Returns the bytes of `cut_bytes`, or None in a direction in which no tensor crosses.

    A tensor without rows crosses with 0 bytes per row, which is why 0 does not mean None.
    """
    alive = tensors_across(model, cut)
    ahead, back = cut_bytes(model, cut)
    return ahead if alive else None, back if any(t.gradient for t in alive) else None


def cut_bytes(model: LayerGraph, cut: int) -> tuple[float, float]:
    """Returns the bytes per row that cross the cut before layer `cut`: forward, and backward."""
    alive = tensors_across(model, cut)
    return sum(t.bytes for t in alive), sum(t.bytes for t in alive if t.gradient)


def boundary_transfers(placement: RankPlacement, boundary: Boundary | None) -> list[Instruction]:
    """Returns this rank's messages of any micro-batch across a boundary in one direction, if there
    are any."""
    if boundary is None:
        return []
    receiving = boundary.op.kind == "receive"
    moves = boundary.moves.received if receiving else boundary.moves.sent
    return [
        Instruction(
            op=boundary.op,
            stage=placement.stage,
            peer=move.source if receiving else move.target,
            rows=move.rows,
            part=move.part,
            ranks=move.chain,
            bytes=_size(boundary, move),
        )
        for move in moves.get(placement.rank, ())
    ]


def _size(boundary: Boundary, move: Move) -> int:
    """Returns the bytes of a message."""
    size = boundary.row_bytes * (move.rows[1] - move.rows[0])
    if move.part is not None:
        size = size * (move.part.last - move.part.first) / move.part.of
    return round(size)


def boundary_gathers(placement: RankPlacement, boundary: Boundary | None) -> list[Instruction]:
    """Returns the gathers by which ranks of a replica assemble what each of them has received a
    part of, for any micro-batch."""
    if boundary is None:
        return []
    return [
        Instruction(
            op=GATHERS[boundary.op],
            stage=placement.stage,
            rows=rows,
            ranks=ranks,
            bytes=round(boundary.row_bytes * (rows[1] - rows[0])),
        )
        for rows, ranks in boundary.moves.gathers.get(placement.rank, ())
    ]
