"""Who holds what: the one description of a strategy, written by the search or by hand."""

from __future__ import annotations

from dataclasses import field
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
"""Orders of work in a pipeline. `list` (made by the list scheduler) and `custom` (by hand, or
imported) stand in the plan itself: `Pipeline.actions`."""

BoundaryKind = Literal["direct", "scatter_gather", "broadcast"]
"""How tensors cross the cut between two stages. `direct`: each device receives all it needs from
one device of the other side. `scatter_gather`: the devices of a replica send and receive equal
parts, which the receivers put together among themselves. `broadcast`: one device sends to all
devices of a replica at once."""

PartName = Annotated[
    str, one_of("compute", "bubble", "transfers", "reductions", "optimizer", "overhead")
]
"""Where the seconds of a step go."""


@record
class Job:
    """What one optimizer step must do, whatever the plan."""

    global_batch: Rows
    """Rows per step, over the whole cluster."""
    sequence: Tokens
    precision: Precision = "bf16"
    optimizer: Literal["adamw", "sgd"] = "adamw"


@record
class Subject:
    """The model, cluster or profile that a plan was made for."""

    name: Name
    fingerprint: Name
    """Of the LayerGraph or Cluster record; empty: any will do (plans written by hand)."""
    source: Line = ""
    """Where it can be had again: a model name, a `config.json`, a `.toml`."""


Actions = Annotated[str, Field(max_length=2**24)]
"""Of one group of devices in a step."""


@record
class Stage:
    """A run of consecutive layers on a mesh of devices, data width x tensor width."""

    layers: tuple[LayerIndex, LayerIndex]
    """First layer, and one past the last."""
    devices: tuple[tuple[Name, ...], ...]
    """One row per replica; the devices of a row share each layer by tensor parallelism."""
    rows: tuple[Rows, ...] | None = None
    """Rows of each micro-batch that each replica takes; absent: equal shares."""
    boundary: BoundaryKind | None = None
    """How activations arrive from the stage before, and gradients go back to it; absent: direct."""
    recompute: bool = False
    """Keep only what enters each layer, and repeat its forward in the backward; the model's last
    layer, whose backward follows at once, keeps what it made."""


@record
class Pipeline:
    """Stages that together hold the whole model and work through a share of the batch."""

    micro_batches: MicroBatches
    rows: Rows
    """Rows of one micro-batch, over all replicas of a stage together."""
    stages: tuple[Stage, ...]
    """In layer order. The same devices may hold several (virtual stages), each time with the same
    `devices` and `rows`, where the schedule can play that."""
    actions: tuple[Actions, ...] | None = None
    """With schedule `list` or `custom`: what each group of devices computes, in order, one text per
    group in the order of their first stages. Words are F, B, I (gradients of the inputs) or W (of
    the weights) and a micro-batch, after the stage's place in the pipeline where the group holds
    several: `F0 F1 I0 W0:2`, `0F0 3F0 3B0`. `W0:2` makes the gradients of micro-batches 0 and 1
    at once."""


@record
class DeviceMemory:
    """Predicted memory of one device at its worst moment, in bytes."""

    device: Name
    parameters: Bytes
    gradients: Bytes
    optimizer: Bytes
    activations: Bytes
    buffers: Bytes
    """Transfers in flight, temporaries, and what the framework takes."""
    capacity: Annotated[Bytes, Field(gt=0)]


@record
class RunnerUp:
    """Another strategy that was looked at, and why it is not the plan."""

    name: Line
    step_seconds: PositiveSeconds | None = None
    """None: it does not fit."""
    reason: Line


@record
class Prediction:
    """What the search believed when it chose."""

    step_seconds: PositiveSeconds
    parts: dict[PartName, Seconds]
    """Critical path by kind: compute, bubble, transfers, reductions, optimizer."""
    memory: tuple[DeviceMemory, ...]
    runners_up: tuple[RunnerUp, ...] = ()
    dropped: dict[Line, Count] = field(default_factory=dict)
    """Candidates not followed up, counted by reason."""
    lower_bound_seconds: Seconds | None = None
    """No plan of the space can be faster, under the same costs."""
    bound_reason: Line = ""


@record
class Plan:
    """A strategy for one model on one cluster. Classic dp x tp x pp is one pipeline of `pp` stages,
    each on a dp x tp mesh; unlike replicas are several pipelines with shares of the batch."""

    format: Format = 1
    name: Name
    model: Subject
    cluster: Subject
    profile: Subject | None = None
    """The measured times that the search used; None: datasheets."""
    job: Job
    schedule: ScheduleName = "1f1b"
    devices: tuple[Name, ...]
    """Devices in use, in rank order: node by node, as the launcher starts them."""
    pipelines: tuple[Pipeline, ...]
    prediction: Prediction | None = None
