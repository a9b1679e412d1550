"""Changes strategies a little: layers, rows, shares of the batch, stages and devices move.

Every move yields whole strategies that hold every layer and every row; the search finds out whether
they fit and whether they are faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

from meshwright.plan.spec import ScheduleName
from meshwright.search.candidate import CandidatePipeline
from meshwright.search.costs import Costs, TensorGroup, group_kind
from meshwright.search.incumbent import Strategy
from meshwright.search.layer_partition import Stages, fit_pipeline
from meshwright.search.space import divisors, legal_widths, tensor_groups, usable_devices
from meshwright.search.stage_devices import StageDevices

STEPS = (1, 2, 4)
"""Rows or layers moved at once."""

Move = Callable[[Costs, Strategy, float], Iterator[Strategy]]
"""Strategies that a move makes of one; those that surely take the given seconds may be missing."""


def stages_of(pipeline: CandidatePipeline) -> Stages:
    """Returns the tensor groups of a pipeline's stages alone."""
    return tuple(stage.groups for stage in pipeline.stages)


def schedules(_costs: Costs, strategy: Strategy, _limit: float) -> Iterator[Strategy]:
    """Yields the strategy with the other schedule, where it makes a difference."""
    schedule, pipelines = strategy
    if any(len(pipeline.stages) > 1 and pipeline.micro_batches > 1 for pipeline in pipelines):
        yield "gpipe" if schedule == "1f1b" else "1f1b", pipelines


def layers(_costs: Costs, strategy: Strategy, _limit: float) -> Iterator[Strategy]:
    """Moves a layer or a few across one cut; or one from each of a run of stages to the next."""
    for i, pipeline in enumerate(strategy[1]):
        inner = range(1, len(pipeline.stages))
        for step in STEPS:
            for s in inner:
                for by in (step, -step):
                    yield from _cut(strategy, i, pipeline, range(s, s + 1), by)
        for first in inner:
            for last in range(first + 2, len(pipeline.stages) + 1):
                for by in (1, -1):
                    yield from _cut(strategy, i, pipeline, range(first, last), by)


def _cut(
    strategy: Strategy, i: int, pipeline: CandidatePipeline, cuts: range, by: int
) -> Iterator[Strategy]:
    """Yields the strategy with these cuts of one pipeline moved by some layers."""
    bounds = tuple(cut + by if s in cuts else cut for s, cut in enumerate(pipeline.bounds))
    if all(a < b for a, b in pairwise(bounds)):
        yield _with(strategy, i, replace(pipeline, bounds=bounds))


def _with(strategy: Strategy, i: int, pipeline: CandidatePipeline) -> Strategy:
    schedule, pipelines = strategy
    return schedule, (*pipelines[:i], pipeline, *pipelines[i + 1 :])


def rows(costs: Costs, strategy: Strategy, _limit: float) -> Iterator[Strategy]:
    """Moves a few rows of every micro-batch from one kind of replica to another; equal replicas are
    not told apart."""
    for i, pipeline in enumerate(strategy[1]):
        for s, stage in enumerate(pipeline.stages):
            for changed in _shifted(costs, stage):
                stages = (*pipeline.stages[:s], changed, *pipeline.stages[s + 1 :])
                yield _with(strategy, i, replace(pipeline, stages=stages))


def _shifted(costs: Costs, stage: StageDevices) -> Iterator[StageDevices]:
    first: dict[object, int] = {}
    for u, group in enumerate(stage.groups):
        first.setdefault((group_kind(costs, group), stage.rows[u]), u)
    for step in STEPS:
        for giver in first.values():
            for taker in first.values():
                if giver != taker and stage.rows[giver] > step:
                    moved = list(stage.rows)
                    moved[giver] -= step
                    moved[taker] += step
                    yield StageDevices(stage.groups, tuple(moved))


