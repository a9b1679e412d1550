"""Collects the figures of a plan by which two plans are compared."""

from __future__ import annotations

from dataclasses import replace

from meshwright.cluster.spec import Cluster
from meshwright.cost.memory import total_bytes
from meshwright.cost.priced_plan import PricedPlan
from meshwright.errors import PlanError, Problem
from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import describe_plan
from meshwright.plan.spec import DeviceMemory, Plan, Prediction
from meshwright.program.timeline import Timeline
from meshwright.records import record
from meshwright.simulate.critical_path import step_breakdown
from meshwright.simulate.simulator import simulate
from meshwright.simulate.traffic import LinkLoad, link_loads
from meshwright.units import format_seconds

SAME = 1e-9
"""The relative difference in speed below which two plans count as equally fast."""

_ON = {
    "compute": "its slowest stage",
    "bubble": "the bubble",
    "transfers": "transfers between stages",
    "reductions": "reductions",
    "optimizer": "the optimizer step",
    "overhead": "overhead",
}
"""The words for the parts of a step in the reason of a verdict."""
_JOB = {
    "rows a step": "global_batch",
    "tokens a row": "sequence",
    "precision": "precision",
    "optimizer": "optimizer",
}
"""The fields of a job that two plans may differ in, by the words for them."""


@record
class PlanFigures:
    """Holds the figures of one simulated step of a plan."""

    name: str
    """The name of the plan in the comparison: its file."""
    plan: str
    """The plan in one line."""
    model: str
    cluster: str
    devices: int
    step_seconds: float
    tokens_per_step: int
    tokens_per_second: float
    parts: dict[str, float]
    """The seconds of the critical path by kind; they add up to the step."""
    bubble_share: float
    """The share of the step that is bubble."""
    fullest: DeviceMemory
    """The device with the largest share of its memory in use."""
    fullest_share: float
    """The share of its memory that the fullest device uses."""
    links: tuple[LinkLoad, ...]
    """The traffic of every resource that carries bytes."""


@record
class SimulatedPlan:
    """Holds a plan with the figures of its step and the timeline they were taken from."""

    figures: PlanFigures
    plan: Plan
    model: LayerGraph
    cluster: Cluster
    timeline: Timeline


@record
class Verdict:
    """Says which of two plans is faster, and what makes the difference."""

    winner: str | None
    """The name of the faster plan; None if they are equally fast."""
    speed_up: float
    """The tokens per second of the faster plan over those of the slower one."""
    reason: str
    """What the slower plan spends more time on; empty if they are equally fast."""
    differences: tuple[str, ...]
    """What else differs besides the plan, such as cluster or batch size."""


def simulate_figures(name: str, priced: PricedPlan) -> SimulatedPlan:
    """Simulates one step of a plan that fits its model and cluster, and collects its figures."""
    plan, model, cluster = priced.plan, priced.model, priced.cluster
    timeline = simulate(priced.program, priced.prices)
    seconds, found = timeline.step_seconds, step_breakdown(timeline)
    fullest = max(priced.memory, key=lambda m: total_bytes(m) / m.capacity)
    tokens = plan.job.global_batch * plan.job.sequence
    facts = PlanFigures(
        name=name,
        plan=describe_plan(plan),
        model=model.name,
        cluster=cluster.name,
        devices=len(plan.devices),
        step_seconds=seconds,
        tokens_per_step=tokens,
        tokens_per_second=tokens / seconds,
        parts=found,
        bubble_share=found["bubble"] / seconds,
        fullest=fullest,
        fullest_share=total_bytes(fullest) / fullest.capacity,
        links=link_loads(priced),
    )
    predicted = Prediction(step_seconds=seconds, parts=found, memory=priced.memory)
    kept = plan if plan.prediction else replace(plan, prediction=predicted)
    return SimulatedPlan(figures=facts, plan=kept, model=model, cluster=cluster, timeline=timeline)


def check_comparable(first: SimulatedPlan, second: SimulatedPlan) -> None:
    """Raises PlanError unless both plans are for the same layers."""
    one, two = (
        [(x.name, x.parameters, x.frozen_parameters) for x in each.model.layers]
        for each in (first, second)
    )
    if one != two:
        a, b = first.figures, second.figures
        raise PlanError(
            Problem(
                b.name,
                "model",
                f"{b.model} ({len(two)} layers)",
                f"{a.model} ({len(one)} layers), the model of {a.name}",
                "compare plans for one model: tokens of different models are different work",
            )
        )


def compare_plans(first: SimulatedPlan, second: SimulatedPlan) -> Verdict:
    """Compares two plans by tokens per second, and names the parts of the step that make the
    difference."""
    a, b = first.figures, second.figures
    best, other = (a, b) if a.tokens_per_second >= b.tokens_per_second else (b, a)
    speed_up = best.tokens_per_second / other.tokens_per_second
    same = speed_up - 1 < SAME
    return Verdict(
        winner=None if same else best.name,
        speed_up=speed_up,
        reason="" if same else _reason(best, other),
        differences=_differences(first, second),
    )


def _reason(best: PlanFigures, other: PlanFigures) -> str:
    """Names the parts in which the slower plan loses time, in seconds per as many tokens as one
    step of the faster."""
    scale = best.tokens_per_step / other.tokens_per_step
    change = {part: scale * other.parts[part] - best.parts[part] for part in best.parts}
    whole = sum(change.values())
    ordered = sorted(change.items(), key=lambda item: -item[1])
    losses = [(part, s) for part, s in ordered if s > 0.1 * whole]
    gains = [(part, s) for part, s in reversed(ordered) if s < -0.1 * whole]
    text = _listed(losses, "more")
    return f"{text}, which {_listed(gains, 'less')} cannot make up for" if gains else text


def _listed(changes: list[tuple[str, float]], word: str) -> str:
    """Returns changes as text: `31 ms more on the bubble and 8 ms more on reductions`."""
    words = [f"{format_seconds(abs(seconds))} {word} on {_ON[part]}" for part, seconds in changes]
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _differences(first: SimulatedPlan, second: SimulatedPlan) -> tuple[str, ...]:
    """Describes in what the two comparisons differ besides the plan."""
    pairs = [
        ("cluster", first.figures.cluster, second.figures.cluster, first.cluster != second.cluster),
        *(
            (name, str(one), str(two), one != two)
            for name, one, two in (
                (name, getattr(first.plan.job, field), getattr(second.plan.job, field))
                for name, field in _JOB.items()
            )
        ),
        (
            "times",
            _times(first.plan),
            _times(second.plan),
            first.plan.profile != second.plan.profile,
        ),
    ]
    return tuple(f"{name}: {one} and {two}" for name, one, two, unlike in pairs if unlike)


def _times(plan: Plan) -> str:
    """Says where the times of a plan come from."""
    return (
        f"measured ({plan.profile.source or plan.profile.name})" if plan.profile else "datasheets"
    )
