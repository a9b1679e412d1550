"""Bytes that each device holds at its worst moment.

A stage of 10,000 candidates is weighed at once: `layers`, `rows` and `in_flight` may be numbers or
numpy arrays that broadcast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.spec import Cluster, DeviceType, Precision, devices_of
from meshwright.errors import Problem
from meshwright.model.spec import Layer, LayerGraph
from meshwright.plan.ranks import StageSeats, stage_seats
from meshwright.plan.spec import DeviceMemory, Job, Plan
from meshwright.program.schedules import in_flight
from meshwright.records import record
from meshwright.units import format_bytes

Array = NDArray[np.float64]
Ints = int | NDArray[np.int64]
Floats = Any
"""A float, or an array of them."""

HOLES = {"gpu": 0.04, "cpu": 0.0}
"""Share of a device's memory that is reserved and never used: the caching allocator keeps blocks
of sizes that do not come again (reserved over allocated is 2 to 10 % in PyTorch's own memory
statistics of training loops with fixed shapes)."""

FRAMEWORK_BYTES = {"gpu": 1 << 30, "cpu": 64 << 20}
"""What a process holds beside tensors: CUDA context with PyTorch's kernels about 0.5 GiB, NCCL's
channel buffers and cuBLAS workspaces about as much again; on a cpu gloo's buffers."""


@record
class ParameterBytes:
    """Bytes per parameter that a rank holds."""

    weights: float
    gradients: float
    optimizer: float
    casts: float
    """For every micro-batch in flight: the 16-bit weights that its backward will read. Autocast
    makes them anew in each forward; they do not grow with the rows."""


def bytes_per_parameter(precision: Precision, optimizer: str) -> ParameterBytes:
    """Master weights, gradients and states are fp32 (fp64 for fp64): 4 + 4 + 8 with Adam, whose
    two moments are of the master's width; 16-bit arithmetic adds 2 for each micro-batch held."""
    width = 8.0 if precision == "fp64" else 4.0
    cast = 2.0 if precision in ("fp16", "bf16") else 0.0
    moments = {"adamw": 2, "sgd": 0}[optimizer]
    return ParameterBytes(weights=width, gradients=width, optimizer=moments * width, casts=cast)


@record
class MemoryTable:
    """Sums over layers, so that any stage is weighed in constant time. Index l of a cumulative
    array is the sum over layers before l; activations are bytes per row."""

    unit: ParameterBytes
    replicated: Array
    split: Array
    """Parameters, cumulative."""
    saved_replicated: Array
    saved_split: Array
    cut: Array
    """Bytes that a cut before each layer carries forward."""
    cut_gradient: Array
    """Of these, bytes for which a gradient comes back."""
    workspace: dict[int, Array]
    """By tensor width, [level, layer]: largest workspace of the 2**level layers from `layer` on."""
    tied: tuple[tuple[NDArray[np.int64], int, bool], ...]
    """Of each tied parameter: cumulative uses, numbers, whether split among tensor ranks."""


@record
class StageMemory:
    """Bytes on one device of a stage, by kind; `buffers` without what the framework takes."""

    parameters: Floats
    gradients: Floats
    optimizer: Floats
    activations: Floats
    buffers: Floats


def _cumulative(values: list[float]) -> Array:
    return np.concatenate([[0.0], np.cumsum(np.array(values, dtype=np.float64))])


def _cut_bytes(model: LayerGraph, *, gradient_only: bool) -> Array:
    change = np.zeros(len(model.layers) + 2)
    for tensor in model.tensors:
        if tensor.consumers and (tensor.gradient or not gradient_only):
            change[tensor.producer + 1] += tensor.bytes
            change[tensor.consumers[-1] + 1] -= tensor.bytes
    return np.cumsum(change)[:-1]


def _range_maxima(values: Array) -> Array:
    """Sparse table: level k holds the maximum of 2**k neighbours."""
    levels = [values]
    while 2 ** len(levels) <= len(values):
        half = 2 ** (len(levels) - 1)
        shifted = np.concatenate([levels[-1][half:], np.zeros(half)])
        levels.append(np.maximum(levels[-1], shifted))
    return np.array(levels)


WORKSPACE_WIDTHS = (1, 2, 4, 8)
"""Tensor widths for which workspaces are looked up; between them the narrower one stands in."""


def _workspaces(model: LayerGraph, tensor: int) -> Array:
    """Each layer's workspace on a tensor rank: of temporaries as large a share is divided as of
    what is kept."""

    def share(layer: Layer) -> float:
        divided = layer.split_saved_bytes / layer.saved_bytes if layer.saved_bytes else 0.0
        return 1 - divided * (1 - 1 / tensor)

    return np.array([layer.workspace_bytes * share(layer) for layer in model.layers])