def micro_batches(costs: Costs, strategy: Strategy, limit: float) -> Iterator[Strategy]:
    """Yields the next larger and smaller micro-batches that share a pipeline's rows out."""
    schedule, pipelines = strategy
    for i, pipeline in enumerate(pipelines):
        sizes = divisors(pipeline.share)
        at = sizes.index(pipeline.rows)
        for size in (*sizes[max(0, at - 2) : at], *sizes[at + 1 : at + 3]):
            found = fit_pipeline(
                costs, stages_of(pipeline), size, pipeline.share // size, schedule, limit
            )
            if found is not None:
                yield _with(strategy, i, found.pipeline)


def order(costs: Costs, strategy: Strategy, limit: float) -> Iterator[Strategy]:
    """Exchanges two stages, moves a run of like stages or the stage at one end elsewhere, or
    reverses the pipeline."""
    schedule, pipelines = strategy
    for i, pipeline in enumerate(pipelines):
        stages = stages_of(pipeline)
        for other in _orders(costs, stages):
            if other != stages:
                found = fit_pipeline(
                    costs, other, pipeline.rows, pipeline.micro_batches, schedule, limit
                )
                if found is not None:
                    yield _with(strategy, i, found.pipeline)


def _orders(costs: Costs, stages: Stages) -> Iterator[Stages]:
    if len(stages) > 2:  # the ends may share a node, and then a tied parameter, after this
        yield (stages[-1], *stages[:-1])
        yield (*stages[1:], stages[0])
    runs = runs_of(costs, stages)
    for i, run in enumerate(runs):
        rest = [*runs[:i], *runs[i + 1 :]]
        for place in range(len(runs)):
            yield tuple(stage for part in (*rest[:place], run, *rest[place:]) for stage in part)
    yield stages[::-1]
    for s in range(1, len(stages)):
        yield (*stages[: s - 1], stages[s], stages[s - 1], *stages[s + 1 :])
    for i, run in enumerate(runs):
        yield tuple(s for part in (*runs[:i], run[::-1], *runs[i + 1 :]) for s in part)


def runs_of(costs: Costs, stages: Stages) -> list[Stages]:
    """Returns the runs of neighbouring stages of the same types of devices."""
    runs: list[list[tuple[TensorGroup, ...]]] = []
    before: object = None
    for stage in stages:
        kind = frozenset(costs.devices[name].type for group in stage for name in group)
        if kind != before:
            runs.append([])
        runs[-1].append(stage)
        before = kind
    return [tuple(run) for run in runs]


def shares(costs: Costs, strategy: Strategy, limit: float) -> Iterator[Strategy]:
    """Moves some of the batch from one pipeline to another: a micro-batch of either, or a row or
    two."""
    schedule, pipelines = strategy

    def resized(pipeline: CandidatePipeline, share: int) -> Iterator[CandidatePipeline]:
        return with_share(costs, stages_of(pipeline), pipeline.rows, share, schedule, limit)

    for i, giver in enumerate(pipelines):
        for j, taker in enumerate(pipelines):
            if i == j:
                continue
            for moved in sorted({1, 2, giver.rows, taker.rows}):
                if giver.share <= moved:
                    continue
                for less in resized(giver, giver.share - moved):
                    for more in resized(taker, taker.share + moved):
                        changed = list(pipelines)
                        changed[i], changed[j] = less, more
                        yield schedule, tuple(changed)


