"""Settings that every test shares, and a check that tests which start processes are marked so."""

import gc
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

HEALTH = [HealthCheck.too_slow]
settings.register_profile(
    "meshwright", deadline=None, suppress_health_check=HEALTH, derandomize=True
)
settings.register_profile("quick", settings.get_profile("meshwright"), max_examples=30)
settings.register_profile("hunt", deadline=None, suppress_health_check=HEALTH)
settings.load_profile("meshwright")
"""The same cases every time, of which `make check` tries three tenths; new ones:
make test ARGS="--hypothesis-profile=hunt"."""

HEAVY_ROOMS = ("launch", "runtime", "testbed")
"""Their tests train, or start and end processes, nearly all of them."""
before = pytest.StashKey[tuple[frozenset[str], int]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of the rooms that start processes."""
    for item in items:
        if item.path.parent.name in HEAVY_ROOMS:
            item.add_marker(pytest.mark.heavy)


def pytest_collection_finish() -> None:
    """Spares the garbage collector what was imported: much of it is large, and all of it stays."""
    gc.freeze()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Remembers which processes ran before the test and its fixtures, and what ended ones did."""
    item.stash[before] = _children(), _work_of_ended_children()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Fails a test that starts a process without being marked: `make check` would run it."""
    known, work = item.stash[before]
    now = _children()
    result = yield
    # A pool that another test left running may end during this one; that is no start.
    if now - known or (now == known and _work_of_ended_children() != work):
        marked = any(item.get_closest_marker(name) for name in ("slow", "heavy"))
        assert marked, "this test starts a process: mark it with pytest.mark.heavy"
    return result


def _children() -> frozenset[str]:
    """Process numbers of the children that run now."""
    lists = Path("/proc/self/task").glob("*/children")
    return frozenset(pid for each in lists for pid in each.read_text().split())


def _work_of_ended_children() -> int:
    """Pages that they touched: more as soon as one more has ended, whatever it did."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
