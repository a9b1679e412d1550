"""The clusters on which planning is timed."""

import sys
from pathlib import Path

import pytest

from meshwright.cluster.spec import devices_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import planner
    import planner_clusters as clusters
finally:
    sys.path.remove(str(BENCHMARKS))


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
