"""Keeps the best plan so far, the plans that were simulated, and what is left of the budget."""

from __future__ import annotations

import math
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from meshwright.cost.out_of_memory import memory_problems
from meshwright.plan.spec import Pipeline, Plan, ScheduleName
from meshwright.search.bounds import after_pipelines, pipeline_bound
from meshwright.search.candidate import (
    CandidatePipeline,
    fits,
    plan_of,
    strategy_label,
    tensor_widths_agree,
)
from meshwright.search.costs import Costs
from meshwright.simulate.critical_path import step_breakdown as parts_of
from meshwright.simulate.simulated_step import SimulatedStep
from meshwright.simulate.symmetry import find_symmetry, simulate_by_symmetry
from meshwright.stopping import never

Strategy = tuple[ScheduleName, tuple[CandidatePipeline, ...]]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

SAME = 1e-9
"""Strategies whose seconds differ by less, relatively, are as good as each other; bounds and
simulator add up the same seconds in different orders."""

WORK = 16_000
"""Micro-batches and reductions of ranks (or their worth in bounds) that may be simulated beside the
first plan and those made by hand: the normal end of a search, the same on every machine."""


STEPS_KEPT, STEPS_ALIKE, SHORT = 12, 4, 5_000
"""Simulated steps that are kept, to say where their seconds go, and those of them whose plans have
the same name, beside those with fewer instructions."""

MOMENT_SECONDS = 1.5
"""How long a search that was told to stop may go on until it has a first plan."""

DEVICES_LOOKED_AT = 4
"""Devices whose bounds and memory are looked at in the time that one rank takes to simulate one
micro-batch."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Describes a strategy that fits, and the seconds of its step in the simulator."""

    name: str
    plan: Plan
    seconds: float


def ignore(_seconds: float) -> None:
    """Does nothing: no caller waits for plans."""


@dataclass(slots=True)
class Incumbent:
    """Holds the best plan so far, all others that were simulated, and the budget that is left."""

    costs: Costs
    cluster_print: str
    deadline: float | None = None
    """End of the search, in seconds of time.monotonic; None: the work alone ends it."""
    grace_seconds: float = 0.0
    """How long a search whose time is up looks for a plan that is better than a spare one."""
    work: int = WORK
    stop: Callable[[], bool] = never
    """Returns True if the user wants the search to end."""
    stopped_at: float | None = None
    """The time when `stop` first said yes, in seconds of time.monotonic."""
    found: Callable[[float], None] = ignore
    """Told the seconds of every plan that is the best so far."""
    spare: Evaluated | None = None
    """A plan that fits, found before the search proper. It is used only if the search is stopped
    before it has found another one."""
    best: Evaluated | None = None
    others: list[Evaluated] = field(default_factory=list)
    pruned: Counter[str] = field(default_factory=Counter)
    seen: set[Strategy] = field(default_factory=set)
    margin: float = 0.0
    """The share by which predicted seconds must differ to be told apart."""
    any_order: bool = False
    """True if the order of work is chosen last: strategies are compared in the best one."""
    promising: dict[Strategy, float] = field(default_factory=dict)
    """Strategies that are fast in the best order of work, with their estimated seconds."""
    misfits: tuple[Plan, ...] = ()
    """Plans that lack memory, the most promising first, if nothing else was found."""
    steps: list[tuple[Evaluated, SimulatedStep]] = field(default_factory=list)
    """The simulated steps of the best plans, fastest first."""
    parts: dict[int, dict[str, float]] = field(default_factory=dict)
    """The answers of `parts_in`, by the identity of a plan in `others`."""

    @property
    def limit(self) -> float:
        """Returns the seconds that a newcomer has to beat."""
        return self.best.seconds * (1 - SAME) if self.best else float("inf")

    @property
    def stopped(self) -> bool:
        """Returns True if the user has told the search to end."""
        if self.stopped_at is None and self.stop():
            self.stopped_at = time.monotonic()
        return self.stopped_at is not None

    @property
    def out_of_time(self) -> bool:
        """Returns True if the search is to end: the time is up, or the user wants it."""
        return self.stopped or (self.deadline is not None and time.monotonic() >= self.deadline)

    def may_leave_off(self) -> bool:
        """True if what is under way may be left unfinished: the search is to end, and there is a
        plan, or none has been found in the time that is left for that."""
        if not self.out_of_time or self.best is not None:
            return self.out_of_time
        now, spared = time.monotonic(), self.spare is not None
        if self.stopped_at is not None:
            return spared or now - self.stopped_at > MOMENT_SECONDS
        return spared and self.deadline is not None and now > self.deadline + self.grace_seconds

    @property
    def out_of_budget(self) -> bool:
        """True if the budget is spent: the time, or the work."""
        return self.out_of_time or self.work <= 0


