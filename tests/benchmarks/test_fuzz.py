"""The fuzzer's tenth, always the same one; and that it sees what it looks for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from test_resharding import load

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_tenth_of_all_mutations_is_taken_as_it_should_be() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "fuzz.py"), "--tenth", "--seed", "0"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed: {}" in done.stdout


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Plays a case; what was wrong with it."""
    module = load("fuzz")
    warm = module.warmed(tmp_path_factory.mktemp("fuzz"))

    def play(**case: object) -> list[str]:
        known = module.Case(
            index=1, kind="k", sort="s", arguments=(), change="", verdict="either", named=("",)
        )
        (ended,) = module.run(iter([replace(known, **case)]), warm, 1)
        return ended.failures

    return play


@pytest.mark.slow
def test_the_fuzzer_sees_what_it_looks_for(fuzz) -> None:
    explain = {"arguments": ("explain", "plan.json")}
    missing = {"arguments": ("explain", "none.json")}
    assert fuzz(**explain, verdict="accepted") == []
    assert fuzz(**missing, verdict="refused", named=("none.json",)) == []
    assert fuzz(**explain, verdict="refused") == ["nonsense accepted"]
    assert fuzz(**missing, verdict="accepted", named=("none.json",)) == ["ordinary refused"]
    assert fuzz(**missing, named=("another.json",)) == ["nothing named"]
    assert fuzz(**explain, seconds=0.0) == ["hang"]
    assert fuzz(arguments=("@nothing",)) == ["traceback"]


def test_every_kind_of_file_and_every_option_is_spoiled_in_every_way() -> None:
    cases, world = load("fuzz_cases"), load("fuzz_world")
    assert len(cases.strata()) > 1500
    assert len(world.KINDS) == len({kind.path for kind in world.KINDS}) > 15
