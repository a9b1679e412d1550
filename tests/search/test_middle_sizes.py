"""Better hardware and larger batches on clusters of 8 to 32 devices, where no space is searched
whole.

benchmarks/monotone.py makes the worlds and the changes, and compares; here a few of them are held.
"""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import monotone
finally:
    sys.path.remove(str(BENCHMARKS))

SLACK = {
    "twice-batch": 0.05,
    "faster-device": 0.05,
    "more-memory": 0.25,
    "faster-link": 0.06,
    "more-devices": 0.12,
}
"""Share by which each change may make a plan slower. Of 150 pairs 15 are slower at all, by as much
as 20 %: what a search does not find on one cluster it may find on a worse one."""

SEEDS = (0, 5, 10)
"""The first two are the worst of these."""


@pytest.fixture(scope="module")
def plain():
    """The worlds of these numbers with their plans, each planned once."""
    known = {}

    def planned(seed):
        if seed not in known:
            ((found, world),) = monotone.worlds(seed, 1)
            assert found == seed, "a world of middle size"
            known[seed] = world, monotone.planned(world)
        return known[seed]

    return planned


@pytest.mark.slow
@pytest.mark.parametrize("change", monotone.CHANGES)
@pytest.mark.parametrize("seed", SEEDS)
def test_better_hardware_or_a_larger_batch_never_gives_a_much_slower_plan(plain, seed, change):
    world, plan = plain(seed)
    changed = monotone.CHANGES[change](world, monotone.Random(seed))
    pair = monotone.compared(seed, change, world, changed, plan, monotone.planned(changed))
    assert pair.slower <= SLACK[change]


@pytest.mark.slow
def test_a_plan_carried_to_its_own_world_takes_as_long(plain):
    world, plan = plain(SEEDS[0])
    assert monotone.carried(plan, world) == pytest.approx(plan.prediction.step_seconds, rel=1e-9)
