"""Explains why a plan won, what its runners-up lost by, and what to do if nothing fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise

from meshwright.cost.memory import device_memory, total_bytes
from meshwright.cost.out_of_memory import memory_problems, needed_bytes
from meshwright.errors import FitError, Problem
from meshwright.model.spec import structure_fingerprint
from meshwright.plan.spec import Pipeline, Plan, PlanInput, RunnerUp, Stage
from meshwright.search.costs import Costs
from meshwright.search.estimate import Bounds, Candidate, Misfit
from meshwright.search.grid_memory import memory_of, recomputed_stages
from meshwright.units import format_bytes, format_seconds

NAMES = {
    "compute": "slowest stage",
    "bubble": "bubble",
    "transfers": "transfers",
    "reductions": "reductions",
    "optimizer": "optimizer",
    "overhead": "overhead",
}
"""Parts of a step, as people call them."""


def as_plan(costs: Costs, candidate: Candidate, bounds: Bounds, cluster_print: str) -> Plan:
    """Returns the plan that a candidate with these layer cuts stands for, without a prediction."""
    shape, grid = candidate.shape, candidate.shape.grid
    recomputed = recomputed_stages(memory_of(costs, candidate.placement, shape), bounds)
    stages = tuple(
        Stage(layers=layers, devices=devices, recompute=recompute)
        for layers, devices, recompute in zip(
            pairwise(bounds), candidate.placement.stages, recomputed, strict=True
        )
    )
    return Plan(
        name=f"dp{grid.data}-tp{grid.tensor}-pp{grid.stages}",
        model=PlanInput(name=costs.model.name, fingerprint=structure_fingerprint(costs.model)),
        cluster=PlanInput(name=costs.cluster.name, fingerprint=cluster_print),
        job=costs.job,
        schedule=shape.schedule,
        devices=tuple(device.name for device in candidate.used.devices),
        pipelines=(
            Pipeline(micro_batches=shape.micro_batches, rows=shape.rows * grid.data, stages=stages),
        ),
    )


def label(candidate: Candidate, bounds: Bounds) -> str:
    """Returns one line that tells a candidate from its neighbours: grid, layers, micro-batches,
    order."""
    shape, grid = candidate.shape, candidate.shape.grid
    words = [f"dp{grid.data}-tp{grid.tensor}-pp{grid.stages}"]
    if grid.stages > 1:
        words.append("[" + "|".join(str(b - a) for a, b in pairwise(bounds)) + "]")
    words.append(f"{shape.micro_batches}x{shape.rows * grid.data}")
    if grid.stages > 1:
        words.append(shape.schedule)
    if candidate.placement.name != "in order":
        words.append(f"({candidate.placement.name})")
    if candidate.used.without:
        words.append(f"without {candidate.used.without}")
    return " ".join(words)


def why_slower(winner: Mapping[str, float], other: Mapping[str, float]) -> str:
    """Returns the parts of a step that make the difference, largest first, until what is left is
    less than a tenth of it: `bubble +31 ms, reductions -8 ms`."""
    change = {part: other.get(part, 0.0) - winner.get(part, 0.0) for part in NAMES}
    left = difference = sum(change.values())
    words: list[str] = []
    for part, seconds in sorted(change.items(), key=lambda item: -abs(item[1])):
        if seconds == 0 or (words and abs(left) < 0.1 * abs(difference)):
            break
        sign = "+" if seconds > 0 else "-"
        words.append(f"{NAMES[part]} {sign}{format_seconds(abs(seconds))}")
        left -= seconds
    return ", ".join(words) or "as fast"


def why_misfit(costs: Costs, misfit: Misfit) -> str:
    """Says by how much a candidate misses: `does not fit: T4 needs 21 GiB of 15 GiB`: the worst
    device under the best cuts."""
    plan = as_plan(costs, misfit.candidate, misfit.bounds, "")
    worst = max(
        device_memory(plan, costs.model, costs.cluster), key=lambda m: total_bytes(m) - m.capacity
    )
    need, room = format_bytes(total_bytes(worst)), format_bytes(worst.capacity)
    return f"does not fit: {worst.device} needs {need} of {room}"


def misfits_as_runners_up(
    costs: Costs, misfits: Iterable[Misfit], most: int
) -> tuple[RunnerUp, ...]:
    """Returns as runners-up the candidates that do not fit and promised most: the first of each
    grid, at most `most` of them."""
    first: dict[object, Misfit] = {}
    for misfit in misfits:
        first.setdefault(misfit.candidate.shape.grid, misfit)
    return tuple(
        RunnerUp(name=label(misfit.candidate, misfit.bounds), reason=why_misfit(costs, misfit))
        for misfit in list(first.values())[:most]
    )


def nothing_fits(costs: Costs, misfits: Iterable[Misfit], tried: int) -> FitError:
    """Says by how much the nearest attempt misses, on which device, and what would help."""
    nearest = min(misfits, key=lambda m: m.excess_bytes)
    plan = as_plan(costs, nearest.candidate, nearest.bounds, "")
    plan = replace(plan, name=label(nearest.candidate, nearest.bounds))
    worst = max(
        device_memory(plan, costs.model, costs.cluster), key=lambda m: total_bytes(m) - m.capacity
    )
    states = worst.parameters + worst.gradients + worst.optimizer
    grid, rows = nearest.candidate.shape.grid, nearest.candidate.shape.rows
    kind = costs.cluster.types[costs.devices[worst.device].type]
    advice = [f"devices with {format_bytes(needed_bytes(worst, kind))} of memory"]
    if grid.stages < len(costs.model.layers):
        advice.append("more devices, hence fewer layers on each")
    if states < worst.activations + worst.buffers and rows == 1:
        advice.append("a shorter sequence")
    if worst.optimizer:
        saved = format_bytes(worst.optimizer)
        advice.append(f"an optimizer without moments (sgd saves {saved} on this device)")
    if not any(layer.along("tensor").parameters for layer in costs.model.layers):
        advice.append("layers that tensor parallelism can split")
    found = next(
        problem.found
        for problem in memory_problems(plan, costs.model, costs.cluster)
        if f" on {worst.device}," in problem.found
    )
    return FitError(
        Problem(
            f"model {costs.model.name} on cluster {costs.cluster.name}",
            "memory",
            f"{tried} strategies, none of which fits; the nearest, {plan.name}, needs {found}",
            f"at most {format_bytes(worst.capacity)}",
            "What would help: " + "; or ".join(advice) + ".",
        )
    )
