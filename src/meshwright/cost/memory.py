"""Predicts the peak memory of every device.

`layers`, `rows` and `in_flight` may be numbers or numpy arrays that broadcast, so that 10,000
candidate stages are weighed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import field, replace
from functools import lru_cache

import numpy as np

from meshwright.cluster.spec import Cluster, DeviceType
from meshwright.cost.constants import FRAGMENTATION, FRAMEWORK_BYTES
from meshwright.cost.gradient_copies import copied_gradient_bytes, tensor_widths
from meshwright.cost.in_flight import ScheduledStages, peak_activation_bytes, scheduled_stages
from meshwright.cost.peak_moments import PeakMoments, RangeMaxima, peak_moments, temporary_bytes
from meshwright.cost.weights import (
    Array,
    Floats,
    Ints,
    WeightTable,
    cast_bytes,
    cumulative,
    rank_parameters,
    rank_weight_bytes,
    stage_parameters,
    tied_share,
    weight_bytes,
    weight_table,
)
from meshwright.model.spec import Layer, LayerGraph, Tensor
from meshwright.plan.ranks import RankPlacement, RankView, StagePlacement, stage_placements
from meshwright.plan.spec import DeviceMemory, Job, Plan
from meshwright.records import record
from meshwright.stopping import raise_if_stopped
from meshwright.techniques import provided
from meshwright.techniques.activation_checkpointing.model import with_recomputation


@record
class MemoryTable:
    """Holds sums over layers, so that any stage is weighed in constant time.

    Index l of a cumulative array is the sum over the layers before l. Activations are in bytes per
    row.
    """

    weights: WeightTable
    saved_replicated: Array
    """Saved bytes that every tensor rank holds whole, cumulative."""
    saved_split: Array
    """Saved bytes that tensor ranks divide, cumulative."""
    saved_fixed: Array
    """Saved bytes that do not depend on the number of rows, cumulative."""
    untrained: SavedTable
    """The part of the saved bytes that belongs to layers whose weights are all frozen."""
    cut: Array
    """The bytes that cross a cut before each layer in the forward."""
    cut_gradient: Array
    """The bytes of `cut` for which a gradient comes back."""
    cut_unkept: Array
    """The bytes of `cut` that no layer counts among its saved bytes."""
    cut_returns: Array
    """The number of tensors at each cut for which a gradient comes back; where it is 0, no stage
    waits for a backward across the cut."""
    alone: PeakMoments
    """The peak moments of layers on a rank that does not divide them."""
    divided: PeakMoments
    """The peak moments of layers that tensor ranks divide."""
    worst: dict[tuple[int, int], tuple[Array, RangeMaxima]] = field(default_factory=dict)
    """A cache by tensor width and rows: the peak bytes of every layer, with their range maxima."""


@record
class SavedTable:
    """Holds the bytes that layers save, cumulative: per row (replicated and split), and fixed."""

    replicated: Array
    split: Array
    fixed: Array


@record
class StageMemory:
    """Holds the bytes on one device of a stage by kind; `buffers` excludes what the framework
    reserves."""

    parameters: Floats
    gradients: Floats
    optimizer: Floats
    activations: Floats
    buffers: Floats


def _cut_sums(model: LayerGraph, amount: Callable[[Tensor], float]) -> Array:
    """Sums an amount at every cut over all tensors that cross it."""
    change = np.zeros(len(model.layers) + 2)
    for tensor in model.tensors:
        if tensor.consumers:
            change[tensor.producer + 1] += amount(tensor)
            change[tensor.consumers[-1] + 1] -= amount(tensor)
    return np.cumsum(change)[:-1]


@record
class MemoryTables:
    """Holds one table for stages that keep their activations, one for those that recompute them."""

    plain: MemoryTable
    recomputed: MemoryTable


@lru_cache(maxsize=8)
def memory_tables(model: LayerGraph, job: Job) -> MemoryTables:
    """Builds the memory tables of a model trained by a job, with and without recomputation."""
    return MemoryTables(
        plain=memory_table(model, job), recomputed=memory_table(with_recomputation(model), job)
    )


def stage_table(tables: MemoryTables, stage: StagePlacement) -> MemoryTable:
    """Returns the table that applies to a stage."""
    return tables.recomputed if stage.plan_stage.recompute else tables.plain


def memory_table(model: LayerGraph, job: Job) -> MemoryTable:
    """Builds the sums that `stage_memory` looks up for a model trained by a job."""
    saved = _saved(model.layers)
    return MemoryTable(
        weights=weight_table(model, job),
        saved_split=saved.split,
        saved_replicated=saved.replicated,
        saved_fixed=saved.fixed,
        untrained=_saved(_untrained(model)),
        cut=_cut_sums(model, lambda t: t.bytes),
        cut_gradient=_cut_sums(model, lambda t: t.bytes if t.gradient else 0.0),
        cut_unkept=_cut_sums(model, lambda t: 0.0 if t.kept else t.bytes),
        cut_returns=_cut_sums(model, lambda t: float(t.gradient)),
        alone=peak_moments(model, divided=False),
        divided=peak_moments(model, divided=True),
    )


def _saved(layers: Sequence[Layer | None]) -> SavedTable:
    """Sums the saved bytes of layers; None stands for a layer that counts nothing."""
    split = cumulative(layer.along("tensor").saved_bytes if layer else 0.0 for layer in layers)
    return SavedTable(
        split=split,
        replicated=cumulative(layer.saved_bytes if layer else 0.0 for layer in layers) - split,
        fixed=cumulative(layer.fixed_saved_bytes if layer else 0.0 for layer in layers),
    )


def _untrained(model: LayerGraph) -> list[Layer | None]:
    """Returns the layers that hold frozen weights and no trained ones; None stands for every other
    layer."""
    trained = {n for tied in model.tied if tied.parameters for n in tied.layers}
    frozen = {n for tied in model.tied if tied.frozen_parameters for n in tied.layers}
    return [
        layer
        if (layer.frozen_parameters or n in frozen) and not (layer.parameters or n in trained)
        else None
        for n, layer in enumerate(model.layers)
    ]


def _workspace(
    table: MemoryTable, layers: tuple[Ints, Ints], tensor: int, rows: int, kept: Array
) -> Floats:
    """Returns the peak bytes in a stage's forward and backward of one micro-batch, above the bytes
    that all its layers keep of it.

    `kept` is cumulative. If a stage holds two users of a tied parameter, the gradient of the later
    one waits for that of the earlier one; at that moment their sum is a third buffer.
    """
    first, last = layers
    if (tensor, rows) not in table.worst:
        moments = table.divided if tensor > 1 else table.alone
        peaks = kept[1:] + temporary_bytes(moments, tensor, rows)
        table.worst[tensor, rows] = peaks, RangeMaxima(peaks)
    peaks, maxima = table.worst[tensor, rows]
    most = maxima.of(first, last)
    for tied in table.weights.tied:
        several = tied.users[last] - tied.users[first] > 1
        waiting = tied_share(tied, tied.trained, tensor) * table.weights.unit.gradients
        end = np.where(several, np.minimum(last, tied.last), last)
        between = np.maximum(maxima.of(first, end) + waiting, peaks[tied.next[first]] + 2 * waiting)
        most = np.where(several, np.maximum(most, between), most)
    return most - kept[last]


def stage_memory(
    table: MemoryTable, layers: tuple[Ints, Ints], tensor: int, rows: Ints, in_flight: Floats
) -> StageMemory:
    """Returns the bytes on each device of a stage by kind.

    The stage works on `rows` rows of every micro-batch and holds `in_flight` micro-batches between
    forward and backward. Activations are the saved tensors of its layers (tensor ranks divide the
    split part) and the tensors at both cuts, which stay until their gradients have been computed.
    Buffers are the messages that arrive for the next instructions (an activation and a gradient),
    the gradient that leaves, the casts of weights, and the peak of a backward above what is kept.
    """
    if not isinstance(rows, (int, np.integer)):
        return _of_many_rows(table, layers, tensor, rows, in_flight)
    first, last = layers
    weights = table.weights
    trained = stage_parameters(weights, layers, tensor)
    saved = table.saved_replicated + table.saved_split / tensor
    kept = saved * rows + table.saved_fixed
    boundary = table.cut_unkept[first] + table.cut[last]
    arriving = table.cut[first] + table.cut_gradient[last]
    transfers = (arriving + table.cut_gradient[first]) * rows
    workspace = _workspace(table, layers, tensor, int(rows), kept)
    return StageMemory(
        parameters=weight_bytes(weights, layers, tensor),
        gradients=trained * weights.unit.gradients,
        optimizer=trained * weights.unit.optimizer,
        activations=(kept[last] - kept[first] + boundary * rows) * in_flight,
        buffers=transfers + workspace + cast_bytes(weights, layers, tensor),
    )


def _of_many_rows(
    table: MemoryTable, layers: tuple[Ints, Ints], tensor: int, rows: Ints, in_flight: Floats
) -> StageMemory:
    """Weighs one stage after another where `rows` is an array."""
    first, last, each, held = np.broadcast_arrays(*layers, rows, in_flight)
    found = [
        stage_memory(table, (a, b), tensor, int(r), h)
        for a, b, r, h in zip(first.flat, last.flat, each.flat, held.flat, strict=True)
    ]
    return StageMemory(
        **{
            kind: np.array([getattr(one, kind) for one in found]).reshape(each.shape)
            for kind in ("parameters", "gradients", "optimizer", "activations", "buffers")
        }
    )


def stage_memory_bytes(
    table: MemoryTable, layers: tuple[Ints, Ints], tensor: int, rows: Ints, in_flight: Floats
) -> Floats:
    """Returns the sum of `stage_memory` over all kinds, to be compared with `usable_bytes`."""
    parts = stage_memory(table, layers, tensor, rows, in_flight)
    states = parts.parameters + parts.gradients + parts.optimizer
    return states + parts.activations + parts.buffers


def framework_bytes(device: DeviceType) -> int:
    """Returns the bytes of a device that no tensor can use.

    They are what the framework reserves before the first tensor, and the fragmentation of its
    allocator.
    """
    kind = device.processor
    return FRAMEWORK_BYTES[kind] + round(FRAGMENTATION[kind] * device.memory)


def usable_bytes(device: DeviceType) -> int:
    """Returns the bytes of a device that tensors can use."""
    return device.memory - framework_bytes(device)


def micro_batch_memory(
    tables: MemoryTables, stage: StagePlacement, tensor: int, rows: int
) -> StageMemory:
    """Returns the memory of a stage with one micro-batch of `rows` rows in flight, on a replica
    `tensor` ranks wide."""
    return stage_memory(stage_table(tables, stage), stage.layers, tensor, rows, 1)


def deferred_bytes(tables: MemoryTables, stage: StagePlacement, tensor: int, rows: int) -> float:
    """Returns the bytes that a stage keeps of a micro-batch between the two parts I and W of its
    backward.

    It keeps the inputs and the output gradients of its matrix products. In a block of GPT-2 these
    are as large as what the forward saved (7 + 9 tensors of the model's width against 16). A
    recomputed layer keeps as much, since part I repeats its forward; a layer whose weights are
    all frozen keeps nothing. The loss saves fp32 numbers whose gradient has the precision of the
    products, so half of them count.
    """
    table, (first, last) = tables.plain, stage.layers
    kept = float(stage_memory(table, stage.layers, tensor, rows, 1).activations)
    none = table.untrained
    idle = (none.replicated + none.split / tensor) * rows + none.fixed
    kept -= float(idle[last] - idle[first])
    trains = none.replicated[-1] == none.replicated[-2] and none.split[-1] == none.split[-2]
    if trains and table.weights.unit.casts and last == len(table.saved_fixed) - 1:
        saved = table.saved_replicated + table.saved_split / tensor
        kept -= float(saved[-1] - saved[-2]) * rows / 2
    return kept


def device_stage_memory(
    table: MemoryTable, stages: Sequence[StagePlacement], tensor: int, parts: Sequence[StageMemory]
) -> StageMemory:
    """Returns the memory of one device that holds several stages, each with one micro-batch in
    flight.

    The casts of all its stages count, but the buffers of only one stage at a time.
    """
    weights = table.weights
    casts = [cast_bytes(weights, stage.layers, tensor) for stage in stages]
    buffers = max(part.buffers - cast for part, cast in zip(parts, casts, strict=True))
    trained = rank_parameters(weights, stages, tensor)
    return StageMemory(
        parameters=rank_weight_bytes(weights, stages, tensor),
        gradients=trained * weights.unit.gradients,
        optimizer=trained * weights.unit.optimizer,
        activations=sum(part.activations for part in parts),
        buffers=buffers + sum(casts),
    )


Adjustment = Callable[[StageMemory, RankView], StageMemory]
"""What a technique changes in the bytes that a rank holds of all its stages together."""


def adjustments(plan: Plan, model: LayerGraph) -> tuple[Adjustment, ...]:
    """Returns the functions by which the techniques of a plan change the memory of its ranks, in
    their order."""
    found = (adjustment(plan, model) for adjustment in provided("memory", "adjustment"))
    return tuple(each for each in found if each is not None)


def device_memory(plan: Plan, model: LayerGraph, cluster: Cluster) -> tuple[DeviceMemory, ...]:
    """Predicts the peak bytes of every device of a plan, in rank order.

    Raises PlanError for a schedule in the plan that cannot be played.
    """
    found = {
        placement.rank: replace(memory, device=placement.device)
        for memory, placements in memory_by_class(plan, model, cluster)
        for placement in placements
    }
    return tuple(found[rank] for rank in sorted(found))


def memory_by_class(
    plan: Plan, model: LayerGraph, cluster: Cluster
) -> Iterator[tuple[DeviceMemory, list[RankPlacement]]]:
    """Groups devices with equal needs, and predicts the peak bytes of one device of each group.

    Activations are the most that a device holds at any point of its schedule.
    """
    tables = memory_tables(model, plan.job)
    nodes = {node.name: node.devices for node in cluster.nodes}
    widths = tensor_widths(model, stage_placements(plan))
    changes = adjustments(plan, model)
    for scheduled in scheduled_stages(plan):
        raise_if_stopped()
        stages = scheduled.stages
        alike: dict[tuple[int, int, str, int], list[RankPlacement]] = {}
        for each in stages[0].mesh.members:
            node, _, index = each.device.rpartition(":")
            rows, kind = each.rows[1] - each.rows[0], nodes[node][int(index)]
            # What techniques change may differ from rank to rank.
            key = (each.width("tensor"), rows, kind, each.rank if changes else 0)
            alike.setdefault(key, []).append(each)
        for (tensor, rows, kind, _), placements in alike.items():
            copied = sum(copied_gradient_bytes(model, plan.job, widths, s, tensor) for s in stages)
            parts, activations = _stage_memories(tables, scheduled, tensor, rows)
            for adjust in changes:
                parts = adjust(parts, RankView(stages=stages, placement=placements[0]))
            buffers = max(parts.buffers, copied - activations)
            parts = replace(parts, activations=activations, buffers=buffers)
            yield _rounded(parts, placements[0].device, cluster.types[kind]), placements


def _rounded(parts: StageMemory, device: str, kind: DeviceType) -> DeviceMemory:
    """Returns the memory of a device in whole bytes, with those of the framework."""
    return DeviceMemory(
        device=device,
        parameters=round(parts.parameters),
        gradients=round(parts.gradients),
        optimizer=round(parts.optimizer),
        activations=round(parts.activations),
        buffers=round(parts.buffers) + framework_bytes(kind),
        capacity=kind.memory,
    )


def _stage_memories(
    tables: MemoryTables, scheduled: ScheduledStages, tensor: int, rows: int
) -> tuple[StageMemory, float]:
    """Returns the memory of all stages of a device, and the most activations that it holds at
    once."""
    parts = [micro_batch_memory(tables, stage, tensor, rows) for stage in scheduled.stages]
    half = [deferred_bytes(tables, stage, tensor, rows) for stage in scheduled.stages]
    held = peak_activation_bytes(scheduled, [float(part.activations) for part in parts], half)
    return device_stage_memory(tables.plain, scheduled.stages, tensor, parts), held


def total_bytes(memory: DeviceMemory) -> int:
    """Returns the peak bytes of one device, all kinds together."""
    states = memory.parameters + memory.gradients + memory.optimizer
    return states + memory.activations + memory.buffers
