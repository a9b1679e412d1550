"""Finishes a search: tries further options on the best plans that it has found.

The search itself compares plans of one kind, for which it has lower bounds. What else a plan may
have is tried at the end, one option after another, on the few best.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Literal

from meshwright.cost.memory import memory_by_class, total_bytes
from meshwright.plan.spec import Plan
from meshwright.search.costs import Costs
from meshwright.search.incumbent import SAME, Evaluated, Incumbent, Progress, simulate_and_record

PruneReason = Literal[
    "impossible for this plan",
    "does not fit in memory",
    "lower bound above the best",
    "slower in closed form",
    "slower by the quick clock",
    "slower in the simulator",
    "too large to try",
    "beyond the budget",
]
"""Why a plan is not followed up."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """Describes a plan that may be faster than the best one so far."""

    plan: Plan
    why: str
    """What sets it apart from others, in one line: its name among the runners-up."""
    is_variant: bool = False
    """True if the plan differs from the best one in a detail only. It is then listed, as the best
    plan or a runner-up, only if it is faster."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """Says why an option does not propose some plans."""

    reason: PruneReason
    count: int = 1


Proposals = Generator[Proposal | Pruned, Evaluated | None, None]
"""What an option yields. After each Proposal it receives the plan as simulated, or None if the plan
does not fit in memory."""


@dataclass(frozen=True, slots=True)
class PlanOption:
    """Describes a way to change whole plans, such as giving them another schedule."""

    name: str
    """A plural, of lower-case words joined by hyphens: `virtual-stages`."""
    propose: Callable[[Incumbent], Proposals]
    """Yields changed forms of the best plans so far."""


def finish(incumbent: Incumbent, options: Iterable[PlanOption], tell: Progress) -> None:
    """Tries options one after another; the incumbent is the fastest plan."""
    for option in options:
        step = f"trying {option.name.replace('-', ' ')}"
        tell(step, 0, 1)
        _try_option(incumbent, option)
        tell(step, 1, 1)


def _try_option(incumbent: Incumbent, option: PlanOption) -> None:
    """Simulates what an option proposes until it ends or the search is out of time."""

    def prune(pruned: Pruned) -> None:
        incumbent.pruned[f"{option.name}: {pruned.reason}"] += pruned.count

    proposals = option.propose(incumbent)
    answer: Evaluated | None = None
    while True:
        if incumbent.out_of_time:
            prune(Pruned("beyond the budget"))
            return
        try:
            found = proposals.send(answer)
        except StopIteration:
            return
        answer = None
        if isinstance(found, Pruned):
            prune(found)
        elif not fits_in_memory(incumbent.costs, found.plan):
            prune(Pruned("does not fit in memory"))
        else:
            answer = _simulated(incumbent, found)
            if answer is not incumbent.best:
                prune(Pruned("slower in the simulator"))


def _simulated(incumbent: Incumbent, proposal: Proposal) -> Evaluated:
    """Simulates a proposal; a variant leaves no trace unless it is faster than the best plan."""
    before = incumbent.best
    evaluated = simulate_and_record(incumbent, proposal.plan, proposal.why)
    if proposal.is_variant and before and evaluated.seconds >= before.seconds * (1 - SAME):
        incumbent.best = before
        incumbent.others.pop()
    return evaluated


def fits_in_memory(costs: Costs, plan: Plan) -> bool:
    """Returns True if every device holds what the plan asks of it."""
    found = memory_by_class(plan, costs.model, costs.cluster)
    return all(total_bytes(memory) <= memory.capacity for memory, _ in found)
