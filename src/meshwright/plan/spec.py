"""Defines the plan: which devices hold which layers, written by the search or by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, replace
from typing import Annotated, Literal

from pydantic import Field

from meshwright.cluster.spec import Precision
from meshwright.records import (
    Bytes,
    Count,
    Format,
    LayerIndex,
    Line,
    Name,
    PositiveSeconds,
    Rows,
    Seconds,
    Tokens,
    one_of,
    record,
)

MicroBatches = Annotated[int, Field(ge=1, le=2**17)]

ScheduleName = Literal[
    "1f1b",
    "1f1b-2bp",
    "1f1b-2bp-batched",
    "gpipe",
    "gpipe-2bp",
    "gpipe-2bp-batched",
    "eager-1f1b",
    "eager-1f1b-2bp",
    "eager-1f1b-2bp-batched",
    "interleaved-1f1b",
    "interleaved-1f1b-2bp",
    "interleaved-1f1b-2bp-batched",
    "zb-h1",
    "zb-h2",
    "zb-v",
    "list",
    "custom",
]
"""Pipeline schedules. `list` (made by the list scheduler) and `custom` (by hand, or imported) are
written out in the plan itself: `Pipeline.actions`."""

RuntimeName = Literal["meshwright", "megatron", "deepspeed", "fsdp"]
"""Systems that may run a plan: ours, those that it is exported to (Megatron-LM, DeepSpeed), and
PyTorch's own FSDP and pipelines (torchtitan, Accelerate)."""

BoundaryKind = Literal["direct", "scatter_gather", "broadcast"]
"""How tensors cross the cut between two stages. `direct`: each device receives all it needs from
one device of the other side. `scatter_gather`: the devices of a replica send and receive equal
parts, and the receivers then all-gather them. `broadcast`: one device sends to all devices of a
replica at once."""

PartName = Annotated[
    str, one_of("compute", "bubble", "transfers", "reductions", "optimizer", "overhead")
]
"""Kind of time on the critical path of a step."""


@record
class Job:
    """Says what one optimizer step must do, whatever the plan."""

    global_batch: Rows
    """Rows per optimizer step, summed over the whole cluster."""
    sequence: Tokens
    precision: Precision = "bf16"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    runtime: RuntimeName = "meshwright"
    """The system that runs it, with whose habits the step is predicted."""
    compiled: bool = False
    """True if a compiler fuses the elementwise operations of a layer, as torch.compile does: they
    then move fewer bytes, and the host launches fewer kernels."""


@record
class PlanInput:
    """Names the model, cluster or profile that a plan was made for."""

    name: Name
    fingerprint: Name
    """Fingerprint of the LayerGraph or Cluster record; empty if any will do, as in plans written by
    hand."""
    source: Line = ""
    """Source that it can be loaded from: a model name, a `config.json`, a `.toml`."""


Actions = Annotated[str, Field(max_length=2**24)]
"""Computations of one pipeline rank in one step, in order; see `Pipeline.actions`."""


StateLevel = Literal["none", "all"]
"""Over which ranks of those that hold a layer a state is divided: `none` (each holds all of it) or
`all` (each holds an equal share)."""


@record
class StateDivision:
    """Says how the ranks that hold the same layers divide what each of them would otherwise hold
    whole."""

    optimizer: StateLevel = "none"
    """Optimizer states, with the update itself: each rank updates its share of the weights, which
    are gathered afterwards (ZeRO-1)."""


@record
class Stage:
    """Assigns consecutive layers to a mesh of devices, data width x tensor width."""

    layers: tuple[LayerIndex, LayerIndex]
    """First layer, and the one after the last: [first, last)."""
    devices: tuple[tuple[Name, ...], ...]
    """One tuple per replica; its devices share each layer by tensor parallelism."""
    rows: tuple[Rows, ...] | None = None
    """Rows of each micro-batch that each replica takes; absent: equal shares."""
    boundary: BoundaryKind | None = None
    """How activations arrive from the previous stage, and gradients return to it; absent:
    direct."""
    recompute: bool = False
    """True if only the input of each layer is kept and the backward repeats its forward. The
    model's last layer keeps its activations all the same, since its backward follows at once."""
    states: StateDivision | None = None
    """How its states are divided among the ranks that hold its layers; absent: not at all."""


@record
class Pipeline:
    """Chains stages that together hold the whole model; they work through a share of the batch."""

    micro_batches: MicroBatches
    rows: Rows
    """Rows of one micro-batch, over all replicas of a stage together."""
    stages: tuple[Stage, ...]
    """Stages in layer order. The same devices may hold several (virtual stages) if the schedule
    allows it, each time with the same `devices` and `rows`."""
    actions: tuple[Actions, ...] | None = None
    """Computations of each pipeline rank in order, for schedule `list` or `custom`: one text per
    pipeline rank, in the order of their first stages.

    Words are F (forward), B (backward), I (gradients of the inputs) or W (of the weights), followed
    by a micro-batch: `F0 F1 I0 W0:2`. If the pipeline rank holds several stages, the stage's index
    in the pipeline comes first: `0F0 3F0 3B0`. `W0:2` computes the weight gradients of
    micro-batches 0 and 1 at once.
    """


@record
class DeviceMemory:
    """Predicts the memory of one device at its peak, in bytes."""

    device: Name
    parameters: Bytes
    gradients: Bytes
    optimizer: Bytes
    activations: Bytes
    buffers: Bytes
    """Transfers in flight, temporaries, and what the framework reserves."""
    capacity: Annotated[Bytes, Field(gt=0)]


@record
class RunnerUp:
    """Names another strategy that the search considered, and says why it was not chosen."""

    name: Line
    step_seconds: PositiveSeconds | None = None
    """Predicted step time; None if it does not fit into memory."""
    reason: Line


@record
class Prediction:
    """Holds what the search predicts for the plan that it chose."""

    step_seconds: PositiveSeconds
    parts: dict[PartName, Seconds]
    """Seconds of the critical path by kind: compute, bubble, transfers, reductions, optimizer."""
    memory: tuple[DeviceMemory, ...]
    runners_up: tuple[RunnerUp, ...] = ()
    dropped: dict[Line, Count] = field(default_factory=dict)
    """Number of candidates that were pruned, by reason."""
    lower_bound_seconds: Seconds | None = None
    """Lower bound of the step time: no plan of the search space is faster under the same costs."""
    bound_reason: Line = ""


@record
class Plan:
    """Describes a training strategy for one model on one cluster.

    Classic dp x tp x pp is one pipeline of `pp` stages, each on a dp x tp mesh; unlike replicas are
    several pipelines with shares of the batch.
    """

    format: Format = 1
    name: Name
    model: PlanInput
    cluster: PlanInput
    profile: PlanInput | None = None
    """Profile with the measured times that the search used; None: datasheets."""
    job: Job
    schedule: ScheduleName = "1f1b"
    devices: tuple[Name, ...]
    """Devices in use, in rank order: node by node, as the launcher starts them."""
    pipelines: tuple[Pipeline, ...]
    prediction: Prediction | None = None

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Returns the stages of all pipelines, pipeline by pipeline."""
        return tuple(stage for pipeline in self.pipelines for stage in pipeline.stages)


def with_stages(plan: Plan, change: Callable[[Stage], Stage]) -> Plan:
    """Returns the plan with every stage changed."""
    pipelines = (
        replace(pipeline, stages=tuple(map(change, pipeline.stages))) for pipeline in plan.pipelines
    )
    return replace(plan, pipelines=tuple(pipelines))
