"""A search that is told to end at any moment ends at once, with a plan that holds or with an error.

Nothing here waits: the search is stopped when it looks up for the n-th time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from meshwright.cluster.spec import Cluster, Link
from meshwright.cost.memory import device_memory
from meshwright.cost.out_of_memory import memory_problems
from meshwright.errors import FitError, PlanError
from meshwright.plan.spec import Plan
from meshwright.plan.validate import validate_plan
from meshwright.program.check import check_program
from meshwright.program.compile import compile_plan
from meshwright.records import dumps
from meshwright.search import local_search
from meshwright.search.certificate import certificate
from meshwright.search.costs import costs_of
from meshwright.search.first_plan import plain_plan
from meshwright.search.incumbent import Incumbent
from meshwright.search.options import other_schedules
from meshwright.search.planner import INTERRUPTED, find_plan
from meshwright.simulate.symmetry import simulate_by_symmetry
from meshwright.stopping import Stopped, raise_if_stopped, stoppable
from soaks import portion, tenth
from worlds import cluster, device, job, model

NETWORK = Link(bandwidth=1e10, latency=1e-5)


def fleet(fast: int, slow: int) -> Cluster:
    """Nodes of four devices, more than are looked at one by one."""
    kinds = ["fast"] * fast + ["slow"] * slow
    return cluster(
        *((kind,) * 4 for kind in kinds),
        network=NETWORK,
        types=(device("fast", 30.0), device("slow", 10.0)),
        names=[f"n{i}" for i in range(fast + slow)],
    )


WORLDS = {
    "searched whole": (model([10.0] * 3), cluster(("fast", "slow")), job(4)),
    "climbed": (model([10.0] * 6, tied=True), cluster(("fast",) * 3, ("slow",) * 4), job(12)),
    "tensor ranks": (
        model([10.0] * 2, parameters=240_000_000),
        cluster(("fast",) * 4, ("fast",) * 4, types=(device("fast", 20.0, 2.0),)),
        job(8),
    ),
    "counted by class": (model([10.0] * 4, parameters=2_000_000), fleet(9, 8), job(16)),
    "nothing fits": (
        model([1.0] * 4, parameters=20_000_000_000),
        cluster(("fast",) * 4, ("fast",) * 3),
        job(8),
    ),
}


@pytest.fixture(autouse=True, scope="module")
def short_searches():
    """What is cut short here need not be long."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(local_search, "STEPS", (60_000, 2_000, 100_000))
        patched.setattr(other_schedules, "LISTED", 4_000)
        yield


@dataclass
class Asked:
    """Says yes from the n-th time on that it is asked."""

    n: float
    times: int = 0
    seconds: list[float] = field(default_factory=list)

    def stop(self) -> bool:
        self.times += 1
        return self.times >= self.n

    def tell(self, _what: str, _done: int, _of: int) -> None:
        self.times += 1


@cache
def uninterrupted(name: str) -> tuple[str, int]:
    """The plan of a world as text (empty: nothing fits), and how often its search looks up."""
    asked = Asked(float("inf"))
    try:
        return dumps(find_plan(*WORLDS[name], stop=asked.stop)), asked.times
    except FitError:
        return "", asked.times


def plan_of(name: str, **options) -> Plan | None:
    """The plan of a search that is stopped; None if it says that it had to end without one, or that
    there is none."""
    try:
        return find_plan(*WORLDS[name], **options)
    except PlanError as refusal:
        if refusal.problems[0].field != "interrupted":
            raise
    except FitError:
        if name != "nothing fits":
            raise
    return None


def check_stopped(name: str, n: int) -> None:
    graph, where, todo = WORLDS[name]
    asked = Asked(n)
    plan = plan_of(name, stop=asked.stop, found=asked.seconds.append)
    assert (plan is None) == (not asked.seconds)
    if plan is None:
        return
    said = plan.prediction
    validate_plan(plan, graph, where)
    check_program(compile_plan(plan, graph))
    assert said.memory == device_memory(plan, graph, where)
    assert not memory_problems(plan, graph, where)
    assert simulate_by_symmetry(plan, graph, where).step_seconds == said.step_seconds
    assert said.step_seconds == pytest.approx(min(asked.seconds), rel=2e-9)
    assert 0 < said.lower_bound_seconds <= said.step_seconds
    assert certificate(costs_of(graph, where, todo)).seconds <= said.step_seconds * (1 + 1e-9)
    assert said.bound_reason
    whole = uninterrupted(name)[0]
    assert said.dropped.get(INTERRUPTED) == 1 or f'"step_seconds": {said.step_seconds!r}' in whole
    assert all(other.reason for other in said.runners_up)


