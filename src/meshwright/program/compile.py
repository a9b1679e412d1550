"""Compiles a plan into a program: every rank's instructions for one optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace

from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import Seat, StageSeats, held_together, stage_seats
from meshwright.plan.spec import Plan
from meshwright.program.actions import Order
from meshwright.program.boundaries import Boundaries, boundaries_of, gathers, transfers
from meshwright.program.instructions import Instruction, Program, summed_layers
from meshwright.program.operations import Op
from meshwright.program.orders import orders_of
from meshwright.program.posting import no_later_than_the_next, receives_ahead
from meshwright.records import record
from meshwright.stopping import look
from meshwright.techniques import provided
from meshwright.techniques.data_parallel.buckets import (
    Bucket,
    Sum,
    gradient_buckets,
    sums_of,
    usual_bucket_bytes,
)

NORM_BYTES = 16
"""The bytes of the loss and of the squared gradient norm, eight each."""

Rewriting = Callable[[tuple[Instruction, ...]], tuple[Instruction, ...]]
"""What a technique makes of the list of a rank."""

_WHOLE = {Op.BACKWARD_INPUT: Op.BACKWARD}
"""The whole operation for the part of it that exchanges the same tensors across a boundary."""


@record
class _Group:
    """Describes a pipeline rank: the ranks that hold the same stages, and their schedule."""

    stages: dict[int, StageSeats]
    """The stages, by position in the pipeline."""
    order: Order
    boundaries: dict[int, Boundaries]
    """The messages of each stage, by position in the pipeline, without those between stages on the
    same ranks."""
    arriving: dict[int, tuple[int, ...]]
    """For the index of an action: the indices of the later actions whose receives are posted ahead
    of it."""
    last_backward: dict[int, int]
    """For each stage, the index of the action that completes its gradients."""


def compile_plan(
    plan: Plan,
    model: LayerGraph,
    *,
    bucket_bytes: int | None = None,
    clipped: bool = True,
    only: Container[int] | None = None,
) -> Program:
    """Compile a valid plan; ranks outside `only` get no instructions.

    A receive is posted `posting.AHEAD` compute instructions ahead of the one that reads it, in the
    order in which the other side sends. A send directly follows the instruction that produces its
    tensors. A reduction is posted ahead of the last backward that it needs; reductions keep the
    order in which a backward over the whole model completes their gradients. Without clipping
    (`clipped` false) the weights of each bucket are updated as soon as its gradients are summed,
    before the norm. Raises PlanError for a schedule in the plan that cannot be played.
    """
    stages = stage_seats(plan)
    size = bucket_bytes or usual_bucket_bytes(model, plan.job)
    buckets = gradient_buckets(model, plan.job, stages, size)
    rewrite = _rewriting(plan, model)
    world = tuple(range(len(plan.devices)))
    ranks: list[tuple[Instruction, ...]] = [()] * len(world)
    for group in _groups(plan, stages, model):
        look()
        first, *others = group.stages.values()
        for seat in (seat for replica in first.seats for seat in replica):
            if only is not None and seat.rank not in only:
                continue
            own = tuple(sums_of(seat.rank, buckets))
            norm = Instruction(op=Op.REDUCE_NORM, stage=first.number, ranks=world, bytes=NORM_BYTES)
            whole = Instruction(
                op=Op.OPTIMIZER_STEP,
                stage=first.number,
                layers=None if others else first.layers,
            )
            ranks[seat.rank] = rewrite(
                (
                    *_group_program(group, seat, own, model),
                    *((norm, whole) if clipped else (*_early_updates(group, own, whole), norm)),
                )
            )
    return Program(ranks=tuple(ranks))


def _rewriting(plan: Plan, model: LayerGraph) -> Rewriting:
    """Return what lets every technique, in their order, put its instructions into a rank's list."""
    found = [rewriting(plan, model) for rewriting in provided("program", "rewriting")]
    own = [each for each in found if each is not None]

    def rewrite(instructions: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
        for each in own:
            instructions = each(instructions)
        return instructions

    return rewrite


def _early_updates(
    group: _Group, sums: Sequence[tuple[Bucket, Sum]], whole: Instruction
) -> Iterator[Instruction]:
    """Yield one optimizer step for each bucket, which waits for that bucket's gradients alone.

    Before them comes one for the weights that no other rank holds, if there are any.
    """
    buckets = dict.fromkeys((bucket.layers, bucket.tied) for bucket, _ in sums)
    summed = {layer for layers, _ in buckets if layers is not None for layer in range(*layers)}
    if not buckets:
        yield whole
    elif any(not summed.issuperset(range(*stage.layers)) for stage in group.stages.values()):
        yield replace(whole, layers=None)
    for layers, tied in buckets:
        yield replace(whole, layers=layers, tied=tied)


def _groups(plan: Plan, stages: Sequence[StageSeats], model: LayerGraph) -> Iterator[_Group]:
    """Yield the pipeline ranks of all pipelines."""
    for p in range(len(plan.pipelines)):
        own = [stage for stage in stages if stage.pipeline == p]
        orders = orders_of(plan, p)
        arriving = receives_ahead(orders, [stage.position for stage in own])
        for position, order in enumerate(orders):
            held = {s: stage for s, stage in enumerate(own) if stage.position == position}
            yield _Group(
                stages=held,
                order=order,
                boundaries={s: _boundaries(stage, stages, model) for s, stage in held.items()},
                arriving=arriving[position],
                last_backward={
                    action.stage: index
                    for index, action in enumerate(order)
                    if action.op.completes_gradients
                },
            )


def _boundaries(stage: StageSeats, stages: Sequence[StageSeats], model: LayerGraph) -> Boundaries:
    """Return what a stage exchanges with other ranks, without what stays on the same ones."""
    found = boundaries_of(stage, stages, model)
    stays: set[Op] = set()
    if not stage.is_first and held_together(stage, stages[stage.number - 1]):
        stays |= {Op.RECV_F, Op.SEND_B}
    if not stage.is_last and held_together(stage, stages[stage.number + 1]):
        stays |= {Op.RECV_B, Op.SEND_F}
    return Boundaries(
        incoming={op: b for op, b in found.incoming.items() if b.op not in stays},
        outgoing={op: b for op, b in found.outgoing.items() if b.op not in stays},
    )


def _group_program(
    group: _Group, seat: Seat, sums: Sequence[tuple[Bucket, Sum]], model: LayerGraph
) -> Iterator[Instruction]:
    """Yield all instructions of one rank before the end of the step."""
    seats = {s: stage.seats[seat.replica][seat.tensor_index] for s, stage in group.stages.items()}
    reductions = _reductions(group, sums, model)
    for index, action in enumerate(group.order):
        for later in group.arriving.get(index, ()):
            op, s, micro_batch, _ = group.order[later]
            incoming = group.boundaries[s].incoming.get(_WHOLE.get(op, op))
            yield from transfers(seats[s], micro_batch, incoming)
        yield from reductions.get(index, ())
        op, s, first, last = action
        if op in (Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT):
            incoming = group.boundaries[s].incoming.get(_WHOLE.get(op, op))
            yield from gathers(seats[s], first, incoming)
        yield Instruction(
            op=op,
            stage=group.stages[s].number,
            micro_batch=first if last == first + 1 else None,
            micro_batches=None if last == first + 1 else (first, last),
            rows=seat.rows,
            layers=group.stages[s].layers,
        )
        outgoing = group.boundaries[s].outgoing.get(_WHOLE.get(op, op))
        yield from transfers(seats[s], first, outgoing)


def _reductions(
    group: _Group, sums: Sequence[tuple[Bucket, Sum]], model: LayerGraph
) -> dict[int, list[Instruction]]:
    """Return the gradient reductions, keyed by the index of the action that they precede.

    All ranks post them in one common order.
    """
    completing = [_completing(group, bucket, model) for bucket, _ in sums]
    posted = no_later_than_the_next([group.last_backward[s] for s in completing])
    found: dict[int, list[Instruction]] = {}
    for (bucket, own), s, index in zip(sums, completing, posted, strict=True):
        reduction = Instruction(
            op=Op.REDUCE_GRAD,
            stage=group.stages[s].number,
            layers=bucket.layers,
            tied=bucket.tied,
            tile=own.tile,
            ranks=own.ranks,
            bytes=own.bytes,
        )
        found.setdefault(index, []).append(reduction)
    return found


def _completing(group: _Group, bucket: Bucket, model: LayerGraph) -> int:
    """Return the stage of a pipeline rank whose backward is the last to add to a bucket."""
    layers = summed_layers(bucket.layers, bucket.tied, model)
    holders = [
        s
        for s, stage in group.stages.items()
        if any(stage.layers[0] <= layer < stage.layers[1] for layer in layers)
    ]
    return max(holders, key=lambda s: group.last_backward[s])
