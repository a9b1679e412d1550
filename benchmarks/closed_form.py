"""How near the closed form, by which strategies are compared, is to what the simulator finds.

    python benchmarks/closed_form.py [--only v100-16 ...] [--model gpt2-medium] [--number 36]

For every example cluster: strategies that the search has compared and that take at most NEAR times
the seconds of the best, of many shapes, each simulated in its two fastest schedules with a rule and
in two orders made for it, the fastest of which counts. `mean` and `spread` (standard deviation) are
of the simulated seconds over those of the closed form; `busy`: the same for strategies whose
busiest link is in use for more than UNDELAYED of the step.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from random import Random
from statistics import fmean, pstdev

from meshwright.cluster.files import load_cluster
from meshwright.cluster.spec import cluster_fingerprint
from meshwright.model.load import load_model
from meshwright.plan.spec import Job
from meshwright.search.candidate import micro_batch_sizes, plan_of
from meshwright.search.candidate_estimate import UNDELAYED, all_pipeline_prices, crowded_link
from meshwright.search.costs import Costs, costs_of
from meshwright.search.hill_climb import LocalSearch
from meshwright.search.incumbent import Incumbent, Strategy, simulated
from meshwright.search.local_search import improve
from meshwright.search.options.other_schedules import GLANCED, in_listed_order, in_named_orders
from meshwright.search.quick_clock import pipeline_works

EXAMPLES = Path(__file__).parents[1] / "examples" / "clusters"
NEAR = 1.2
ALIKE = 6
"""Strategies with the same micro-batches and numbers of stages."""
MARGINS = (1.0, 1.2)
ROW = "{:<20} {:>6} {:>7} {:>7} {:>7} {:>7} {:>7}"


def compared(costs: Costs) -> dict[Strategy, float]:
    """The strategies that a search compares in the best order of work, and their seconds."""
    incumbent = Incumbent(costs, cluster_fingerprint(costs.cluster), any_order=True)
    search = LocalSearch(incumbent, ("1f1b", "gpipe"))
    improve(search, lambda _what, _done, _all: None)
    known = {s: seconds for s, (seconds, sure) in search.known.items() if sure}
    return {s: t for s, t in {**known, **incumbent.promising}.items() if t < float("inf")}


def sample(rated: dict[Strategy, float], number: int) -> list[Strategy]:
    """Some of the strategies near the best, of many shapes: the same every time."""
    limit = NEAR * min(rated.values())
    near = [s for s in rated if rated[s] <= limit and any(len(p.stages) > 1 for p in s[1])]
    Random(1).shuffle(near)
    shapes: Counter[object] = Counter()
    chosen = []
    for strategy in near:
        depths = tuple(len(pipeline.stages) for pipeline in strategy[1])
        shape = depths, micro_batch_sizes(strategy[1])
        shapes[shape] += 1
        if shapes[shape] <= ALIKE:
            chosen.append(strategy)
    return chosen[:number]


def best_of_orders(costs: Costs, strategy: Strategy) -> float:
    """Simulated seconds of a strategy in the fastest of a few orders; infinite if none fits."""
    plan = plan_of(costs, strategy[1], "1f1b", "")
    works = pipeline_works(plan, costs)
    named = in_named_orders(costs, plan, works)[:2]
    plans = [each.plan for each in named]
    for margin in MARGINS if named else ():
        listed = in_listed_order(costs, plan, works, GLANCED, margin)
        plans += [listed.plan] if listed else []
    return min((simulated(costs, each).step_seconds for each in plans), default=float("inf"))


def is_busy(costs: Costs, strategy: Strategy, seconds: float) -> bool:
    """True if messages meet on the busiest link, by the closed form."""
    link = crowded_link(strategy[1], all_pipeline_prices(costs, strategy[1]))
    return link > UNDELAYED * seconds


def main() -> None:
    """Print a line for every cluster, and one for all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="clusters whose names contain one")
    parser.add_argument("--model", default="gpt2-medium")
    parser.add_argument("--number", type=int, default=36, help="strategies of a cluster")
    options = parser.parse_args()
    print(ROW.format("cluster", "number", "mean", "spread", "busy", "mean", "spread"))
    every: list[tuple[float, bool]] = []
    for path in sorted(EXAMPLES.glob("*.toml")):
        if options.only and not any(each in path.stem for each in options.only):
            continue
        job = Job(global_batch=64, sequence=1024, precision="fp16", optimizer="adamw")
        graph = load_model(options.model, 1024, "fp16")
        costs = costs_of(graph, load_cluster(path), job, None, recomputation=True)
        rated = compared(costs)
        found = []
        for strategy in sample(rated, options.number) if rated else []:
            seconds, closed = best_of_orders(costs, strategy), rated[strategy]
            if seconds < float("inf"):
                found.append((seconds / closed, is_busy(costs, strategy, closed)))
        every += found
        print(line(path.stem, found), flush=True)
    print(line("all", every))


def line(name: str, found: list[tuple[float, bool]]) -> str:
    """A row of the table."""
    busy = [ratio for ratio, crowded in found if crowded]
    cells: list[object] = [name]
    for ratios in ([ratio for ratio, _ in found], busy):
        cells.append(len(ratios))
        cells += [f"{fmean(ratios):.4f}", f"{pstdev(ratios):.4f}"] if ratios else ["", ""]
    return ROW.format(*cells)


if __name__ == "__main__":
    main()