@pytest.mark.heavy
@pytest.mark.parametrize("name", [name for name in WORLDS if name != "nothing fits"])
@settings(max_examples=portion(15))
@given(share=st.floats(0, 1))
@example(share=0.0)
@example(share=1.0)
def test_whenever_a_search_is_stopped_what_it_says_is_so(name, share):
    looks = uninterrupted(name)[1]
    check_stopped(name, max(1, min(looks, round(looks**share))))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", WORLDS)
@settings(max_examples=tenth(60), database=None)
@given(data=st.data())
def test_whenever_a_search_is_stopped_what_it_says_is_so_at_many_moments(name, data):
    looks = uninterrupted(name)[1]
    check_stopped(name, data.draw(st.integers(1, looks)))


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["climbed", "counted by class"])
def test_a_search_stopped_at_what_it_tells_ends_with_a_plan_or_an_error(name):
    """The n-th thing that it tells is the last before it ends."""
    graph, where, todo = WORLDS[name]
    told = Asked(float("inf"))
    find_plan(graph, where, todo, progress=told.tell)
    every = told.times
    for n in {1, 2, 3, every // 4, every // 2, every - 1, every}:
        asked = Asked(float("inf"))

        def stop(asked: Asked = asked, n: int = n) -> bool:
            return asked.times >= n

        plan = plan_of(name, progress=asked.tell, stop=stop)
        if plan is not None:
            validate_plan(plan, graph, where)
            assert plan.prediction.lower_bound_seconds > 0


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["searched whole", "climbed", "counted by class"])
def test_a_search_that_is_asked_and_never_stopped_finds_what_it_always_finds(name):
    graph, where, todo = WORLDS[name]
    text, looks = uninterrupted(name)
    assert looks > 20
    assert dumps(find_plan(graph, where, todo)) == text


def test_where_nothing_fits_the_error_says_that_the_search_was_interrupted():
    graph, where, todo = WORLDS["nothing fits"]
    with pytest.raises(PlanError, match="search: interrupted: found no plan that fits so far"):
        find_plan(graph, where, todo, stop=Asked(5).stop)
    with pytest.raises(FitError):
        find_plan(graph, where, todo, stop=Asked(float("inf")).stop)


def test_more_time_never_gives_a_slower_plan():
    name = "climbed"
    looks = uninterrupted(name)[1]
    found = [
        find_plan(*WORLDS[name], stop=Asked(n).stop).prediction.step_seconds
        for n in (looks // 4, looks // 2, looks)
    ]
    assert all(later <= earlier for earlier, later in pairwise(found))


def test_a_very_large_cluster_has_a_plan_before_its_search_begins():
    graph, where, todo = WORLDS["counted by class"]
    incumbent = Incumbent(costs_of(graph, where, todo, recomputation=True), "")
    plain = plain_plan(incumbent)
    assert plain is not None
    validate_plan(plain.plan, graph, where)
    assert simulate_by_symmetry(plain.plan, graph, where).step_seconds == plain.seconds
    assert incumbent.best is None, "it takes no part in the incumbent"
    first = []
    find_plan(graph, where, todo, found=first.append)
    assert first[0] == plain.seconds
    assert first[-1] < plain.seconds


def test_a_plain_plan_takes_as_many_stages_as_the_model_needs():
    heavy = model([1.0] * 12, parameters=200_000_000)
    incumbent = Incumbent(costs_of(heavy, fleet(12, 12), job(96), recomputation=True), "")
    plain = plain_plan(incumbent)
    assert plain is not None
    assert len(plain.plan.pipelines[0].stages) > 1
    assert not memory_problems(plain.plan, heavy, fleet(12, 12))
    hopeless = model([1.0] * 12, parameters=200_000_000_000)
    assert plain_plan(Incumbent(costs_of(hopeless, fleet(12, 12), job(96)), "")) is None


def test_only_what_is_told_to_stop_stops():
    raise_if_stopped()
    with stoppable(lambda: False):
        raise_if_stopped()
        with pytest.raises(Stopped), stoppable(lambda: True):
            raise_if_stopped()
        raise_if_stopped()
    raise_if_stopped()
