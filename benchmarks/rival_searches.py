"""What the rivals' spaces share: a search among drafts of one pipeline.

It tries every micro-batch size in each schedule of the rival, and cuts the layers with Meshwright's
exact assignment under its memory model, ranked by Meshwright's simulator. What is theirs is the
space.

Letters: S stages, L layers, M micro-batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, product

import numpy as np

from meshwright.plan.ranks import gradient_bytes
from meshwright.plan.spec import Plan, ScheduleName
from meshwright.search.bounds import after_pipelines, pipeline_bound
from meshwright.search.candidate import CandidatePipeline, plan_of, tensor_widths_agree
from meshwright.search.costs import (
    Array,
    Costs,
    TensorGroup,
    distinct_groups,
    group_kind,
    group_times,
    ring,
    seconds_per_byte,
)
from meshwright.search.incumbent import work_of
from meshwright.search.layer_partition import Stages, apportion, recut
from meshwright.search.space import divisors
from meshwright.search.stage_devices import StageDevices
from meshwright.simulate.symmetry import simulate_by_symmetry

FITTED = 900
"""Drafts whose layers are cut, at most; the most promising first."""

AT_ONCE = 300
"""Drafts that are cut before the best of them are simulated."""

BOTH = 6
"""Best lines that are tried in the other schedules as well."""

WORK = 48_000
"""Ranks x micro-batches that may be simulated for one search."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A strategy before its layers are cut."""

    bound: float
    """Seconds that it takes at least."""
    guess: float
    """The same with its gradient reductions estimated: the order in which drafts are looked at."""
    stages: Callable[[], Stages]
    rows: int
    """Of a micro-batch, over all replicas of a stage."""
    micro_batches: int
    by_speed: bool
    """Whether replicas of several types share out the rows by speed; else equally."""
    build: tuple[tuple[str, str, int], ...]
    """Types, sites and tensor widths in the order in which they stand."""


@dataclass(frozen=True, slots=True)
class Found:
    """The best plan of a restricted space."""

    plan: Plan
    seconds: float
    """In the simulator."""
    drafts: int
    fitted: int
    """Drafts whose layers were cut."""
    complete: bool
    """Whether no draft that could be faster was left over."""


BOTH_KINDS: tuple[ScheduleName, ...] = ("1f1b", "gpipe")


def search(
    costs: Costs,
    drafts: Sequence[Draft],
    schedules: Sequence[ScheduleName] = BOTH_KINDS,
    *,
    work: int = WORK,
) -> Found | None:
    """The draft that is fastest in the simulator; None if none fits.

    Lines are looked for in the first schedule; the best of them are tried in the others, too.
    """
    played: list[tuple[float, CandidatePipeline]] = []
    ordered = _by_build(drafts)
    fitted, best, skipped = 0, float("inf"), False
    while fitted < FITTED and work > 0:
        limit = best
        some = list(islice((d for d in ordered if d.bound < limit), AT_ONCE))
        if not some:
            break
        fitted += len(some)
        for bound, line in _by_turns(_cut(costs, some, schedules[0])):
            if bound < best and work > 0:
                seconds, spent = play(costs, line, schedules[0])
                work -= spent
                best = min(best, seconds)
                played.append((seconds, line))
            skipped = skipped or (bound < best and work <= 0)
    if not played:
        return None
    lines = sorted(played, key=lambda entry: entry[0])[:BOTH]
    found = _in_any_schedule(costs, lines, schedules)
    left = skipped or any(draft.bound < found[0] for draft in ordered)
    return Found(found[1], found[0], len(drafts), fitted, not left)


def play(costs: Costs, line: CandidatePipeline, schedule: ScheduleName) -> tuple[float, int]:
    """Seconds in the simulator, and its work."""
    return play_plan(costs, plan_of(costs, (line,), schedule))


def play_plan(costs: Costs, plan: Plan) -> tuple[float, int]:
    """The same of a plan."""
    timeline = simulate_by_symmetry(plan, costs.model, costs.cluster, costs.profile)
    return timeline.step_seconds, work_of(costs, plan)


def _in_any_schedule(
    costs: Costs,
    lines: Sequence[tuple[float, CandidatePipeline]],
    schedules: Sequence[ScheduleName],
) -> tuple[float, Plan]:
    """The best of these lines of the first schedule, and of the same devices and rows in the
    others."""
    best = lines[0][0], plan_of(costs, (lines[0][1],), schedules[0])
    for (_, line), schedule in product(lines, schedules[1:]):
        fitted = recut(costs, line.stages, line.micro_batches, schedule)
        if fitted is not None and tensor_widths_agree(costs, (fitted.pipeline,)):
            seconds, _ = play(costs, fitted.pipeline, schedule)
            if seconds < best[0]:
                best = seconds, plan_of(costs, (fitted.pipeline,), schedule)
    return best


Cut = tuple[float, CandidatePipeline]
"""A line that fits, behind the seconds that it takes at least."""


