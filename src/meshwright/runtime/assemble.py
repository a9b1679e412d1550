"""Model, plan and program to all that one rank needs to play its instructions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed import Work

from meshwright.model.graph import LayeredModel
from meshwright.model.shard import Tile, own_tile
from meshwright.plan.ranks import Seat, StageSeats, stage_seats
from meshwright.plan.spec import Plan
from meshwright.program.instructions import Instruction, Op, Program
from meshwright.program.schedules import in_flight
from meshwright.runtime.boundary import Handle, Messages
from meshwright.runtime.build import Crossing, Held, build_stage, cut_for
from meshwright.runtime.collect import Home, parameter_homes
from meshwright.runtime.dilation import Dilator
from meshwright.runtime.reduce import (
    FlatBucket,
    Key,
    Members,
    Reducer,
    group_parameters,
    make_bucket,
)
from meshwright.runtime.stage import Stage
from meshwright.runtime.start import agree, equalise
from meshwright.runtime.tensor import Team
from meshwright.runtime.world import World


@dataclass(slots=True)
class Assembly:
    """One rank, ready to start."""

    seat: Seat
    team: Team | None
    stage: Stage
    held: tuple[Held, ...]
    messages: dict[Op, Messages]
    """By what this rank does with them: SEND_F, RECV_F, SEND_B, RECV_B."""
    reducer: Reducer
    homes: tuple[Home, ...]

    @property
    def buckets(self) -> Sequence[FlatBucket]:
        """All gradients of this rank."""
        return list(self.reducer.buckets.values())


def assemble(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    plan: Plan,
    program: Program,
    world: World,
    *,
    seed: int,
    dilator: Dilator | None,
    posted: Callable[[Instruction, list[Work]], Handle],
) -> Assembly:
    """Builds this rank's stage and meets the others to start from equal weights.

    `posted` is told of every reduction that starts. Raises ModelError, PlanError, or TrainingError
    if the processes did not build the same model.
    """
    _, seat = _seat(stage_seats(plan), world.rank)
    cuts = cut_for(model, inputs, plan.job.precision, seat.rows[1] - seat.rows[0])
    own = build_own(model, cuts, plan, program, world, seed=seed, dilator=dilator, posted=posted)
    agree(program, world, own.messages)
    equalise(own.buckets, own.held, world, own.team)
    return own


def build_own(
    model: nn.Module,
    cuts: tuple[LayeredModel, LayeredModel],
    plan: Plan,
    program: Program,
    world: World,
    *,
    seed: int,
    dilator: Dilator | None,
    posted: Callable[[Instruction, list[Work]], Handle],
) -> Assembly:
    """All that one rank holds, of a model cut for its rows; nothing is communicated.

    Raises ModelError or PlanError.
    """
    stages = stage_seats(plan)
    place, seat = _seat(stages, world.rank)
    homes = parameter_homes(model, cuts[0], stages)
    width = len(place.seats[seat.replica])
    team = _team(world, seat, width, dilator)
    built = build_stage(model, cuts, place, seed=seed, device=world.device, team=team)
    own = own_tile(width, seat.tensor_index)
    buckets = _buckets(built.held, program.ranks[world.rank], built.tied, own, world)
    catch_up = (lambda: None) if dilator is None else dilator.catch_up
    return Assembly(
        seat=seat,
        team=team,
        stage=Stage(built, plan.job.precision, world.device, seed),
        held=built.held,
        messages={
            Op.SEND_F: _messages(plan, seat, built.outgoing, world, backward=False),
            Op.RECV_F: _messages(plan, seat, built.incoming, world, backward=False),
            Op.SEND_B: _messages(plan, seat, built.incoming, world, backward=True),
            Op.RECV_B: _messages(plan, seat, built.outgoing, world, backward=True),
        },
        reducer=Reducer(buckets, posted, catch_up),
        homes=homes,
    )


def _seat(stages: Sequence[StageSeats], rank: int) -> tuple[StageSeats, Seat]:
    return next(
        (stage, seat)
        for stage in stages
        for replica in stage.seats
        for seat in replica
        if seat.rank == rank
    )


def _team(world: World, seat: Seat, width: int, dilator: Dilator | None) -> Team | None:
    if world.tensor is None:
        return None
    team = Team(world.tensor, seat.tensor_index, width)
    if dilator is not None:
        team.before_sum, team.after_sum = dilator.catch_up, dilator.resume
    return team


def _buckets(
    held: Sequence[Held],
    instructions: Sequence[Instruction],
    tied: frozenset[str],
    own: Tile,
    world: World,
) -> dict[Key, FlatBucket]:
    reductions = [i for i in instructions if i.op is Op.REDUCE_GRAD]
    buckets = {}
    for key, group in group_parameters(held, reductions, tied).items():
        members = {
            i.tile: Members(world.reduce[i.ranks], len(i.ranks))
            for i in reductions
            if (i.layers, i.tied) == key
        }
        buckets[key] = make_bucket(group, own, members)
    return buckets


def _messages(
    plan: Plan, seat: Seat, tensors: Sequence[Crossing], world: World, *, backward: bool
) -> Messages:
    pipeline = plan.pipelines[seat.pipeline]
    return Messages(
        tensors,
        seat.rows,
        world.backward if backward else world.forward,
        world.device,
        backward=backward,
        chains=world.chains,
        replica=world.tensor,
        window=in_flight(plan.schedule, 0, len(pipeline.stages), pipeline.micro_batches),
    )