def simulated(costs: Costs, plan: Plan) -> SimulatedStep:
    """Returns the simulated step of a plan that fits."""
    return simulate_by_symmetry(
        plan, costs.model, costs.stated_cluster, costs.profile, times=costs.times
    )


def simulate_and_record(incumbent: Incumbent, plan: Plan, name: str) -> Evaluated:
    """Simulates a plan that fits; of equally fast ones the first stays the best."""
    costs = incumbent.costs
    step = simulated(costs, plan)
    evaluated = Evaluated(name, plan, step.step_seconds)
    insort(incumbent.steps, (evaluated, step), key=lambda pair: pair[0].seconds)
    incumbent.steps = _worth_keeping(incumbent.steps)
    if incumbent.best is None or evaluated.seconds < incumbent.best.seconds:
        incumbent.best = evaluated
        incumbent.found(evaluated.seconds)
    incumbent.others.append(evaluated)
    return evaluated


def _worth_keeping(
    steps: Sequence[tuple[Evaluated, SimulatedStep]],
) -> list[tuple[Evaluated, SimulatedStep]]:
    """Returns the steps of plans that may be told about in the end; few of one name are."""
    kept: list[tuple[Evaluated, SimulatedStep]] = []
    names = Counter[str]()
    for each, step in steps:
        names[each.plan.name] += 1
        fast = len(kept) < STEPS_KEPT and names[each.plan.name] <= STEPS_ALIKE
        if fast or len(step.executed) < SHORT:
            kept.append((each, step))
    return kept


