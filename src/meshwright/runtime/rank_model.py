"""Builds all that one rank needs to run its instructions, from model, plan and program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import Work

from meshwright.cluster.spec import Precision
from meshwright.layout.shares import Share, own_share
from meshwright.model.graph import LayeredModel
from meshwright.plan.ranks import (
    RankPlacement,
    StagePlacement,
    placements_of,
    same_ranks,
    stage_placements,
)
from meshwright.plan.spec import Plan
from meshwright.program.instructions import GradientKey, Instruction, Program
from meshwright.program.operations import Op
from meshwright.runtime.agreement import agree_on_messages, broadcast_parameters
from meshwright.runtime.build_stages import (
    BoundaryTensor,
    BuiltStage,
    LocalParameter,
    build_stages,
    cut_for,
)
from meshwright.runtime.debug import NonFiniteCheck
from meshwright.runtime.flat_buckets import (
    FlatBucket,
    SumGroup,
    group_parameters,
    make_bucket,
)
from meshwright.runtime.handles import Handle
from meshwright.runtime.observer import UNOBSERVED, Observer
from meshwright.runtime.parameters import Parameter, parameters_of
from meshwright.runtime.run_folder import TrainingOptions
from meshwright.runtime.stage import StageModule
from meshwright.runtime.world import World
from meshwright.techniques import provided
from meshwright.techniques.data_parallel.runtime import Reducer
from meshwright.techniques.pipeline_parallel.runtime import BoundaryMessages
from meshwright.techniques.tensor_parallel.runtime import TensorParallelGroup


@dataclass(slots=True)
class LocalStage:
    """Holds a stage of this rank, and its connections to the stages before and after it."""

    placement: RankPlacement
    stage: StageModule
    messages: dict[Op, BoundaryMessages]
    """This stage's messages in each direction, keyed by what this rank does with them: SEND_F,
    RECV_F, SEND_B or RECV_B."""
    previous_here: bool
    """True if this rank also holds the previous stage, so that tensors between the two are handed
    over without a message."""
    next_here: bool
    """True if this rank also holds the next stage."""


@dataclass(slots=True)
class RankModel:
    """Holds one rank's stages, parameters and gradient buckets, ready for the first step."""

    stages: dict[int, LocalStage]
    """This rank's stages, keyed by stage number."""
    device: torch.device
    tensor_group: TensorParallelGroup | None
    local_parameters: tuple[LocalParameter, ...]
    reducer: Reducer
    parameters: dict[str, Parameter]
    """All of the model, by name."""

    @property
    def buckets(self) -> Sequence[FlatBucket]:
        """Returns all gradient buckets of this rank."""
        return list(self.reducer.buckets.values())


def build_rank_model(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    plan: Plan,
    program: Program,
    world: World,
    *,
    options: TrainingOptions,
    observer: Observer = UNOBSERVED,
    posted: Callable[[Instruction, list[Work]], Handle],
) -> RankModel:
    """Builds this rank's stages, then copies initial weights so that all ranks start from equal
    ones.

    `posted` is called with every gradient reduction that starts. Raises ModelError, PlanError, or
    TrainingError if the processes did not build the same model.
    """
    stages = stage_placements(plan)
    _, placement = _own_seats(stages, world.rank)[0]
    cuts = cut_for(model, inputs, plan.job.precision, placement.rows[1] - placement.rows[0])
    own = build_local_layers(
        model, cuts, plan, program, world, options=options, observer=observer, posted=posted
    )
    agree_on_messages(program, world, {n: place.messages for n, place in own.stages.items()})
    broadcast_parameters(own.parameters.values(), stages, own.local_parameters, world)
    return own


