"""Builds all that one rank needs to run its instructions, from model, plan and program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import Work

from meshwright.layout.shares import Share, own_share
from meshwright.model.graph import LayeredModel
from meshwright.plan.ranks import Seat, StageSeats, held_together, seats_of, stage_seats
from meshwright.plan.spec import Plan
from meshwright.program.instructions import Instruction, Key, Program
from meshwright.program.operations import Op
from meshwright.runtime.build import BuiltStage, Crossing, Held, build_stages, cut_for
from meshwright.runtime.debug import Tracer
from meshwright.runtime.observer import UNOBSERVED, Observer
from meshwright.runtime.parameters import Parameter, parameters_of
from meshwright.runtime.run import TrainingOptions
from meshwright.runtime.stage import Stage
from meshwright.runtime.start import agree, equalise
from meshwright.runtime.world import World
from meshwright.techniques import provided
from meshwright.techniques.data_parallel.runtime import (
    FlatBucket,
    Members,
    Reducer,
    group_parameters,
    make_bucket,
)
from meshwright.techniques.pipeline_parallel.runtime import Handle, Messages
from meshwright.techniques.tensor_parallel.runtime import Team


@dataclass(slots=True)
class Place:
    """One of the stages that a rank holds, and its connections to the stages before and after."""

    seat: Seat
    stage: Stage
    messages: dict[Op, Messages]
    """This stage's messages in each direction, keyed by what this rank does with them: SEND_F,
    RECV_F, SEND_B or RECV_B."""
    previous_here: bool
    """True if this rank also holds the previous stage, so that tensors between the two are handed
    over without a message."""
    next_here: bool
    """True if this rank also holds the next stage."""


@dataclass(slots=True)
class Assembly:
    """One rank's stages, parameters and gradient buckets, ready for the first step."""

    places: dict[int, Place]
    """This rank's stages, keyed by stage number."""
    device: torch.device
    team: Team | None
    held: tuple[Held, ...]
    reducer: Reducer
    parameters: dict[str, Parameter]
    """All of the model, by name."""

    @property
    def buckets(self) -> Sequence[FlatBucket]:
        """All gradient buckets of this rank."""
        return list(self.reducer.buckets.values())


def assemble(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    plan: Plan,
    program: Program,
    world: World,
    *,
    options: TrainingOptions,
    observer: Observer = UNOBSERVED,
    posted: Callable[[Instruction, list[Work]], Handle],
) -> Assembly:
    """Builds this rank's stages, then copies initial weights so that all ranks start from equal
    ones.

    `posted` is called with every gradient reduction that starts. Raises ModelError, PlanError, or
    TrainingError if the processes did not build the same model.
    """
    stages = stage_seats(plan)
    _, seat = _own_seats(stages, world.rank)[0]
    cuts = cut_for(model, inputs, plan.job.precision, seat.rows[1] - seat.rows[0])
    own = build_own(
        model, cuts, plan, program, world, options=options, observer=observer, posted=posted
    )
    agree(program, world, {n: place.messages for n, place in own.places.items()})
    equalise(own.parameters.values(), stages, own.held, world)
    return own


def build_own(
    model: nn.Module,
    cuts: tuple[LayeredModel, LayeredModel],
    plan: Plan,
    program: Program,
    world: World,
    *,
    options: TrainingOptions,
    observer: Observer = UNOBSERVED,
    posted: Callable[[Instruction, list[Work]], Handle],
) -> Assembly:
    """Builds all that one rank holds, without communication.

    `cuts` is what `cut_for` returns for this rank's number of rows. Raises ModelError or PlanError.
    """
    stages = stage_seats(plan)
    mine = _own_seats(stages, world.rank)
    parameters = parameters_of(model, cuts[0])
    place, seat = mine[0]
    width = len(place.seats[seat.replica])
    team = _team(world, seat, width, observer)
    built = build_stages(
        model,
        cuts,
        parameters,
        [place for place, _ in mine],
        seed=options.seed,
        device=world.device,
        team=team,
    )
    held = tuple({one.name: one for each in built for one in each.held}.values())
    own = own_share(width, seat.tensor_index)
    buckets = _buckets(held, program.ranks[world.rank], own, world)
    return Assembly(
        places={
            place.number: _place(each, place, seat, stages, plan, world, options, observer)
            for each, (place, seat) in zip(built, mine, strict=True)
        },
        device=world.device,
        team=team,
        held=held,
        reducer=Reducer(buckets, posted, observer.posting),
        parameters=parameters,
    )


def _place(
    built: BuiltStage,
    place: StageSeats,
    seat: Seat,
    stages: Sequence[StageSeats],
    plan: Plan,
    world: World,
    options: TrainingOptions,
    observer: Observer,
) -> Place:
    def messages(tensors: Sequence[Crossing], *, backward: bool, incoming: bool) -> Messages:
        return Messages(
            tensors,
            seat.rows,
            world.backward if backward else world.forward,
            world.device,
            backward=backward,
            window=plan.pipelines[seat.pipeline].micro_batches,
            lane=(place.number if incoming else place.number + 1, len(stages) + 1),
            chains=world.chains,
            replica=world.tensor,
            debug=options.debug,
        )

    precision = plan.job.precision
    stage = Stage(built, precision, world.device, options.seed, compile=options.compile)
    if options.debug:
        stage.tracer = Tracer(place.number, built.held, backward=precision != "fp16")
    if observer is not UNOBSERVED:
        stage.between_layers = observer.between_layers
    return Place(
        seat=seat,
        stage=stage,
        messages={
            Op.SEND_F: messages(built.outgoing, backward=False, incoming=False),
            Op.RECV_F: messages(built.incoming, backward=False, incoming=True),
            Op.SEND_B: messages(built.incoming, backward=True, incoming=True),
            Op.RECV_B: messages(built.outgoing, backward=True, incoming=False),
        },
        previous_here=not place.is_first and held_together(stages[place.number - 1], place),
        next_here=not place.is_last and held_together(place, stages[place.number + 1]),
    )


def _own_seats(stages: Sequence[StageSeats], rank: int) -> list[tuple[StageSeats, Seat]]:
    """Returns the stages that a rank holds, in layer order, each with its placement in it."""
    return [(stages[seat.stage], seat) for seat in seats_of(stages, rank)]


def _team(world: World, seat: Seat, width: int, observer: Observer) -> Team | None:
    if world.tensor is None:
        return None
    team = Team(world.tensor, seat.tensor_index, width)
    team.waiting = observer.waiting_inside
    return team


def _buckets(
    held: Sequence[Held],
    instructions: Sequence[Instruction],
    own: Share,
    world: World,
) -> dict[Key, FlatBucket]:
    reductions = [i for i in instructions if i.op.of_gradients]
    buckets = {}
    for key, group in group_parameters(held, reductions).items():
        members = {
            i.tile: Members(world.reduce[i.ranks], len(i.ranks))
            for i in reductions
            if (i.layers, i.tied) == key
        }
        buckets[key] = make_bucket(group, own, members)
    for prepare in provided("runtime", "prepare"):
        for i in reductions:
            prepare(buckets[i.layers, i.tied], i)
    return buckets
