"""Whether better hardware or a larger batch ever gives a slower plan.

    python benchmarks/monotone.py [--worlds 40] [--first SEED] [--only faster-link] [--worst 0.0]

Each world of random_clusters.py with 8 to 32 devices is planned as it is and with one change at a
time: twice the batch, a device type that computes a quarter faster or has half as much memory
again, networks twice as fast, one more device. `slower`: the changed world's step over the plain
one's, less one; twice the batch may take up to twice as long, and not less than once. `missed`: the
changed world's step over that of the plain world's plan used unchanged there (with twice the
micro-batches for twice the batch), less one. A plan in an order of its own has none for twice the
batch. Exits with 1 where a plan is slower by more than `--worst`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from random_clusters import Draw, draw

from meshwright.cluster.spec import Cluster, Link, devices_of
from meshwright.cost.memory import memory_by_class, total_bytes
from meshwright.errors import FitError
from meshwright.model.load import load_model
from meshwright.plan.ranks import describe_plan
from meshwright.plan.spec import Job, Plan
from meshwright.search.planner import find_plan
from meshwright.simulate.symmetry import simulate_by_symmetry

FEWEST, MOST = 8, 32
"""Devices of a world."""

NOISE = 1e-9
"""Relative difference of seconds that is none."""

ROW = "{:>5} {:<14} {:>8} {:>8}  {}"


def faster_device(world: Draw, chance: Random) -> Draw:
    """One type computes and remembers a quarter faster."""
    kinds = world.cluster.types
    name = chance.choice(sorted(kinds))
    kind = kinds[name]
    quicker = replace(
        kind,
        peak={precision: peak * 1.25 for precision, peak in kind.peak.items()},
        memory_bandwidth=kind.memory_bandwidth * 1.25,
    )
    return _on(world, replace(world.cluster, types={**kinds, name: quicker}))


def more_memory(world: Draw, chance: Random) -> Draw:
    """One type has half as much memory again."""
    kinds = world.cluster.types
    name = chance.choice(sorted(kinds))
    larger = replace(kinds[name], memory=kinds[name].memory * 3 // 2)
    return _on(world, replace(world.cluster, types={**kinds, name: larger}))


def faster_link(world: Draw, _chance: Random) -> Draw:
    """All networks and uplinks carry twice as much."""

    def better(link: Link) -> Link:
        return replace(link, bandwidth=link.bandwidth * 2, latency=link.latency / 2)

    cluster = world.cluster
    nodes = tuple(replace(node, network=better(node.network)) for node in cluster.nodes)
    sites = tuple(
        replace(site, uplink=better(site.uplink)) if site.uplink else site for site in cluster.sites
    )
    return _on(world, replace(cluster, nodes=nodes, sites=sites))


def one_more_device(world: Draw, chance: Random) -> Draw:
    """A node gets one more device of its type."""
    at = chance.randrange(len(world.cluster.nodes))
    node = world.cluster.nodes[at]
    grown = replace(node, devices=(*node.devices, node.devices[0]))
    nodes = (*world.cluster.nodes[:at], grown, *world.cluster.nodes[at + 1 :])
    return _on(world, replace(world.cluster, nodes=nodes))


def twice_the_batch(world: Draw, _chance: Random) -> Draw:
    """Twice the rows of a step."""
    return replace(world, batch=2 * world.batch)


Change = Callable[[Draw, Random], Draw]

CHANGES: dict[str, Change] = {
    "twice-batch": twice_the_batch,
    "faster-device": faster_device,
    "more-memory": more_memory,
    "faster-link": faster_link,
    "more-devices": one_more_device,
}


def _on(world: Draw, cluster: Cluster) -> Draw:
    return replace(world, cluster=cluster)


@dataclass(frozen=True, slots=True)
class Pair:
    """A world and a change of it. Shares, as in the docstring of the module."""

    seed: int
    change: str
    slower: float
    missed: float | None
    """None: the plain plan cannot be used unchanged."""
    plans: str

    @property
    def is_worse(self) -> bool:
        """Whether there is anything to report."""
        return self.slower > NOISE or (self.missed or 0.0) > NOISE


def worlds(first: int, count: int) -> list[tuple[int, Draw]]:
    """The next worlds of middle size from this number on."""
    found: list[tuple[int, Draw]] = []
    seed = first
    while len(found) < count:
        world = draw(seed)
        if FEWEST <= len(devices_of(world.cluster)) <= MOST:
            found.append((seed, world))
        seed += 1
    return found


def planned(world: Draw) -> Plan | None:
    """The plan of a world; None if nothing fits."""
    model = load_model(world.model, world.sequence, world.precision)
    try:
        return find_plan(model, world.cluster, _job(world))
    except FitError:
        return None


def _job(world: Draw) -> Job:
    return Job(global_batch=world.batch, sequence=world.sequence, precision=world.precision)


def pairs_of(seed: int, world: Draw, only: str = "") -> list[Pair]:
    """Every change of a world whose name contains a text; none where nothing fits."""
    plain = planned(world)
    if plain is None:
        return []
    found = []
    for name, change in CHANGES.items():
        if only in name:
            changed = change(world, Random(seed))
            found.append(compared(seed, name, world, changed, plain, planned(changed)))
    return found


def compared(
    seed: int, name: str, world: Draw, changed: Draw, plain: Plan, plan: Plan | None
) -> Pair:
    """How the plan of a changed world compares with that of the plain one."""
    before = _seconds(plain)
    after = _seconds(plan) if plan else float("inf")
    slower = after / before - 1
    if changed.batch != world.batch:
        slower = max(after / (2 * before) - 1, before / after - 1)
    kept = carried(plain, changed)
    missed = None if kept is None else after / kept - 1
    names = f"{describe_plan(plain)} -> {describe_plan(plan) if plan else 'nothing fits'}"
    return Pair(seed, name, slower, missed, names)


def _seconds(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.step_seconds


def carried(plan: Plan, world: Draw) -> float | None:
    """Seconds of a plan in a world that it was not made for; None if it cannot be used there."""
    times, rest = divmod(world.batch, plan.job.global_batch)
    if rest or (times > 1 and any(p.actions for p in plan.pipelines)):
        return None
    plan = replace(
        plan,
        job=_job(world),
        pipelines=tuple(replace(p, micro_batches=p.micro_batches * times) for p in plan.pipelines),
    )
    model = load_model(world.model, world.sequence, world.precision)
    held = memory_by_class(plan, model, world.cluster)
    if any(total_bytes(memory) > memory.capacity for memory, _ in held):
        return None
    return simulate_by_symmetry(plan, model, world.cluster).step_seconds


def main() -> int:
    """Print every pair that is worse, then what share of each change is."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--worlds", type=int, default=40)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--only", default="", help="changes whose names contain this")
    options.add_argument("--worst", type=float, default=0.0, help="largest share allowed")
    options.add_argument("--every", action="store_true", help="print all pairs")
    chosen = options.parse_args()
    print(ROW.format("seed", "change", "slower", "missed", "plans"))
    every: list[Pair] = []
    for seed, world in worlds(chosen.first, chosen.worlds):
        for pair in pairs_of(seed, world, chosen.only):
            every.append(pair)
            if pair.is_worse or chosen.every:
                print(_row(pair), flush=True)
    for name in CHANGES:
        own = [pair for pair in every if pair.change == name]
        if own:
            print(_summary(name, own))
    print(f"{time.process_time():.0f} CPU s")
    return int(any(pair.slower > max(chosen.worst, NOISE) for pair in every))


def _row(pair: Pair) -> str:
    missed = "-" if pair.missed is None else f"{pair.missed:.3%}"
    return ROW.format(pair.seed, pair.change, f"{pair.slower:.3%}", missed, pair.plans)


def _summary(name: str, own: list[Pair]) -> str:
    slower = [pair.slower for pair in own if pair.slower > NOISE]
    kept = [pair.missed for pair in own if pair.missed is not None]
    missed = [share for share in kept if share > NOISE]
    return (
        f"{name}: {len(own)} pairs, {len(slower)} slower, at most by {max(slower, default=0):.3%}; "
        f"{len(missed)} of {len(kept)} plans that were missed, at most by "
        f"{max(missed, default=0):.3%}"
    )


if __name__ == "__main__":
    sys.exit(main())
