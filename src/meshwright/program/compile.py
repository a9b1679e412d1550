"""Plan to Program: every rank's instructions for one optimizer step."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import Seat, StageSeats, stage_seats
from meshwright.plan.spec import Plan
from meshwright.program.boundaries import Boundaries, boundaries_of, transfers
from meshwright.program.buckets import BUCKET_BYTES, gradient_buckets, reductions
from meshwright.program.instructions import Instruction, Op, Program
from meshwright.program.schedules import Action, actions

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
        boundaries = boundaries_of(stage, stages, model)
        pipeline = plan.pipelines[stage.pipeline]
        first = next(s.number for s in stages if s.pipeline == stage.pipeline)
        order = actions(
            plan.schedule, stage.number - first, len(pipeline.stages), pipeline.micro_batches
        )
        for seat in (seat for replica in stage.seats for seat in replica):
            if only is not None and seat.rank not in only:
                continue
            own = tuple(reductions(seat.rank, stage.number, buckets))
            ranks[seat.rank] = (
                *_stage_program(stage, seat, order, boundaries, own),
                Instruction(op=Op.REDUCE_NORM, stage=stage.number, ranks=world, bytes=NORM_BYTES),
                Instruction(op=Op.OPTIMIZER_STEP, stage=stage.number, layers=stage.layers),
            )
    return Program(ranks=tuple(ranks))


def _stage_program(
    stage: StageSeats,
    seat: Seat,
    order: Sequence[Action],
    boundaries: Boundaries,
    reductions: Sequence[Instruction],
) -> Iterator[Instruction]:
    last_backward = max(i for i, (op, _) in enumerate(order) if op is Op.BACKWARD)
    arriving = [(micro_batch, boundaries.incoming.get(op)) for op, micro_batch in order]
    yield from transfers(seat, *arriving[0])
    for i, (op, micro_batch) in enumerate(order):
        if i + 1 < len(order):
            yield from transfers(seat, *arriving[i + 1])
        if i == last_backward:
            yield from reductions
        yield Instruction(
            op=op,
            stage=stage.number,
            micro_batch=micro_batch,
            rows=seat.rows,
            layers=stage.layers,
        )
        yield from transfers(seat, micro_batch, boundaries.outgoing.get(op))
