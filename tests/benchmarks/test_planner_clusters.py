"""The clusters on which planning is timed, and the allowances that a longer search has more of."""

import importlib.util
import sys
from pathlib import Path

import pytest

from meshwright.cluster.spec import devices_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name):
    """A script, with those that it imports."""
    for each in (*NEEDED.get(name, ()), name):
        spec = importlib.util.spec_from_file_location(each, BENCHMARKS / f"{each}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[each] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


NEEDED = {"planner": ("growth", "planner_clusters")}
planner = load("planner")
clusters = sys.modules["planner_clusters"]


@pytest.mark.parametrize(
    ("kind", "devices"),
    [(kind, size) for kind, each in clusters.KINDS.items() for size in each.sizes],
)
def test_a_cluster_has_as_many_devices_as_its_size_says(kind, devices):
    assert len(devices_of(clusters.KINDS[kind].build(devices))) == devices


def test_four_types_are_allowed_twice_as_long_and_odd_sizes_what_the_next_one_is():
    assert planner.allowed_seconds("gpt2-xl", "mixed", 128) == 2.5
    assert planner.allowed_seconds("gpt2-xl", "four-types", 128) == 5.0
    assert planner.allowed_seconds("gpt2-xl", "four-types", 64) == 5.0
    assert planner.allowed_seconds("llama-2-70b", "one-type", 8000) == 11.0


def test_growth_is_the_ratio_of_the_two_largest_sizes():
    assert planner.growth_of({"m": [(16, 1.0), (1024, 2.0), (10240, 5.0)], "n": [(16, 1.0)]}) == {
        "m": 2.5
    }