def memory_table(model: LayerGraph, job: Job) -> MemoryTable:
    """Everything that `stage_memory` needs to know of a model trained by a job."""
    split = [layer.split_parameters for layer in model.layers]
    saved = [layer.split_saved_bytes for layer in model.layers]
    whole = _cumulative([float(layer.parameters) for layer in model.layers])
    whole_saved = _cumulative([layer.saved_bytes for layer in model.layers])
    uses = [np.zeros(len(model.layers) + 1, dtype=np.int64) for _ in model.tied]
    for count, tied in zip(uses, model.tied, strict=True):
        count[[layer + 1 for layer in tied.layers]] = 1
    return MemoryTable(
        unit=bytes_per_parameter(job.precision, job.optimizer),
        split=_cumulative([float(s) for s in split]),
        replicated=whole - _cumulative([float(s) for s in split]),
        saved_split=_cumulative(saved),
        saved_replicated=whole_saved - _cumulative(saved),
        cut=_cut_bytes(model, gradient_only=False),
        cut_gradient=_cut_bytes(model, gradient_only=True),
        workspace={w: _range_maxima(_workspaces(model, w)) for w in WORKSPACE_WIDTHS},
        tied=tuple(
            (np.cumsum(count), tied.parameters, tied.split)
            for count, tied in zip(uses, model.tied, strict=True)
        ),
    )


def stage_parameters(table: MemoryTable, layers: tuple[Ints, Ints], tensor: int) -> Floats:
    """Parameters that each tensor rank of a stage holds, tied ones included."""
    first, last = layers
    held = table.replicated[last] - table.replicated[first]
    held = held + (table.split[last] - table.split[first]) / tensor
    for uses, parameters, split in table.tied:
        share = parameters / tensor if split else float(parameters)
        held = held + np.where(uses[last] > uses[first], share, 0.0)
    return held


def _largest_workspace(table: MemoryTable, layers: tuple[Ints, Ints], tensor: int) -> Floats:
    first, last = layers
    workspace = table.workspace[max(width for width in WORKSPACE_WIDTHS if width <= tensor)]
    level = np.log2(np.maximum(last - first, 1)).astype(np.int64)
    return np.maximum(workspace[level, first], workspace[level, last - 2**level])


def stage_memory(
    table: MemoryTable, layers: tuple[Ints, Ints], tensor: int, rows: Ints, in_flight: Ints
) -> StageMemory:
    """Bytes on each device of a stage that works on `rows` rows of every micro-batch and holds
    `in_flight` micro-batches between forward and backward.

    Activations are what layers save (their split part divided), casts of their weights, and the
    tensors at both cuts, which stay until their gradients have been computed. Buffers are one
    incoming activation, one incoming and one outgoing gradient, and the largest workspace.
    """
    first, last = layers
    parameters = stage_parameters(table, layers, tensor)
    saved = table.saved_replicated[last] - table.saved_replicated[first]
    saved = saved + (table.saved_split[last] - table.saved_split[first]) / tensor
    boundary = table.cut[first] + table.cut[last]
    transfers = table.cut[first] + table.cut_gradient[first] + table.cut_gradient[last]
    return StageMemory(
        parameters=parameters * table.unit.weights,
        gradients=parameters * table.unit.gradients,
        optimizer=parameters * table.unit.optimizer,
        activations=((saved + boundary) * rows + parameters * table.unit.casts) * in_flight,
        buffers=(transfers + _largest_workspace(table, layers, tensor)) * rows,
    )


def stage_memory_bytes(
    table: MemoryTable, layers: tuple[Ints, Ints], tensor: int, rows: Ints, in_flight: Ints
) -> Floats:
    """All of `stage_memory`, in bytes; to be compared with `usable_bytes`."""
    parts = stage_memory(table, layers, tensor, rows, in_flight)
    states = parts.parameters + parts.gradients + parts.optimizer
    return states + parts.activations + parts.buffers


def framework_bytes(device: DeviceType) -> int:
    """Bytes of a device that no tensor can have: context, communication buffers, and holes."""
    kind = device.processor
    return FRAMEWORK_BYTES[kind] + round(HOLES[kind] * device.memory)


def usable_bytes(device: DeviceType) -> int:
    """Bytes of a device that tensors may take."""
    return device.memory - framework_bytes(device)


def enough_bytes(memory: DeviceMemory, device: DeviceType) -> int:
    """The memory that a device of this kind would need for what it is asked to hold."""
    excess = total_bytes(memory) - memory.capacity
    return memory.capacity + round(excess / (1 - HOLES[device.processor]))


