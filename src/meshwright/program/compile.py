"""Plan to Program: every rank's instructions for one optimizer step."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

from meshwright.layout.rows import Move, boundary_moves
from meshwright.model.spec import LayerGraph, alive_at
from meshwright.plan.ranks import Seat, StageSeats, stage_seats
from meshwright.plan.spec import Plan
from meshwright.program.buckets import BUCKET_BYTES, Bucket, buckets_of, gradient_buckets
from meshwright.program.instructions import RECEIVES, Instruction, Op, Program
from meshwright.program.schedules import Action, actions
from meshwright.records import record

NORM_BYTES = 16
"""Loss and squared gradient norm, two numbers of eight bytes."""


def compile_plan(
    plan: Plan,
    model: LayerGraph,
    *,
    bucket_bytes: int = BUCKET_BYTES,
    only: Container[int] | None = None,
) -> Program:
    """The program of a valid plan; ranks that are not among `only` get no instructions.

    A receive is posted one compute instruction ahead of the one that reads it, a send right after
    the one that makes it, and the reductions right before the last backward, in the order in which
    a backward over the whole model completes their gradients.
    """
    stages = stage_seats(plan)
    buckets = gradient_buckets(model, plan.job, stages, bucket_bytes)
    world = tuple(range(len(plan.devices)))
    ranks: list[tuple[Instruction, ...]] = [()] * len(world)
    for stage in stages:
        boundaries = _boundaries(stage, stages, model)
        pipeline = plan.pipelines[stage.pipeline]
        first = next(s.number for s in stages if s.pipeline == stage.pipeline)
        order = actions(
            plan.schedule, stage.number - first, len(pipeline.stages), pipeline.micro_batches
        )
        for seat in (seat for replica in stage.seats for seat in replica):
            if only is not None and seat.rank not in only:
                continue
            own = buckets_of(seat.rank, seat.tensor_index, buckets)
            ranks[seat.rank] = (
                *_stage_program(stage, seat, order, boundaries, own),
                Instruction(op=Op.REDUCE_NORM, stage=stage.number, ranks=world, bytes=NORM_BYTES),
                Instruction(op=Op.OPTIMIZER_STEP, stage=stage.number, layers=stage.layers),
            )
    return Program(ranks=tuple(ranks))


@record
class _Boundary:
    """Transfers of one direction at one end of a stage."""

    op: Op
    """What the ranks of this stage do: a send or a receive."""
    moves: tuple[Move, ...]
    row_bytes: float


@record
class _Boundaries:
    """All that a stage exchanges: with the stage before it and the one after."""

    incoming: dict[Op, _Boundary]
    """By the compute instruction that reads it."""
    outgoing: dict[Op, _Boundary]
    """By the compute instruction that makes it."""


def _boundaries(stage: StageSeats, stages: Sequence[StageSeats], model: LayerGraph) -> _Boundaries:
    before = None if stage.is_first else stages[stage.number - 1]
    after = None if stage.is_last else stages[stage.number + 1]
    forward_in, backward_out = cut_bytes(model, stage.layers[0])
    forward_out, backward_in = cut_bytes(model, stage.layers[1])
    incoming, outgoing = {}, {}
    if before is not None:
        arriving, leaving = boundary_moves(before, stage), boundary_moves(stage, before)
        incoming[Op.FORWARD] = _Boundary(op=Op.RECV_F, moves=arriving, row_bytes=forward_in)
        outgoing[Op.BACKWARD] = _Boundary(op=Op.SEND_B, moves=leaving, row_bytes=backward_out)
    if after is not None:
        arriving, leaving = boundary_moves(after, stage), boundary_moves(stage, after)
        incoming[Op.BACKWARD] = _Boundary(op=Op.RECV_B, moves=arriving, row_bytes=backward_in)
        outgoing[Op.FORWARD] = _Boundary(op=Op.SEND_F, moves=leaving, row_bytes=forward_out)
    return _Boundaries(incoming=incoming, outgoing=outgoing)


def cut_bytes(model: LayerGraph, cut: int) -> tuple[float, float]:
    """Bytes per row that cross a cut before layer `cut`: forward, and backward."""
    alive = alive_at(model, cut)
    return sum(t.bytes for t in alive), sum(t.bytes for t in alive if t.gradient)


def _stage_program(
    stage: StageSeats,
    seat: Seat,
    order: Sequence[Action],
    boundaries: _Boundaries,
    buckets: Sequence[Bucket],
) -> Iterator[Instruction]:
    last_backward = max(i for i, (op, _) in enumerate(order) if op is Op.BACKWARD)
    arriving = [(micro_batch, boundaries.incoming.get(op)) for op, micro_batch in order]
    yield from _transfers(seat, *arriving[0])
    for i, (op, micro_batch) in enumerate(order):
        if i + 1 < len(order):
            yield from _transfers(seat, *arriving[i + 1])
        if i == last_backward:
            yield from _reductions(seat, buckets)
        yield Instruction(
            op=op,
            stage=stage.number,
            micro_batch=micro_batch,
            rows=seat.rows,
            layers=stage.layers,
        )
        yield from _transfers(seat, micro_batch, boundaries.outgoing.get(op))


def _transfers(seat: Seat, micro_batch: int, boundary: _Boundary | None) -> Iterator[Instruction]:
    """This rank's part of what crosses a boundary one way, if anything does."""
    if boundary is None or not boundary.row_bytes:
        return
    receiving = boundary.op in RECEIVES
    for move in boundary.moves:
        if (move.target if receiving else move.source) == seat.rank:
            yield Instruction(
                op=boundary.op,
                stage=seat.stage,
                micro_batch=micro_batch,
                peer=move.source if receiving else move.target,
                rows=move.rows,
                bytes=round(boundary.row_bytes * (move.rows[1] - move.rows[0])),
            )


def _reductions(seat: Seat, buckets: Sequence[Bucket]) -> Iterator[Instruction]:
    for bucket in buckets:
        yield Instruction(
            op=Op.REDUCE_GRAD,
            stage=seat.stage,
            layers=bucket.layers,
            tied=bucket.tied,
            ranks=bucket.ranks[seat.tensor_index],
            bytes=bucket.bytes,
        )