def _cut(costs: Costs, drafts: Sequence[Draft], schedule: ScheduleName = "1f1b") -> Iterator[Cut]:
    for draft in drafts:
        teams = tuple(StageDevices(units, _shares(costs, draft, units)) for units in draft.stages())
        fitted = recut(costs, teams, draft.micro_batches, schedule)
        if fitted is not None and tensor_widths_agree(costs, (fitted.pipeline,)):
            line = fitted.pipeline
            yield pipeline_bound(costs, line, schedule) + after_pipelines(costs, (line,)), line


def _by_turns(cuts: Iterable[Cut]) -> list[Cut]:
    """The best of every build (widths and rows), then the second best of each: neighbours by their
    bound are neighbours in the simulator."""
    turns: Counter[object] = Counter()
    placed = []
    for cut in sorted(cuts, key=lambda cut: cut[0]):
        line = cut[1]
        widths = tuple(dict.fromkeys((len(t.groups), len(t.groups[0])) for t in line.stages))
        placed.append((turns[widths, line.rows], cut))
        turns[widths, line.rows] += 1
    return [cut for _, cut in sorted(placed, key=lambda entry: (entry[0], entry[1][0]))]


def _shares(costs: Costs, draft: Draft, units: tuple[TensorGroup, ...]) -> tuple[int, ...]:
    if draft.by_speed:
        return apportion(costs, units, draft.rows)
    return (draft.rows // len(units),) * len(units)


@dataclass(frozen=True, slots=True)
class Block:
    """Equal stages: one unit of them, its rows of a micro-batch, and how many stages there are."""

    unit: TensorGroup
    rows: int
    number: int
    slope: float
    """Seconds per byte of the stage's gradient ring."""


def drafted(
    costs: Costs,
    blocks: Sequence[Block],
    rows: int,
    stages: Callable[[], Stages],
    *,
    by_speed: bool,
) -> Draft:
    """With the least seconds of M micro-batches on the slowest stage, or of one on all of them; the
    guess takes both, and the reductions. Where stage s takes t(s, l) for layer l:

    slowest stage >= sum over l of min over s of t(s, l) / t(s, all) / sum over s of 1 / t(s, all)

    by linear programming duality, layers taken as divisible.
    """
    micro_batches = costs.job.global_batch // rows
    times = np.array([_layer_seconds(costs, block) for block in blocks])
    whole = times.sum(axis=1)
    numbers = np.array([block.number for block in blocks])
    slowest = float((times / whole[:, None]).min(axis=0).sum() / (numbers / whole).sum())
    once = float(times.min(axis=0).sum())
    size = sum(layer.parameters for layer in costs.model.layers) * gradient_bytes(costs.job)
    reduction = max(b.slope / len(b.unit) for b in blocks) * size / int(numbers.sum())
    guess = (micro_batches - 1) * slowest + once + reduction
    bound = max(micro_batches * slowest, once)
    places = ((costs.devices[block.unit[0]], len(block.unit)) for block in blocks)
    build = tuple(dict.fromkeys((device.type, device.site, width) for device, width in places))
    return Draft(bound, guess, stages, rows, micro_batches, by_speed, build)


def _by_build(drafts: Iterable[Draft]) -> Iterator[Draft]:
    """The most promising draft of every build, then the second of each: what a thin link between
    two sites costs is not in the guess."""
    turns: Counter[object] = Counter()
    placed = []
    for draft in sorted(drafts, key=lambda draft: draft.guess):
        placed.append((turns[draft.build], draft.guess, draft))
        turns[draft.build] += 1
    return (draft for _, _, draft in sorted(placed, key=lambda entry: entry[:2]))


def _layer_seconds(costs: Costs, block: Block) -> Array:
    forward, backward = group_times(costs, block.unit, block.rows)
    return forward + backward


def ring_slope(costs: Costs, units: Sequence[TensorGroup]) -> float:
    if len(units) == 1:
        return 0.0
    return seconds_per_byte(costs, [ring(costs, tuple(unit[0] for unit in units))])[1]


def drafts_by_speed(costs: Costs, stages: Stages) -> Iterator[Draft]:
    """Every micro-batch size on these stages; replicas of several types share out its rows by
    speed."""
    slopes = [ring_slope(costs, units) for units in stages]
    kinds = [distinct_groups(costs, units) for units in stages]
    widest = max(map(len, stages))
    for rows in (r for r in divisors(costs.job.global_batch) if r >= widest):
        blocks: dict[object, Block] = {}
        for units, own, slope in zip(stages, kinds, slopes, strict=True):
            if len(own) == 1 and rows % len(units):
                break
            share = rows // len(units) if len(own) == 1 else apportion(costs, units, rows)[0]
            key = (group_kind(costs, units[0]), share, slope)
            number = blocks[key].number + 1 if key in blocks else 1
            blocks[key] = Block(units[0], share, number, slope)
        else:
            yield drafted(
                costs, list(blocks.values()), rows, partial(_as_they_are, stages), by_speed=True
            )


def _as_they_are(stages: Stages) -> Stages:
    return stages
