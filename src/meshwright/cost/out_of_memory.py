"""Reports the devices that run out of memory under a plan, by how much, and what would help."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import numpy as np

from meshwright.cluster.spec import Cluster, DeviceType, devices_of
from meshwright.cost.constants import FRAGMENTATION
from meshwright.cost.in_flight import peak_activation_bytes, scheduled_stages
from meshwright.cost.memory import (
    MemoryTables,
    device_memory,
    framework_bytes,
    memory_tables,
    stage_memory_bytes,
    stage_table,
    total_bytes,
)
from meshwright.errors import Problem
from meshwright.model.spec import Layer, LayerGraph
from meshwright.plan.ranks import StagePlacement
from meshwright.plan.spec import DeviceMemory, Plan
from meshwright.units import format_bytes

SMALLER_SHARE_ADVICE = "give it fewer layers and fewer rows, or a device with more memory"
"""The advice where no single change is known to suffice."""


def needed_bytes(memory: DeviceMemory, device: DeviceType) -> int:
    """Returns the memory that a device of this type would need to hold what the plan gives it."""
    excess = total_bytes(memory) - memory.capacity
    return memory.capacity + round(excess / (1 - FRAGMENTATION[device.processor]))


def memory_problems(plan: Plan, model: LayerGraph, cluster: Cluster) -> tuple[Problem, ...]:
    """Returns one Problem for every device that a plan overfills: by how much, and what would
    help."""
    tables = memory_tables(model, plan.job)
    by_device = {memory.device: memory for memory in device_memory(plan, model, cluster)}
    types = {device.name: cluster.types[device.type] for device in devices_of(cluster)}
    problems = []
    for scheduled in scheduled_stages(plan):
        stage, count = scheduled.stages[0], len(scheduled.stages)
        held = peak_activation_bytes(scheduled, (1.0,) * count, (1.0,) * count)
        advice = cache(partial(_what_helps, model, tables, stage, held=held))
        for placement in stage.mesh.members:
            memory = by_device[placement.device]
            excess = total_bytes(memory) - memory.capacity
            if excess > 0:
                room = memory.capacity - framework_bytes(types[placement.device])
                rows = placement.rows[1] - placement.rows[0]
                problems.append(
                    Problem(
                        f"plan {plan.name}",
                        scheduled.path,
                        f"{_sizes(memory)} on {placement.device}, {format_bytes(excess)} too much",
                        f"at most {format_bytes(memory.capacity)}",
                        advice(placement.width("tensor"), rows, room)
                        if count == 1
                        else SMALLER_SHARE_ADVICE,
                        each=("device", placement.device),
                    )
                )
    return tuple(problems)


def _sizes(memory: DeviceMemory) -> str:
    """Returns the bytes of a device as text: the sum, and every kind."""
    parts = ", ".join(
        f"{name} {format_bytes(getattr(memory, name))}"
        for name in ("parameters", "gradients", "optimizer", "activations", "buffers")
    )
    return f"{format_bytes(total_bytes(memory))} ({parts})"


def _wider(layers: Sequence[Layer], tensor: int) -> list[int]:
    """Returns the legal tensor widths above `tensor`, up to 8, the devices of a usual node."""
    units = [each.units for each in (layer.along("tensor") for layer in layers) if each.units]
    return [w for w in range(tensor + 1, 9) if units and all(u % w == 0 for u in units)]


def _what_helps(
    model: LayerGraph,
    tables: MemoryTables,
    stage: StagePlacement,
    tensor: int,
    rows: int,
    room: float,
    *,
    held: float,
) -> str:
    """Returns which single changes make the stage fit.

    They are recomputation, the longest prefix of its layers, the most rows, and the least wider
    tensor width.
    """
    (first, last), table = stage.layers, stage_table(tables, stage)
    ends, sizes = np.arange(first + 1, last + 1), np.arange(1, rows)
    by_layers = stage_memory_bytes(table, (np.full_like(ends, first), ends), tensor, rows, held)
    by_rows = stage_memory_bytes(table, stage.layers, tensor, sizes, held)
    layers_that_fit = int(np.sum(by_layers <= room))
    rows_that_fit = int(np.sum(by_rows <= room))
    advice = []
    if stage_memory_bytes(tables.recomputed, stage.layers, tensor, rows, held) <= room:
        advice.append("`recompute: true`")
    if layers_that_fit:
        advice.append(f"give it {layers_that_fit} of its {last - first} layers")
    if rows_that_fit:
        advice.append(f"{rows_that_fit} of its {rows} rows of each micro-batch")
    for width in _wider(model.layers[first:last], tensor):
        if stage_memory_bytes(table, stage.layers, width, rows, held) <= room:
            advice.append(f"tensor width {width}")
            break
    return "; or ".join(advice) or SMALLER_SHARE_ADVICE