def with_share(
    costs: Costs, stages: Stages, rows: int, share: int, schedule: ScheduleName, limit: float
) -> Iterator[CandidatePipeline]:
    """Yields the stages with a share of the batch, in the two sizes of micro-batches that are
    nearest to a number of rows."""
    widest = max((len(groups) for groups in stages), default=share + 1)
    sizes = [size for size in divisors(share) if size >= widest]
    for size in sorted(sizes, key=lambda size: (abs(size - rows), size))[:2]:
        found = fit_pipeline(costs, stages, size, share // size, schedule, limit)
        if found is not None:
            yield found.pipeline


def recast(costs: Costs, strategy: Strategy, limit: float) -> Iterator[Strategy]:
    """Gives a run of like stages, or all of a pipeline, another depth, width or tensor width."""
    widths = legal_widths(costs)
    for i, pipeline in enumerate(strategy[1]):
        runs = runs_of(costs, stages_of(pipeline))
        for r, run in enumerate(runs):
            for other in _recasts(costs, run, widths):
                stages = tuple(s for part in (*runs[:r], other, *runs[r + 1 :]) for s in part)
                yield from rebuilt(costs, strategy, limit, {i: stages})
        if len(runs) > 1:
            ways = [list(_recasts(costs, run, widths)) for run in runs]
            for together in zip(*ways, strict=False):
                yield from rebuilt(
                    costs, strategy, limit, {i: tuple(s for part in together for s in part)}
                )


def _recasts(costs: Costs, run: Stages, widths: tuple[int, ...]) -> Iterator[Stages]:
    """Yields for every run, in the same order, tensor widths by depths around its own."""
    depth, tensor = len(run), len(run[0][0])
    names = [name for stage in run for group in stage for name in group]
    place = {name: i for i, name in enumerate(costs.devices)}
    at = widths.index(tensor) if tensor in widths else 0
    for other in dict.fromkeys((tensor, *widths[max(0, at - 1) : at + 2])):
        by_node: dict[tuple[str, str], list[str]] = {}
        for name in sorted(names, key=place.__getitem__):
            device = costs.devices[name]
            by_node.setdefault((device.node, device.type), []).append(name)
        groups = [group for own in by_node.values() for group in tensor_groups(costs, own, other)]
        around = {depth * tensor // other, depth, depth - 1, depth + 1, depth * 2, depth // 2}
        for number in sorted(d for d in around if 0 < d <= len(groups)):
            width = len(groups) // number
            yield tuple(tuple(groups[s * width : (s + 1) * width]) for s in range(number))
            if width > 1 and number > 1:
                yield tuple(tuple(groups[s : number * width : number]) for s in range(number))


def stages(costs: Costs, strategy: Strategy, limit: float) -> Iterator[Strategy]:
    """Joins two neighbouring stages, divides one into two, or exchanges groups of two stages."""
    for i, pipeline in enumerate(strategy[1]):
        own = stages_of(pipeline)
        for s, groups in enumerate(own):
            if s and len(own[s - 1][0]) == len(groups[0]):
                merged = (*own[: s - 1], (*own[s - 1], *groups), *own[s + 1 :])
                yield from rebuilt(costs, strategy, limit, {i: merged})
            half = len(groups) // 2
            for cut in sorted({half, len(groups) - half} - {0, len(groups)}):
                split = (*own[:s], groups[:cut], groups[cut:], *own[s + 1 :])
                yield from rebuilt(costs, strategy, limit, {i: split})
        for s, here in enumerate(own):
            for t in range(s + 1, len(own)):
                for one in _distinct(costs, here):
                    for other in _distinct(costs, own[t]):
                        alike = group_kind(costs, one) == group_kind(costs, other)
                        if not alike and len(one) == len(other):
                            swap = {one: other, other: one}
                            changed = tuple(tuple(swap.get(u, u) for u in st) for st in own)
                            yield from rebuilt(costs, strategy, limit, {i: changed})


def devices(costs: Costs, strategy: Strategy, limit: float) -> Iterator[Strategy]:
    """Moves a group to another stage, to a stage of its own, or out of use; or an idle one into
    use."""
    every = [stages_of(pipeline) for pipeline in strategy[1]]
    places = [(i, s) for i, own in enumerate(every) for s in range(len(own))]
    for group in _idle(costs, strategy[1]):
        for i, s in places:
            if len(every[i][s][0]) == len(group):
                yield from rebuilt(costs, strategy, limit, {i: _joined(every[i], s, group)})
                for alone in (_inserted(every[i], s, group), _inserted(every[i], s + 1, group)):
                    yield from rebuilt(costs, strategy, limit, {i: alone})
    for i, s in places:
        for group in _distinct(costs, every[i][s]):
            yield from rebuilt(costs, strategy, limit, {i: _without(every[i], s, group)})
            for j, goal in places:
                if (i, s) != (j, goal):
                    yield from _moved(costs, strategy, every, (i, s), (j, goal), group, limit)


def exchanged(costs: Costs, strategy: Strategy, limit: float) -> Iterator[Strategy]:
    """Takes a tensor group out of use and puts an idle one of another kind in its place."""
    every = [stages_of(pipeline) for pipeline in strategy[1]]
    for idle in _idle(costs, strategy[1]):
        for i, own in enumerate(every):
            for s, groups in enumerate(own):
                for group in _distinct(costs, groups):
                    alike = group_kind(costs, group) == group_kind(costs, idle)
                    if len(group) == len(idle) and not alike:
                        left = tuple(idle if u == group else u for u in groups)
                        changed = {i: (*own[:s], left, *own[s + 1 :])}
                        yield from rebuilt(costs, strategy, limit, changed)


def _moved(
    costs: Costs,
    strategy: Strategy,
    every: list[Stages],
    source: tuple[int, int],
    target: tuple[int, int],
    group: TensorGroup,
    limit: float,
) -> Iterator[Strategy]:
    """Moves the tensor group to the target's stage, or to a new one before it."""
    (i, s), (j, goal) = source, target
    if len(group) != len(every[j][goal][0]):
        return
    for put in (_joined, _inserted):
        if i != j:
            changed = {i: _without(every[i], s, group), j: put(every[j], goal, group)}
        else:
            left = _without(every[i], s, group)
            at = goal - (len(left) < len(every[i]) and goal > s)
            changed = {i: put(left, at, group)}
        yield from rebuilt(costs, strategy, limit, changed)


def _distinct(costs: Costs, groups: tuple[TensorGroup, ...]) -> list[TensorGroup]:
    """Returns one tensor group of every kind on every node and island: the others are as good."""
    found: dict[object, TensorGroup] = {}
    for group in groups:
        first = costs.devices[group[0]]
        found.setdefault((group_kind(costs, group), first.node, first.island), group)
    return list(found.values())


def _without(own: Stages, s: int, group: TensorGroup) -> Stages:
    left = tuple(u for u in own[s] if u != group)
    return (*own[:s], *((left,) if left else ()), *own[s + 1 :])


def _joined(own: Stages, s: int, group: TensorGroup) -> Stages:
    return (*own[:s], (*own[s], group), *own[s + 1 :])


def _inserted(own: Stages, s: int, group: TensorGroup) -> Stages:
    return (*own[:s], (group,), *own[s:])


def _idle(costs: Costs, pipelines: tuple[CandidatePipeline, ...]) -> list[TensorGroup]:
    """Returns the unused devices of every class, as tensor groups of every width in use."""
    used = {name for pipeline in pipelines for name in pipeline.devices}
    tensors = sorted({len(stage.groups[0]) for pipeline in pipelines for stage in pipeline.stages})
    free: dict[tuple[str, str], list[str]] = {}
    for device in usable_devices(costs):
        if device.name not in used:
            free.setdefault((device.node, device.type), []).append(device.name)
    return [
        tensor_groups(costs, names, tensor)[0]
        for names in free.values()
        for tensor in tensors
        if len(names) >= tensor
    ]


def rebuilt(
    costs: Costs, strategy: Strategy, limit: float, changed: dict[int, Stages]
) -> Iterator[Strategy]:
    """Yields the strategy with other stages for some of its pipelines; a pipeline that has none
    left leaves its share to the first of the others."""
    schedule, pipelines = strategy
    left = [i for i in range(len(pipelines)) if changed.get(i, True)]
    orphaned = sum(pipeline.share for i, pipeline in enumerate(pipelines) if i not in left)
    found = []
    for i in left:
        pipeline, own = pipelines[i], stages_of(pipelines[i])
        share = pipeline.share + (orphaned if i == left[0] else 0)
        if share == pipeline.share and changed.get(i, own) == own:
            found.append(pipeline)
            continue
        fitted = next(
            with_share(costs, changed.get(i, own), pipeline.rows, share, schedule, limit), None
        )
        if fitted is None:
            return
        found.append(fitted)
    if found:
        yield schedule, tuple(found)
