"""Nothing in planning grows faster than the cluster.

Calls are counted on clusters of 256 and of 1,024 devices. A function that is called for every pair
of devices is called sixteen times as often on the larger one.
"""

import cProfile
import pstats
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.plan.spec import Job
from meshwright.search.planner import find_plan
from worlds import model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    from planner_clusters import KINDS
finally:
    sys.path.remove(str(BENCHMARKS))

FEWER, MORE = 256, 1024
GROWS = 1.5 * MORE / FEWER
"""Calls on the larger cluster over those on the smaller, at most: proportional, and some more since
other plans are chosen."""

FOR_EACH = 150
"""Calls for each device up to which a function may be called as often as it likes: list schedules
have a fixed allowance that small clusters do not use up."""

GRAPH = replace(model([100.0] * 8, parameters=20_000_000, units=8), precision="fp16")


def calls(kind, devices):
    """How often each function of ours is called while a cluster is planned."""
    cluster = KINDS[kind].build(devices)
    job = Job(global_batch=2 * devices, sequence=GRAPH.sequence, precision="fp16")
    profiler = cProfile.Profile()
    profiler.runcall(find_plan, GRAPH, cluster, job)
    found = Counter()
    for (path, line, name), (_, count, *_) in pstats.Stats(profiler).stats.items():
        if "meshwright" in path:
            found[f"{Path(path).name}:{line} {name}"] += count
    return found


def too_many(before, after, devices):
    """The functions whose calls grow faster than the cluster."""
    return {
        name: (before[name], count)
        for name, count in after.items()
        if count > FOR_EACH * devices and count > GROWS * before[name]
    }


def check_growth(kind):
    assert not too_many(calls(kind, FEWER), calls(kind, MORE), MORE)


@pytest.mark.heavy
@pytest.mark.timeout(300)
def test_no_calls_grow_faster_than_a_cluster_of_single_devices():
    check_growth("single-devices")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["one-type", "mixed", "cabled-pairs"])
def test_no_calls_grow_faster_than_clusters_of_nodes(kind):
    check_growth(kind)


def test_calls_for_every_pair_of_devices_are_noticed():
    pairs = too_many(Counter(f=FEWER**2 // 2), Counter(f=MORE**2 // 2), MORE)
    assert pairs == {"f": (FEWER**2 // 2, MORE**2 // 2)}
    assert not too_many(Counter(f=200 * FEWER), Counter(f=200 * MORE), MORE)
