"""Settings that every test shares, and a check that tests which start processes are marked so."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

HEALTH = [HealthCheck.too_slow]
settings.register_profile(
    "meshwright", deadline=None, suppress_health_check=HEALTH, derandomize=True
)
settings.register_profile("hunt", deadline=None, suppress_health_check=HEALTH)
settings.load_profile("meshwright")
"""The same cases every time; new ones: make test ARGS="--hypothesis-profile=hunt"."""

HEAVY_ROOMS = ("launch", "runtime", "testbed")
"""Their tests train, or start and end processes, nearly all of them."""
before = pytest.StashKey[int]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of the rooms that start processes."""
    for item in items:
        if item.path.parent.name in HEAVY_ROOMS:
            item.add_marker(pytest.mark.heavy)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Remembers what children had done before the test and its fixtures."""
    item.stash[before] = _work_of_ended_children()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Fails a test that starts a process without being marked: `make check` would run it."""
    children = any(each.read_text() for each in Path("/proc/self/task").glob("*/children"))
    result = yield
    if children or _work_of_ended_children() != item.stash[before]:
        marked = any(item.get_closest_marker(name) for name in ("slow", "heavy"))
        assert marked, "this test starts a process: mark it with pytest.mark.heavy"
    return result


def _work_of_ended_children() -> int:
    """Pages that they touched: more as soon as one more has ended, whatever it did."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