def device_memory(plan: Plan, model: LayerGraph, cluster: Cluster) -> tuple[DeviceMemory, ...]:
    """Predicted bytes of every device of a plan, in rank order.

    A stage holds as many micro-batches at once as its schedule opens (1F1B min(M, S - s), GPipe M).
    """
    table = memory_table(model, plan.job)
    types = {device.name: cluster.types[device.type] for device in devices_of(cluster)}
    found: dict[int, DeviceMemory] = {}
    for stage, _, held in _stages(plan):
        for seat in (seat for replica in stage.seats for seat in replica):
            rows = seat.rows[1] - seat.rows[0]
            parts = stage_memory(table, stage.layers, len(stage.seats[0]), rows, held)
            device = types[seat.device]
            found[seat.rank] = DeviceMemory(
                device=seat.device,
                parameters=round(parts.parameters),
                gradients=round(parts.gradients),
                optimizer=round(parts.optimizer),
                activations=round(parts.activations),
                buffers=round(parts.buffers) + framework_bytes(device),
                capacity=device.memory,
            )
    return tuple(found[rank] for rank in sorted(found))


def _stages(plan: Plan) -> Iterator[tuple[StageSeats, str, int]]:
    """Every stage, its path in the plan, and the micro-batches it holds at once."""
    stages = stage_seats(plan)
    for stage in stages:
        pipeline = plan.pipelines[stage.pipeline]
        depth = stage.number - next(s.number for s in stages if s.pipeline == stage.pipeline)
        held = in_flight(plan.schedule, depth, len(pipeline.stages), pipeline.micro_batches)
        yield stage, f"pipelines[{stage.pipeline}].stages[{depth}]", held


def total_bytes(memory: DeviceMemory) -> int:
    """All that one device holds at its worst moment."""
    states = memory.parameters + memory.gradients + memory.optimizer
    return states + memory.activations + memory.buffers


def memory_problems(plan: Plan, model: LayerGraph, cluster: Cluster) -> tuple[Problem, ...]:
    """One Problem for every device that a plan overfills: by how much, and what would help."""
    table = memory_table(model, plan.job)
    by_device = {memory.device: memory for memory in device_memory(plan, model, cluster)}
    problems = []
    for stage, path, held in _stages(plan):
        for seat in (seat for replica in stage.seats for seat in replica):
            memory = by_device[seat.device]
            excess = total_bytes(memory) - memory.capacity
            rows = seat.rows[1] - seat.rows[0]
            if excess > 0:
                room = memory.capacity - framework_bytes(_type_of(cluster, seat.device))
                problems.append(
                    Problem(
                        f"plan {plan.name}",
                        path,
                        f"{_sizes(memory)} on {seat.device}, {format_bytes(excess)} too much",
                        f"at most {format_bytes(memory.capacity)}",
                        _what_helps(model, table, stage, rows, held, room),
                    )
                )
    return tuple(problems)


def _type_of(cluster: Cluster, device: str) -> DeviceType:
    return next(cluster.types[d.type] for d in devices_of(cluster) if d.name == device)


def _sizes(memory: DeviceMemory) -> str:
    parts = ", ".join(
        f"{name} {format_bytes(getattr(memory, name))}"
        for name in ("parameters", "gradients", "optimizer", "activations", "buffers")
    )
    return f"{format_bytes(total_bytes(memory))} ({parts})"


def _wider(layers: Sequence[Layer], tensor: int) -> list[int]:
    """Legal tensor widths above `tensor`, up to the eight devices of a usual node."""
    units = [layer.tensor_units for layer in layers if layer.tensor_units]
    return [w for w in range(tensor + 1, 9) if units and all(u % w == 0 for u in units)]


def _what_helps(
    model: LayerGraph, table: MemoryTable, stage: StageSeats, rows: int, held: int, room: float
) -> str:
    """The longest prefix of the stage's layers, the most rows, or the tensor width that fits."""
    first, last = stage.layers
    tensor = len(stage.seats[0])
    ends, sizes = np.arange(first + 1, last + 1), np.arange(1, rows)
    by_layers = stage_memory_bytes(table, (np.full_like(ends, first), ends), tensor, rows, held)
    by_rows = stage_memory_bytes(table, stage.layers, tensor, sizes, held)
    layers_that_fit = int(np.sum(by_layers <= room))
    rows_that_fit = int(np.sum(by_rows <= room))
    advice = []
    if layers_that_fit:
        advice.append(f"give it {layers_that_fit} of its {last - first} layers")
    if rows_that_fit:
        advice.append(f"{rows_that_fit} of its {rows} rows of each micro-batch")
    for width in _wider(model.layers[first:last], tensor):
        if stage_memory_bytes(table, stage.layers, width, rows, held) <= room:
            advice.append(f"tensor width {width}")
            break
    return (
        "; or ".join(advice) or "give it fewer layers and fewer rows, or a device with more memory"
    )
