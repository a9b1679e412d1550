"""Explains why a plan won, what its runners-up lost by, and what to do if nothing fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from meshwright.cost.memory import device_memory, total_bytes
from meshwright.cost.out_of_memory import memory_problems, needed_bytes
from meshwright.errors import FitError, Problem
from meshwright.plan.spec import DeviceMemory, Plan, RunnerUp
from meshwright.search.candidate import (
    CandidatePipeline,
    excess_bytes,
    plan_of,
    strategy_label,
)
from meshwright.search.costs import Costs
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


def _why_misfit(costs: Costs, plan: Plan) -> str:
    """Says by how much a plan misses: `does not fit: T4 needs 21 GiB of 15 GiB`: the worst
    device."""
    worst = _worst(costs, plan)
    need, room = format_bytes(total_bytes(worst)), format_bytes(worst.capacity)
    return f"does not fit: {worst.device} needs {need} of {room}"


def _worst(costs: Costs, plan: Plan) -> DeviceMemory:
    """Returns the memory of the device that lacks most."""
    every = device_memory(plan, costs.model, costs.cluster)
    return max(every, key=lambda memory: total_bytes(memory) - memory.capacity)


def misfit_as_runner_up(costs: Costs, misfit: CandidatePipeline, title: str = "") -> RunnerUp:
    """Returns as a runner-up a pipeline that does not fit."""
    plan = plan_of(costs, (misfit,), "1f1b")
    return RunnerUp(name=title or pipeline_title(costs, misfit), reason=_why_misfit(costs, plan))


def pipeline_title(costs: Costs, pipeline: CandidatePipeline) -> str:
    """Returns the name of a plan of one pipeline in 1F1B among the runners-up."""
    return strategy_label(costs, (pipeline,), "1f1b")


def nothing_fits(costs: Costs, misfits: Iterable[CandidatePipeline], tried: int) -> FitError:
    """Says by how much the nearest attempt misses, on which device, and what would help."""
    nearest = min(misfits, key=lambda misfit: excess_bytes(costs, misfit, "1f1b"))
    plan = plan_of(costs, (nearest,), "1f1b")
    worst = _worst(costs, plan)
    found = next(
        problem.found
        for problem in memory_problems(plan, costs.model, costs.cluster)
        if f" on {worst.device}," in problem.found
    )
    name = pipeline_title(costs, nearest)
    return FitError(
        Problem(
            f"model {costs.model.name} on cluster {costs.cluster.name}",
            "memory",
            f"{tried} strategies, none of which fits; the nearest, {name}, needs {found}",
            f"at most {format_bytes(worst.capacity)}",
            "What would help: " + "; or ".join(_advice(costs, nearest, worst)) + ".",
        )
    )


def _advice(costs: Costs, nearest: CandidatePipeline, worst: DeviceMemory) -> Iterator[str]:
    """Yields what would make the nearest attempt fit, or help it to."""
    states = worst.parameters + worst.gradients + worst.optimizer
    kind = costs.cluster.types[costs.devices[worst.device].type]
    yield f"devices with {format_bytes(needed_bytes(worst, kind))} of memory"
    if len(nearest.stages) < len(costs.model.layers):
        yield "more devices, hence fewer layers on each"
    one_row = all(rows == 1 for stage in nearest.stages for rows in stage.rows)
    if states < worst.activations + worst.buffers and one_row:
        yield "a shorter sequence"
    if worst.optimizer:
        saved = format_bytes(worst.optimizer)
        yield f"an optimizer without moments (sgd saves {saved} on this device)"
    if not any(layer.along("tensor").parameters for layer in costs.model.layers):
        yield "layers that tensor parallelism can split"
