"""Strategies of several lines: which pools work together, and what share of the batch each gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product
from typing import Protocol, TypeVar

from meshwright.search.compose import (
    KEPT,
    Pool,
    Widths,
    by_build,
    drafts,
    offers,
    orders,
    pool_table,
    pools,
    two_ways,
    whole_batch,
    written,
)
from meshwright.search.costs import Costs
from meshwright.search.fitting import Fitted, fit_line
from meshwright.search.lines import Line

FEW_POOLS = 4
"""Up to so many pools every way to group them is tried."""

NEAR = 3
"""Micro-batches more or fewer than a line's ideal number that are tried."""

Block = tuple[Pool, ...]


class Sited(Protocol):
    """What can be grouped: something at a site."""

    @property
    def site(self) -> str:
        """Its name."""


Group = TypeVar("Group", bound=Sited)


def single_lines(costs: Costs, limit: Callable[[], float]) -> Iterator[tuple[Line, ...]]:
    """Lines of whole pools for all of the batch, the most promising first, over all tensor widths
    of every pool; those whose guess is above the limit are left out."""
    table = pool_table(costs, legal_widths(costs))
    row_counts = whole_batch(costs)
    found = []
    for block in blocks(table):
        found += drafts(costs, block, costs.job.global_batch, row_counts)
    found.sort(key=lambda draft: draft.guess)
    for draft in by_build(found):
        if draft.guess >= limit():
            continue
        for shape in orders(draft.shape):
            for across in (False, True) if two_ways(shape) else (False,):
                stages = written(shape, across=across)
                fitted = fit_line(
                    costs, stages, draft.rows, costs.job.global_batch // draft.rows, "1f1b"
                )
                yield (fitted.line,) if fitted else ()


def blocks(table: Sequence[Widths]) -> Iterator[tuple[Widths, ...]]:
    """Sets of pools that one line may use; of many pools all, those of a site, and all but the
    slowest."""
    if len(table) <= FEW_POOLS:
        for number in range(len(table), 0, -1):
            yield from combinations(table, number)
        return
    first = [min(widths.values(), key=lambda pool: pool.pace) for widths in table]
    ordered = [table[i] for i in sorted(range(len(table)), key=lambda i: first[i].pace)]
    sites = dict.fromkeys(pool.site for pool in first)
    found = [tuple(ordered[:number]) for number in range(len(table), 0, -1)]
    found += [
        tuple(w for w, pool in zip(table, first, strict=True) if pool.site == site)
        for site in sites
    ]
    found += [(widths,) for widths in table]
    seen: list[tuple[Widths, ...]] = []
    for block in found:
        if block not in seen:
            seen.append(block)
            yield block


def several_lines(costs: Costs) -> Iterator[tuple[Line, ...]]:
    """Strategies of two lines and more, made of whole pools, over all tensor widths."""
    for tensor in legal_widths(costs):
        yield from _at_width(costs, pools(costs, tensor))


def legal_widths(costs: Costs) -> tuple[int, ...]:
    """Tensor widths that every layer allows and some node has."""
    widest = max((len(node.devices) for node in costs.cluster.nodes), default=1)
    units = {layer.tensor_units for layer in costs.model.layers}
    return tuple(t for t in range(1, widest + 1) if all(unit % t == 0 for unit in units))


def _at_width(costs: Costs, every: tuple[Pool, ...]) -> Iterator[tuple[Line, ...]]:
    known: dict[tuple[Block, float], tuple[Fitted, ...]] = {}
    batch = costs.job.global_batch
    for grouping in groupings(every):
        if len(grouping) == 1 or len(grouping) > batch:
            continue
        speed = sum(pool.speed for block in grouping for pool in block)
        choices = []
        for block in grouping:
            share = batch * sum(pool.speed for pool in block) / speed
            key = (block, round(share, 1))
            if key not in known:
                known[key] = offers(costs, block, share)
            choices.append(known[key])
        for chosen in product(*(choice[:KEPT] for choice in choices)):
            lines = shared_out(costs, chosen, batch)
            if lines is not None:
                yield lines


def groupings(every: Sequence[Group]) -> Iterator[tuple[tuple[Group, ...], ...]]:
    """Sets of blocks of pools; the pools in no block are left out. With many pools only the natural
    ones: all in one line, one line each, one line a site, without the slowest."""
    if len(every) <= FEW_POOLS:
        for number in range(1, len(every) + 1):
            for chosen in combinations(every, number):
                yield from _partitions(chosen)
        return
    sites = dict.fromkeys(pool.site for pool in every)
    by_site = tuple(tuple(p for p in every if p.site == site) for site in sites)
    found = [(tuple(every),), by_site, *((block,) for block in by_site)]
    for number in range(1, len(every) + 1):
        found.append(tuple((pool,) for pool in every[:number]))
        found.append((tuple(every[:number]),))
    found += [((pool,),) for pool in every]
    yield from dict.fromkeys(found)


def _partitions(chosen: tuple[Group, ...]) -> Iterator[tuple[tuple[Group, ...], ...]]:
    if not chosen:
        yield ()
        return
    first, rest = chosen[0], chosen[1:]
    for size in range(len(rest) + 1):
        for others in combinations(range(len(rest)), size):
            block = (first, *(rest[i] for i in others))
            left = tuple(pool for i, pool in enumerate(rest) if i not in others)
            for blocks in _partitions(left):
                yield (block, *blocks)


def shared_out(costs: Costs, chosen: tuple[Fitted, ...], batch: int) -> tuple[Line, ...] | None:
    """The lines with numbers of micro-batches (and, for one of them, rows) that add up to the batch
    and let the last one finish soonest; None if there is no way near their speeds' shares."""
    speed = sum(f.line.rows / f.slowest for f in chosen)
    reached: dict[int, tuple[float, tuple[tuple[int, int], ...]]] = {0: (0.0, ())}
    for number, fitted in enumerate(chosen):
        ideal = batch * (fitted.line.rows / fitted.slowest) / speed
        last = number == len(chosen) - 1
        following: dict[int, tuple[float, tuple[tuple[int, int], ...]]] = {}
        for done, (worst, ways) in reached.items():
            for rows, count in _sizes(fitted, ideal, batch - done if last else None):
                total = done + rows * count
                spent = fitted.once + (count - 1) * fitted.slowest
                longest = max(worst, spent * rows / fitted.line.rows)
                if total <= batch and longest < following.get(total, (float("inf"),))[0]:
                    following[total] = (longest, (*ways, (rows, count)))
        reached = following
    if batch not in reached:
        return None
    lines = []
    for fitted, (rows, count) in zip(chosen, reached[batch][1], strict=True):
        stages = tuple(team.units for team in fitted.line.teams)
        exact = fit_line(costs, stages, rows, count, "1f1b")
        if exact is None:
            return None
        lines.append(exact.line)
    return tuple(lines)


def _sizes(fitted: Fitted, ideal: float, left: int | None) -> Iterator[tuple[int, int]]:
    """Rows and number of micro-batches near the ideal share; exactly `left` rows if given."""
    widest = max(len(team.units) for team in fitted.line.teams)
    middle = max(1, round(ideal / fitted.line.rows))
    for count in range(max(1, middle - NEAR), middle + NEAR + 1):
        if left is None:
            full = int(ideal / count / widest) * widest
            for rows in sorted({fitted.line.rows, round(ideal / count), full, full + widest}):
                if rows >= widest:
                    yield rows, count
        elif left > 0 and left % count == 0 and left // count >= widest:
            yield left // count, count
