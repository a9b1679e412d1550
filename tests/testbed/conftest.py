"""Which of the testbed's abilities this machine has, and a claim that nothing of it stays."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshwright.testbed.capabilities import Capabilities, probe_capabilities
from meshwright.testbed.cleanup import existing_namespaces


@pytest.fixture(scope="session")
def able() -> Capabilities:
    return probe_capabilities(f"mw-probe{os.getpid()}")


@pytest.fixture
def namespaces(able: Capabilities) -> Iterator[None]:
    """Only where there can be any; the machine has the same ones afterwards.

    Namespaces belong to the whole machine, so one test at a time makes them: what another worker's
    test has up would look left behind.
    """
    if not able.namespaces:
        pytest.skip(able.missing["namespaces and link rates"])
    lock = Path(tempfile.gettempdir()) / f"meshwright-tests-{os.getuid()}.lock"
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = existing_namespaces()
        yield
        left = {name for name in existing_namespaces() - before if name.startswith("mw-")}
        assert not left, "left behind"
