"""Finds a plain plan for a very large cluster in a moment, for users who stop the search early.

The plan has one pipeline on one kind of node, with as few stages as hold the model, and few
micro-batches, so that it takes a moment to simulate. A search would not keep it, but it fits.
"""

from __future__ import annotations

from collections.abc import Iterator

from meshwright.search.candidate import plan_of, strategy_label
from meshwright.search.costs import Costs, speeds
from meshwright.search.device_classes import (
    DeviceClass,
    PipelineTemplate,
    StageRun,
    device_classes,
    nodes_for,
    written,
)
from meshwright.search.incumbent import Evaluated, Incumbent, Strategy, simulated, work_of
from meshwright.search.layer_partition import fit_pipeline
from meshwright.search.space import divisors, legal_widths
from meshwright.stopping import raise_if_stopped

DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Numbers of stages that are tried."""

ROUNDS = 4
"""Micro-batches for each stage, at least: more of them take longer to simulate, fewer leave the
stages idle."""

MOST_WORK = 40_000
"""Micro-batches of ranks beyond which the strategy would take too long to play."""


def plain_plan(incumbent: Incumbent) -> Evaluated | None:
    """Returns the first plain strategy that fits, simulated; None if none fits, or it would take
    too long to simulate."""
    costs = incumbent.costs
    strategy = next(_fitting(costs), None)
    if strategy is None:
        return None
    schedule, pipelines = strategy
    plan = plan_of(costs, pipelines, schedule, incumbent.cluster_print)
    if work_of(costs, plan) > MOST_WORK:
        return None
    seconds = simulated(costs, plan).step_seconds
    return Evaluated(strategy_label(costs, pipelines, schedule), plan, seconds)


def _fitting(costs: Costs) -> Iterator[Strategy]:
    """Yields plain strategies that fit: on the kind of nodes that has the most speed together, in
    the narrowest tensor groups, of the fewest stages, in the largest micro-batches first."""
    every = device_classes(costs)
    speed = speeds(costs, {device_class.kind for device_class in every})
    order = sorted(
        range(len(every)), key=lambda i: -speed[every[i].kind] * every[i].each * len(every[i].nodes)
    )
    for number in order:
        for tensor in (t for t in legal_widths(costs) if every[number].each % t == 0):
            for depth in (d for d in DEPTHS if d <= len(costs.model.layers)):
                raise_if_stopped()
                run = _widest(costs, every[number], number, tensor, depth)
                if run is None:
                    break
                template = PipelineTemplate((run,), run.width)
                stages = written(every, template, {})
                for count in _counts(costs.job.global_batch // run.width, depth):
                    rows = costs.job.global_batch // count
                    fitted = fit_pipeline(costs, stages, rows, count, "1f1b")
                    if fitted is not None:
                        yield "1f1b", (fitted.pipeline,)


def _counts(most: int, depth: int) -> list[int]:
    """Returns how many micro-batches to try: ever twice as many, up to one row for each replica."""
    counts = [most]
    while counts[-1] % 2 == 0 and counts[-1] >= 2 * ROUNDS * depth:
        counts.append(counts[-1] // 2)
    return counts[::-1]


def _widest(
    costs: Costs, device_class: DeviceClass, number: int, tensor: int, depth: int
) -> StageRun | None:
    """Returns the run of `depth` stages with the most replicas that divide the batch and find
    nodes, packed onto them as densely as their number allows; None if there is none."""
    groups = device_class.each // tensor
    for width in reversed(divisors(costs.job.global_batch)):
        blocks = [b for b in divisors(groups) if width % b == 0]
        if blocks and nodes_for(groups, depth, width, blocks[-1]) <= len(device_class.nodes):
            return StageRun(number, tensor, depth, width, blocks[-1])
    return None
