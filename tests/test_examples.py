"""The examples run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RENT = ROOT / "examples" / "rent.py"
TRAINING = sorted({*(ROOT / "examples").glob("*.py")} - {RENT})


def _run(path: Path, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)
def test_an_example_trains(path: Path, tmp_path: Path) -> None:
    losses = [float(found) for found in re.findall(r"loss (\d+\.\d+)", _run(path, tmp_path))]
    assert len(losses) == 50
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_the_example_of_renting_keeps_its_limits(tmp_path: Path) -> None:
    cheapest, bounded, quick = _run(RENT, tmp_path).split("== ")[1:]
    assert all(answer.count("<- best") == 1 for answer in (cheapest, bounded, quick))
    rented = [re.search(r"([\d,]+) +([\d.]+) +[\d.]+ +<- best", each) for each in (bounded, quick)]
    assert all(rented)
    assert float(rented[0][2]) <= 8  # type: ignore[index]
    assert int(rented[1][1].replace(",", "")) >= 50_000  # type: ignore[index]


def test_an_example_of_adapters_says_what_is_trained() -> None:
    """Its own numbers, by hand: two maps of rank 8 in each of three blocks."""
    source = (ROOT / "examples" / "lora.py").read_text(encoding="utf-8")
    scope: dict[str, object] = {"__name__": "example"}
    exec(source.split("\nplan = ")[0], scope)
    graph = scope["graph"]
    assert sum(x.parameters for x in graph.layers) == 3 * 2 * 8 * (256 + 512)  # type: ignore[attr-defined]
