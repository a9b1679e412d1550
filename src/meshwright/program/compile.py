"""Compiles a plan into a program: every rank's instructions for one optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence

from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import RankPlacement, StagePlacement, stage_placements
from meshwright.plan.spec import Plan
from meshwright.program.actions import Order
from meshwright.program.instructions import Instruction, Program, of_micro_batch
from meshwright.program.operations import Op
from meshwright.program.orders import orders_of
from meshwright.records import record
from meshwright.stopping import raise_if_stopped
from meshwright.techniques import provided
from meshwright.techniques.pipeline_parallel.boundaries import (
    Boundaries,
    boundaries_of,
    boundary_gathers,
    boundary_transfers,
    moves_once,
)

RECEIVES_AHEAD = 2
"""The number of compute instructions between posting a receive and reading it, behind which the
transfer can hide. In 1F1B, 2 covers a forward and a backward; with 1, a gradient could hide behind
a forward only."""


def receives_ahead(
    orders: Sequence[Order], groups: Sequence[int]
) -> tuple[dict[int, tuple[int, ...]], ...]:
    """Returns, for every pipeline rank, the actions whose receives are posted ahead of an action.

    The result maps the index of an action to the indices of those actions. `groups` holds the
    pipeline rank of every stage. Messages in one direction between two ranks have no tags (NCCL),
    so they are received in the order in which they were sent, some earlier than needed.
    """
    made = {
        (action.op if action.op is Op.FORWARD else Op.BACKWARD, action.stage, action.first): index
        for order in orders
        for index, action in enumerate(order)
        if action.op is not Op.BACKWARD_WEIGHT
    }
    found = []
    for group, order in enumerate(orders):
        channels: dict[tuple[int, bool], list[tuple[int, int]]] = {}
        for index, (op, stage, micro_batch, _) in enumerate(order):
            forward = op is Op.FORWARD
            source = stage - 1 if forward else stage + 1
            if op is Op.BACKWARD_WEIGHT or not 0 <= source < len(groups):
                continue
            if groups[source] != group:
                sent = made[Op.FORWARD if forward else Op.BACKWARD, source, micro_batch]
                channels.setdefault((groups[source], forward), []).append((sent, index))
        found.append(_posts(channels))
    return tuple(found)


def _posts(
    channels: dict[tuple[int, bool], list[tuple[int, int]]],
) -> dict[int, tuple[int, ...]]:
    """Chooses where a pipeline rank posts its receives, so that messages keep their order."""
    posts: dict[int, list[int]] = {}
    for messages in channels.values():
        messages.sort()
        latest = suffix_minima([max(0, index - RECEIVES_AHEAD) for _, index in messages])
        for at, (_, index) in zip(latest, messages, strict=True):
            posts.setdefault(at, []).append(index)
    return {at: tuple(indices) for at, indices in posts.items()}


def suffix_minima(places: Sequence[int]) -> list[int]:
    """Lowers each number to the least of those after it: [3, 1, 2] becomes [1, 1, 2]."""
    found = list(places)
    for k in range(len(found) - 2, -1, -1):
        found[k] = min(found[k], found[k + 1])
    return found


REDUCE_NORM_BYTES = 16
"""The bytes of the loss and of the squared gradient norm, eight each."""

_WHOLE = {Op.BACKWARD_INPUT: Op.BACKWARD}
"""The whole backward for the part of it that sends and receives what the whole one does."""


@record
class PipelineRank:
    """Describes a group of ranks that hold the same stages, and their schedule."""

    stages: dict[int, StagePlacement]
    """The stages, by position in the pipeline."""
    order: Order
    boundaries: dict[int, Boundaries]
    """The messages of each stage, by position in the pipeline."""
    arriving: dict[int, tuple[int, ...]]
    """For the index of an action: the indices of the later actions whose receives are posted ahead
    of it."""
    last_backward: dict[int, int]
    """For each stage, the index of the action that completes its gradients."""


Placed = dict[int, list[Instruction]]
"""Instructions by the index of the action that they precede."""
Emission = Callable[[PipelineRank, RankPlacement], Placed]
"""What a technique puts into the list of a rank, given its pipeline rank and its placement
there."""
Rewriting = Callable[[tuple[Instruction, ...]], tuple[Instruction, ...]]
"""What a technique makes of the list of a rank."""


def compile_plan(
    plan: Plan,
    model: LayerGraph,
    *,
    bucket_bytes: int | None = None,
    clipped: bool = True,
    only: Container[int] | None = None,
) -> Program:
    """Compiles a valid plan; ranks outside `only` get no instructions.

    A receive is posted RECEIVES_AHEAD compute instructions ahead of the one that reads it, in the
    order in which the other side sends. A send directly follows the instruction that produces its
    tensors. A reduction is posted ahead of the last backward that it needs; reductions keep the
    order in which a backward over the whole model completes their gradients. Without clipping
    (`clipped` false) the weights of each bucket are updated as soon as its gradients are summed,
    before the norm. Raises PlanError for a schedule in the plan that cannot be played.
    """
    stages = stage_placements(plan)
    emissions: list[Emission] = [
        emission(stages, plan.job, model, bucket_bytes)
        for emission in provided("program", "emission")
    ]
    rewrite = _rewriting(plan, model)
    world = tuple(range(len(plan.devices)))
    ranks: list[tuple[Instruction, ...]] = [()] * len(world)
    for group in _groups(plan, stages, model, only):
        raise_if_stopped()
        first = next(iter(group.stages.values()))
        for number, placement in enumerate(first.mesh.members):
            if only is None or placement.rank in only:
                placed = _placed(emissions, group, placement)
                computing = _group_program(group, number, placed)
                ending = _end_of_step(group, placed, world, clipped=clipped)
                ranks[placement.rank] = rewrite((*computing, *ending))
    return Program(ranks=tuple(ranks))


def _end_of_step(
    group: PipelineRank, placed: Placed, world: tuple[int, ...], *, clipped: bool
) -> tuple[Instruction, ...]:
    """Returns the norm and the updates of weights: the norm first if it scales the gradients."""
    first, *others = group.stages.values()
    norm = Instruction(op=Op.REDUCE_NORM, stage=first.number, ranks=world, bytes=REDUCE_NORM_BYTES)
    layers = None if others else first.layers
    whole = Instruction(op=Op.OPTIMIZER_STEP, stage=first.number, layers=layers)
    return (norm, whole) if clipped else (*_early_updates(group, placed, whole), norm)


def _placed(emissions: Sequence[Emission], group: PipelineRank, placement: RankPlacement) -> Placed:
    """Returns the instructions that techniques place ahead of the actions of a rank, in the order
    of techniques."""
    found: Placed = {}
    for emission in emissions:
        for index, instructions in emission(group, placement).items():
            found.setdefault(index, []).extend(instructions)
    return found


def _rewriting(plan: Plan, model: LayerGraph) -> Rewriting:
    """Returns a function by which every technique in turn changes the instructions of a rank."""
    found = [rewriting(plan, model) for rewriting in provided("program", "rewriting")]
    own = [each for each in found if each is not None]

    def rewrite(instructions: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
        for each in own:
            instructions = each(instructions)
        return instructions

    return rewrite


def _early_updates(
    group: PipelineRank, placed: Placed, whole: Instruction
) -> Iterator[Instruction]:
    """Yields one optimizer step for each bucket, which waits for that bucket's gradients alone.

    Before them comes one for the weights that no other rank holds, if there are any.
    """
    posted = (i for _, instructions in sorted(placed.items()) for i in instructions)
    buckets = dict.fromkeys((i.layers, i.tied) for i in posted if i.op.of_gradients)
    summed = {layer for layers, _ in buckets if layers is not None for layer in range(*layers)}
    if not buckets:
        yield whole
    elif any(not summed.issuperset(range(*stage.layers)) for stage in group.stages.values()):
        yield whole._replace(layers=None)
    for layers, tied in buckets:
        yield whole._replace(layers=layers, tied=tied)


def _groups(
    plan: Plan, stages: Sequence[StagePlacement], model: LayerGraph, only: Container[int] | None
) -> Iterator[PipelineRank]:
    """Yields the pipeline ranks of all pipelines."""
    moves = moves_once(only)
    for p in range(len(plan.pipelines)):
        own = [stage for stage in stages if stage.pipeline == p]
        orders = orders_of(plan, p)
        arriving = receives_ahead(orders, [stage.position for stage in own])
        for position, order in enumerate(orders):
            held = {s: stage for s, stage in enumerate(own) if stage.position == position}
            yield PipelineRank(
                stages=held,
                order=order,
                boundaries={
                    s: boundaries_of(stage, stages, model, moves) for s, stage in held.items()
                },
                arriving=arriving[position],
                last_backward={
                    action.stage: index
                    for index, action in enumerate(order)
                    if action.op.completes_gradients
                },
            )


@record
class _Pattern:
    """Holds what is alike in the instructions around an action for all micro-batches."""

    receives: list[Instruction]
    """What is posted ahead of it."""
    work: list[Instruction]
    """The gathers of what it has received, itself, and what it sends."""


def _pattern(group: PipelineRank, placement: RankPlacement, op: Op, s: int) -> _Pattern:
    """Returns the pattern of an operation of a stage on one rank."""
    stage, boundaries, whole = group.stages[s], group.boundaries[s], _WHOLE.get(op, op)
    incoming, outgoing = boundaries.incoming.get(whole), boundaries.outgoing.get(whole)
    own = Instruction(op=op, stage=stage.number, rows=placement.rows, layers=stage.layers)
    gathers = boundary_gathers(placement, incoming)
    sends = boundary_transfers(placement, outgoing)
    return _Pattern(receives=boundary_transfers(placement, incoming), work=[*gathers, own, *sends])


def _group_program(group: PipelineRank, number: int, placed: Placed) -> Iterator[Instruction]:
    """Yields the instructions of one rank that come before the end of the step (norm and update),
    given its number in the mesh."""
    patterns = {
        (op, s): _pattern(group, group.stages[s].mesh.members[number], op, s)
        for op, s in {action[:2]: None for action in group.order}
    }
    for index, (op, s, first, last) in enumerate(group.order):
        for later in group.arriving.get(index, ()):
            other, t, micro_batch, _ = group.order[later]
            yield from of_micro_batch(patterns[other, t].receives, micro_batch)
        yield from placed.get(index, ())
        work = patterns[op, s].work
        if last == first + 1:
            yield from of_micro_batch(work, first)
        else:
            yield from (i._replace(micro_batches=(first, last)) for i in work)
