"""Training runs that others posted in papers, repositories, issues and blogs, against our
predictions without any fit or profile.

    python benchmarks/posted.py [--runs FILE] [--json OUT] [--plain]

posted/runs.csv lists the runs and posted/sources.toml where each was read. The list was committed
before anything of it was predicted. Each run is priced with the constants of its framework
(`cost/runtimes.py`); with --plain, as a plain PyTorch loop. Every run is shown; one whose device
type the catalogue lacks is counted as not priced.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scores import write

from meshwright.errors import MeshwrightError
from meshwright.recorded.files import read_runs
from meshwright.recorded.price import (
    Machines,
    machines_of,
    predicted_bytes,
    predicted_seconds,
    prepare,
)
from meshwright.recorded.spec import RecordedRun, step_seconds_of

FOLDER = Path(__file__).parent / "posted"
FAR = 0.35
"""Relative error beyond which a run must be explained."""
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Row:
    """One run, predicted; None where nothing was measured or could be priced."""

    run: RecordedRun
    seconds: float | None = None
    measured_seconds: float | None = None
    bytes: float | None = None
    note: str = ""

    @property
    def step_error(self) -> float | None:
        """Signed relative error of the step."""
        if self.seconds is None or self.measured_seconds is None:
            return None
        return self.seconds / self.measured_seconds - 1

    @property
    def memory_error(self) -> float | None:
        """Signed relative error of the memory."""
        if self.bytes is None or self.run.memory is None:
            return None
        return self.bytes / self.run.memory - 1


def priced(run: RecordedRun, machines: dict[str, Machines]) -> Row:
    """The run with its prediction."""
    try:
        ready = prepare(run, machines)
        seconds = predicted_seconds(ready)
        return Row(run, seconds, step_seconds_of(run), predicted_bytes(ready))
    except MeshwrightError as failure:
        return Row(run, note=failure.problems[0].field + ": " + failure.problems[0].found)


def _cell(error: float | None) -> str:
    if error is None:
        return ""
    return f"**{error:+.0%}**" if abs(error) > FAR else f"{error:+.0%}"


def show(rows: Sequence[Row]) -> None:
    """Print every run as a row of a table."""
    print(
        "| run | devices | dp x tp x pp | measured s | predicted s | | memory GiB | predicted | |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        run, seconds, size = row.run, row.measured_seconds, row.run.memory
        layout = f"{run.data} x {run.tensor} x {run.stages}"
        times = [f"{x:.4g}" if x is not None else row.note for x in (seconds, row.seconds)]
        held = [f"{x / GIB:.1f}" if x and size else "" for x in (size, row.bytes)]
        cells = [run.run, f"{run.devices} {run.device}", layout, *times, _cell(row.step_error)]
        print("| " + " | ".join([*cells, *held, _cell(row.memory_error)]) + " |")


def figures(errors: Sequence[float]) -> dict[str, float]:
    """Number of runs, median error, bias and share of far ones."""
    found = np.array(errors)
    if not len(found):
        return {"runs": 0}
    return {
        "runs": len(found),
        "median_relative_error": float(np.median(abs(found))),
        "median_signed_error": float(np.median(found)),
        "share_beyond_35_percent": float((abs(found) > FAR).mean()),
    }


def _line(name: str, steps: dict[str, float], memory: dict[str, float]) -> str:
    cells = [name]
    for each in (steps, memory):
        cells.append(f"{each['runs']:.0f}")
        if each["runs"]:
            cells += [f"{each['median_relative_error']:.1%}", f"{each['median_signed_error']:+.1%}"]
            cells.append(f"{each['share_beyond_35_percent']:.0%}")
        else:
            cells += ["", "", ""]
    return "| " + " | ".join(cells) + " |"


def errors_of(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """The errors of steps, and those of memory."""
    steps = [row.step_error for row in rows if row.step_error is not None]
    return steps, [row.memory_error for row in rows if row.memory_error is not None]


def main() -> int:
    """Print all runs, and the figures of each source and of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=Path, default=FOLDER / "runs.csv")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plain", action="store_true", help="every framework as a plain loop")
    chosen = parser.parse_args()
    machines = machines_of()
    runs = read_runs(chosen.runs)
    if chosen.plain:
        runs = tuple(replace(run, framework="meshwright") for run in runs)
    rows = [priced(run, machines) for run in runs]
    show(rows)
    known = tomllib.loads((FOLDER / "sources.toml").read_text(encoding="utf-8"))
    groups = {"all": rows}
    for row in rows:
        groups.setdefault(row.run.source, []).append(row)
    print("\n| source | steps | median error | bias | beyond 35 % ", end="")
    print("| memories | median error | bias | beyond 35 % |\n|---|---|---|---|---|---|---|---|---|")
    result: dict[str, object] = {}
    for name, own in groups.items():
        steps, memory = map(figures, errors_of(own))
        result[name] = {"step": steps, "memory": memory}
        print(_line(name, steps, memory))
    result["not_priced"] = [row.run.run for row in rows if row.note]
    print(f"\nnot priced: {result['not_priced']}\n")
    for name in (each for each in groups if each in known):
        print(f"- {name}: {known[name]['title']}. {known[name]['address']}")
    write(chosen.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