def build_local_layers(
    model: nn.Module,
    cuts: tuple[LayeredModel, LayeredModel],
    plan: Plan,
    program: Program,
    world: World,
    *,
    options: TrainingOptions,
    observer: Observer = UNOBSERVED,
    posted: Callable[[Instruction, list[Work]], Handle],
) -> RankModel:
    """Builds all that one rank holds, without communication.

    `cuts` is what `cut_for` returns for this rank's number of rows. Raises ModelError or PlanError.
    """
    stages = stage_placements(plan)
    mine = _own_seats(stages, world.rank)
    parameters = parameters_of(model, cuts[0])
    _, placement = mine[0]
    tensor_group = _tensor_group(world, placement, observer)
    built = build_stages(
        model,
        cuts,
        parameters,
        [place for place, _ in mine],
        seed=options.seed,
        device=world.device,
        tensor_group=tensor_group,
    )
    held = tuple({one.name: one for each in built for one in each.local_parameters}.values())
    own = own_share(placement.width("tensor"), placement.index("tensor"))
    buckets = _buckets(held, program.ranks[world.rank], own, world)
    return RankModel(
        stages={
            place.number: _place(each, place, placement, stages, plan, world, options, observer)
            for each, (place, placement) in zip(built, mine, strict=True)
        },
        device=world.device,
        tensor_group=tensor_group,
        local_parameters=held,
        reducer=Reducer(buckets, posted, observer.posting),
        parameters=parameters,
    )


def _place(
    built: BuiltStage,
    place: StagePlacement,
    placement: RankPlacement,
    stages: Sequence[StagePlacement],
    plan: Plan,
    world: World,
    options: TrainingOptions,
    observer: Observer,
) -> LocalStage:
    def messages(
        tensors: Sequence[BoundaryTensor], *, backward: bool, incoming: bool
    ) -> BoundaryMessages:
        return BoundaryMessages(
            tensors,
            placement.rows,
            world.backward if backward else world.forward,
            world.device,
            backward=backward,
            window=plan.pipelines[placement.pipeline].micro_batches,
            lane=(place.number if incoming else place.number + 1, len(stages) + 1),
            chains=world.chains,
            replica=world.inside.get("tensor"),
            debug=options.debug,
        )

    return LocalStage(
        placement=placement,
        stage=_stage_module(built, place.number, plan.job.precision, world, options, observer),
        messages={
            Op.SEND_F: messages(built.outgoing, backward=False, incoming=False),
            Op.RECV_F: messages(built.incoming, backward=False, incoming=True),
            Op.SEND_B: messages(built.incoming, backward=True, incoming=True),
            Op.RECV_B: messages(built.outgoing, backward=True, incoming=False),
        },
        previous_here=not place.is_first and same_ranks(stages[place.number - 1], place),
        next_here=not place.is_last and same_ranks(place, stages[place.number + 1]),
    )


def _stage_module(
    built: BuiltStage,
    number: int,
    precision: Precision,
    world: World,
    options: TrainingOptions,
    observer: Observer,
) -> StageModule:
    stage = StageModule(built, precision, world.device, options.seed, compile=options.compile)
    if options.debug:
        backward = precision != "fp16"
        stage.tracer = NonFiniteCheck(number, built.local_parameters, backward=backward)
    if observer is not UNOBSERVED:
        stage.between_layers = observer.between_layers
    return stage


def _own_seats(
    stages: Sequence[StagePlacement], rank: int
) -> list[tuple[StagePlacement, RankPlacement]]:
    """Returns the stages that a rank holds, in layer order, each with its placement in it."""
    return [(stages[placement.stage], placement) for placement in placements_of(stages, rank)]


def _tensor_group(
    world: World, placement: RankPlacement, observer: Observer
) -> TensorParallelGroup | None:
    group = world.inside.get("tensor")
    if group is None:
        return None
    tensor_group = TensorParallelGroup(group, placement.index("tensor"), placement.width("tensor"))
    tensor_group.waiting = observer.waiting_inside
    return tensor_group


def _buckets(
    held: Sequence[LocalParameter],
    instructions: Sequence[Instruction],
    own: Share,
    world: World,
) -> dict[GradientKey, FlatBucket]:
    reductions = [i for i in instructions if i.op.of_gradients]
    buckets = {}
    for key, group in group_parameters(held, reductions).items():
        members = {
            i.tile: SumGroup(world.reduce[i.ranks], len(i.ranks))
            for i in reductions
            if (i.layers, i.tied) == key
        }
        buckets[key] = make_bucket(group, own, members)
    for prepare in provided("runtime", "prepare"):
        for i in reductions:
            prepare(buckets[i.layers, i.tied], i)
    return buckets
