"""The restricted searches of the benchmark give legal plans of their own spaces."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import worlds
from meshwright.cost.memory import device_memory, total_bytes
from meshwright.plan.validate import validate_plan
from meshwright.search.costs import costs_of
from meshwright.search.planner import find_plan

CLUSTER = worlds.cluster(("fast", "fast"), ("slow", "slow"))
MODEL = worlds.model([10.0, 40.0, 5.0, 10.0, 20.0, 10.0])


def load(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


load("rival_zones")
searches = load("rival_searches")
by_metis, by_sailor = load("rival_metis"), load("rival_sailor")
by_harp, by_zorse = load("rival_harp"), load("rival_zorse")
RIVALS = {
    "metis": by_metis.metis,
    "sailor": by_sailor.sailor,
    "harp": by_harp.harp,
    "zorse": by_zorse.zorse,
}


@pytest.mark.parametrize("name", RIVALS)
def test_plans_are_legal_whole_and_never_faster_than_the_exhaustive_search(name):
    job = worlds.job(8)
    found = RIVALS[name](costs_of(MODEL, CLUSTER, job))
    validate_plan(found.plan, MODEL, CLUSTER)
    (pipeline,) = found.plan.pipelines
    assert pipeline.stages[0].layers[0] == 0
    assert pipeline.stages[-1].layers[1] == len(MODEL.layers)
    assert all(total_bytes(m) <= m.capacity for m in device_memory(found.plan, MODEL, CLUSTER))
    best = find_plan(MODEL, CLUSTER, job).prediction.step_seconds
    assert found.seconds >= best * (1 - 1e-9)


def test_each_keeps_to_its_space():
    costs = costs_of(MODEL, CLUSTER, worlds.job(8))
    wide, narrow = by_metis.metis(costs).plan, by_sailor.sailor(costs).plan
    assert len(wide.devices) == 4
    widths = {len(stage.devices) for stage in narrow.pipelines[0].stages}
    assert len(widths) == 1
    assert all(stage.rows is None for stage in narrow.pipelines[0].stages)


def test_a_draft_is_bounded_from_below():
    costs = costs_of(MODEL, CLUSTER, worlds.job(8))
    zones = by_sailor.zones_of(costs, {"fast": 1, "slow": 1})
    checked = 0
    for draft in by_sailor.sailor_drafts(costs, tuple(zones)):
        for seconds, _ in searches._cut(costs, [draft]):
            assert draft.bound <= seconds * (1 + 1e-9)
            checked += 1
    assert checked > 30


def test_groups_add_up_and_are_powers_of_two_or_equal():
    for groups in by_metis.group_sizes(12, 6):
        assert sum(groups) == 12
        powers = all(size & (size - 1) == 0 for size in groups)
        assert powers or len(set(groups)) == 1
    assert (8, 4) in set(by_metis.group_sizes(12, 6))
    assert (4, 8) in set(by_metis.group_sizes(12, 6))


def test_nothing_is_found_where_nothing_fits():
    heavy = worlds.model([1.0] * 3, parameters=3_000_000_000)
    costs = costs_of(heavy, CLUSTER, worlds.job(8))
    assert by_metis.metis(costs) is None
    assert by_sailor.sailor(costs) is None
    assert by_harp.harp(costs) is None
    assert by_zorse.zorse(costs) is None


def test_groups_of_well_joined_devices_keep_nodes_together():
    costs = costs_of(MODEL, CLUSTER, worlds.job(8))
    groups = list(by_zorse.bandwidth_groups(costs))
    assert [len(each) for each in groups] == [4, 3, 2, 1]
    assert {frozenset(group) for group in groups[2]} == {
        frozenset({"a:0", "a:1"}),
        frozenset({"b:0", "b:1"}),
    }


def test_more_micro_batches_ahead_win_behind_a_slow_link():
    """Where transfers take about as long as a stage, eager 1F1B hides them and 1F1B does not."""
    slow = worlds.Link(bandwidth=2e7, latency=1e-4)
    where = worlds.cluster(("fast",), ("slow",), network=slow)
    costs = costs_of(MODEL, where, worlds.job(8))
    assert by_harp.harp(costs).plan.schedule == "eager-1f1b"
