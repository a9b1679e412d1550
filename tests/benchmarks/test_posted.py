"""The list of posted measurements: every run says where it was read, and is priced if its device is
known."""

from __future__ import annotations

import csv
import sys
import tomllib
from pathlib import Path

import pytest

from meshwright.recorded.files import COLUMNS, read_runs
from meshwright.recorded.price import machines_of, predicted_seconds, prepare
from meshwright.recorded.spec import step_seconds_of
from meshwright.recorded.validate import device_problems

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import posted
finally:
    sys.path.remove(str(BENCHMARKS))

PATH = posted.FOLDER / "runs.csv"
RUNS = read_runs(PATH)
SOURCES = tomllib.loads((posted.FOLDER / "sources.toml").read_text(encoding="utf-8"))


def test_every_run_says_where_it_was_read_and_what_is_assumed() -> None:
    assert len(RUNS) >= 60
    assert {run.source for run in RUNS} == set(SOURCES)
    assert len(SOURCES) >= 12
    assert all(
        each["title"] and each["address"].startswith("https://") for each in SOURCES.values()
    )
    assert all(run.assumptions for run in RUNS)
    with PATH.open(encoding="utf-8", newline="") as file:
        assert set(next(csv.reader(file))) <= set(COLUMNS)


def test_no_posted_figure_is_impossible_on_its_device() -> None:
    machines = machines_of()
    known = [run for run in RUNS if run.device in machines]
    assert len(known) > 0.9 * len(RUNS)
    for run in known:
        assert not list(device_problems(run, machines[run.device].type, run.run))


def test_figures_count_errors_of_both_signs() -> None:
    found = posted.figures([-0.5, 0.1, 0.2, 0.3])
    assert found["median_relative_error"] == pytest.approx(0.25)
    assert found["median_signed_error"] == pytest.approx(0.15)
    assert found["share_beyond_35_percent"] == 0.25
    assert posted.figures([]) == {"runs": 0}


def test_a_run_is_priced_or_says_why_not(capsys) -> None:
    machines = machines_of()
    run = next(each for each in RUNS if each.run == "flash-gpt3-125m")
    row = posted.priced(run, machines)
    assert row.seconds == predicted_seconds(prepare(run, machines))
    assert row.step_error == row.seconds / step_seconds_of(run) - 1
    del machines[run.device]
    strange = posted.priced(run, machines)
    assert strange.note == "device: A100-80"
    posted.show([row, strange])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[3].count("device: A100-80") == 2
