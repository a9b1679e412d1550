"""How far the plans of middle-sized inputs are from those of a search a hundred times as long.

    python benchmarks/oracle.py [--cases 100] [--first SEED] [--worst 0.01]

Six to eight devices of two or three types, eight to twelve layers: too many strategies to look at
each. The oracle takes the best of the planner's own search with far larger allowances and of climbs
from strategies drawn at random, which owe nothing to how the planner chooses its starts; the
simulator judges every summit. It is no proof: what neither finds stays unknown. Fails when a plan
is more than `--worst` above the oracle's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from meshwright.cluster.catalog import catalog
from meshwright.cluster.spec import Cluster, Link, Node, Site
from meshwright.errors import FitError
from meshwright.model.load import load_model
from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import describe_plan
from meshwright.plan.spec import Job, Plan
from meshwright.search.candidate import candidate_of
from meshwright.search.costs import Costs, costs_of
from meshwright.search.hill_climb import LocalSearch, climb
from meshwright.search.incumbent import Incumbent, Strategy, try_candidate
from meshwright.search.neighbourhood import stages_of, with_share
from meshwright.search.planner import find_plan
from meshwright.search.space import divisors, legal_widths, usable_devices

TYPES = ("T4", "A10G", "V100-16", "A100-40")
NETWORKS = (10e9, 25e9, 100e9)
"""Bits per second."""
SCHEDULES = ("1f1b", "gpipe")

DRAWN = 24
"""Strategies drawn at random for each case."""

STEPS = 400_000
"""Of each of their climbs; the planner's whole search has about half a million."""

World = tuple[LayerGraph, Cluster, Job]


def world(seed: int) -> World:
    """The case of this number: a small GPT-2 on nodes of one to four devices."""
    chance = Random(seed)
    entries = catalog()
    kinds = chance.sample(TYPES, chance.choice((2, 2, 3)))
    left = chance.choice((6, 7, 8))
    nodes: list[Node] = []
    network = Link(bandwidth=chance.choice(NETWORKS) / 8, latency=2e-5)
    while left:
        width = min(left, chance.choice((1, 2, 3, 4)))
        kind = kinds[len(nodes)] if len(nodes) < len(kinds) else chance.choice(kinds)
        inside = entries[kind].inside
        name = f"n{len(nodes)}"
        nodes.append(
            Node(name=name, site="here", devices=(kind,) * width, inside=inside, network=network)
        )
        left -= width
    cluster = Cluster(
        name=f"middle-{seed}",
        types={kind: entries[kind].type for kind in {node.devices[0] for node in nodes}},
        nodes=tuple(nodes),
        sites=(Site(name="here"),),
    )
    hidden = chance.choice((768, 1024, 1600, 2048))
    graph = _model(chance.randint(6, 10), hidden)
    batch = chance.choice((8, 12, 16, 24, 32, 48))
    return graph, cluster, Job(global_batch=batch, sequence=1024, precision="fp16")


def _model(blocks: int, hidden: int) -> LayerGraph:
    """Blocks between an embedding and a head that share their table."""
    config = {"model_type": "gpt2", "n_layer": blocks, "n_embd": hidden, "n_head": hidden // 64}
    config |= {"vocab_size": 50257, "n_positions": 1024, "architectures": ["GPT2LMHeadModel"]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        return load_model(str(path), 1024, "fp16")


def oracle(where: World, seed: int, known: Plan | None) -> float:
    """The least simulated seconds that long climbs reach; infinite if none fits."""
    graph, cluster, job = where
    costs = costs_of(graph, cluster, job)
    incumbent = Incumbent(costs, "", work=1 << 62)
    search = LocalSearch(incumbent, SCHEDULES)
    chance = Random(seed)
    starts = [random_strategy(costs, chance) for _ in range(DRAWN)]
    if known and known.schedule in SCHEDULES:
        starts.append((known.schedule, tuple(candidate_of(p) for p in known.pipelines)))
    for start in starts:
        if start is not None:
            search.left = STEPS
            try_candidate(incumbent, start)
            try_candidate(incumbent, climb(search, start))
    return incumbent.best.seconds if incumbent.best else float("inf")


def random_strategy(costs: Costs, chance: Random) -> Strategy | None:
    """Devices in any order, cut anywhere into stages of one or two pipelines."""
    tensor = chance.choice(legal_widths(costs)[:2])
    by_node: dict[str, list[str]] = {}
    for device in usable_devices(costs):
        by_node.setdefault(device.node, []).append(device.name)
    units = [
        tuple(names[i : i + tensor])
        for names in by_node.values()
        for i in range(0, len(names) - tensor + 1, tensor)
    ]
    chance.shuffle(units)
    batch = costs.job.global_batch
    if not units:
        return None
    half = chance.randint(1, len(units) - 1) if len(units) > 1 and chance.random() < 0.3 else 0
    groups = [units[:half], units[half:]] if half else [units]
    shares = [batch * len(group) // len(units) or 1 for group in groups]
    shares[-1] = batch - sum(shares[:-1])
    lines = []
    for group, share in zip(groups, shares, strict=True):
        ends = sorted({len(group), *(i for i in range(1, len(group)) if chance.random() < 0.6)})
        stages = tuple(tuple(group[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True))
        rows = chance.choice(divisors(share)) if share else 0
        found = with_share(costs, stages, rows, share, "1f1b", float("inf")) if share else iter(())
        line = next(found, None)
        if line is None or not stages_of(line):
            return None
        lines.append(line)
    return "1f1b", tuple(lines)


def gap(seed: int) -> tuple[float, str] | None:
    """How much the plan of a case is above the oracle's, relatively, and the plan; None where
    neither finds one."""
    where = world(seed)
    try:
        plan = find_plan(*where)
    except FitError:
        plan = None
    best = oracle(where, seed, plan)
    if plan is None:
        return None if best == float("inf") else (float("inf"), "nothing fits")
    assert plan.prediction is not None
    return plan.prediction.step_seconds / min(
        best, plan.prediction.step_seconds
    ) - 1, describe_plan(plan)


def main() -> int:
    """Print every gap as it is found, then how they are distributed; 1 if one is too large."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--cases", type=int, default=100)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--worst", type=float, default=0.01)
    chosen = options.parse_args()
    gaps = []
    for seed in range(chosen.first, chosen.first + chosen.cases):
        began = time.process_time()
        found = gap(seed)
        if found is not None:
            gaps.append(found[0])
            spent = time.process_time() - began
            sys.stdout.write(f"{seed}: {found[0]:.3%} {found[1]} ({spent:.0f} s)\n")
            sys.stdout.flush()
    gaps.sort()
    shares = {at: gaps[int(at * (len(gaps) - 1))] for at in (0.5, 0.9, 0.95, 1.0)}
    text = ", ".join(f"{at:.0%} of them at most {value:.3%}" for at, value in shares.items())
    sys.stdout.write(f"{len(gaps)} cases: {text}\n")
    return int(gaps[-1] > chosen.worst)


if __name__ == "__main__":
    sys.exit(main())