def try_candidate(incumbent: Incumbent, strategy: Strategy) -> bool:
    """True if a strategy beats the best so far; bounded, weighed and, if need be, simulated."""
    if strategy in incumbent.seen:
        return False
    incumbent.seen.add(strategy)
    incumbent.work -= max(1, len(incumbent.costs.devices) // DEVICES_LOOKED_AT)
    reason = _refused(incumbent, strategy)
    if reason:
        incumbent.pruned[reason] += 1
        return False
    schedule, pipelines = strategy
    costs = incumbent.costs
    plan = plan_of(costs, pipelines, schedule, incumbent.cluster_print)
    if _copies_overfill(costs, plan):
        incumbent.pruned["does not fit in memory"] += 1
        return False
    work = work_of(costs, plan)
    if incumbent.best and work > max(incumbent.work, 0) // 4:
        incumbent.pruned["too much to simulate in what is left of the budget"] += 1
        return False
    incumbent.work -= work
    evaluated = simulate_and_record(incumbent, plan, strategy_label(costs, pipelines, schedule))
    if incumbent.best is evaluated:
        return True
    incumbent.pruned["slower in the simulator"] += 1
    return False


def _copies_overfill(costs: Costs, plan: Plan) -> bool:
    """True if replicas of unlike tensor widths have no memory for the gradients that they copy to
    be summed: all else that a plan holds was weighed before."""
    widths = {len(group) for p in plan.pipelines for stage in p.stages for group in stage.devices}
    return len(widths) > 1 and bool(memory_problems(plan, costs.model, costs.cluster))


def work_of(costs: Costs, plan: Plan) -> int:
    """Counts the micro-batches, and the reductions of about a layer each, of all ranks that are
    simulated."""
    folded = find_symmetry(plan, costs.cluster, costs.model)
    running = {plan.devices[rank] for rank in folded.ranks}
    work = 0
    for pipeline in plan.pipelines:
        for stage in pipeline.stages:
            count = sum(device in running for group in stage.devices for device in group)
            layers = stage.layers[1] - stage.layers[0]
            shared = len(stage.devices) > 1 or len(plan.pipelines) > 1
            work += count * (pipeline.micro_batches + layers * shared)
    return work


def _refused(incumbent: Incumbent, strategy: Strategy) -> str:
    """Says why a strategy need not be simulated; empty if it must be."""
    schedule, pipelines = strategy
    costs = incumbent.costs
    if not tensor_widths_agree(costs, pipelines):
        return "tensor widths of a layer's holders do not divide each other"
    if not all(fits(costs, pipeline, schedule) for pipeline in pipelines):
        return "does not fit in memory"
    bound = max(pipeline_bound(costs, each, schedule) for each in pipelines)
    bound += after_pipelines(costs, pipelines)
    return "lower bound above the best" if bound >= incumbent.limit else ""


def chosen(incumbent: Incumbent) -> Evaluated:
    """Returns the plan to train by: of plans whose predictions differ by at most the margin, the
    one with least `sturdy_seconds`; without a margin, the simplest of the fastest."""
    assert incumbent.best is not None
    margin = incumbent.margin
    if not margin:
        return simplest(incumbent)
    limit = incumbent.best.seconds * (1 + margin)

    def key(each: Evaluated) -> tuple[float, float]:
        return sturdy_seconds(each.seconds, each.plan.pipelines, margin), each.seconds

    return min((each for each in incumbent.others if each.seconds <= limit), key=key)


def sturdy_seconds(
    seconds: float, pipelines: Sequence[Pipeline | CandidatePipeline], margin: float
) -> float:
    """Returns seconds by which plans compare whose predictions are uncertain by `margin`: one with
    twice as many pieces of work as another has to be faster by the whole margin."""
    return float(seconds * pieces(pipelines) ** math.log2(1 + margin))


def pieces(pipelines: Sequence[Pipeline | CandidatePipeline]) -> int:
    """Counts the pieces of work of a step: micro-batches times stages, of the pipeline with
    most."""
    return max(each.micro_batches * len(each.stages) for each in pipelines)


def simplest(incumbent: Incumbent) -> Evaluated:
    """Returns the plan with the fewest pipelines and stages among those as good as the best."""

    def parts(evaluated: Evaluated) -> tuple[int, int]:
        pipelines = evaluated.plan.pipelines
        return len(pipelines), sum(len(pipeline.stages) for pipeline in pipelines)

    assert incumbent.best is not None
    limit = incumbent.best.seconds * (1 + SAME)
    return min((p for p in incumbent.others if p.seconds <= limit), key=parts)


def step_of(incumbent: Incumbent, evaluated: Evaluated) -> SimulatedStep | None:
    """Returns the simulated step of a strategy, if it was kept."""
    return next((step for each, step in incumbent.steps if each is evaluated), None)


def parts_in(incumbent: Incumbent, evaluated: Evaluated) -> dict[str, float]:
    """Returns the seconds of a plan's critical path by kind, without rounding noise."""
    if id(evaluated) not in incumbent.parts:
        step = step_of(incumbent, evaluated) or simulated(incumbent.costs, evaluated.plan)
        noise = 1e-12 * step.step_seconds
        incumbent.parts[id(evaluated)] = {
            part: s if s > noise else 0.0 for part, s in parts_of(step).items()
        }
    return incumbent.parts[id(evaluated)]
