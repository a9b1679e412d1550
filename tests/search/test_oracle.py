"""Middle-sized inputs: plans against climbs from many random strategies."""

import importlib.util
import sys
from pathlib import Path

import pytest


def load(name):
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


oracle = load("oracle")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_plans_are_near_those_of_a_far_longer_search(seed):
    found = oracle.gap(seed)
    if found is not None:
        assert found[0] <= 0.01
