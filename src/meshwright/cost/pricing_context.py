"""Holds what the price of an operation is made from: the inputs of a plan, and what was priced
before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from meshwright.cluster.spec import Cluster, DeviceType
from meshwright.cluster.topology import Topology
from meshwright.cost.collective import Traffic
from meshwright.cost.constants import SystemConstants
from meshwright.cost.memory import Adjustment, MemoryTables, StageMemory, micro_batch_memory
from meshwright.cost.profile import Profile
from meshwright.cost.times import ReplicaSeconds
from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import RankPlacement, StagePlacement
from meshwright.plan.spec import Plan
from meshwright.program.instructions import Instruction
from meshwright.records import record

Collective = Callable[..., Traffic]
"""A function of cost.collective: links, devices and bytes to traffic."""

NO_TRAFFIC = Traffic(bytes_by_resource={})


@record
class Price:
    """Holds the price of one instruction on its rank."""

    seconds: float = 0.0
    """The seconds of a compute instruction, with the tensor-parallel all-reduces of its layers; of
    a send, those for which its rank waits before it goes on."""
    held_bytes: float = 0.0
    """The bytes of activations that a compute instruction adds: positive for a forward, from its
    start; negative for a backward, at its end."""
    traffic: Traffic = NO_TRAFFIC
    """The traffic of a send (its receive moves with it) or of a collective."""
    completed_by: int | None = None
    """The index of the backward that completes the gradients of this reduction."""
    completes: tuple[tuple[int, float], ...] = ()
    """For that backward: the index of each of its reductions, with the seconds from its own start
    to the moment at which their gradients are complete."""


@record
class PricingContext:
    """Holds the inputs from which one plan is priced, and what has been computed for it so far."""

    model: LayerGraph
    plan: Plan
    cluster: Cluster
    profile: Profile | None
    links: Topology
    step_latency: float
    """The fixed seconds of one step of a ring."""
    queued: bool
    """True if messages of several devices over one link pass one after another."""
    system: SystemConstants
    tables: MemoryTables
    adjustments: tuple[Adjustment, ...]
    """What the techniques of the plan change in the memory of ranks."""
    collectives: dict[tuple[Collective, tuple[int, ...], float], Traffic] = field(
        default_factory=dict
    )
    """The collectives priced so far, by kind, ranks and bytes: all members ask for the same one."""
    stage_memories: dict[tuple[bool, tuple[int, int], int, int], StageMemory] = field(
        default_factory=dict
    )
    """The memory of stages weighed so far, by recomputation, layers, tensor width and rows."""

    deferred: dict[tuple[tuple[int, int], int, int], float] = field(default_factory=dict)
    """What is kept between the parts of a backward, by layers, tensor width and rows."""

    def type_of(self, device: str) -> DeviceType:
        """Returns the type of a device."""
        return self.cluster.types[self.links.devices[device].type]


@dataclass(frozen=True, slots=True)
class PricedStage:
    """Describes a rank's placement in one of its stages, with the compute times of its replica."""

    stage: StagePlacement
    placement: RankPlacement
    times: ReplicaSeconds


@dataclass(frozen=True, slots=True)
class RankContext:
    """Holds what is needed to price the instructions of one rank."""

    instructions: Sequence[Instruction]
    stages: dict[int, PricedStage]
    """Its placements, by number of the stage."""
    pricing: PricingContext

    def stage_of(self, i: Instruction) -> PricedStage:
        """Returns the rank's placement in the stage of an instruction."""
        return self.stages[i.stage]


PriceFunction = Callable[[Instruction, RankContext], Price]
"""Prices one instruction of a rank."""


def one_micro_batch_memory(
    stage: StagePlacement, placement: RankPlacement, context: PricingContext
) -> StageMemory:
    """Returns the memory of a stage with one micro-batch in flight."""
    tensor, rows = placement.width("tensor"), placement.rows[1] - placement.rows[0]
    key = (stage.plan_stage.recompute, stage.layers, tensor, rows)
    if key not in context.stage_memories:
        context.stage_memories[key] = micro_batch_memory(context.tables, stage, tensor, rows)
    return context.stage_memories[key]
